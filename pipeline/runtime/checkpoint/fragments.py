"""Find this rank's share of every parameter and of its optimizer states, whatever the ZeRO stage.

In every stage DeepSpeed keeps a rank's share of the float32 master weights in a few flat tensors, and the inner optimizer its
states in tensors of the same shape. A fragment is the part of one parameter that lies in such a flat tensor. Where it begins
in the parameter is computed from where the parameter itself lies, never from DeepSpeed's own tables, so that keys which change
the layout alone (`round_robin_gradients`, `sub_group_size`, bucket sizes) change nothing in a checkpoint.

Traps of DeepSpeed 0.19.8: optimizer states exist only after a first applied step, and its own setters leave the weights that a
forward sees as they were. Here missing states are made, as zeros, and `refresh_weights` is called after all values are set.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

MASTER: Literal["master"] = "master"
FROZEN: Literal["frozen"] = "frozen"
STATES: tuple[Literal["exp_avg"], Literal["exp_avg_sq"]] = ("exp_avg", "exp_avg_sq")
"""AdamW's states of a value, in float32 as the master weights are."""


@dataclass(frozen=True)
class Fragment:
    """This rank's part of a parameter: values [start, start + numel) of the flattened parameter.

    tensors: flat views of live memory, [numel] each: `master` and the optimizer states in float32, or `frozen` alone, in the
    model's dtype.
    """

    name: str
    start: int
    tensors: dict[str, Tensor]

    @property
    def numel(self) -> int:
        return next(iter(self.tensors.values())).numel()


def fragments_of(engine: Any) -> list[Fragment]:
    """List the fragments that this rank holds of an engine's parameters, none of them empty."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    shares = _partitioned_shares(optimizer) if _is_stage_3(optimizer) else _flat_shares(optimizer)

    fragments = []
    for parameter, flat, offset, start, numel in shares:
        flats: dict[str, Tensor] = {MASTER: flat.detach()} | {name: _state_of(optimizer, flat)[name] for name in STATES}
        tensors = {kind: values.narrow(0, offset, numel) for kind, values in flats.items()}
        fragments.append(Fragment(names[id(parameter)], start, tensors))

    frozen = ((name, parameter) for name, parameter in engine.module.named_parameters() if not parameter.requires_grad)
    return fragments + [fragment for name, parameter in frozen for fragment in _frozen_fragments(name, parameter)]


def optimizer_step(engine: Any) -> int:
    """The number of updates that the optimizer has counted; 0 before the first."""
    steps = {int(state["step"]) for state in _all_states(engine.optimizer)}
    assert len(steps) <= 1, f"parts of the optimizer are at different steps: {sorted(steps)}"
    return steps.pop() if steps else 0


def set_optimizer_step(engine: Any, step: int) -> None:
    """Have the optimizer count on from `step`."""
    for state in _all_states(engine.optimizer):
        state["step"].fill_(step)


def refresh_weights(engine: Any) -> None:
    """Bring the weights that a forward sees up to date with the master weights; collective."""
    optimizer = engine.optimizer
    if not _is_stage_3(optimizer):
        optimizer.update_lp_params()
        return

    # Small parameters are kept gathered, and with zero_hpz_partition_size a second partition, of the node alone, is what a
    # forward gathers: give both up before the partitions are set, and gather again after.
    optimizer.checkpoint_event_prologue()
    for sub_group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
    optimizer.checkpoint_event_epilogue()


class _Share(NamedTuple):
    """`numel` values of a parameter, the first of them its `start`-th, that lie in `flat` from `offset` on."""

    parameter: nn.Parameter
    flat: Tensor
    offset: int
    start: int
    numel: int


def _is_stage_3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _partitioned_shares(optimizer: Any) -> Iterator[_Share]:
    """Stage 3: a parameter is cut into equal partitions, one a rank; the last ones are padded, or padding alone."""
    for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in parameters:
            start, numel = _partition(parameter)
            if numel:
                yield _Share(parameter, flat, offset, start, numel)
            offset += parameter.partition_numel()


def _partition(parameter: Any) -> tuple[int, int]:
    """(first value, number of values) of this rank's partition of a parameter of stage 3, without padding."""
    size = parameter.partition_numel()
    start = dist.get_rank(parameter.ds_process_group) * size
    return start, max(0, min(size, parameter.ds_numel - start))


def _flat_shares(optimizer: Any) -> Iterator[_Share]:
    """Stages 1 and 2: a group's parameters lie behind one another in a flat tensor, which is cut into equal partitions."""
    # In bf16 with float32 accumulation stage 1 is another class, with other names.
    prefix = "bf16" if hasattr(optimizer, "bf16_groups_flat") else "bit16"
    groups, wholes = getattr(optimizer, f"{prefix}_groups"), getattr(optimizer, f"{prefix}_groups_flat")
    parts = zip(groups, wholes, _masters(optimizer), optimizer.real_dp_process_group, strict=True)
    for parameters, whole, flat, ranks in parts:
        first = dist.get_rank(ranks) * flat.numel()
        for parameter in parameters:
            place = (parameter.data_ptr() - whole.data_ptr()) // whole.element_size()
            begin, end = max(place, first), min(place + parameter.numel(), first + flat.numel())
            if begin < end:
                yield _Share(parameter, flat, begin - first, begin - place, end - begin)


def _frozen_fragments(name: str, parameter: Any) -> Iterator[Fragment]:
    """Stage 3 partitions frozen parameters as the others; in stages 1 and 2 every rank has them whole, and the first saves."""
    if hasattr(parameter, "ds_id"):
        start, numel = _partition(parameter)
        if numel:
            yield Fragment(name, start, {FROZEN: parameter.ds_tensor.detach().flatten().narrow(0, 0, numel)})
    elif dist.get_rank() == 0:
        yield Fragment(name, 0, {FROZEN: parameter.detach().flatten()})


def _masters(optimizer: Any) -> list[Tensor]:
    """The flat tensors of this rank's master weights."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    raise TypeError(f"{type(optimizer).__name__}: not one of DeepSpeed's ZeRO optimizers")


def _all_states(optimizer: Any) -> list[dict[str, Tensor]]:
    return [_state_of(optimizer, flat) for flat in _masters(optimizer)]


def _state_of(optimizer: Any, flat: Tensor) -> dict[str, Tensor]:
    """The optimizer's state of a flat tensor; made, as it is before the first update, if it does not exist yet."""
    # A part of the flat tensors that stays on the device while others are offloaded has an optimizer of its own.
    backup = getattr(optimizer, "backup_optimizer", None)
    inner = backup if backup is not None and flat in backup.state else optimizer.optimizer
    state = inner.state[flat]
    if not state:
        state["step"] = torch.zeros((), device=flat.device)
        state |= {name: torch.zeros_like(flat, requires_grad=False) for name in STATES}
    return state
