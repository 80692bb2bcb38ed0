"""One micro-batch from tokens to losses, in three stages that run lazily, a micro-batch at a time:

    comparisons    the frozen reference scores the tokens
    selectors_of   how the pairs are to be selected: EveryPair, TopOfPool or DecidedBefore
    policy_losses  the policy's hidden states, its losses, the selection among them, and the objective

Training and validation run the same stages, so what is validated is what is trained. Each model runs once a micro-batch; only
the pool `step` with several micro-steps needs a scoring pass of the policy beforehand, since the last micro-step's losses
decide about the first's.

Shapes: A micro-steps, B rows, T tokens, H heads, K = H - 1 the heads that select.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from pipeline.config import TrainingSettings
from pipeline.consumption import Consumed, count
from pipeline.data.loading.batch import Batch, targets_and_valid
from pipeline.model.reference import Reference, losses_by_head, reference_columns
from pipeline.weighting.exchange import Group, on_device
from pipeline.weighting.loss_phase import HeadLosses
from pipeline.weighting.objective import ObjectiveSettings, PendingCounts, StepCounts, count_pairs
from pipeline.weighting.pools import SHARED_POOLS, select_shared
from pipeline.weighting.prediction import Prediction
from pipeline.weighting.score import Comparison, random_scores
from pipeline.weighting.selection import Selector
from pipeline.weighting.selectors import DecidedBefore, EveryPair, TopOfPool


@dataclass(frozen=True)
class MicroBatch:
    """A batch on the device with its targets.

    targets_BTH: int64, the token that each head predicts; valid_BTH: bool, where there is one.
    rows_B: int64, the numbers of the rows in the order of the whole run. first_row: that of the first one, on the host.
    num_valid_BH: int64 on the host, the valid pairs of each row.
    """

    batch: Batch
    targets_BTH: Tensor
    valid_BTH: Tensor
    rows_B: Tensor
    first_row: int
    num_valid_BH: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The positional arguments of a model's forward."""
        return self.batch.tokens_BT, self.batch.document_ids_BT, self.targets_BTH, self.valid_BTH

    @property
    def known(self) -> dict[str, Any]:
        """Keyword arguments of a model's forward: facts that the host knows without waiting for the device."""
        return {"spans": self.batch.spans, "num_valid_H": self.num_valid_BH.numpy().sum(0).tolist()}


@dataclass(frozen=True)
class Models:
    """The trained policy, the frozen reference, and the ranks that share a pool.

    reference: None where nothing is compared, or where its losses come with the data.
    horizon: the reference's loss that a pair is compared with, as `reference.horizon`.
    """

    policy: Callable[..., Any]
    reference: Reference | None
    horizon: str
    group: Group


def load_micro_batches(
    batches: Sequence[Batch], first_sample: int, num_heads: int, group_size: int, rank: int, device: torch.device
) -> list[MicroBatch]:
    """Put this rank's micro-batches of consecutive micro-steps on the device; `first_sample` is the number of the first row
    of the first of them, over all ranks."""
    loaded = []
    for index, batch in enumerate(batches):
        batch = batch.to(device, non_blocking=True)
        num_rows = len(batch.tokens_BT)
        first_row = first_sample + (index * group_size + rank) * num_rows
        rows_B = torch.arange(first_row, first_row + num_rows, device=device)
        targets_BTH, valid_BTH = targets_and_valid(batch.tokens_BT, batch.document_ids_BT, num_heads)
        loaded.append(MicroBatch(batch, targets_BTH, valid_BTH, rows_B, first_row, batch.num_valid(num_heads)))
    return loaded


class RankFlags(NamedTuple):
    """Flags on which the ranks agree along with a step's counts.

    stop_requested, save_due: true if any rank was asked to stop, or finds a checkpoint due. save_written: true if every rank's
    part of the checkpoint in hand is on disk.
    """

    stop_requested: bool = False
    save_due: bool = False
    save_written: bool = False


NO_FLAGS = RankFlags()


class CountedStep(NamedTuple):
    """A step's counts over all ranks: of the pairs, and of the data; and the ranks' agreed flags."""

    counts: StepCounts
    consumed: Consumed
    flags: RankFlags


class PendingStep:
    """The counts of a step on their way to the host."""

    def __init__(self, counts: PendingCounts):
        self._counts = counts

    def read(self) -> CountedStep:
        """Return the counts. The host waits only where the device has not yet come so far."""
        counts = self._counts.read()
        num_ranks, num_stop, num_due, num_written, *data = counts.data
        return CountedStep(counts, Consumed.of(data), RankFlags(num_stop > 0, num_due > 0, num_written == num_ranks))


def count_step(
    micro_batches: Sequence[MicroBatch],
    objective: ObjectiveSettings,
    num_sources: int,
    group: Group,
    flags: RankFlags = NO_FLAGS,
) -> PendingStep:
    """Count a step's micro-batches over all ranks, with one all-reduce; this rank's flags travel along."""
    batches = [micro.batch for micro in micro_batches]
    data = torch.cat(
        [torch.tensor([1, *map(int, flags)]), count(batches, num_sources, [micro.first_row for micro in micro_batches])]
    )
    valid_ABH = [micro.num_valid_BH for micro in micro_batches]
    return PendingStep(count_pairs(valid_ABH, data, objective, micro_batches[0].valid_BTH.device, group))


