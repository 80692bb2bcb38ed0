"""The metrics of a step or a validation over all ranks: sums on the device, one reduction, then plain numbers.

Everything is a sum divided once by a global count; a mean of ranks' means would weigh ranks with few valid pairs too
much. Sums are float64, counts in them exact. A mean over losses of which one was not finite does not exist: it is None,
and the pair is counted in no sum, so that it spoils nothing but what it belongs to.

Distributions are histograms of `EXCESS_BINS` bins: percentiles read from them are within half a bin (1/32 nat) of the
true ones, for values inside; what lies outside counts in the outermost bins.

Shapes: B rows, T tokens, N = B * T, H heads, K = H - 1 the heads that select, P pairs of such heads, S sources, V bins
of a histogram, C columns of sums, X those of one name.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.mtp import HeadLosses
from pipeline.weighting.exchange import Group, all_reduce_sum

Record = dict[str, Any]
"""One line of metrics.jsonl."""

OF_THE_MACHINE = (
    "time",
    "tokens_per_second",
    "seconds_per_step",
    "seconds_saving",
    "memory_bytes",
    "mfu",
    "data_wait",
)
"""Metrics in which two runs with equal results need not be equal."""

EXCESS_LOWEST, EXCESS_BIN_WIDTH, EXCESS_BINS = -16.0, 1 / 16, 512
"""The histogram of excess losses: 512 bins of 1/16 from -16 to 16, in nats; 12 KiB a source with three such heads."""
PERCENTILES = (10, 50, 90)


class SelectionSums:
    """Sums over the micro-batches of one step or one validation, on the device.

    finite: bool scalar, false once a loss was not finite. bad_rows: for each micro-batch of this rank bool [B, H] of the policy
    and of the reference, true where a loss was not finite. thresholds: of each micro-batch, float32 [K].
    """

    def __init__(self, num_heads: int, num_sources: int, device: torch.device):
        num_selecting = num_heads - 1
        # Made here, because an index made from numbers on the host is copied, and copies wait.
        self.pairs_2P = torch.triu_indices(num_selecting, num_selecting, offset=1, device=device)
        self.sources_S = torch.arange(num_sources, device=device)

        # What is summed for each source, by the names of `Counted`, with the number of columns.
        self.widths = {
            "valid": num_heads,
            "selected": num_heads,
            "bad_loss": num_heads,
            "loss": num_heads,
            "selected_loss": num_heads,
            "bad_excess": num_selecting,
            "excess": num_selecting,
            "predicted_and_selected": num_selecting,
            "predicted_or_selected": num_selecting,
            "both": self.pairs_2P.shape[1],
        }
        zeros_K = torch.zeros(num_selecting, dtype=torch.float64, device=device)
        self.columns_SC = zeros_K.new_zeros(num_sources, sum(self.widths.values()))
        self.histogram_SKV = zeros_K.new_zeros(num_sources, num_selecting, EXCESS_BINS)
        self.threshold_K, self.threshold_weight_K = zeros_K, zeros_K.clone()

        self.trunk_gradient_H: Tensor | None = None
        self.compared = False
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.bad_rows: list[tuple[Tensor, Tensor]] = []
        self.thresholds: list[Tensor] = []

    def add(self, losses: HeadLosses, valid_BTH: Tensor, sources_BT: Tensor) -> None:
        """Add a rank's micro-batch. Nothing here waits for the device."""
        selection, policy_loss_BTH = losses.selection, losses.policy_loss_BTH
        self.compared = selection.excess_BTK is not None
        excess_BTK = torch.zeros_like(policy_loss_BTH[..., 1:]) if selection.excess_BTK is None else selection.excess_BTK

        # Values that are not finite are counted, and are in no sum.
        finite_BTH, finite_BTK = torch.isfinite(policy_loss_BTH), torch.isfinite(excess_BTK)
        bad_reference_BTK = ~finite_BTK & (excess_BTK != torch.inf)
        policy_loss_BTH, excess_BTK = policy_loss_BTH.where(finite_BTH, 0.0), excess_BTK.where(finite_BTK, 0.0)

        # The columns of every pair.
        selected_BTK, has_prediction = selection.selected_BTK, losses.predicted_BTK is not None
        selected_BTH = torch.cat([valid_BTH[..., :1], selected_BTK], dim=-1)
        predicted_BTK = selected_BTK.new_zeros(()) if losses.predicted_BTK is None else losses.predicted_BTK
        one_BTP, other_BTP = (selected_BTK.index_select(-1, heads_P) for heads_P in self.pairs_2P)
        columns = {
            "valid": valid_BTH,
            "selected": selected_BTH,
            "bad_loss": ~finite_BTH,
            "loss": policy_loss_BTH,
            "selected_loss": policy_loss_BTH * selected_BTH,
            "bad_excess": ~finite_BTK,
            "excess": excess_BTK,
            "predicted_and_selected": predicted_BTK & selected_BTK,
            "predicted_or_selected": (predicted_BTK | selected_BTK) & has_prediction,
            "both": one_BTP & other_BTP,
        }

        # Sums by source. A product with ones and zeros, not `index_add_`: its order of summation is always the same.
        is_of_source_SN = sources_BT.flatten() == self.sources_S[:, None]
        columns_BTC = torch.cat([columns[name] for name in self.widths], dim=-1)
        self.columns_SC += is_of_source_SN.double() @ columns_BTC.flatten(0, 1).double()
        if self.compared:
            self._add_to_histogram(excess_BTK, valid_BTH[..., 1:] & finite_BTK, sources_BT)

        # Thresholds, whose mean is weighted by valid pairs.
        weight_K = selection.threshold_weight_K
        self.threshold_K += torch.where(weight_K > 0, selection.threshold_K, 0.0) * weight_K
        self.threshold_weight_K += weight_K
        self.thresholds.append(selection.threshold_K)

        # The micro-batch's part of the rule for numbers that are not finite (`runtime.non_finite`).
        self.bad_rows.append((~finite_BTH.all(1), F.pad(bad_reference_BTK.any(1), (1, 0))))
        self.finite &= finite_BTH.all() & finite_BTK.all() & selection.finite

    def add_trunk_gradients(self, squared_norms: Sequence[tuple[int, Tensor]], world_size: int) -> None:
        """Add the squared norms of the gradients that heads have sent into the trunk, by head. The engine's are `world_size`
        times the objective's, since it averages over ranks (`engine.backward`)."""
        self.trunk_gradient_H = self.columns_SC.new_zeros(self.widths["valid"])
        for head, square in squared_norms:
            self.trunk_gradient_H[head] += square / world_size**2

    def _add_to_histogram(self, excess_BTK: Tensor, counted_BTK: Tensor, sources_BT: Tensor) -> None:
        num_heads = excess_BTK.shape[-1]
        row_BTK = sources_BT[..., None] * num_heads + torch.arange(num_heads, device=sources_BT.device)
        bin_BTK = row_BTK * EXCESS_BINS + excess_bin(excess_BTK)
        self.histogram_SKV.view(-1).scatter_add_(0, bin_BTK.flatten(), counted_BTK.flatten().double())

    def over_ranks(self, group: Group) -> "Totals":
        """Sum over all ranks, with one collective that every rank must join, and one copy to the host."""
        trunk_H = self.threshold_K.new_zeros(0) if self.trunk_gradient_H is None else self.trunk_gradient_H
        parts = [self.columns_SC, self.histogram_SKV, self.threshold_K, self.threshold_weight_K, trunk_H]
        flat = all_reduce_sum(torch.cat([part.flatten() for part in parts]), group).cpu()
        columns, histogram, threshold_K, weight_K, trunk_H = flat.split([part.numel() for part in parts])

        columns_SX = columns.view(self.columns_SC.shape).split(list(self.widths.values()), dim=1)
        by_name = dict(zip(self.widths, columns_SX, strict=True))
        histogram_SKV = histogram.view(self.histogram_SKV.shape)
        by_source = [
            Counted(
                compared=self.compared,
                histogram_KV=histogram_SKV[source],
                **{name: sums_SX[source].tolist() for name, sums_SX in by_name.items()},
            )
            for source in range(len(histogram_SKV))
        ]
        whole = Counted(
            compared=self.compared,
            histogram_KV=histogram_SKV.sum(0),
            **{name: sums_SX.sum(0).tolist() for name, sums_SX in by_name.items()},
        )
        thresholds = [ratio(*of_head) for of_head in zip(threshold_K.tolist(), weight_K.tolist(), strict=True)]
        return Totals(whole, by_source, thresholds, [x if math.isfinite(x) else None for x in trunk_H.sqrt().tolist()])

    def record(self, scale_H: Sequence[float], source_names: Sequence[str], group: Group) -> Record:
        """Return the metrics of these sums; one collective, which every rank must join."""
        return self.over_ranks(group).record(scale_H, source_names)


