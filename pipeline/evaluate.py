"""Evaluate on held-out data with the code that training uses: per-head losses over all valid pairs, and the objective.

A head's loss is in nats a token; exp of it is the perplexity. Both depend on the tokenizer. Bits per byte do not: they are the
next-token losses summed, in bits, over the bytes of text that the predicted tokens stand for,

    bits_per_byte = Σ loss_0 / (ln 2 · Σ bytes)

over the valid pairs of head 0 whose target stands for text (not the end of a document). Where sources are named, each source
has its own losses, perplexities and bits per byte.
"""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.config import Settings
from pipeline.consumption import handle_damage
from pipeline.data.loading.batch import Batch
from pipeline.data.token_bytes import NO_TEXT, UNKNOWN, TokenBytes
from pipeline.micro_step import (
    MicroBatch,
    Models,
    RankFlags,
    comparisons,
    count_step,
    load_micro_batches,
    policy_losses,
    selectors_of,
)
from pipeline.runtime import heartbeat
from pipeline.runtime.distributed import World
from pipeline.runtime.draft_agreement import AgreementSums
from pipeline.runtime.metrics import Record, SelectionSums
from pipeline.runtime.preemption import StoppedError, StopRequest
from pipeline.weighting.exchange import Group, all_reduce_sum
from pipeline.weighting.loss_phase import HeadLosses
from pipeline.weighting.objective import ObjectiveSettings, StepCounts, loss_scale
from pipeline.weighting.prediction import Prediction


def evaluate(
    models: Models,
    batches: Iterable[Batch],
    settings: Settings,
    objective: ObjectiveSettings,
    source_names: Sequence[str],
    token_bytes: TokenBytes,
    world: World,
    device: torch.device,
    stop: StopRequest | None = None,
) -> tuple[Record, list[str]]:
    """Compute held-out losses over all batches of all ranks; collective, and every rank must have equally many batches.

    stop: whose signals end the evaluation, agreed micro-batch by micro-batch.

    Returns:
        A record of metrics. `loss_head_h` is the mean over every valid pair; `loss` is the training objective, with all the
        data taken as one step, each micro-batch over all ranks a pool. A mean with a non-finite loss in it is None. There is no
        `bits_per_byte` if the text of a predicted token is not known.
        A message for each damaged row that padding replaces, over all ranks.

    Raises:
        DataError: on all ranks alike, if rows are damaged and `data.on_corrupt` does not allow so many, or if data could not be
            read.
        StoppedError: on all ranks alike, if one of them has had a signal to stop.
    """
    num_heads, training = settings.model.num_prediction_heads, settings.training
    # The pool `step` spans the micro-steps of an optimizer step. A validation has no such steps, so it pools each micro-batch.
    objective = replace(objective, pool="global" if objective.pool == "step" else objective.pool)
    sums = HeldOutSums(objective, source_names, token_bytes, num_heads, device)
    replaced: list[str] = []
    first_sample = 0

    # Not inference_mode: after it the trained engine's next step raises.
    with torch.no_grad():
        for batch in batches:
            heartbeat.go_on()

            # Data: on the device, counted, damage agreed.
            micro_batches = load_micro_batches([batch], first_sample, num_heads, world.size, world.rank, device)
            first_sample += len(batch.tokens_BT) * world.size
            flags = RankFlags(stop_requested=stop is not None and stop.is_signalled)
            counts, consumed, agreed = count_step(micro_batches, objective, len(source_names), models.group, flags).read()
            if agreed.stop_requested:
                raise StoppedError
            replaced += handle_damage(consumed, [batch], settings.data, len(replaced))

            # Losses, as in training; without gradients nothing is gained by predicting.
            compared = comparisons(models, micro_batches, training)
            selectors = selectors_of(models, micro_batches, compared, counts, training, Prediction())
            (losses,) = policy_losses(models, micro_batches, selectors, counts, training)
            sums.add(micro_batches[0], losses, counts)

    return sums.record(models.group) | {"corrupt_samples": len(replaced)}, replaced