def comparisons(models: Models, micro_batches: Sequence[MicroBatch], training: TrainingSettings) -> Iterator[Comparison]:
    """Stage 1: compute the values by which each micro-batch's pairs compete, the reference's losses among them.

    The reference runs when a comparison is asked for, unless its losses came with the data.
    """
    for micro in micro_batches:
        valid_BTK, num_heads = micro.valid_BTH[..., 1:], micro.valid_BTH.shape[-1]

        # Scores that no loss takes part in.
        given_BTK, columns_BTC = None, micro.batch.reference_losses_BTC
        if training.selection_score == "random":
            given_BTK = random_scores(training.selection_seed, micro.rows_B, *valid_BTK.shape[1:])
        if training.selection_score == "external":
            assert columns_BTC is not None, "external scores come with the data"
            given_BTK, columns_BTC = losses_by_head(columns_BTC, "shifted", num_heads)[..., 1:], None

        # The reference's losses; the policy's own come later.
        reference_loss_BTK = None
        if models.reference is not None:
            with record_function("reference"):
                columns_BTC = reference_columns(models.reference, models.horizon, *micro.inputs, **micro.known)
        if columns_BTC is not None:
            reference_loss_BTK = losses_by_head(columns_BTC, models.horizon, num_heads)[..., 1:]
        yield Comparison(training.selection_score, valid_BTK, reference_loss_BTK, given_BTK, models.horizon == "own")


def selectors_of(
    models: Models,
    micro_batches: Sequence[MicroBatch],
    compared: Iterable[Comparison],
    counts: StepCounts,
    training: TrainingSettings,
    prediction: Prediction,
) -> Iterator[Selector]:
    """Stage 2: say how each micro-batch's pairs are to be selected.

    `compared` is consumed a micro-batch at a time; at once for a pool over several micro-steps; not at all where nothing
    competes. `prediction` changes only how fast the loss phase is.
    """
    if not _compete(models, micro_batches[0], training):
        yield from (EveryPair(micro.valid_BTH[..., 1:]) for micro in micro_batches)
        return

    objective = counts.objective
    if objective.pool == "step" and len(micro_batches) > 1:
        yield from _decide_before(models, micro_batches, compared, counts, training)
        return

    # Pools that ranks share have one threshold each to predict; those of a rank or a row have many.
    is_shared = objective.pool in SHARED_POOLS
    for index, comparison in enumerate(compared):
        yield TopOfPool(
            compared=comparison,
            pool=objective.pool,
            k_percent=objective.k_percent,
            num_valid_K=counts.num_valid_AH[index][1:],
            num_selected_K=counts.pool_selected[index] if is_shared else [],
            exchange=training.selection_exchange,
            group=models.group,
            predicted_threshold_K=prediction.thresholds(comparison.valid_BTK.device) if is_shared else None,
        )


def policy_losses(
    models: Models,
    micro_batches: Sequence[MicroBatch],
    selectors: Iterable[Selector],
    counts: StepCounts,
    training: TrainingSettings,
) -> Iterator[HeadLosses]:
    """Stage 3: run the policy on each micro-batch and select among its losses.

    A micro-batch's losses are computed when they are asked for, so that its graph is used up before the next one is built.
    """
    scale_H = on_device(counts.scale_H, torch.float32, micro_batches[0].valid_BTH.device)
    for micro, selector in zip(micro_batches, selectors, strict=True):
        yield models.policy(*micro.inputs, selector=selector, scale_H=scale_H, loss_phase=training.loss_phase, **micro.known)


def has_reference(models: Models, batch: Batch) -> bool:
    """Return whether losses are there that the policy's are compared with: computed, cached, or those of its own head 0."""
    return models.reference is not None or batch.reference_losses_BTC is not None or models.horizon == "own"


def _compete(models: Models, micro: MicroBatch, training: TrainingSettings) -> bool:
    """Return whether pairs compete at all: there is a head that selects, and something to compare with."""
    return micro.valid_BTH.shape[-1] > 1 and (has_reference(models, micro.batch) or training.selection_score != "excess")


def _decide_before(
    models: Models,
    micro_batches: Sequence[MicroBatch],
    compared: Iterable[Comparison],
    counts: StepCounts,
    training: TrainingSettings,
) -> Iterator[DecidedBefore]:
    """Select from the pool of a whole step: every micro-batch is scored before the first is trained on."""
    scores, excesses, valid = [], [], []
    for micro, comparison in zip(micro_batches, compared, strict=True):
        # Head 0 does not compete: without valid pairs it costs the scoring pass nothing. It may be the reference, though.
        scored_BTH, known = micro.valid_BTH, micro.known
        if not comparison.is_own:
            scored_BTH = torch.cat([torch.zeros_like(scored_BTH[..., :1]), scored_BTH[..., 1:]], dim=-1)
            known = known | {"num_valid_H": [0, *known["num_valid_H"][1:]]}
        with torch.no_grad():
            policy_loss_BTH = models.policy(*micro.inputs[:3], scored_BTH, **known)
        comparison, policy_loss_BTK = comparison.after_first_head(policy_loss_BTH[..., 0]), policy_loss_BTH[..., 1:]
        scores.append(comparison.scores(policy_loss_BTK))
        excesses.append(comparison.excess(policy_loss_BTK))
        valid.append(comparison.valid_BTK)

    selections = select_shared(
        torch.stack(scores),
        torch.stack(valid),
        [valid_H[1:] for valid_H in counts.num_valid_AH],
        counts.pool_selected[0],
        training.selection_exchange,
        models.group,
    )
    for selection, excess_BTK in zip(selections, excesses, strict=True):
        yield DecidedBefore(selection._replace(excess_BTK=excess_BTK), counts.objective.k_percent)
