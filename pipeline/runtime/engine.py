"""DeepSpeed, and nothing but: the only module that imports it.

Guarantees: no rank ever holds a whole partitioned model; the gradient that reaches the optimiser is that of the objective
summed over ranks and micro-steps (see `backward`); the reference has an engine of its own, without an optimiser.
"""

import gc
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
from pydantic import BaseModel
from torch import Tensor, nn

from pipeline.config import ModelSettings, Settings, TrainingSettings
from pipeline.model.elementwise import elementwise_for
from pipeline.model.huggingface import load_weights
from pipeline.model.mtp import MTPModel, initialize_weights
from pipeline.model.transformer import Block

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
# DeepSpeed's collectives go by names that torch 2.13 deprecates, one warning a call.
warnings.filterwarnings("ignore", message=".*torch.distributed.*deprecated", category=FutureWarning)
import deepspeed  # noqa: E402
from deepspeed import DeepSpeedEngine as Engine  # noqa: E402
from deepspeed.comm.config import CommsLoggerConfig  # noqa: E402
from deepspeed.runtime.precision_config import DeepSpeedBF16Config  # noqa: E402
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: E402

JSON_SECTIONS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "comms_logger": CommsLoggerConfig,
}
"""DeepSpeed's own models of the sections of its JSON."""

# Compiling this on a CPU's first start takes most of a minute, and hangs on the lock of a build that was killed.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def initialize_distributed(device: torch.device, level: str) -> None:
    """Start the process group and set how much of DeepSpeed's own log is shown."""
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(level.upper())
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=level == "debug")


@contextmanager
def gathered(parameter: nn.Parameter) -> Iterator[bool]:
    """Make a partitioned parameter whole; what the first rank writes into it reaches all. Every rank must enter."""
    if not hasattr(parameter, "ds_id"):
        yield True
        return
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield dist.get_rank() == 0


def sample_parameter(engine: Engine, turn: int, num_values: int = 4096) -> tuple[str, bytes]:
    """(name, bits of some of its values) of one parameter, another each turn. Every rank must call."""
    parameters = list(engine.module.named_parameters())
    name, parameter = parameters[turn % len(parameters)]
    with gathered(parameter):
        values = parameter.detach().flatten()
        return name, values[:: -(-values.numel() // num_values)].float().cpu().numpy().tobytes()


def num_parameters(settings: ModelSettings) -> int:
    """Parameters of a model of this shape."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MTPModel(settings).parameters())


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter; a partitioned one's own shape is (0,) (`ds_shape` has the truth)."""
    return getattr(parameter, "ds_shape", parameter.shape)


def build_policy(settings: Settings, config: dict[str, Any]) -> Engine:
    """The policy under its engine, weights drawn or read from `model.pretrained`."""
    training = settings.training
    model = _build_model(settings.model, config, settings.model.pretrained, training.compile, training.activation_checkpointing)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, training),
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.adam_eps,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(config))
    return engine


def build_reference(
    settings: ModelSettings,
    directory: Path | None,
    sharding: str,
    policy_config: dict[str, Any],
    compile_setting: str = "auto",
) -> Engine:
    """The frozen reference in an engine without optimiser; `directory` None draws random weights (a dry run's)."""
    config: dict[str, Any] = {
        key: policy_config[key] for key in ("train_micro_batch_size_per_gpu", "bf16") if key in policy_config
    }
    zero = policy_config.get("zero_optimization", {})
    names = (
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
    )
    kept = {name: zero[name] for name in names if name in zero}
    config |= {
        "zero_optimization": {"stage": 3, **kept} if sharding == "zero3" else {"stage": 0},
        "steps_per_print": None,
    }
    model = _build_model(settings, config, directory, compile_setting).requires_grad_(False)
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
    """L2 norm of the last step's whole gradient before clipping; None where it was not finite. Waits for the device."""
    norm = engine.get_global_grad_norm()
    norm = math.nan if norm is None else float(norm)
    return norm if math.isfinite(norm) else None


def release(engine: Engine) -> None:
    """Give back the memory of an engine that is no longer needed: weights, gradients, optimiser state."""
    parameters = list(engine.module.parameters())
    engine.destroy()
    # Hooks of DeepSpeed's that last as long as the process name the engine and its model, so neither is ever collected:
    # what they hold has to be emptied.
    for optimizer in filter(None, (engine.optimizer, engine.basic_optimizer)):  # A reference's engine has none.
        vars(optimizer).clear()
    for parameter in parameters:
        parameter.grad = None
        for held in (parameter, getattr(parameter, "ds_tensor", parameter)):
            held.data = held.data.new_empty(0)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _build_model(
    settings: ModelSettings,
    config: dict[str, Any],
    weights: Path | None,
    compile_setting: str,
    activation_checkpointing: str = "none",
) -> MTPModel:
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    elementwise = elementwise_for(compile_setting, activation_checkpointing, device_type)
    partitioned = config.get("zero_optimization", {}).get("stage", 0) == 3
    with deepspeed.zero.Init(config_dict_or_path=dict(config)) if partitioned else nullcontext():
        model = MTPModel(settings, activation_checkpointing, elementwise)
    if partitioned:
        # A block is gathered as one: a third of the collectives, and half the time that the hooks of all its parts take on the
        # host, which a GPU waited for (22 layers: 0.22 s a step before, 0.11 s after).
        deepspeed.utils.set_z3_leaf_modules(model, [Block])
    if weights is None:
        initialize_weights(model, gathered)
    else:
        load_weights(model, weights, gathered)
    return model
