"""May a run continue from a checkpoint? Its settings are compared with those of the run, and losses with those it remembers."""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.config import ConfigError
from pipeline.runtime.checkpoint.folders import step_name
from pipeline.runtime.checkpoint.state import HeldOut, State
from pipeline.runtime.identity import changed_settings

# Of a mean loss, because another layout or device sums in another order: relative, and below a loss of 1 in nats. The logits'
# rounding is no smaller where a batch is known by heart and its loss next to nothing.
_TOLERANCE, _TOLERANCE_BF16 = 1e-3, 0.02


def check_settings(state: State, identity: Mapping[str, Any], allow_changed: bool) -> None:
    """Check that a run of this identity may continue from a checkpoint.

    Raises:
        ConfigError: fixed settings are others, or (unless `allow_changed`) such as change the result.
    """
    name = step_name(state.step)

    # Never allowed to differ: what could not take effect.
    changes = changed_settings(state.identity, identity)
    fixed = [f"{change}; it is fixed for the life of a run" for change in changes if change.is_fixed]

    # Allowed to differ only on request.
    changed = [f"{change} ({name} was trained with the former)" for change in changes if not change.is_fixed]
    if fixed or (changed and not allow_changed):
        remedy = "to start anew choose another --run-dir"
        remedy = remedy if fixed else f"to continue all the same pass --allow-changed; {remedy}"
        raise ConfigError([*fixed, *changed], remedy)


def other_losses(state: State, identity: Mapping[str, Any], found: HeldOut) -> list[str]:
    """Compare losses of the fixed batch: what a forward sees must be what it saw when the checkpoint was saved.

    Nothing is said where they cannot be compared: the batch or a setting is another.
    """
    saved = state.held_out
    is_comparable = saved.batch == found.batch and saved.losses and found.losses
    if not is_comparable or changed_settings(state.identity, identity):
        return []
    tolerance = _TOLERANCE_BF16 if identity.get("deepspeed bf16") else _TOLERANCE
    pairs = zip(found.losses, saved.losses, strict=True)
    if all(abs(one - other) <= tolerance * max(1.0, abs(other)) for one, other in pairs):
        return []
    both = f"{json.dumps(found.losses)}, and had {json.dumps(saved.losses)} when it was saved"
    return [f"{step_name(state.step)}: the held-out batch has losses {both}"]


def changed_pools(state: State, identity: Mapping[str, Any], world_size: int) -> list[str]:
    """Say where the pool of the selection is another on this number of ranks, or with this micro-batch."""
    pool = identity.get("training.selection_pool")
    if pool not in ("global", "rank"):
        return []
    both = ((state.identity, state.world_size), (identity, world_size))
    was, now = (of["data.micro_batch"] * (ranks if pool == "global" else 1) for of, ranks in both)
    return [] if was == now else [f"the selection's pool ({pool}) was a micro-step of {was} rows and is now one of {now}"]
