"""The dense API against loops written by hand."""

import math

import pytest
import torch
import torch.distributed as dist

from pipeline.weighting.rho1 import compute_mtp_selective_weights, compute_rho1_stats
from tests.ranks import run_ranks

BATCH, SEQ, HEADS, VOCAB = 3, 12, 4, 11


def inputs(seed: int = 0, batch: int = BATCH) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    policy_logits = 2 * torch.randn(batch, SEQ, HEADS, VOCAB, generator=generator)
    ref_logits = 2 * torch.randn(batch, SEQ, VOCAB, generator=generator)
    labels = torch.randint(VOCAB, (batch, SEQ), generator=generator)
    attention_mask = torch.ones(batch, SEQ, dtype=torch.long)
    attention_mask[0, 9:] = 0
    labels[1, 4] = -100
    return policy_logits, ref_logits, labels, attention_mask


def losses_by_hand(policy_logits, ref_logits, labels, attention_mask) -> dict[int, dict[tuple[int, int], tuple[float, float]]]:
    """head -> (row, position) -> (policy loss, reference loss), valid pairs only."""
    found: dict[int, dict[tuple[int, int], tuple[float, float]]] = {h: {} for h in range(HEADS)}
    for b in range(len(labels)):
        for t in range(SEQ):
            for h in range(HEADS):
                j = t + 1 + h
                if j >= SEQ or labels[b, j] == -100 or not attention_mask[b, t] or not attention_mask[b, j]:
                    continue
                policy = -policy_logits[b, t, h].log_softmax(-1)[labels[b, j]].item()
                reference = -ref_logits[b, j - 1].log_softmax(-1)[labels[b, j]].item()
                found[h][b, t] = (policy, reference)
    return found


def weights_by_hand(losses, k_percent: float) -> torch.Tensor:
    weights = torch.zeros(1 + max(b for b, _ in losses[0]), SEQ, HEADS)
    for h, pairs in losses.items():
        count = len(pairs) if h == 0 else max(1, math.floor(k_percent * len(pairs) + 0.5))
        order = sorted(pairs, key=lambda place: (-(pairs[place][0] - pairs[place][1]), place))
        for b, t in order[:count]:
            weights[b, t, h] = 1.0
    return weights


@pytest.mark.parametrize("k_percent", [0.01, 0.3, 0.6, 1.0])
def test_weights_and_statistics_equal_a_loop_written_by_hand(k_percent: float) -> None:
    arguments = inputs()
    losses = losses_by_hand(*arguments)
    weights, stats = compute_mtp_selective_weights(*arguments, k_percent=k_percent)
    expected = weights_by_hand(losses, k_percent)
    assert torch.equal(weights, expected)
    for h, pairs in losses.items():
        excess = {place: policy - reference for place, (policy, reference) in pairs.items()}
        chosen = [value for (b, t), value in excess.items() if expected[b, t, h]]
        assert stats[f"head_{h}_count"] == len(chosen)
        assert stats[f"head_{h}_ratio"] == len(chosen) / len(pairs)
        assert stats[f"head_{h}_excess_mean"] == pytest.approx(sum(excess.values()) / len(excess), abs=1e-6)
        if h:
            assert stats[f"head_{h}_threshold"] == pytest.approx(min(chosen), abs=1e-6)
    num_valid = sum(len(pairs) for pairs in losses.values())
    assert stats["selection_ratio"] == expected.sum().item() / num_valid
    assert stats["avg_heads_per_position"] == expected.sum().item() / len(losses[0])


def test_mtp_selective_weights_head0_always_selected() -> None:
    policy_logits, ref_logits, labels, attention_mask = inputs()
    weights, stats = compute_mtp_selective_weights(policy_logits, ref_logits, labels, attention_mask, k_percent=0.1)
    for b in range(BATCH):
        for t in range(SEQ):
            valid = t + 1 < SEQ and labels[b, t + 1] != -100 and attention_mask[b, t] and attention_mask[b, t + 1]
            assert weights[b, t, 0] == float(bool(valid))
    assert stats["head_0_ratio"] == 1.0
    assert "head_0_threshold" not in stats


