"""The plan: at which moment of a step a rank needs most, and what of it is what.

A step's memory has few moments at which it can be highest: the loss phase, when all activations wait and the loss's
buffers are there; the start of backward, when the final norm's gradients are made; a block's backward, when a checkpointed
one is made again; the end of backward, when the embedding's gradient is made; reductions by themselves; the optimiser's
step; and, for models that are whole on each rank, their building. The plan is the highest of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.planning import activations, states
from pipeline.planning.case import Case

PARTS = (
    "parameters", "gathered parameters", "master weights", "optimiser", "gradients", "reduce buckets", "activations",
    "loss phase", "reference",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Bytes of one rank. at_rest: by part, between two steps; moments: by moment and part, on the device; host: by part, what
    is kept in host memory instead."""

    at_rest: dict[str, int]
    moments: dict[str, dict[str, int]]
    host: dict[str, int]

    @property
    def highest(self) -> str:
        """The moment at which most is needed."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak(self) -> dict[str, int]:
        return self.moments[self.highest]

    @property
    def total(self) -> int:
        return sum(self.peak.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())


def plan_memory(case: Case) -> Plan:
    held = {
        "parameters": states.weights(case),
        "master weights": states.master_weights(case),
        "optimiser": states.optimizer(case),
        "gradients": states.gradients_at_rest(case),
        "reduce buckets": states.buckets_at_rest(case),
        "reference": states.reference(case),
    }
    host: dict[str, int] = {}
    if case.offloads_optimizer:
        host |= {part: held.pop(part) for part in ("master weights", "optimiser", "gradients")}
    if case.offloads_parameters:
        host["parameters"] = held.pop("parameters")
    resident = states.persistent(case, case.parameters) if case.stage == 3 and case.num_ranks > 1 else 0
    at_rest = held | {"gathered parameters": resident}
    moments = {name: _with(at_rest, moment(case)) for name, moment in _MOMENTS.items()}
    if case.stage != 3:
        # The model as it was built, and the flat copy that takes its place.
        moments["building"] = {"parameters": 2 * states.weights(case)}
    return Plan(at_rest, moments, host)


def _with(at_rest: dict[str, int], added: dict[str, int]) -> dict[str, int]:
    both = {part: at_rest.get(part, 0) + added.get(part, 0) for part in PARTS}
    return {part: size for part, size in both.items() if size}


def _gathered_beyond_persistent(case: Case) -> int:
    return max(0, states.gathered(case) - states.persistent(case, case.parameters))


def _loss_phase(case: Case) -> dict[str, int]:
    return {
        "gathered parameters": _gathered_beyond_persistent(case),
        "gradients": states.gradients_accumulated(case),
        "activations": activations.waiting(case),
        "loss phase": activations.stacked(case) + activations.normalised(case) + activations.in_loss(case),
    }


def _start_of_backward(case: Case) -> dict[str, int]:
    dense = case.settings.training.loss_phase == "dense"
    at_work = activations.in_backward_of_dense(case) if dense else activations.in_backward_of_norm(case)
    alone = states.fits_no_bucket(case)
    return {
        "gathered parameters": _gathered_beyond_persistent(case),
        "gradients": states.gradients_accumulated(case) + _unembeddings_gradient(case),
        "reduce buckets": _buckets_beyond_rest(case, 0 if alone else case.unembedding),
        "activations": activations.waiting(case),
        "loss phase": activations.stacked(case) + activations.normalised(case) + at_work,
    }


def _first_reduction(case: Case) -> dict[str, int]:
    """Of the unembedding's gradient by itself, when the final norm's comes."""
    if not states.fits_no_bucket(case) or states.is_bf16_optimizer(case):
        return {}
    return {
        "gathered parameters": _gathered_beyond_persistent(case),
        "gradients": states.gradients_in_backward(case) + _unembeddings_gradient(case),
        "reduce buckets": _buckets_beyond_rest(case, 0) + states.reducing_alone(case),
        "activations": activations.waiting(case) + activations.stacked(case),
    }


def _backward_of_a_head(case: Case) -> dict[str, int]:
    return {
        "gathered parameters": _gathered_beyond_persistent(case),
        "gradients": states.gradients_in_backward(case) + _kept_as_they_are(case),
        "reduce buckets": _buckets_beyond_rest(case, 2 * case.unembedding) + states.reducing(case),
        "activations": activations.waiting(case) + activations.in_backward_of_block(case),
    }


def _end_of_backward(case: Case) -> dict[str, int]:
    own = 0 if _kept_as_they_are(case) else case.width * case.unembedding
    return {
        "gathered parameters": case.width * case.unembedding if _gathered_beyond_persistent(case) else 0,
        "gradients": states.gradients_after_backward(case) + own,
        "reduce buckets": _buckets_beyond_rest(case, case.whole) + states.reducing(case),
        "activations": activations.block_input(case) * 2,
    }


def _reduction_of_the_whole(case: Case) -> dict[str, int]:
    if not states.is_bf16_optimizer(case):
        return {}
    return {"gradients": states.gradients_after_backward(case), "reduce buckets": states.reducing_whole(case)}


def _unembeddings_gradient(case: Case) -> int:
    """Where nothing takes it as soon as it is there."""
    kept = states.fits_no_bucket(case) or states.is_bf16_optimizer(case)
    return case.width * case.unembedding if kept else 0


def _kept_as_they_are(case: Case) -> int:
    """The unembedding's gradient in a first micro-step of BF16_Optimizer, which reduces none before all are there."""
    first = states.is_bf16_optimizer(case) and case.micro_steps == 1
    return _unembeddings_gradient(case) if first else 0


def _buckets_beyond_rest(case: Case, written: int) -> int:
    return states.buckets_in_backward(case, written) - states.buckets_at_rest(case)


def _optimizer_step(case: Case) -> dict[str, int]:
    return {"gradients": states.gradients_in_step(case)}


_MOMENTS: dict[str, Callable[[Case], dict[str, int]]] = {
    "the loss phase": _loss_phase,
    "the start of backward": _start_of_backward,
    "the unembedding's reduction": _first_reduction,
    "a head's backward": _backward_of_a_head,
    "the end of backward": _end_of_backward,
    "the gradient's reduction": _reduction_of_the_whole,
    "the optimiser's step": _optimizer_step,
}
