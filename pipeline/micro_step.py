"""One micro-batch from tokens to losses: reference, policy hidden states, per-token losses, exchange, selection, loss.

Training and validation both go through `selective_losses`, so what is validated is what is trained. Each model runs once
a micro-batch; only the pool `step` with several micro-steps needs a scoring pass of the policy beforehand, since the last
micro-step's losses decide about the first's.

Shapes: A micro-steps, B rows, T tokens, H heads, K = H - 1 the heads that select.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.config import TrainingSettings
from pipeline.consumption import Consumed, count
from pipeline.data.loading.batch import Batch, targets_and_valid
from pipeline.model.reference import Reference, losses_by_head, reference_columns
from pipeline.weighting.exchange import Group, on_device
from pipeline.weighting.loss_phase import HeadLosses
from pipeline.weighting.objective import StepPlan, plan_step
from pipeline.weighting.pools import SHARED_POOLS, random_scores, score, select_local, select_shared
from pipeline.weighting.prediction import Prediction
from pipeline.weighting.selection import Select, Selection, select_all


@dataclass(frozen=True)
class MicroBatch:
    """A batch on the device, with what each head has to predict in it (int64, bool [B, T, H]) and the numbers of its
    rows in the order of the whole run (int64 [B]). num_valid_BH: valid pairs of each row, on the host."""

    batch: Batch
    targets_BTH: Tensor
    valid_BTH: Tensor
    rows_B: Tensor
    num_valid_BH: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a model's forward takes."""
        return self.batch.tokens_BT, self.batch.document_ids_BT, self.targets_BTH, self.valid_BTH

    @property
    def known(self) -> dict[str, Any]:
        """What the host knows beforehand, for a model's forward."""
        return {"spans": self.batch.spans, "num_valid_H": self.num_valid_BH.numpy().sum(0).tolist()}


@dataclass(frozen=True)
class Models:
    """The trained policy, the frozen reference (None: nothing is compared, or its losses come with the data), how far ahead
    it is asked (`shifted` or `matched`), and the ranks that share a pool."""

    policy: Callable[..., Any]
    reference: Reference | None
    horizon: str
    group: Group


def load_micro_batches(
    batches: Sequence[Batch], first_sample: int, num_heads: int, group_size: int, rank: int, device: torch.device
) -> list[MicroBatch]:
    """This rank's micro-batches of consecutive micro-steps on the device; `first_sample` is the number of the first row
    of the first of them, over all ranks."""
    loaded = []
    for index, batch in enumerate(batches):
        batch = batch.to(device, non_blocking=True)
        num_rows = len(batch.tokens_BT)
        first_row = first_sample + (index * group_size + rank) * num_rows
        rows_B = torch.arange(first_row, first_row + num_rows, device=device)
        targets_BTH, valid_BTH = targets_and_valid(batch.tokens_BT, batch.document_ids_BT, num_heads)
        loaded.append(MicroBatch(batch, targets_BTH, valid_BTH, rows_B, batch.num_valid(num_heads)))
    return loaded


class Planned(NamedTuple):
    """What the data of a step determines of its loss, what it was, and whether any rank said so."""

    step: StepPlan
    consumed: Consumed
    said: bool


def plan(
    micro_batches: Sequence[MicroBatch],
    training: TrainingSettings,
    head_weights: Sequence[float],
    num_sources: int,
    group: Group,
    says: bool = False,
) -> Callable[[], Planned]:
    """Count micro-batches over all ranks, with one all-reduce; what is returned reads the counts, as `plan_step`'s. `says` is
    anything that this rank has to say to the others."""
    flag = torch.tensor([int(says)])
    read = plan_step(
        [micro.num_valid_BH for micro in micro_batches],
        torch.cat([flag, count([micro.batch for micro in micro_batches], num_sources)]),
        pool=training.selection_pool,
        k_percent=training.k_percent,
        normalize_by=training.normalize_by,
        head_weights=head_weights,
        device=micro_batches[0].valid_BTH.device,
        group=group,
    )

    def planned() -> Planned:
        step = read()
        num_saying, *counts = step.data
        return Planned(step, Consumed.of(counts), num_saying > 0)

    return planned