def test_mtp_selective_weights_topk_ratio() -> None:
    generator = torch.Generator().manual_seed(3)
    policy_logits = torch.randn(8, 256, HEADS, VOCAB, generator=generator)
    ref_logits = torch.randn(8, 256, VOCAB, generator=generator)
    labels = torch.randint(VOCAB, (8, 256), generator=generator)
    weights, stats = compute_mtp_selective_weights(policy_logits, ref_logits, labels, torch.ones(8, 256), k_percent=0.6)
    for h in range(1, HEADS):
        num_valid = 8 * (256 - 1 - h)
        assert weights[..., h].sum().item() == stats[f"head_{h}_count"] == math.floor(0.6 * num_valid + 0.5)
        assert stats[f"head_{h}_ratio"] == pytest.approx(0.6, abs=1 / num_valid)
    assert 0.69 < stats["selection_ratio"] < 0.71


def test_signed_excess_loss() -> None:
    """A token that the policy already knows better than the reference has a large negative excess and stays out; by
    absolute value it would come first."""
    labels = torch.zeros(1, 4, dtype=torch.long)
    policy_logits = torch.zeros(1, 4, 2, VOCAB)
    ref_logits = torch.zeros(1, 4, VOCAB)
    policy_logits[0, 0, 1, 0] = 20.0  # Head 1 at position 0 predicts token 2 with certainty: excess about -2.4.
    policy_logits[0, 1, 1, 0] = -1.0  # Head 1 at position 1 is a little worse than the reference at token 3.
    weights, stats = compute_mtp_selective_weights(policy_logits, ref_logits, labels, torch.ones(1, 4), k_percent=0.5)
    assert weights[0, :, 1].tolist() == [0.0, 1.0, 0.0, 0.0]
    assert stats["head_1_threshold"] > 0 > stats["head_1_excess_mean"]


def test_half_precision_logits_and_int32_labels_are_compared_in_float32() -> None:
    policy_logits, ref_logits, labels, attention_mask = inputs()
    weights, _ = compute_mtp_selective_weights(policy_logits.bfloat16(), ref_logits.bfloat16(), labels.int(), attention_mask)
    rounded = losses_by_hand(policy_logits.bfloat16().float(), ref_logits.bfloat16().float(), labels, attention_mask)
    assert torch.equal(weights, weights_by_hand(rounded, 0.6))


def test_statistics_are_none_where_nothing_is_valid() -> None:
    policy_logits, ref_logits, labels, attention_mask = inputs()
    weights, stats = compute_mtp_selective_weights(policy_logits, ref_logits, labels, 0 * attention_mask)
    assert not weights.any()
    assert stats["head_1_count"] == 0
    assert stats["head_1_ratio"] is stats["head_1_threshold"] is stats["selection_ratio"] is None


def weights_of_this_rank() -> tuple[torch.Tensor, dict]:
    return compute_mtp_selective_weights(*inputs(seed=dist.get_rank()), k_percent=0.6, group=dist.group.WORLD)


def test_a_group_shares_one_pool() -> None:
    answers = run_ranks(weights_of_this_rank, 2)
    whole = [torch.cat(parts) for parts in zip(inputs(seed=0), inputs(seed=1), strict=True)]
    expected, stats = compute_mtp_selective_weights(*whole, k_percent=0.6)
    assert torch.equal(torch.cat([weights for weights, _ in answers]), expected)
    for _, found in answers:
        assert found == pytest.approx(stats)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy_logits": torch.zeros(3, 12, 11)}, "policy_logits: expected .batch, seq, n_future, vocab., got .3, 12, 11."),
        ({"ref_logits": torch.zeros(3, 12, 5)}, "ref_logits: expected shape .3, 12, 11.*got .3, 12, 5."),
        ({"labels": torch.zeros(3, 12)}, "labels: expected integer token ids, got torch.float32"),
        ({"labels": torch.full((3, 12), 11)}, "labels: expected ids in .0, 11. or -100, got 11"),
        ({"attention_mask": torch.ones(3, 2)}, "attention_mask: expected shape .3, 12."),
        ({"k_percent": 0.0}, "k_percent: expected a fraction in .0, 1., got 0.0"),
        ({"policy_logits": torch.full((3, 12, 4, 11), math.nan)}, "NaN or infinite"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    names = ("policy_logits", "ref_logits", "labels", "attention_mask")
    arguments = dict(zip(names, inputs(), strict=True)) | {"k_percent": 0.6} | change
    with pytest.raises(ValueError, match=message):
        compute_mtp_selective_weights(**arguments)


def test_statistics_refuse_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="expected excess_loss and weights"):
        compute_rho1_stats(torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.ones(2, 3))
