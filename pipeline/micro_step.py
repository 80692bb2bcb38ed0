"""One micro-batch from tokens to losses: reference, policy hidden states, per-token losses, exchange, selection, loss.

Training and validation both go through `selective_losses`, so what is validated is what is trained.

Shapes: B rows, T tokens, H heads, K = H - 1 the heads that select.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config import TrainingSettings
from pipeline.data.batch import Batch, targets_and_valid
from pipeline.model.mtp import HeadLosses
from pipeline.model.reference import Reference, reference_losses
from pipeline.weighting.exchange import Group
from pipeline.weighting.objective import StepPlan, plan_step
from pipeline.weighting.selection import Select, select_all, select_pairs


@dataclass(frozen=True)
class MicroBatch:
    """A batch on the device, with what each head has to predict in it (int64, bool [B, T, H])."""

    batch: Batch
    targets_BTH: Tensor
    valid_BTH: Tensor


@dataclass(frozen=True)
class Models:
    """The trained policy, the frozen reference (None: nothing is selected against), and the ranks that share a pool."""

    policy: Callable[..., HeadLosses]
    reference: Reference | None
    group: Group

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)


def load_micro_batch(batch: Batch, num_heads: int, device: torch.device) -> MicroBatch:
    batch = batch.to(device, non_blocking=True)
    return MicroBatch(batch, *targets_and_valid(batch.tokens_BT, batch.document_ids_BT, num_heads))


def plan(
    micro_batches: Sequence[MicroBatch], training: TrainingSettings, head_weights: Sequence[float], group: Group
) -> StepPlan:
    """What the data of these micro-batches determines of their loss, over all ranks; one all-reduce."""
    num_tokens = torch.stack([(micro.batch.document_ids_BT >= 0).sum() for micro in micro_batches]).sum()
    return plan_step(
        [micro.valid_BTH for micro in micro_batches],
        num_tokens,
        k_percent=training.k_percent,
        normalize_by=training.normalize_by,
        head_weights=head_weights,
        group=group,
    )


def selective_losses(models: Models, micro: MicroBatch, num_selected_H: Sequence[int], scale_H: Sequence[float]) -> HeadLosses:
    """Run the reference and the policy once each and select; `num_selected_H` is the number of pairs to select over
    all ranks, `scale_H` the objective's factor for a selected loss of each head."""
    inputs = (micro.batch.tokens_BT, micro.batch.document_ids_BT, micro.targets_BTH, micro.valid_BTH)
    return models.policy(
        *inputs,
        select=_selector(models, micro, num_selected_H),
        scale_H=torch.tensor(scale_H, dtype=torch.float32, device=micro.valid_BTH.device),
    )


def _selector(models: Models, micro: MicroBatch, num_selected_H: Sequence[int]) -> Select:
    valid_BTK = micro.valid_BTH[..., 1:]
    if models.reference is None:
        return partial(select_all, valid_BTK=valid_BTK)
    batch = micro.batch
    reference_loss_BTH = reference_losses(
        models.reference, batch.tokens_BT, batch.document_ids_BT, micro.targets_BTH, micro.valid_BTH
    )
    return partial(
        select_pairs,
        reference_loss_BTK=reference_loss_BTH[..., 1:],
        valid_BTK=valid_BTK,
        num_selected_K=num_selected_H[1:],
        group=models.group,
        rank=models.rank,
    )
