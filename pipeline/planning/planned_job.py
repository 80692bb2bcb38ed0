"""The job whose memory is planned, and the sizes that the plan is computed from."""

from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch

from pipeline.config import ModelSettings, Settings
from pipeline.model.mtp import MTPModel
from pipeline.runtime.deepspeed_json import RECIPE_OWNS, precision_of, resolve_deepspeed_json
from pipeline.runtime.engine import JSON_SECTIONS

FLOAT32 = 4
"""Bytes per value of master weights, optimizer states, accumulated gradients and losses, whatever dtype the models run in."""


@dataclass(frozen=True)
class PlannedJob:
    """A resolved job on a number of ranks.

    settings: with vocab_size set.
    config: the resolved DeepSpeed configuration.
    on_gpu: True for GPU kernels and memory; on a CPU device and host memory are the same.
    reference: the shape of the live reference model, None without one.
    sharding: `replicate` or `zero3`, the reference's.
    """

    settings: Settings
    config: dict[str, Any]
    num_ranks: int
    on_gpu: bool
    reference: ModelSettings | None
    sharding: str

    @cached_property
    def zero(self) -> Any:
        """The zero_optimization section as DeepSpeed's own model, with its defaults filled in."""
        return JSON_SECTIONS["zero_optimization"].model_validate(self.config["zero_optimization"])

    @property
    def stage(self) -> int:
        return int(self.zero.stage)

    @property
    def offloads_optimizer(self) -> bool:
        return _on_host(self.zero.offload_optimizer)

    @property
    def offloads_parameters(self) -> bool:
        return _on_host(self.zero.offload_param)

    @property
    def dtype_bytes(self) -> int:
        """Bytes per weight or activation in the models' dtype."""
        return 2 if precision_of(self.config) == "bfloat16" else 4

    @property
    def num_tokens(self) -> int:
        return self.settings.data.rows_per_rank * self.settings.data.sequence_length

    @property
    def micro_steps(self) -> int:
        return int(self.config["gradient_accumulation_steps"])

    @property
    def vocab_size(self) -> int:
        assert self.settings.model.vocab_size is not None
        return self.settings.model.vocab_size

    @cached_property
    def parameter_sizes(self) -> list[int]:
        """Number of values of each of the policy's parameters."""
        return parameter_sizes(self.settings.model)

    @cached_property
    def largest_gathered_module(self) -> int:
        """Number of values of the largest module that ZeRO-3 gathers at once: a block, or the embedding."""
        # One more head is one more block.
        model = self.settings.model
        one_head_more = model.model_copy(update={"num_prediction_heads": model.num_prediction_heads + 1})
        return max(sum(parameter_sizes(one_head_more)) - self.num_parameters, self.embedding_size)

    @cached_property
    def num_parameters(self) -> int:
        """Number of the policy's parameters."""
        return sum(self.parameter_sizes)

    @cached_property
    def num_matrix_parameters(self) -> int:
        """Number of the policy's parameters in matrices, one of the two groups of `parameters.parameter_groups`."""
        return sum(parameter_sizes(self.settings.model, matrices_alone=True))

    @property
    def num_local_parameters(self) -> int:
        """Number of the policy's parameters that one rank owns under ZeRO.

        Stage 3 cuts each parameter evenly and pads it (`partition_parameters.py`, _partition_numel). Stages 1 and 2 cut a flat
        list, which is the same but for the padding.
        """
        return sum(-(-size // self.num_ranks) for size in self.parameter_sizes)

    @property
    def embedding_size(self) -> int:
        """Number of values of the embedding matrix, which is that of the unembedding: V * D."""
        return self.vocab_size * self.settings.model.dim

    def changed(
        self, sections: dict[str, Any] | None = None, zero: dict[str, Any] | None = None, **others: Any
    ) -> "PlannedJob":
        """A copy with other settings (`sections`), other values in the JSON's zero_optimization, or other fields."""
        settings, ranks = self.settings.with_values(**(sections or {})), others.get("num_ranks", self.num_ranks)
        content = {key: value for key, value in self.config.items() if key not in RECIPE_OWNS}
        content["zero_optimization"] = content["zero_optimization"] | (zero or {})
        return replace(self, settings=settings, config=resolve_deepspeed_json(content, settings, ranks), **others)


@cache
def parameter_sizes(shape: ModelSettings, matrices_alone: bool = False) -> list[int]:
    """Number of values of each parameter, or of each matrix, of a model of this shape."""
    with torch.device("meta"):
        parameters = MTPModel(shape).parameters()
        return [parameter.numel() for parameter in parameters if parameter.ndim > 1 or not matrices_alone]


def _on_host(offload: Any) -> bool:
    return offload is not None and str(getattr(offload.device, "value", offload.device)) == "cpu"