@dataclass(frozen=True)
class Counted:
    """Counts and sums over the pairs of a source, or of all: lists of a number for each head (`excess`, `bad_excess` and
    those of the prediction for heads 1..., `both`, pairs that two heads select, for each two of these).

    `bad_loss` and `bad_excess` are numbers of valid pairs whose value is not finite; such values are in no sum.
    `compared` is false without a reference.
    """

    compared: bool
    histogram_KV: Tensor
    valid: list[float]
    selected: list[float]
    bad_loss: list[float]
    loss: list[float]
    selected_loss: list[float]
    bad_excess: list[float]
    excess: list[float]
    predicted_and_selected: list[float]
    predicted_or_selected: list[float]
    both: list[float]

    @property
    def all_finite(self) -> bool:
        return not any(self.bad_loss) and not any(self.bad_excess)

    def statistics(self) -> Record:
        """Return the metrics of each head, of each two selecting heads, and overall."""
        record: Record = {}

        # Each head.
        *percentiles, overall = excess_percentiles(torch.cat([self.histogram_KV, self.histogram_KV.sum(0, keepdim=True)]))
        for head, (valid, selected) in enumerate(zip(self.valid, self.selected, strict=True)):
            record[f"loss_head_{head}"] = None if self.bad_loss[head] else ratio(self.loss[head], valid)
            record[f"selected_ratio_head_{head}"] = ratio(selected, valid)
            record[f"selected_count_head_{head}"] = int(selected)
            record[f"valid_count_head_{head}"] = int(valid)
            if head > 0:
                of_head = self._of_heads(slice(head - 1, head), percentiles[head - 1])
                record |= {f"{name}_head_{head}": value for name, value in of_head.items()}

        # Each two heads: pairs that both select, over pairs that either does.
        two_heads = itertools.combinations(range(1, len(self.valid)), 2)
        for (one, other), both in zip(two_heads, self.both, strict=True):
            record[f"agreement_head_{one}_head_{other}"] = ratio(both, self.selected[one] + self.selected[other] - both)

        # Overall.
        record |= self._of_heads(slice(None), overall)
        # Each head is in as many unions as there are others, and what two share is in theirs once.
        either = sum(self.selected[1:]) * (len(self.valid) - 2) - sum(self.both)
        record["agreement"] = ratio(sum(self.both), either)
        record["selected_count"], record["valid_count"] = int(sum(self.selected)), int(sum(self.valid))
        record["selection_ratio"] = ratio(sum(self.selected), sum(self.valid))
        record["heads_per_position"] = ratio(sum(self.selected), self.valid[0])
        return record

    def _of_heads(self, heads: slice, percentiles: Sequence[float | None]) -> Record:
        """Average over the pairs of some selecting heads, given as a slice of 1...: excess, and the policy loss of selected
        and of rejected pairs."""
        valid, selected, loss, selected_loss, bad_loss = (
            sum(numbers[1:][heads]) for numbers in (self.valid, self.selected, self.loss, self.selected_loss, self.bad_loss)
        )
        is_bad = bool(bad_loss or sum(self.bad_excess[heads]))
        values = {
            "excess_mean": ratio(sum(self.excess[heads]), valid * self.compared),
            **{f"excess_p{percent}": value for percent, value in zip(PERCENTILES, percentiles, strict=True)},
            "selected_loss": ratio(selected_loss, selected),
            "rejected_loss": ratio(loss - selected_loss, valid - selected),
        }
        return {name: None if is_bad else value for name, value in values.items()}


