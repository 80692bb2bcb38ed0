"""Selective weights from dense logits: the plain API, and the oracle for everything faster.

It shares the selection itself with training (`select_shared`) and computes the losses from full logits. Labels are the tokens
themselves, unshifted: head h at position t predicts labels[t + 1 + h]. A pair is invalid where its target lies beyond the row
or is -100, or where its position or its target has attention mask 0.

Wrong inputs on one rank are an error on all ranks of its group: problems are exchanged before any rank waits for the others'
numbers.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pipeline.weighting.exchange import Group, all_reduce_sum
from pipeline.weighting.pools import select_shared
from pipeline.weighting.selection import num_selected, shifted_reference_loss

IGNORED_LABEL = -100
_NOT_FINITE = "policy_logits or ref_logits give a loss that is NaN or infinite on a valid pair"
_NOT_COMPARABLE = (torch.uint16, torch.uint32, torch.uint64)


def compute_mtp_selective_weights(
    policy_logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    attention_mask: Tensor,
    k_percent: float = 0.6,
    group: Group = None,
) -> tuple[Tensor, dict[str, int | float]]:
    """Compute the weights of all pairs under selective multi-token prediction (arXiv 2404.19737, 2404.07965).

    Args:
        policy_logits: [batch, seq, n_future, vocab], floating point.
        ref_logits: [batch, seq, vocab], of a next-token model.
        labels: [batch, seq], integer token ids, -100 where there is no target.
        attention_mask: [batch, seq], 0 on padding.
        k_percent: fraction of valid pairs that each head but the first trains on, in (0, 1].
        group: ranks that share one pool; every rank calls with tensors of equal shape. None: this process alone.

    Returns:
        weights: float32 [batch, seq, n_future], 0 or 1; head 0 has 1 on every valid pair.
        stats: as `compute_rho1_stats` gives them, over the whole group.

    Raises:
        ValueError: shapes, dtypes or ranges do not fit, on any rank of the group and then on all, or a valid pair's loss
            is not finite on any of them.
    """
    problem = _problem_with_inputs(policy_logits, ref_logits, labels, attention_mask, k_percent)
    in_common = {} if problem else {"policy_logits": list(policy_logits.shape), "k_percent": k_percent}
    _raise_on_all_ranks(problem, in_common, group)
    excess_BTH, valid_BTH = _excess_and_valid(policy_logits, ref_logits, labels, attention_mask)

    # The exact top of each head over the group.
    counts = all_reduce_sum(valid_BTH.sum((0, 1)), group).tolist()
    # Head 0 goes along, with all its pairs, so that its excess is checked as the others' is.
    num_selected_H = [counts[0], *(num_selected(k_percent, count) for count in counts[1:])]
    (selection,) = select_shared(excess_BTH[None], valid_BTH[None], [counts], num_selected_H, "auto", group)
    if not selection.finite:
        raise ValueError(_NOT_FINITE)

    weights = selection.selected_BTK.float()
    return weights, compute_rho1_stats(excess_BTH, weights, attention_mask, group)


def excess_losses(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:
    """Compute the excess losses that `compute_rho1_stats` takes: policy minus reference loss of each pair's target.

    Args: as of `compute_mtp_selective_weights`.

    Returns:
        float32 [batch, seq, n_future], without a gradient; 0 at invalid pairs. It is the negative zero there, which equals 0,
        and by which `compute_rho1_stats` tells a pair whose label is -100 from one whose losses are equal.

    Raises:
        ValueError: shapes, dtypes or ranges do not fit, or a valid pair's loss is not finite.
    """
    problem = _problem_with_inputs(policy_logits, ref_logits, labels, attention_mask, k_percent=1.0)
    if problem is not None:
        raise ValueError(problem)
    excess_BTH, _ = _excess_and_valid(policy_logits, ref_logits, labels, attention_mask)
    if not excess_BTH.isfinite().all():
        raise ValueError(_NOT_FINITE)
    return excess_BTH


def _excess_and_valid(
    policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """(excess_BTH, with the negative zero at invalid pairs and nowhere else; valid_BTH)."""
    # Targets and validity of each pair.
    num_heads = policy_logits.shape[2]
    targets_BTH = _shifted(labels.long(), num_heads, fill=IGNORED_LABEL)
    valid_BTH = _valid_by_mask(attention_mask, num_heads) & (targets_BTH != IGNORED_LABEL)

    # excess = policy loss - reference loss of the token that the head predicts.
    with torch.no_grad():
        policy_loss_BTH = _cross_entropy(policy_logits, targets_BTH)
        next_token_loss_BT = _cross_entropy(ref_logits, targets_BTH[..., 0])
        reference_loss_BTH = shifted_reference_loss(F.pad(next_token_loss_BT[:, :-1], (1, 0)), num_heads)
        # Adding 0.0 turns the negative zero of a valid pair into the positive one.
        excess_BTH = policy_loss_BTH - reference_loss_BTH + 0.0
    return excess_BTH.masked_fill(~valid_BTH, -0.0), valid_BTH


def compute_rho1_stats(
    excess_loss: Tensor, weights: Tensor, attention_mask: Tensor, group: Group = None
) -> dict[str, int | float]:
    """Compute the statistics of a selection over all ranks of `group`.

    Args:
        excess_loss: [batch, seq, n_future], policy minus reference loss, as `excess_losses` gives it. NaN or the negative zero
            marks a pair without a target; where the mask says so already, the value does not matter.
        weights: [batch, seq, n_future], 0 or 1.
        attention_mask: [batch, seq], 0 on padding.

    Returns:
        head_{i}_count (selected pairs), head_{i}_ratio (of the valid pairs), head_{i}_excess_mean (over valid pairs),
        head_{i}_threshold (smallest selected excess; i >= 1), selection_ratio (over all heads) and
        avg_heads_per_position (selected pairs per valid pair of head 0). All are numbers: where a head has no valid pair its
        count is 0, ratios are 0.0, mean and threshold NaN.

    Raises:
        ValueError: shapes, dtypes or ranges do not fit, on any rank of the group and then on all.
    """
    problem = _problem_with_selection(excess_loss, weights, attention_mask)
    _raise_on_all_ranks(problem, {} if problem else {"n_future": list(weights.shape[2:])}, group)

    # Sums and smallest selected excess over all ranks.
    num_heads = weights.shape[2]
    has_target_BTH = ~excess_loss.isnan() & ~((excess_loss == 0) & excess_loss.signbit())
    valid_BTH = _valid_by_mask(attention_mask, num_heads) & has_target_BTH
    selected_BTH = (weights > 0) & valid_BTH
    excess_BTH = torch.where(valid_BTH, excess_loss.double(), 0.0)
    sums_3H = torch.stack([valid_BTH.sum((0, 1)), selected_BTH.sum((0, 1)), excess_BTH.sum((0, 1))])
    all_reduce_sum(sums_3H, group)
    smallest_H = excess_loss.float().masked_fill(~selected_BTH, torch.inf).amin((0, 1))
    if group is not None:
        dist.all_reduce(smallest_H, op=dist.ReduceOp.MIN, group=group)

    valid, selected, excess = sums_3H.tolist()
    stats: dict[str, int | float] = {}
    for head in range(num_heads):
        stats[f"head_{head}_count"] = int(selected[head])
        stats[f"head_{head}_ratio"] = _quotient(selected[head], valid[head], 0.0)
        stats[f"head_{head}_excess_mean"] = _quotient(excess[head], valid[head], math.nan)
        if head > 0:
            stats[f"head_{head}_threshold"] = smallest_H[head].item() if selected[head] else math.nan
    stats["selection_ratio"] = _quotient(sum(selected), sum(valid), 0.0)
    stats["avg_heads_per_position"] = _quotient(sum(selected), valid[0], 0.0)
    return stats


def _quotient(part: float, whole: float, of_nothing: float) -> float:
    return part / whole if whole else of_nothing


def _shifted(values_BT: Tensor, num_heads: int, fill: int) -> Tensor:
    """[b, t, h] = values[b, t + 1 + h], `fill` beyond the row."""
    return F.pad(values_BT, (0, num_heads), value=fill).unfold(1, num_heads, 1)[:, 1:]


def _valid_by_mask(attention_mask: Tensor, num_heads: int) -> Tensor:
    present_BT = attention_mask != 0
    return present_BT[..., None] & _shifted(present_BT.long(), num_heads, fill=0).bool()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """float32 losses of the targets' shape, 0 where the target is ignored; a row of the batch at a time."""
    rows = [
        F.cross_entropy(row_logits.float().flatten(0, -2), row_targets.flatten(), ignore_index=IGNORED_LABEL, reduction="none")
        for row_logits, row_targets in zip(logits, targets, strict=True)
    ]
    return torch.stack(rows).view(targets.shape)


