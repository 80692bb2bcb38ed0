"""What a step or a validation did, over all ranks: sums on the device, one reduction, then plain numbers.

Everything is a sum divided once by a global count; a mean of ranks' means would weigh ranks with few valid pairs too
much. Sums are float64, counts in them exact.

Shapes: B rows, T tokens, H heads, K = H - 1 the heads that select, S sources.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.weighting.exchange import Group, all_reduce_sum
from pipeline.weighting.loss_phase import HeadLosses

Record = dict[str, Any]
"""One line of metrics.jsonl."""


EXCESS_LOWEST, EXCESS_BIN_WIDTH, EXCESS_BINS = -16.0, 1 / 16, 512
"""The histogram of excess losses: 512 bins of 1/16 from -16 to 16, in nats."""
PERCENTILES = (10, 50, 90)


class SelectionSums:
    """Sums over the micro-batches of one step or one validation. `finite` is false once a loss was not; `bad_rows` says
    for each micro-batch of this rank in which rows and heads, bool [B, H]; `thresholds` its thresholds, [K]."""

    def __init__(self, num_heads: int, num_sources: int, device: torch.device):
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.valid_SH = zeros(num_sources, num_heads)
        self.selected_SH = zeros(num_sources, num_heads)
        self.policy_loss_H = zeros(num_heads)
        self.selected_loss_H = zeros(num_heads)
        self.excess_K = zeros(num_heads - 1)
        self.threshold_K = zeros(num_heads - 1)
        self.threshold_weight_K = zeros(num_heads - 1)
        self.compared_K = zeros(num_heads - 1)
        self.foreseen_rightly_K = zeros(num_heads - 1)
        self.foreseen_or_selected_K = zeros(num_heads - 1)
        self.excess_KV = zeros(num_heads - 1, EXCESS_BINS)
        self.both_selected_KK = zeros(num_heads - 1, num_heads - 1)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.bad_rows: list[Tensor] = []
        self.thresholds: list[Tensor] = []

    def add(self, losses: HeadLosses, valid_BTH: Tensor, sources_BT: Tensor) -> None:
        """Add a rank's micro-batch."""
        selected_BTH = torch.cat([valid_BTH[..., :1], losses.selection.selected_BTK], dim=-1)
        finite_BTH = torch.isfinite(losses.policy_loss_BTH)
        policy_loss_BTH = torch.where(finite_BTH, losses.policy_loss_BTH, 0.0).double()
        source_N = sources_BT.flatten()
        self.valid_SH.index_add_(0, source_N, valid_BTH.flatten(0, 1).double())
        self.selected_SH.index_add_(0, source_N, selected_BTH.flatten(0, 1).double())
        self.policy_loss_H += policy_loss_BTH.sum((0, 1))
        self.selected_loss_H += (policy_loss_BTH * selected_BTH).sum((0, 1))
        chosen_NK = losses.selection.selected_BTK.flatten(0, 1).double()
        self.both_selected_KK += chosen_NK.T @ chosen_NK
        if losses.foreseen_BTK is not None:
            selected_BTK = losses.selection.selected_BTK
            self.foreseen_rightly_K += (losses.foreseen_BTK & selected_BTK).sum((0, 1))
            self.foreseen_or_selected_K += (losses.foreseen_BTK | selected_BTK).sum((0, 1))
        weight_K, threshold_K = losses.selection.threshold_weight_K, losses.selection.threshold_K
        self.threshold_K += torch.where(weight_K > 0, threshold_K.double() * weight_K, 0.0)
        self.threshold_weight_K += weight_K
        self.thresholds.append(threshold_K)
        if losses.selection.excess_BTK is not None:
            excess_BTK = losses.selection.excess_BTK
            usable_BTK = valid_BTH[..., 1:] & torch.isfinite(excess_BTK)
            self.excess_K += torch.where(usable_BTK, excess_BTK, 0.0).double().sum((0, 1))
            bins_KN = excess_bin(torch.where(usable_BTK, excess_BTK, 0.0)).flatten(0, 1).T
            self.excess_KV.scatter_add_(1, bins_KN, usable_BTK.flatten(0, 1).T.double())
            self.compared_K += valid_BTH[..., 1:].sum((0, 1))
        if losses.selection.excess_BTK is not None:
            finite_BTH = finite_BTH & F.pad(torch.isfinite(losses.selection.excess_BTK), (1, 0), value=True)
        self.bad_rows.append(~finite_BTH.all(1))
        self.finite &= finite_BTH.all() & losses.selection.finite

    def record(self, scale_H: Sequence[float], source_names: Sequence[str], group: Group) -> Record:
        """The metrics of these sums; `scale_H` is the objective's factor for a selected loss of each head. One
        collective, which every rank must join."""
        by_source = [self.valid_SH, self.selected_SH]
        by_head = [self.policy_loss_H, self.selected_loss_H]
        by_selecting_head = [self.excess_K, self.compared_K, self.threshold_K, self.threshold_weight_K]
        by_selecting_head += [self.foreseen_rightly_K, self.foreseen_or_selected_K]
        distributions = [self.excess_KV, self.both_selected_KK]
        parts = [*by_source, *by_head, *by_selecting_head, *distributions]
        flat = all_reduce_sum(torch.cat([part.flatten() for part in parts]), group).cpu()
        reduced = flat.split([part.numel() for part in parts])
        valid_SH, selected_SH = (part.view(self.valid_SH.shape) for part in reduced[:2])
        loss_H, selected_loss_H, excess_K, compared_K, threshold_K, weight_K = (part.tolist() for part in reduced[2:8])
        rightly_K, foreseen_K = (part.tolist() for part in reduced[8:10])
        excess_KV, both_KK = (part.view(like.shape) for part, like in zip(reduced[10:], distributions, strict=True))
        valid_H, selected_H = valid_SH.sum(0).tolist(), selected_SH.sum(0).tolist()
        record: Record = {"loss": sum(scale * loss for scale, loss in zip(scale_H, selected_loss_H, strict=True))}
        for head, (valid, selected) in enumerate(zip(valid_H, selected_H, strict=True)):
            record[f"loss_head_{head}"] = ratio(loss_H[head], valid)
            record[f"selected_ratio_head_{head}"] = ratio(selected, valid)
            record[f"selected_count_head_{head}"] = int(selected)
            record[f"valid_count_head_{head}"] = int(valid)
        for index, head in enumerate(range(1, len(loss_H))):
            record[f"threshold_head_{head}"] = ratio(threshold_K[index], weight_K[index])
            record[f"excess_mean_head_{head}"] = ratio(excess_K[index], compared_K[index])
            record[f"prediction_hit_rate_head_{head}"] = ratio(rightly_K[index], foreseen_K[index])
            record |= {f"excess_p{p}_head_{head}": percentile(excess_KV[index].tolist(), p) for p in PERCENTILES}
            record[f"selected_loss_head_{head}"] = ratio(selected_loss_H[head], selected_H[head])
            rejected = valid_H[head] - selected_H[head]
            record[f"rejected_loss_head_{head}"] = ratio(loss_H[head] - selected_loss_H[head], rejected)
            for other in range(head + 1, len(loss_H)):
                both = both_KK[index, other - 1].item()
                record[f"agreement_head_{head}_head_{other}"] = ratio(both, selected_H[head] + selected_H[other] - both)
        record["selection_ratio"] = ratio(sum(selected_H), sum(valid_H))
        record["heads_per_position"] = ratio(sum(selected_H), valid_H[0])
        if any(source_names):
            record |= _by_source(source_names, valid_SH.tolist(), selected_SH.tolist())
        return record