def selective_losses(
    models: Models,
    micro_batches: Sequence[MicroBatch],
    counts: StepPlan,
    training: TrainingSettings,
    prediction: Prediction | None = None,
) -> Iterator[HeadLosses]:
    """The losses of each micro-batch of a step in turn, each made when it is asked for, so that its graph is used up
    before the next one's is built. `prediction` is used by the loss phase `predicted`, and changes only how fast it is."""
    scale_H = on_device(counts.scale_H, torch.float32, micro_batches[0].valid_BTH.device)
    foresees, dense = training.loss_phase == "predicted", training.loss_phase == "dense"
    selects = _selects(models, micro_batches, counts, training, prediction)
    for micro, select in zip(micro_batches, selects, strict=True):
        if not foresees:
            select = Select(select.choose)
        yield models.policy(*micro.inputs, select=select, scale_H=scale_H, dense=dense, **micro.known)


def _selects(
    models: Models,
    micro_batches: Sequence[MicroBatch],
    counts: StepPlan,
    training: TrainingSettings,
    prediction: Prediction | None,
) -> Iterator[Select]:
    """How each micro-batch's pairs are selected, in turn; the reference runs once when each is asked for."""
    one_head = micro_batches[0].valid_BTH.shape[-1] == 1
    compared = models.reference is not None or micro_batches[0].batch.reference_losses_BTC is not None
    if one_head or (training.selection_score == "excess" and not compared):
        for micro in micro_batches:
            yield Select(partial(select_all, valid_BTK=micro.valid_BTH[..., 1:]), _foresee_all)
    elif training.selection_pool == "step" and len(micro_batches) > 1:
        yield from _selected_beforehand(models, micro_batches, counts, training)
    else:
        for index, micro in enumerate(micro_batches):
            valid_BTK, compare = micro.valid_BTH[..., 1:], _comparison(models, micro, training)
            choose: Callable[[Tensor], Selection]
            foresee = None
            if training.selection_pool in SHARED_POOLS:
                num_valid_K, num_selected_K = counts.num_valid_AH[index][1:], counts.pool_selected[index]
                choose = partial(
                    _select_in_micro_step, valid_BTK, num_valid_K, num_selected_K, training.selection_exchange, models.group
                )
                # The pools of a rank have thresholds of its own, or of every row's: there is none to follow.
                level_K = None if prediction is None else prediction.scores(valid_BTK.device)
                if level_K is not None:
                    foresee = partial(compare.surplus, level_K)
            else:
                choose = partial(select_local, valid_BTK=valid_BTK, k_percent=training.k_percent, pool=training.selection_pool)
            yield Select(partial(_compare_and_choose, compare, choose), foresee, training.k_percent)


def _select_in_micro_step(
    valid_BTK: Tensor,
    num_valid_K: Sequence[int],
    num_selected_K: Sequence[int],
    exchange: str,
    group: Group,
    score_BTK: Tensor,
) -> Selection:
    (selection,) = select_shared(score_BTK[None], valid_BTK[None], [num_valid_K], num_selected_K, exchange, group)
    return selection


