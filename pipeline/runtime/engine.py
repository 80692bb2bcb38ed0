"""DeepSpeed, and nothing but: the only module that imports it.

Guarantees: the recipe owns batch sizes, learning rate and clipping, and a DeepSpeed JSON that also sets one is refused;
no rank ever holds a whole partitioned model; the gradient that reaches the optimiser is that of the objective summed
over ranks and micro-steps (see `backward`); the reference has an engine of its own, without an optimiser.
"""

import gc
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from pipeline.config import ModelSettings, Settings, TrainingSettings, did_you_mean
from pipeline.model.huggingface import load_weights
from pipeline.model.mtp import MTPModel, initialize_weights

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
# DeepSpeed's collectives go by names that torch 2.13 deprecates, one warning a call.
warnings.filterwarnings("ignore", message=".*torch.distributed.*deprecated", category=FutureWarning)
import deepspeed  # noqa: E402
from deepspeed import DeepSpeedEngine as Engine  # noqa: E402
from deepspeed.runtime.precision_config import DeepSpeedBF16Config  # noqa: E402
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: E402

# Compiling this on a CPU's first start takes most of a minute, and hangs on the lock of a build that was killed.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

_ALLOWED_KEYS = {
    "zero_optimization", "bf16", "communication_data_type", "data_types", "comms_logger", "wall_clock_breakdown",
    "memory_breakdown", "flops_profiler",
}  # fmt: skip
_RECIPE_OWNS = {
    "train_batch_size": "data.global_batch",
    "train_micro_batch_size_per_gpu": "data.micro_batch",
    "gradient_accumulation_steps": "data.global_batch",
    "gradient_clipping": "training.gradient_clipping",
    "optimizer": "training.learning_rate",
    "scheduler": "training.schedule",
}
_DTYPE_KEYS = ("communication_data_type", "data_types.grad_accum_dtype")
_DTYPES = ("fp32", "bf16", "fp16")
_REFUSED = {"fp16": "train in bf16 or float32: fp16's loss scaling would change which steps are applied"}


def initialize_distributed(device: torch.device, level: str) -> None:
    """Start the process group and set how much of DeepSpeed's own log is shown."""
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(level.upper())
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=level == "debug")


def read_deepspeed_json(path: Path, settings: Settings) -> tuple[dict[str, Any], list[str]]:
    """The JSON's content and everything that is wrong with it, one sentence a problem."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, [f"--deepspeed: no such file: {path}"]
    except (ValueError, OSError) as error:
        return {}, [f"--deepspeed: {path} is not valid JSON: {error}"]
    if not isinstance(content, dict):
        return {}, [f"--deepspeed: {path}: expected a JSON object"]
    problems = [problem for key, value in content.items() for problem in _key_problems(key, value, settings)]
    for section, model in _SECTIONS.items():
        problems += _section_problems(section, model, content.get(section, {}))
    problems += _precision_problems(content) + _zero_problems(content.get("zero_optimization", {}))
    problems += [
        f"deepspeed {place}: 'auto' is not resolved here; write a value or leave the key out"
        for place in _autos(content)
        if place not in _AUTO and place not in _RECIPE_OWNS
    ]
    return content, problems


def resolve_deepspeed_json(content: dict[str, Any], settings: Settings, world_size: int) -> dict[str, Any]:
    """What DeepSpeed is given: 'auto' replaced by values, the recipe's batch sizes and clipping filled in."""
    batch, micro_batch = settings.data.global_batch, settings.data.micro_batch
    # DeepSpeed would reduce and accumulate gradients in bf16 where nothing is said.
    exact = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    resolved = exact | {key: value for key, value in content.items() if key not in _RECIPE_OWNS}
    for place in _autos(resolved):
        section, key = place.split(".")
        resolved[section] = resolved[section] | {key: _AUTO[place](settings)}
    return resolved | {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": batch // (micro_batch * world_size),
        "gradient_clipping": settings.training.gradient_clipping or 0.0,
        "steps_per_print": None,
    }


@contextmanager
def gathered(parameter: nn.Parameter) -> Iterator[bool]:
    """Make a partitioned parameter whole; what the first rank writes into it reaches all. Every rank must enter."""
    if not hasattr(parameter, "ds_id"):
        yield True
        return
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield dist.get_rank() == 0


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter; a partitioned one's own shape is (0,) (`ds_shape` has the truth)."""
    return getattr(parameter, "ds_shape", parameter.shape)


def build_policy(settings: Settings, config: dict[str, Any]) -> Engine:
    """The policy under its engine, weights drawn or read from `model.pretrained`."""
    model = _build_model(settings.model, config, settings.model.pretrained)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.training),
        lr=settings.training.learning_rate,
        betas=(settings.training.beta1, settings.training.beta2),
        eps=settings.training.adam_eps,
        fused=torch.cuda.is_available(),
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(config))
    return engine


