"""Build and drive DeepSpeed engines; the only module that imports deepspeed.

Guarantees: under ZeRO-3 no rank ever holds the whole model; the gradient that reaches the optimizer is that of the objective
summed over ranks and micro-steps (see `backward`); the reference has its own engine, without an optimizer.

The comments name the traps of DeepSpeed 0.19.8, which this module exists to keep in one place. Three of them bind its callers:

- Every parameter must be reached by every step's backward, on every rank. ZeRO-3 applies the *previous* gradient of a parameter
  that was not reached again. So a loss is multiplied by zero, never left out.
- The input of a block that trains must need a gradient. Blocks are ZeRO-3 leaf modules, whose gradients are reduced in a hook
  on the gradient of the inputs; where no input needs one, torch runs the hook before the parameters have theirs, and
  DeepSpeed takes zeros. So what is cut off is `detach().requires_grad_()`; `MTPModel.hidden_states` asserts it.
- No `torch.inference_mode` around the trained engine: the next training step raises. Evaluate the policy under `torch.no_grad`.
"""

import gc
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor, nn
from torch.profiler import record_function

from pipeline.config import ModelSettings, Settings
from pipeline.model.elementwise import elementwise_for
from pipeline.model.huggingface import load_weights
from pipeline.model.mtp import MTPModel, initialize_weights
from pipeline.model.transformer import Block
from pipeline.runtime import flight_recorder
from pipeline.runtime.distributed import broadcast_from_first
from pipeline.runtime.model_content import agreed
from pipeline.runtime.parameters import gathered_block_size, parameter_groups

# Both are read when deepspeed is imported.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
# DeepSpeed calls collectives by names that torch 2.13 deprecates: one warning per call.
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
"""DeepSpeed's pydantic models of the sections of its JSON."""
PERSISTENCE_THRESHOLD = DeepSpeedZeroConfig().param_persistence_threshold
"""DeepSpeed's default of `stage3_param_persistence_threshold`, in values."""

# On a CPU DeepSpeed compiles this extension at its first start. That takes 45 s, fails without a compiler, and hangs on a stale
# lock if an earlier build was killed. gloo does the same work without it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def initialize_distributed(device: torch.device, level: str, timeout: timedelta = timedelta(minutes=10)) -> None:
    """Start the process group (nccl on CUDA, else gloo).

    level: of DeepSpeed's own log, `debug` to `error`. timeout: of a collective; longer than the patience of `heartbeat`, which
    would not come to name the rank that hangs.
    """
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(level.upper())
    flight_recorder.record()
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=level == "debug", timeout=timeout
    )


@contextmanager
def gathered(parameter: nn.Parameter) -> Iterator[bool]:
    """Gather a partitioned parameter for the length of a `with`; collective.

    Yields True where this rank's writes count: on the first rank, which broadcasts them to the others at the end; on every
    rank if the parameter is not partitioned.
    """
    # `ds_id` marks the parameters that zero.Init has partitioned.
    if not hasattr(parameter, "ds_id"):
        yield True
        return
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield dist.get_rank() == 0


def whole_parameters(engine: Engine) -> dict[str, Tensor]:
    """The parameters of which this rank holds all values, as every other rank does, by name.

    They are all but those that ZeRO-3 has partitioned; of these the small ones, which it keeps gathered, are whole as well.
    """
    parameters: Iterator[tuple[str, Any]] = engine.module.named_parameters()
    return {name: each.detach() for name, each in parameters if not hasattr(each, "ds_id") or each.ds_persist}


def build_policy(settings: Settings, config: dict[str, Any]) -> Engine:
    """Build the policy and its engine; weights are initialised, or loaded from `model.pretrained`.

    config: the resolved DeepSpeed configuration.
    """
    training = settings.training
    model = _build_model(
        settings.model,
        config,
        settings.model.pretrained,
        training.compile,
        training.activation_checkpointing,
        training.detach_heads,
    )
    # An optimizer object rather than the JSON's "optimizer": DeepSpeed would compile its own FusedAdam, which takes minutes.
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
    """Build the frozen reference in an engine without an optimizer.

    Weights are loaded before `deepspeed.initialize`, because `load_checkpoint` fails on an engine without an optimizer.

    Args:
        directory: the model's files; None initialises random weights (for a dry run).
        sharding: `zero3` partitions it; `replicate` keeps it whole on every rank.
        policy_config: the policy's resolved configuration, from which precision and gathering limits are taken.
        compile_setting: `training.compile`.
    """
    # The reference follows the policy in precision and in how much of it may be gathered at a time.
    config: dict[str, Any] = {
        key: policy_config[key] for key in ("train_micro_batch_size_per_gpu", "bf16") if key in policy_config
    }
    zero = policy_config.get("zero_optimization", {})
    names = (
        "stage3_param_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "zero_hpz_partition_size",
    )
    kept = {name: zero[name] for name in names if name in zero}
    # What is gathered ahead is a block of its own (`deepspeed_json` says why), unless the policy gathers nothing ahead.
    if zero.get("stage3_prefetch_bucket_size", 1):
        kept["stage3_prefetch_bucket_size"] = gathered_block_size(settings, zero.get(names[0], PERSISTENCE_THRESHOLD))

    # Whole means stage 0: stages 1 and 2 assert that there is an optimizer.
    config |= {
        "zero_optimization": {"stage": 3, **kept} if sharding == "zero3" else {"stage": 0},
        "steps_per_print": None,
    }

    model = _build_model(settings, config, directory, compile_setting).requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()  # Unlike torch's, it does not return the module.
    return engine