def _raise_on_all_ranks(problem: str | None, common: dict[str, Any], group: Group) -> None:
    """Raise a ValueError if any rank has a problem, or if ranks differ in what they must have in common."""
    if group is None:
        if problem is not None:
            raise ValueError(problem)
        return
    by_rank: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(by_rank, (problem, common), group=group)
    problems = [f"rank {rank}: {found}" for rank, (found, _) in enumerate(by_rank) if found is not None]
    for name in common if not problems else ():
        values = [in_common[name] for _, in_common in by_rank]
        if any(value != values[0] for value in values):
            problems.append(f"{name}: expected the same shape or value on all ranks of the group, got {values}")
    if problems:
        raise ValueError("; ".join(problems))


def _problem_with_inputs(
    policy_logits: Tensor, ref_logits: Tensor, labels: Tensor, attention_mask: Tensor, k_percent: float
) -> str | None:
    tensors = {"policy_logits": policy_logits, "ref_logits": ref_logits, "labels": labels, "attention_mask": attention_mask}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            return f"{name}: expected a tensor, got {type(tensor).__name__}"

    # Shapes and devices.
    if policy_logits.ndim != 4 or 0 in policy_logits.shape:
        return f"policy_logits: expected [batch, seq, n_future, vocab], none of them 0, got {list(policy_logits.shape)}"
    batch, seq, _, vocab = policy_logits.shape
    for name, tensor, shape in (
        ("ref_logits", ref_logits, [batch, seq, vocab]),
        ("labels", labels, [batch, seq]),
        ("attention_mask", attention_mask, [batch, seq]),
    ):
        if list(tensor.shape) != shape:
            return f"{name}: expected shape {shape} to fit policy_logits, got {list(tensor.shape)}"
        if tensor.device != policy_logits.device:
            return f"{name}: expected it on {policy_logits.device}, where policy_logits are, got {tensor.device}"

    # Dtypes and ranges.
    for name, tensor in (("policy_logits", policy_logits), ("ref_logits", ref_logits)):
        if not tensor.is_floating_point():
            return f"{name}: expected a floating-point tensor, got {tensor.dtype}"
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        return f"labels: expected integer token ids, got {labels.dtype}"
    if labels.dtype in _NOT_COMPARABLE:
        return f"labels: torch cannot compare {labels.dtype}; pass labels.long()"
    if isinstance(k_percent, bool) or not isinstance(k_percent, (int, float)) or not 0 < k_percent <= 1:
        return f"k_percent: expected a fraction in (0, 1], got {k_percent!r}"
    if attention_mask.dtype in _NOT_COMPARABLE:
        return f"attention_mask: torch cannot compare {attention_mask.dtype}; pass attention_mask.long()"

    # Values.
    neither = (attention_mask != 0) & (attention_mask != 1)
    if neither.any():
        return f"attention_mask: expected 1 on tokens and 0 on padding, got {attention_mask[neither][0].item()}"
    # As int64: -100 in 8 unsigned bits would be 156.
    labels = labels.long()
    outside = (labels != IGNORED_LABEL) & ((labels < 0) | (labels >= vocab))
    if outside.any():
        return f"labels: expected ids in [0, {vocab}) or {IGNORED_LABEL}, got {labels[outside][0].item()}"
    return None


def _problem_with_selection(excess_loss: Tensor, weights: Tensor, attention_mask: Tensor) -> str | None:
    for name, tensor in {"excess_loss": excess_loss, "weights": weights, "attention_mask": attention_mask}.items():
        if not isinstance(tensor, Tensor):
            return f"{name}: expected a tensor, got {type(tensor).__name__}"

    fits = excess_loss.ndim == 3 and excess_loss.shape == weights.shape and attention_mask.shape == weights.shape[:2]
    if not fits or 0 in weights.shape:
        return (
            "expected excess_loss and weights [batch, seq, n_future] and attention_mask [batch, seq], none of them 0, got "
            f"{list(excess_loss.shape)}, {list(weights.shape)} and {list(attention_mask.shape)}"
        )

    if not excess_loss.is_floating_point():
        return f"excess_loss: expected a floating-point tensor, got {excess_loss.dtype}"
    for name, tensor in {"weights": weights, "attention_mask": attention_mask}.items():
        neither = (tensor != 0) & (tensor != 1)
        if neither.any():
            return f"{name}: expected 0 or 1, got {tensor[neither][0].item()}"

    if excess_loss.isinf().any():
        return "excess_loss: expected finite values, or NaN where there is no target, got an infinite one"
    return None
