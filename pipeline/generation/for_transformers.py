"""Self-speculative decoding for `generate` of transformers, as a callable: no code lies in the model's folder.

    model = AutoModelForCausalLM.from_pretrained(DIR)
    model.generate(**inputs, max_new_tokens=64, custom_generate=self_speculative(DIR))

The tokens are those of `model.generate` without it. The model of transformers only says device, dtype and settings; what runs
is the same model of this package, which has the drafting heads and is in memory beside it.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.generation.decoding import decode
from pipeline.generation.sampling import Sampling
from pipeline.model.mtp import MTPModel
from pipeline.saved_model import find_model

# What transformers makes of `temperature` and `top_p`, which are computed here.
_COMPUTED = ("TemperatureLogitsWarper", "TopPLogitsWarper", "InfNanRemoveLogitsProcessor")
_STOPS = ("MaxLengthCriteria", "EosTokenCriteria")


class SelfSpeculative:
    """Decodes by the model in a folder (any MODEL of the commands), instead of transformers' own loop.

    Raises:
        ValueError: the folder holds no model with drafting heads; or, when it is called, settings of the generation mean
            something that is not computed here.
    """

    def __init__(self, directory: Path | str):
        self.source = find_model(Path(directory))
        self.num_drafts = self.source.settings.num_prediction_heads - 1
        if not self.num_drafts:
            raise ValueError(f"{directory}: has head 0 alone, and no head that could draft")
        self._model: MTPModel | None = None

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_inputs: Any,
    ) -> Tensor:
        """Continue rows of ids, padded on the left; returns prompts and completions, int64 [B, longest].

        model_inputs: of which `attention_mask` is used. As a parameter of its own transformers would pass it twice.
        """
        _check(logits_processor, stopping_criteria, generation_config)
        own = self._built(model.device, model.dtype)
        mask = model_inputs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        prompts = [ids[of_row.bool()].tolist() for ids, of_row in zip(input_ids, mask, strict=True)]

        limit, ends = generation_config.max_length - input_ids.shape[1], generation_config.eos_token_id
        stop_ids = frozenset([] if ends is None else ends if isinstance(ends, list) else [ends])
        sampling = Sampling()
        if generation_config.do_sample:
            sampling = Sampling(_given(generation_config.temperature), _given(generation_config.top_p))
        seed = int(torch.randint(2**31, ()))
        completions, _counts = decode(own, prompts, [limit] * len(prompts), stop_ids, sampling, self.num_drafts, seed)

        # Shorter rows end with padding, as transformers has it.
        padding = generation_config.pad_token_id or 0
        longest = max(len(completion.token_ids) for completion in completions)
        added = [each.token_ids + [padding] * (longest - len(each.token_ids)) for each in completions]
        return torch.cat([input_ids, torch.tensor(added, device=input_ids.device)], dim=1)

    def _built(self, device: torch.device, dtype: torch.dtype) -> MTPModel:
        if self._model is None or (self._model.embed.weight.device, self._model.embed.weight.dtype) != (device, dtype):
            self._model = self.source.build(device, dtype)
        return self._model


def _given(value: float | None) -> float:
    return 1.0 if value is None else value


def _check(logits_processor: Any, stopping_criteria: Any, generation_config: Any) -> None:
    """Refuse what would be left out."""
    for known, found in ((_COMPUTED, logits_processor), (_STOPS, stopping_criteria)):
        others = [type(each).__name__ for each in found if type(each).__name__ not in known]
        if others:
            remedy = "; pass top_k=0" if "TopKLogitsWarper" in others else ""
            raise ValueError(f"self-speculative decoding does not compute {', '.join(others)}{remedy}")
    if (generation_config.num_return_sequences or 1) > 1:
        raise ValueError("self-speculative decoding returns one sequence a prompt; repeat the prompt instead")