@dataclass(frozen=True)
class Totals:
    """Sums over all ranks. thresholds: of heads 1...; a threshold belongs to a pool, so that neither a source nor several
    heads together have one. trunk_grad_norms: of each head, in training."""

    whole: Counted
    by_source: list[Counted]
    thresholds: list[float | None]
    trunk_grad_norms: list[float | None]

    def record(self, scale_H: Sequence[float], source_names: Sequence[str]) -> Record:
        """Return the metrics; `scale_H` is the objective's factor for a selected loss of each head. Without names ("") there
        are none by source."""
        whole = self.whole
        objective = sum(scale * loss for scale, loss in zip(scale_H, whole.selected_loss, strict=True))
        record: Record = {"loss": objective if whole.all_finite else None}
        record |= whole.statistics()
        record |= {f"trunk_grad_norm_head_{head}": norm for head, norm in enumerate(self.trunk_grad_norms)}
        for index, threshold in enumerate(self.thresholds):
            is_bad = whole.bad_loss[index + 1] or whole.bad_excess[index]
            record[f"threshold_head_{index + 1}"] = None if is_bad else threshold
            hits, either = whole.predicted_and_selected[index], whole.predicted_or_selected[index]
            record[f"prediction_hit_rate_head_{index + 1}"] = ratio(hits, either)
        for name, counted in zip(source_names, self.by_source, strict=True):
            if name:
                of_source = counted.statistics() | self._enrichment(counted)
                record |= {f"{key}_source_{name}": value for key, value in of_source.items()}
        return record

    def _enrichment(self, counted: Counted) -> Record:
        """A source's share of each head's selected pairs over its share of the valid ones: above 1 where it is preferred."""
        whole = self.whole
        return {
            f"enrichment_head_{head}": ratio(
                counted.selected[head] * whole.valid[head], counted.valid[head] * whole.selected[head]
            )
            for head in range(1, len(whole.valid))
        }


def excess_bin(excess: Tensor) -> Tensor:
    """Return the histogram bin of each excess, int64; values outside count in the outermost bins."""
    return ((excess - EXCESS_LOWEST) / EXCESS_BIN_WIDTH).floor().clamp(0, EXCESS_BINS - 1).long()


def excess_percentiles(counts_XV: Tensor) -> list[list[float | None]]:
    """Return for each histogram the middles of the bins in which the percentiles lie; None where it is empty."""
    reached_XV = counts_XV.cumsum(-1)
    # In whole numbers, so that rounding cannot make the rank one more.
    found = [(100 * reached_XV >= percent * reached_XV[:, -1:]).int().argmax(-1) for percent in PERCENTILES]
    middles = (EXCESS_LOWEST + (torch.stack(found, dim=-1) + 0.5) * EXCESS_BIN_WIDTH).tolist()
    return [of_one if total else [None] * len(found) for of_one, total in zip(middles, reached_XV[:, -1].tolist(), strict=True)]


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
