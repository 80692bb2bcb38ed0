"""Validate and resolve the DeepSpeed JSON, which holds ZeRO, precision and communication and nothing else.

The recipe owns batch sizes, learning rate and clipping; a JSON that also sets one of them is refused with both values.
Unknown keys are refused, because DeepSpeed silently ignores a misspelt one. 'auto' is a convention of Hugging Face's
integration that DeepSpeed itself does not know, so it is resolved here.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from pipeline.config import Settings, did_you_mean
from pipeline.runtime.engine import JSON_SECTIONS, PERSISTENCE_THRESHOLD
from pipeline.runtime.parameters import gathered_block_size
from pipeline.setting_types import rule_of

_ALLOWED_KEYS = {
    "zero_optimization", "bf16", "communication_data_type", "data_types", "comms_logger",
}  # fmt: skip
RECIPE_OWNS = {
    "train_batch_size": "data.global_batch",
    "train_micro_batch_size_per_gpu": "data.micro_batch",
    "gradient_accumulation_steps": "data.global_batch",
    "gradient_clipping": "training.gradient_clipping",
    "optimizer": "training.learning_rate",
    "scheduler": "training.schedule",
}
RANKS_OF_A_NODE = 8
"""The ranks of a node where nobody says how many there are: the GPUs of most machines that have several."""
_HPZ = "zero_hpz_partition_size"
_DTYPE_KEYS = ("communication_data_type", "data_types.grad_accum_dtype")
_DTYPES = ("fp32", "bf16", "fp16")
_REFUSED = {
    "fp16": "train in bf16 or float32: fp16's loss scaling would change which steps are applied",
    "compile": "DeepCompile compiles a whole model, and the selection's collectives lie within one's forward; remove the key "
    "(training.compile compiles the functions that gain by it)",
}


def read_deepspeed_json(path: Path, settings: Settings) -> tuple[dict[str, Any], list[str]]:
    """Read the JSON; return its content and a list of problems, one sentence each (empty if it is valid)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_reject_duplicates)
    except FileNotFoundError:
        return {}, [f"--deepspeed: no such file: {path}"]
    except IsADirectoryError:
        return {}, [f"--deepspeed: expected a JSON file, and this is a folder: {path}; one is ds_configs/zero3.json"]
    except OSError as error:
        return {}, [f"--deepspeed: {path} cannot be read: {error.strerror}"]
    except RecursionError:
        return {}, [f"--deepspeed: {path} is not valid JSON: it is nested too deeply"]
    except ValueError as error:
        return {}, [f"--deepspeed: {path} is not valid JSON: {error}"]
    if not isinstance(content, dict):
        return {}, [f"--deepspeed: {path}: expected a JSON object"]

    problems = [problem for key, value in content.items() for problem in _key_problems(key, value, settings)]
    for section, model in JSON_SECTIONS.items():
        problems += _section_problems(section, model, content.get(section, {}))
    problems += _precision_problems(content) + _zero_problems(content.get("zero_optimization", {}))

    # A gradient that is not finite must be noticed, and nothing may stay 'auto' that is not resolved below.
    bf16 = content.get("bf16", {})
    if isinstance(bf16, dict) and bf16.get("check_grad_overflow", True) is not True:
        problems.append("deepspeed bf16.check_grad_overflow: a gradient that is not finite must be seen; remove the key")
    problems += [
        f"deepspeed {key}: 'auto' is not resolved here; write a value or leave the key out"
        for key in _auto_keys(content)
        if key not in _AUTO_VALUES and key not in RECIPE_OWNS
    ]
    return content, problems


def with_nodes_of(content: dict[str, Any], node_ranks: int, world_size: int) -> dict[str, Any]:
    """Return the content with hpZ's `auto` resolved for nodes of so many ranks, 1 where nodes differ, which turns hpZ off."""
    zero = content.get("zero_optimization", {})
    if zero.get(_HPZ) != "auto":
        return content
    return content | {"zero_optimization": zero | {_HPZ: _partitions_of_a_node(world_size, node_ranks)}}