class HeldOutSums:
    """Sums over the micro-batches of a validation, from which its record comes."""

    def __init__(
        self,
        objective: ObjectiveSettings,
        source_names: Sequence[str],
        token_bytes: TokenBytes,
        num_heads: int,
        device: torch.device,
    ):
        self.objective, self.source_names, self.num_heads = objective, source_names, num_heads
        self.selection = SelectionSums(num_heads, len(source_names), device)
        self.agreement = AgreementSums(num_heads, len(source_names), device)
        self.bytes = ByteSums(token_bytes, len(source_names), device)
        self.num_pairs_H = [0] * num_heads
        """The pairs by which each head's objective is divided."""

    def add(self, micro: MicroBatch, losses: HeadLosses, counts: StepCounts) -> None:
        """Add a rank's micro-batch, and its counts over all ranks."""
        self.selection.add(losses, micro.valid_BTH, micro.batch.sources_BT)
        assert losses.choices_BTH is not None, "without gradients the choices are there"
        self.agreement.add(losses.choices_BTH, micro.valid_BTH, micro.batch.sources_BT)
        self.bytes.add(micro, losses)
        counted_H = counts.num_valid if self.objective.normalize_by == "valid" else counts.num_selected_H
        self.num_pairs_H = [total + count for total, count in zip(self.num_pairs_H, counted_H, strict=True)]

    def record(self, group: Group) -> Record:
        """Return the metrics over all ranks; collective."""
        scale_H = loss_scale(self.num_pairs_H, self.objective.head_weights)
        record = self.selection.record(scale_H, self.source_names, group)
        # Without gradients nothing is predicted, so a hit rate would mean nothing.
        record = {key: value for key, value in record.items() if not key.startswith("prediction_hit_rate")}
        losses = [(key, loss) for key, loss in record.items() if key.startswith("loss_head_")]
        record |= {key.replace("loss", "perplexity", 1): _perplexity(loss) for key, loss in losses}
        return record | self.agreement.record(self.source_names, group) | self.bytes.record(self.source_names, group)


def losses_of_batch(policy: Callable[..., Tensor], batch: Batch, num_heads: int, device: torch.device) -> list[float]:
    """Compute each head's mean loss over the valid pairs of one batch, which is the same on all ranks; collective."""
    (micro,) = load_micro_batches([batch], 0, num_heads, 1, 0, device)
    with torch.no_grad():
        loss_BTH = policy(*micro.inputs, **micro.known)
    sums_H = loss_BTH.where(micro.valid_BTH, 0.0).double().sum((0, 1))
    return (sums_H / micro.valid_BTH.sum((0, 1)).clamp(min=1)).tolist()


class ByteSums:
    """Sums for the bits per byte of a validation, on the device, by source: nats, bytes, targets whose text is not known, and
    losses that are not finite."""

    def __init__(self, token_bytes: TokenBytes, num_sources: int, device: torch.device):
        self.lengths_V = torch.from_numpy(token_bytes.lengths_V).to(device)
        self.opens_with_space = token_bytes.opens_with_space
        self.sources_S = torch.arange(num_sources, device=device)
        self.sums_S4 = torch.zeros(num_sources, 4, dtype=torch.float64, device=device)

    def add(self, micro: MicroBatch, losses: HeadLosses) -> None:
        """Add a rank's micro-batch. Nothing here waits for the device."""
        bytes_BT = self.lengths_V[micro.targets_BTH[..., 0]]
        counted_BT = micro.valid_BTH[..., 0] & (bytes_BT != NO_TEXT)
        if self.opens_with_space:
            # After a token without text, which begins a document, comes a space that is not in the text.
            counted_BT &= self.lengths_V[micro.batch.tokens_BT] != NO_TEXT

        # Sums by source, by a product with ones and zeros: what is not finite must not be in it.
        nats_BT = losses.policy_loss_BTH[..., 0].double()
        finite_BT = nats_BT.isfinite()
        parts = [nats_BT.where(counted_BT & finite_BT, 0.0), bytes_BT.double().where(counted_BT, 0.0)]
        parts += [(counted_BT & bad_BT).double() for bad_BT in (bytes_BT == UNKNOWN, ~finite_BT)]
        is_of_source_SN = micro.batch.sources_BT.flatten() == self.sources_S[:, None]
        self.sums_S4 += is_of_source_SN.double() @ torch.stack(parts, dim=-1).flatten(0, 1)

    def record(self, source_names: Sequence[str], group: Group) -> Record:
        """Return the metrics `bits_per_byte` that are known; one collective, which every rank must join. Without names ("")
        there are none by source."""
        sums_S4 = all_reduce_sum(self.sums_S4, group).cpu()
        by_source = [(f"_source_{name}", sums) for name, sums in zip(source_names, sums_S4, strict=True) if name]
        of_all = [("", sums_S4.sum(0)), *by_source]
        return {
            f"bits_per_byte{suffix}": None if num_bad else nats / math.log(2) / num_bytes
            for suffix, (nats, num_bytes, num_unknown, num_bad) in ((suffix, sums.tolist()) for suffix, sums in of_all)
            if num_bytes and not num_unknown
        }


def _perplexity(loss: float | None) -> float | None:
    """exp(loss); None where there is none, or where it is beyond the largest number."""
    return None if loss is None or loss > math.log(sys.float_info.max) else math.exp(loss)