def _selected_beforehand(
    models: Models, micro_batches: Sequence[MicroBatch], counts: StepPlan, training: TrainingSettings
) -> Iterator[Select]:
    """The pool of a whole step: every micro-batch is scored before the first is trained on."""
    compared = []
    for micro in micro_batches:
        compare = _comparison(models, micro, training)
        # Head 0 does not compete: without valid pairs it costs the scoring pass nothing.
        scored_BTH = torch.cat([torch.zeros_like(micro.valid_BTH[..., :1]), micro.valid_BTH[..., 1:]], dim=-1)
        num_valid_H = micro.known["num_valid_H"]
        with torch.no_grad():
            scored = models.policy(*micro.inputs[:3], scored_BTH, **micro.known | {"num_valid_H": [0, *num_valid_H[1:]]})
        policy_loss_BTK = scored[..., 1:]
        compared.append((compare.scores(policy_loss_BTK), compare.excess(policy_loss_BTK)))
    selections = select_shared(
        torch.stack([score_BTK for score_BTK, _ in compared]),
        torch.stack([micro.valid_BTH[..., 1:] for micro in micro_batches]),
        [valid_H[1:] for valid_H in counts.num_valid_AH],
        counts.pool_selected[0],
        training.selection_exchange,
        models.group,
    )
    for selection, (_, excess_BTK) in zip(selections, compared, strict=True):
        selection = selection._replace(excess_BTK=excess_BTK)
        yield Select(
            partial(_already_selected, selection), partial(_foresee_exactly, selection.selected_BTK), training.k_percent
        )


def _already_selected(selection: Selection, policy_loss_BTK: Tensor) -> Selection:
    return selection


@dataclass(frozen=True)
class Comparison:
    """What a micro-batch's pairs compete by. score: which of the scores; reference_loss_BTK: None without a reference;
    random_BTK: None where nothing is drawn."""

    score: str
    valid_BTK: Tensor
    reference_loss_BTK: Tensor | None
    random_BTK: Tensor | None

    def scores(self, policy_loss_BTK: Tensor) -> Tensor:
        return score(self.score, policy_loss_BTK, _minus(policy_loss_BTK, self.reference_loss_BTK), self.random_BTK)

    def surplus(self, level_K: Tensor, policy_loss_P: Tensor, places_P: Tensor) -> Tensor:
        """By how much some pairs, by their places in the flattened [B, T, K], have a score above `level_K`."""
        reference_P, random_P = (
            None if table_BTK is None else table_BTK.take(places_P) for table_BTK in (self.reference_loss_BTK, self.random_BTK)
        )
        score_P = score(self.score, policy_loss_P, _minus(policy_loss_P, reference_P), random_P)
        return score_P - level_K[places_P % len(level_K)]

    def excess(self, policy_loss_BTK: Tensor) -> Tensor | None:
        """The excess losses, 0 at invalid pairs; None without a reference."""
        excess_BTK = _minus(policy_loss_BTK, self.reference_loss_BTK)
        return None if excess_BTK is None else excess_BTK.where(self.valid_BTK, 0.0)


def _minus(policy_loss: Tensor, reference_loss: Tensor | None) -> Tensor | None:
    return None if reference_loss is None else policy_loss - reference_loss


def _comparison(models: Models, micro: MicroBatch, training: TrainingSettings) -> Comparison:
    """Runs the reference on a micro-batch, unless its losses came with it."""
    valid_BTK = micro.valid_BTH[..., 1:]
    reference_loss_BTK = random_BTK = None
    columns_BTC = micro.batch.reference_losses_BTC
    if models.reference is not None:
        columns_BTC = reference_columns(models.reference, models.horizon, *micro.inputs, **micro.known)
    if columns_BTC is not None:
        reference_loss_BTK = losses_by_head(columns_BTC, models.horizon, micro.valid_BTH.shape[-1])[..., 1:]
    if training.selection_score == "random":
        random_BTK = random_scores(training.selection_seed, micro.rows_B, *valid_BTK.shape[1:])
    return Comparison(training.selection_score, valid_BTK, reference_loss_BTK, random_BTK)


def _compare_and_choose(compare: Comparison, choose: Callable[[Tensor], Selection], policy_loss_BTK: Tensor) -> Selection:
    return choose(compare.scores(policy_loss_BTK))._replace(excess_BTK=compare.excess(policy_loss_BTK))


def _foresee_all(policy_loss_P: Tensor, places_P: Tensor) -> Tensor:
    return torch.zeros_like(policy_loss_P)


def _foresee_exactly(selected_BTK: Tensor, policy_loss_P: Tensor, places_P: Tensor) -> Tensor:
    return selected_BTK.take(places_P).float() - 0.5