def excess_bin(excess: Tensor) -> Tensor:
    """int64 number of the histogram bin of each excess; what lies outside counts in the outermost bin."""
    return ((excess - EXCESS_LOWEST) / EXCESS_BIN_WIDTH).floor().clamp(0, EXCESS_BINS - 1).long()


def percentile(counts: Sequence[float], percent: float) -> float | None:
    """The middle of the bin in which the value of that rank lies: within half a bin's width of the true percentile, for
    values inside the histogram."""
    needed = percent / 100 * sum(counts)
    for number, reached in enumerate(itertools.accumulate(counts)):
        if reached >= needed > 0:
            return EXCESS_LOWEST + (number + 0.5) * EXCESS_BIN_WIDTH
    return None


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _by_source(names: Sequence[str], valid_SH: list[list[float]], selected_SH: list[list[float]]) -> Record:
    record: Record = {}
    for name, valid_H, selected_H in zip(names, valid_SH, selected_SH, strict=True):
        for head, (valid, selected) in enumerate(zip(valid_H, selected_H, strict=True)):
            record[f"selected_ratio_head_{head}_source_{name}"] = ratio(selected, valid)
            record[f"selected_count_head_{head}_source_{name}"] = int(selected)
            record[f"valid_count_head_{head}_source_{name}"] = int(valid)
    return record