def resolve_deepspeed_json(content: dict[str, Any], settings: Settings, world_size: int) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`: 'auto' resolved, the recipe's batch sizes and clipping filled in.

    hpZ's `auto` that `with_nodes_of` has not resolved means nodes of `RANKS_OF_A_NODE`.
    """
    batch, micro_batch = settings.data.global_batch, settings.data.rows_per_rank

    # DeepSpeed's default is to reduce and accumulate gradients in bf16.
    exact = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    resolved = exact | {key: value for key, value in content.items() if key not in RECIPE_OWNS}
    for dotted in _auto_keys(resolved):
        section, key = dotted.split(".")
        resolved[section] = resolved[section] | {key: _AUTO_VALUES[dotted](settings, resolved[section], world_size)}
    if resolved.get("zero_optimization", {}).get("offload_optimizer"):
        # With an offloaded optimizer DeepSpeed insists on its own CPU Adam, which it compiles at first use (minutes, needs a
        # compiler). torch's fused AdamW runs on a CPU as well.
        resolved["zero_force_ds_cpu_optimizer"] = False

    # Gradient clipping is written out even when it is off, because DeepSpeed's default is 1.0.
    return resolved | {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": batch // (micro_batch * world_size),
        "gradient_clipping": settings.training.gradient_clipping or 0.0,
        "steps_per_print": None,
        # On by default; it synchronises with the device twice per micro-step, only to print a speed.
        "timers": {"throughput": {"enabled": False}},
    }


def precision_of(config: dict[str, Any]) -> str:
    """The dtype that models run in under a resolved configuration: `bfloat16` or `float32`."""
    return "bfloat16" if config.get("bf16", {}).get("enabled") else "float32"


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that is given twice, of which the JSON parser would silently keep the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{', '.join(sorted({repr(key) for key in keys if keys.count(key) > 1}))} given twice")
    return content


def _key_problems(key: str, value: Any, settings: Settings) -> list[str]:
    if key in RECIPE_OWNS:
        owner = RECIPE_OWNS[key]
        section, name = owner.split(".")
        mine = getattr(getattr(settings, section), name)
        return (
            []
            if value == "auto"
            else [
                f"deepspeed {key}: {value!r} there, {owner} = {mine!r} in the recipe; the recipe owns it: remove the key or "
                "set it to 'auto'"
            ]
        )

    # fp16 may be present if it is disabled.
    if key in _REFUSED:
        off = isinstance(value, dict) and not value.get("enabled", True)
        return [] if off else [f"deepspeed {key}: {_REFUSED[key]}"]

    if key not in _ALLOWED_KEYS:
        return [f"deepspeed {key}: unknown key, or not ZeRO, precision or communication; {did_you_mean(key, _ALLOWED_KEYS)}"]
    return []


def _section_problems(section: str, model: type[BaseModel], value: Any) -> Iterator[str]:
    """Validate a section with DeepSpeed's own pydantic model; 'auto' is checked elsewhere."""
    if value == "auto":
        return
    if not isinstance(value, dict):
        yield f"deepspeed {section}: got {value!r}; expected an object"
        return

    try:
        model.model_validate({key: given for key, given in value.items() if given != "auto"})
    except ValidationError as error:
        for detail in error.errors():
            key = ".".join(map(str, detail["loc"]))
            if detail["type"] == "extra_forbidden" and len(detail["loc"]) == 1:
                known = {name for field, info in model.model_fields.items() for name in (field, info.alias) if name}
                yield f"deepspeed {section}.{key}: unknown key; {did_you_mean(key, known)}"
            else:
                yield f"deepspeed {section}.{key}: got {detail['input']!r}; {rule_of(detail)}"


def _precision_problems(content: dict[str, Any]) -> list[str]:
    data_types = content.get("data_types", {})
    if not isinstance(data_types, dict):
        return [f"deepspeed data_types: got {data_types!r}; expected an object with grad_accum_dtype"]
    given = {"communication_data_type": content.get("communication_data_type", "fp32")}
    given |= {f"data_types.{key}": value for key, value in data_types.items()}
    unknown = [f"deepspeed {key}: unknown key; did you mean 'grad_accum_dtype'?" for key in given if key not in _DTYPE_KEYS]
    return unknown + [
        f"deepspeed {key}: got {value!r}; expected one of {', '.join(_DTYPES)}"
        for key, value in given.items()
        if key in _DTYPE_KEYS and value not in (*_DTYPES, "auto")
    ]


def _zero_problems(zero: Any) -> list[str]:
    if not isinstance(zero, dict):
        return []
    problems = []
    stage = zero.get("stage")
    if stage not in (1, 2, 3, "auto"):
        problems.append(
            f"deepspeed zero_optimization.stage: got {stage!r}; expected 1, 2 or 3 (without ZeRO a step whose gradient is not "
            "finite would be applied)"
        )

    # DeepSpeed finds a non-finite gradient by its norm.
    if zero.get("compute_grad_norm", True) is not True:
        problems.append("deepspeed zero_optimization.compute_grad_norm: only by the norm is a gradient known to be finite")
    problems += [
        f"deepspeed zero_optimization.{key}: DeepSpeed's former spelling; write offload_optimizer or offload_param"
        for key in zero
        if key.startswith("cpu_offload")
    ]

    # ZeRO++'s quantised collectives would choose tokens by the losses of rounded weights, and sum rounded gradients.
    problems += [
        f"deepspeed zero_optimization.{key}: rounds what ranks exchange, so that neither losses and their selection nor "
        "gradients would be exact; remove the key"
        for key in zero
        if key.startswith("zero_quantized_") and zero[key] is not False
    ]

    # Offloading: to the host only, and parameters only where they are partitioned.
    for key in ("offload_optimizer", "offload_param"):
        device = zero[key].get("device", "none") if isinstance(zero.get(key), dict) else "none"
        if device not in ("none", "cpu"):
            problems.append(f"deepspeed zero_optimization.{key}.device: got {device!r}; expected 'cpu' or 'none'")
        elif device == "cpu" and key == "offload_param" and stage in (1, 2):
            problems.append(f"deepspeed zero_optimization.{key}: needs stage 3, which alone partitions parameters; got {stage}")
    return problems


def _auto_keys(content: Any, prefix: str = "") -> list[str]:
    """Dotted keys of all values that are 'auto'."""
    if content == "auto":
        return [prefix]
    if not isinstance(content, dict):
        return []
    return [found for key, value in content.items() for found in _auto_keys(value, f"{prefix}.{key}" if prefix else key)]


def _threshold(settings: Settings) -> int:
    return 10 * settings.model.dim


def _block(settings: Settings, zero: dict[str, Any], _: int) -> int:
    """A block's gathered values, so that the prefetcher, which takes whole parameters until its bucket is full, stops where a
    block ends. With a smaller bucket a block comes in several all-gathers; a larger one runs into the next block, and spends
    `stage3_max_live_parameters` on it."""
    threshold = zero.get("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD)
    return gathered_block_size(settings.model, _threshold(settings) if threshold == "auto" else threshold)


def _partitions_of_a_node(world_size: int, node_ranks: int) -> int:
    """The ranks that hold a node's copy of the weights; 1, which turns hpZ off, where a node has all ranks or nodes differ."""
    return node_ranks if world_size > node_ranks and world_size % node_ranks == 0 else 1


# The others are the formulas of Hugging Face's integration, so that one JSON serves both, with a lower bound: at dim ** 2 a
# small model would reduce each parameter in a collective of its own, which costs more than a tenth of its step.
_SMALLEST_BUCKET = 2**22
_AUTO_VALUES: dict[str, Callable[[Settings, dict[str, Any], int], Any]] = {
    "bf16.enabled": lambda *_: torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
    "zero_optimization.reduce_bucket_size": lambda settings, *_: max(settings.model.dim**2, _SMALLEST_BUCKET),
    "zero_optimization.allgather_bucket_size": lambda settings, *_: max(settings.model.dim**2, _SMALLEST_BUCKET),
    "zero_optimization.stage3_prefetch_bucket_size": _block,
    f"zero_optimization.{_HPZ}": lambda *given: _partitions_of_a_node(given[-1], RANKS_OF_A_NODE),
    "zero_optimization.stage3_param_persistence_threshold": lambda settings, *_: _threshold(settings),
}