def build_reference(settings: ModelSettings, directory: Path | None, sharding: str, policy_config: dict[str, Any]) -> Engine:
    """The frozen reference in an engine without optimiser; `directory` None draws random weights (a dry run's)."""
    config: dict[str, Any] = {
        key: policy_config[key] for key in ("train_micro_batch_size_per_gpu", "bf16") if key in policy_config
    }
    zero = policy_config.get("zero_optimization", {})
    names = ("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    kept = {name: zero[name] for name in names if name in zero}
    config |= {
        "zero_optimization": {"stage": 3, **kept} if sharding == "zero3" else {"stage": 0},
        "steps_per_print": None,
    }
    model = _build_model(settings, config, directory).requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()  # DeepSpeed's returns nothing.
    return engine


def parameter_groups(model: nn.Module, training: TrainingSettings) -> list[dict[str, Any]]:
    """Weight decay on matrices; none on norms and biases."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if len(full_shape(parameter)) >= 2]
    vectors = [parameter for parameter in parameters if len(full_shape(parameter)) < 2]
    groups = [(matrices, training.weight_decay), (vectors, 0.0)]
    return [{"params": members, "weight_decay": decay} for members, decay in groups if members]


def backward(engine: Engine, loss: Tensor) -> None:
    """Add the gradient of this rank's part of the objective.

    The objective is the plain sum of all ranks' and micro-steps' losses, each already divided by the step's global
    counts. DeepSpeed divides by the accumulation steps (not asked to here) and averages over ranks (undone here); this
    is the one place that knows.
    """
    engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)


def end_micro_step(engine: Engine) -> bool:
    """Close a micro-step; the step's last one updates the weights, or on all ranks discards a gradient that is not
    finite. Returns whether weights were updated."""
    engine.step()
    return engine.was_step_applied()


def set_learning_rate(engine: Engine, learning_rate: float) -> None:
    optimizer: Any = engine.optimizer
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def gradient_norm(engine: Engine) -> float | None:
    """L2 norm of the last step's whole gradient before clipping; None where it was not finite."""
    norm = engine.get_global_grad_norm()
    norm = math.nan if norm is None else float(norm)
    return norm if math.isfinite(norm) else None


def release(engine: Engine) -> None:
    """Give back what an engine that is no longer needed holds."""
    engine.destroy()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _build_model(settings: ModelSettings, config: dict[str, Any], weights: Path | None) -> MTPModel:
    partitioned = config.get("zero_optimization", {}).get("stage", 0) == 3
    with deepspeed.zero.Init(config_dict_or_path=dict(config)) if partitioned else nullcontext():
        model = MTPModel(settings)
    if weights is None:
        initialize_weights(model, gathered)
    else:
        load_weights(model, weights, gathered)
    return model


def _key_problems(key: str, value: Any, settings: Settings) -> list[str]:
    if key in _RECIPE_OWNS:
        owner = _RECIPE_OWNS[key]
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
    if key in _REFUSED:
        off = isinstance(value, dict) and not value.get("enabled", True)
        return [] if off else [f"deepspeed {key}: {_REFUSED[key]}"]
    if key not in _ALLOWED_KEYS:
        return [f"deepspeed {key}: unknown key, or not ZeRO, precision or communication; {did_you_mean(key, _ALLOWED_KEYS)}"]
    return []


_SECTIONS = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config}


def _section_problems(section: str, model: type[BaseModel], value: Any) -> Iterator[str]:
    """What DeepSpeed itself would raise for a section, as sentences; 'auto' is judged elsewhere."""
    if value == "auto":
        return
    if not isinstance(value, dict):
        yield f"deepspeed {section}: got {value!r}; expected an object"
        return
    try:
        model.model_validate({key: given for key, given in value.items() if given != "auto"})
    except ValidationError as error:
        for detail in error.errors():
            place = ".".join(map(str, detail["loc"]))
            if detail["type"] == "extra_forbidden" and len(detail["loc"]) == 1:
                known = {name for key, field in model.model_fields.items() for name in (key, field.alias) if name}
                yield f"deepspeed {section}.{place}: unknown key; {did_you_mean(place, known)}"
            else:
                yield f"deepspeed {section}.{place}: got {detail['input']!r}; {detail['msg']}"


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
    if zero.get("stage") not in (3, "auto"):
        problems.append(
            f"deepspeed zero_optimization.stage: got {zero.get('stage')!r}; expected 3. The other stages do not discard a step "
            "whose gradient is not finite"
        )
    for key in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(key), dict) and zero[key].get("device", "none") != "none":
            problems.append(f"deepspeed zero_optimization.{key}: offloading is not supported; remove the key")
    return problems


def _autos(content: Any, place: str = "") -> list[str]:
    """Dotted places of all values 'auto'."""
    if content == "auto":
        return [place]
    if not isinstance(content, dict):
        return []
    return [found for key, value in content.items() for found in _autos(value, f"{place}.{key}" if place else key)]


# As Hugging Face's integration computes the same 'auto', so that one file serves both; but a small model's gradients are
# reduced together: one collective a parameter costs such a model more than a tenth of its step.
_SMALLEST_BUCKET = 2**22
_AUTO = {
    "bf16.enabled": lambda settings: torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    "zero_optimization.reduce_bucket_size": lambda settings: max(settings.model.dim**2, _SMALLEST_BUCKET),
    "zero_optimization.stage3_prefetch_bucket_size": lambda settings: int(0.9 * settings.model.dim**2),
    "zero_optimization.stage3_param_persistence_threshold": lambda settings: 10 * settings.model.dim,
}