def backward(engine: Engine, loss: Tensor) -> None:
    """Add the gradient of this rank's part of the objective; once per micro-step.

    The objective is the plain sum of all ranks' and micro-steps' losses, each already divided by the step's global counts:

        gradient = Σ_ranks Σ_micro-steps ∂loss

    DeepSpeed would divide by the accumulation steps (`scale_wrt_gas=False` turns that off) and averages over ranks (the factor
    world_size undoes that). Both corrections are made here and nowhere else. Never call `loss.backward()`: a hook of
    DeepSpeed's divides by the accumulation steps there too.
    """
    with record_function("backward"):
        engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)


def end_micro_step(engine: Engine) -> bool:
    """End a micro-step. The last one of a step updates the weights, or discards a non-finite gradient on all ranks.

    Returns:
        True if the weights were updated. DeepSpeed's `global_steps` counts discarded steps too, so it is not used.
    """
    with record_function("step"):
        engine.step()
    return engine.was_step_applied()


def begin_step(engine: Engine, learning_rate: float, trunk_is_frozen: bool) -> None:
    """Set the learning rate of all parameter groups for the next update, and whether it leaves the trunk as it is.

    A frozen trunk has gradients of zero, and a learning rate of 0, so that neither AdamW's decay nor its moments move it.
    """
    engine.module.freeze_trunk(trunk_is_frozen)
    optimizer: Any = engine.optimizer
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if trunk_is_frozen and group["is_trunk"] else learning_rate


def give_up_gathered(engine: Engine) -> None:
    """Partition whatever ZeRO-3 has gathered, or is gathering ahead; collective.

    After a forward without a backward it gathers for the backward that does not come, and `gathered` would then fail. A step
    needs no such call.
    """
    if hasattr(engine.optimizer, "persistent_parameters"):
        optimizer: Any = engine.optimizer
        optimizer.checkpoint_event_prologue()
        optimizer.checkpoint_event_epilogue()


def gradient_norm(engine: Engine) -> float | None:
    """L2 norm of the last step's whole gradient before clipping, None if not finite; the host waits for the device."""
    norm = engine.get_global_grad_norm()
    norm = math.nan if norm is None else float(norm)
    return norm if math.isfinite(norm) else None


def release(engine: Engine) -> None:
    """Free the memory of an engine that is no longer needed: weights, gradients, optimizer state."""
    parameters = list(engine.module.parameters())
    engine.destroy()

    # Process-wide hooks of DeepSpeed's keep references to the engine and its model, so Python never collects them. Empty what
    # they hold instead.
    for optimizer in filter(None, (engine.optimizer, engine.basic_optimizer)):  # The reference's engine has neither.
        vars(optimizer).clear()
    for parameter in parameters:
        parameter.grad = None
        for held in (parameter, getattr(parameter, "ds_tensor", None), getattr(parameter, "ds_secondary_tensor", None)):
            if held is not None:
                held.data = held.data.new_empty(0)

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _partitioned_at_birth(config: dict[str, Any]) -> AbstractContextManager[Any]:
    """Partition each parameter as soon as its module is built.

    With hpZ DeepSpeed makes the node's process group for the first engine, and refuses to make it again for the next one.
    """
    has_node_group = config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1
    node_group = deepspeed.utils.groups._get_zero_param_intra_parallel_group() if has_node_group else None
    return deepspeed.zero.Init(config_dict_or_path=dict(config), zero_param_parallel_group=node_group)


def _build_model(
    settings: ModelSettings,
    config: dict[str, Any],
    weights: Path | None,
    compile_setting: str,
    activation_checkpointing: str = "none",
    detach_heads: bool = False,
) -> MTPModel:
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    elementwise = elementwise_for(compile_setting, activation_checkpointing, device_type)

    # Under ZeRO-3 each parameter is partitioned as soon as its module is built, so the whole model never exists on a rank.
    partitioned = config.get("zero_optimization", {}).get("stage", 0) == 3
    with _partitioned_at_birth(config) if partitioned else nullcontext():
        model = MTPModel(settings, activation_checkpointing, elementwise, detach_heads)
    if partitioned:
        # Gather a block in one collective instead of one per linear layer and norm. That is a third of the collectives and half
        # the time in DeepSpeed's Python hooks, for which the GPU waited (22 layers: 0.22 s of a step before, 0.11 s after).
        deepspeed.utils.set_z3_leaf_modules(model, [Block])

    if weights is None:
        initialize_weights(model, gathered)
        return model
    # The first rank reads every tensor, whether the model is partitioned or not.
    not_finite = broadcast_from_first(load_weights(model, weights, gathered))
    if not_finite:
        listed = ", ".join(not_finite[:8]) + " …" * (len(not_finite) > 8)
        raise agreed(f"{weights}: values that are not finite (NaN or infinite) in {listed}; every loss would be NaN")
    return model
