"""The dense API against loops written by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline.config import ModelSettings, TrainingSettings
from pipeline.micro_step import Models, count_step, load_micro_batches
from pipeline.model.mtp import MTPModel, initialize_weights
from pipeline.runtime.metrics import SelectionSums
from pipeline.weighting.rho1 import compute_mtp_selective_weights, compute_rho1_stats, excess_losses
from tests.ranks import run_ranks
from tests.rows import batch_with
from tests.stepping import losses_of, objective_of

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


def log_lines(stats: dict[str, int | float]) -> list[str]:
    """As a training loop prints them, with the statistics of every head formatted as numbers."""
    lines = [f"{stats['selection_ratio']:.2%} selected, {stats['avg_heads_per_position']:.2f} heads a position"]
    for head in range(HEADS):
        count, ratio, mean = (stats[f"head_{head}_{name}"] for name in ("count", "ratio", "excess_mean"))
        threshold = stats.get(f"head_{head}_threshold", 0.0)
        lines.append(f"head {head}: {count:d} ({ratio:.2%}), mean {mean:.4f}, threshold {threshold:.4f}")
    return lines


def test_statistics_are_numbers_where_nothing_is_valid() -> None:
    policy_logits, ref_logits, labels, attention_mask = inputs()
    weights, stats = compute_mtp_selective_weights(policy_logits, ref_logits, labels, 0 * attention_mask)
    assert not weights.any()
    assert log_lines(stats)[:2] == [
        "0.00% selected, 0.00 heads a position",
        "head 0: 0 (0.00%), mean nan, threshold 0.0000",
    ]
    assert log_lines(stats)[2:] == [f"head {head}: 0 (0.00%), mean nan, threshold nan" for head in (1, 2, 3)]


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_a_head_whose_distance_a_row_does_not_reach_has_statistics_all_the_same(length: int) -> None:
    policy_logits, ref_logits, labels, attention_mask = (given[1:, :length] for given in inputs())
    _, stats = compute_mtp_selective_weights(policy_logits, ref_logits, labels, attention_mask)
    assert len(log_lines(stats)) == 1 + HEADS
    for head in range(length - 1, HEADS):
        assert (stats[f"head_{head}_count"], stats[f"head_{head}_ratio"]) == (0, 0.0)
        assert math.isnan(stats[f"head_{head}_excess_mean"])
        assert head == 0 or math.isnan(stats[f"head_{head}_threshold"])


@pytest.mark.parametrize("equal_models", [False, True])
def test_statistics_of_the_excess_losses_are_those_of_the_weights(equal_models: bool) -> None:
    policy_logits, ref_logits, labels, attention_mask = inputs()
    if equal_models:
        # Head 0 has the reference's losses, so that valid pairs have an excess of exactly 0 too.
        policy_logits[:, :, 0] = ref_logits
    arguments = (policy_logits, ref_logits, labels, attention_mask)
    excess = excess_losses(*arguments)
    by_hand = torch.zeros(BATCH, SEQ, HEADS)
    for head, pairs in losses_by_hand(*arguments).items():
        for place, (policy, reference) in pairs.items():
            by_hand[(*place, head)] = policy - reference
    assert torch.allclose(excess, by_hand, atol=1e-6)
    assert bool((excess[by_hand == 0] == 0).all())

    weights, stats = compute_mtp_selective_weights(*arguments)
    assert compute_rho1_stats(excess, weights, attention_mask) == stats


def test_excess_losses_refuse_what_does_not_fit_or_is_not_finite() -> None:
    policy_logits, ref_logits, labels, attention_mask = inputs()
    with pytest.raises(ValueError, match="labels: expected shape"):
        excess_losses(policy_logits, ref_logits, labels[:, 1:], attention_mask)
    ref_logits[2, 3] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite on a valid pair"):
        excess_losses(policy_logits, ref_logits, labels, attention_mask)


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
        ({"policy_logits": torch.zeros(3, 12, 11)}, "policy_logits: expected .batch, seq, n_future, vocab.*got .3, 12, 11."),
        ({"ref_logits": torch.zeros(3, 12, 5)}, "ref_logits: expected shape .3, 12, 11.*got .3, 12, 5."),
        ({"labels": torch.zeros(3, 12)}, "labels: expected integer token ids, got torch.float32"),
        ({"labels": torch.full((3, 12), 11)}, "labels: expected ids in .0, 11. or -100, got 11"),
        ({"attention_mask": torch.ones(3, 2)}, "attention_mask: expected shape .3, 12."),
        ({"k_percent": 0.0}, "k_percent: expected a fraction in .0, 1., got 0.0"),
        ({"k_percent": math.nan}, "k_percent: expected a fraction in .0, 1., got nan"),
        ({"k_percent": "60%"}, "k_percent: expected a fraction in .0, 1., got '60%'"),
        ({"policy_logits": torch.zeros(3, 12, 0, 11)}, "policy_logits: expected .*none of them 0, got .3, 12, 0, 11."),
        (
            {"policy_logits": torch.zeros(3, 12, 4, 11).long()},
            "policy_logits: expected a floating-point tensor, got torch.int64",
        ),
        ({"ref_logits": torch.zeros(3, 12, 11).int()}, "ref_logits: expected a floating-point tensor, got torch.int32"),
        ({"ref_logits": torch.zeros(3, 12, 11, device="meta")}, "ref_logits: expected it on cpu.*got meta"),
        ({"labels": torch.full((3, 12), -1)}, "labels: expected ids in .0, 11. or -100, got -1"),
        ({"labels": torch.ones(3, 12, dtype=torch.bool)}, "labels: expected integer token ids, got torch.bool"),
        # As some libraries write masks: to be added to attention's scores.
        ({"attention_mask": torch.full((3, 12), -math.inf)}, "attention_mask: expected 1 on tokens and 0 on padding, got -inf"),
        ({"policy_logits": torch.full((3, 12, 4, 11), math.nan)}, "NaN or infinite"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    names = ("policy_logits", "ref_logits", "labels", "attention_mask")
    arguments = dict(zip(names, inputs(), strict=True)) | {"k_percent": 0.6} | change
    with pytest.raises(ValueError, match=message):
        compute_mtp_selective_weights(**arguments)


def said_on_this_rank() -> list[str]:
    """What each call of which rank 1 alone has wrong inputs says on this rank; none of them may wait for ever."""
    rank, said = dist.get_rank(), []
    names = ("policy_logits", "ref_logits", "labels", "attention_mask")
    good = dict(zip(names, inputs(), strict=True))
    policy_logits = good["policy_logits"].clone()
    policy_logits[1, 2, 3, 4] = math.nan
    for wrong in (
        {"labels": torch.full((BATCH, SEQ), VOCAB)},
        {"labels": torch.zeros(BATCH, SEQ)},
        {"ref_logits": good["ref_logits"][:, :5]},
        {"k_percent": 0.7},
        dict(zip(names, inputs(batch=BATCH + 1), strict=True)),
        {"policy_logits": policy_logits},
        {"labels": torch.zeros(BATCH, SEQ, dtype=torch.uint16)},
        {"labels": torch.full((BATCH, SEQ), 156, dtype=torch.uint8)},
        {"labels": None},
    ):
        with pytest.raises(ValueError) as refused:  # noqa: PT011 (its text is what is compared)
            compute_mtp_selective_weights(**(good | (wrong if rank == 1 else {})), group=dist.group.WORLD)
        said.append(str(refused.value))
    shape = (BATCH, SEQ, HEADS)
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        compute_rho1_stats(torch.zeros(shape), torch.zeros(shape), torch.ones(BATCH, SEQ + rank), dist.group.WORLD)
    return [*said, str(refused.value)]


def test_wrong_inputs_of_one_rank_are_an_error_on_all() -> None:
    first, second = run_ranks(said_on_this_rank, 2)
    assert first == second
    expected = [
        "rank 1: labels: expected ids in [0, 11) or -100, got 11",
        "rank 1: labels: expected integer token ids, got torch.float32",
        "rank 1: ref_logits: expected shape [3, 12, 11] to fit policy_logits, got [3, 5, 11]",
        "k_percent: expected the same shape or value on all ranks of the group, got [0.6, 0.7]",
        "policy_logits: expected the same shape or value on all ranks of the group, got [[3, 12, 4, 11], [4, 12, 4, 11]]",
        "policy_logits or ref_logits give a loss that is NaN or infinite on a valid pair",
        "rank 1: labels: torch cannot compare torch.uint16; pass labels.long()",
        "rank 1: labels: expected ids in [0, 11) or -100, got 156",
        "rank 1: labels: expected a tensor, got NoneType",
        "rank 1: expected excess_loss and weights [batch, seq, n_future] and attention_mask [batch, seq], none of them 0, got "
        "[3, 12, 4], [3, 12, 4] and [3, 13]",
    ]
    assert first == expected


@pytest.mark.slow
def test_more_tokens_than_a_float_can_count_are_selected_exactly() -> None:
    """17 equal rows of a million tokens: every excess ties, and float32 counts no further than 2**24."""
    generator = torch.Generator().manual_seed(0)
    rows, seq = 17, 2**20
    policy_logits = torch.randn(1, seq, 2, 2, generator=generator).expand(rows, -1, -1, -1)
    ref_logits = torch.randn(1, seq, 2, generator=generator).expand(rows, -1, -1)
    labels = torch.randint(2, (1, seq), generator=generator).expand(rows, -1)
    weights, stats = compute_mtp_selective_weights(policy_logits, ref_logits, labels, torch.ones(1, 1).expand(rows, seq))
    valid = rows * (seq - 2)
    count = math.floor(0.6 * valid + 0.5)
    assert valid > 2**24
    assert stats["head_0_count"] == rows * (seq - 1)
    assert stats["head_1_count"] == int((weights[..., 1] != 0).sum()) == count
    assert stats["head_1_ratio"] == count / valid
    row = [logits.log_softmax(-1) for logits in (policy_logits[0, :-2, 1], ref_logits[0, 1:-1])]
    policy_loss, reference_loss = (-logits.gather(1, labels[0, 2:, None])[:, 0] for logits in row)
    excess = (policy_loss - reference_loss).numpy()
    # In falling order each excess of a row comes 17 times; those at the threshold are taken row by row.
    threshold = np.sort(excess)[::-1][(count - 1) // rows]
    expected = np.tile(excess > threshold, rows)
    expected[np.flatnonzero(np.tile(excess == threshold, rows))[: count - expected.sum()]] = True
    assert expected.sum() == count
    assert np.array_equal(weights[:, :-2, 1].numpy().astype(bool).ravel(), expected)
    assert stats["head_1_threshold"] == threshold


DENSE_SETTINGS = {"dim": 16, "num_layers": 2, "num_attention_heads": 2, "vocab_size": VOCAB}


def training_beside_dense_api() -> tuple[torch.Tensor, torch.Tensor, dict[str, Any], dict[str, Any]]:
    """This rank's rows through the training's own path and through the API: two masks, two sets of statistics."""
    rank, group = dist.get_rank(), dist.group.WORLD
    policy = MTPModel(ModelSettings(**DENSE_SETTINGS))
    reference = MTPModel(ModelSettings(**DENSE_SETTINGS, num_prediction_heads=1, seed=1))
    for model in (policy, reference):
        initialize_weights(model)
        with torch.no_grad():
            model.unembed.weight.mul_(20)
    tokens = torch.randint(VOCAB, (8, SEQ), generator=torch.Generator().manual_seed(4))
    documents = torch.zeros(8, SEQ, dtype=torch.int32)
    documents[5:7, 3:] = -1  # Ranks have unequal numbers of valid pairs.
    rows = slice(rank * 8 // dist.get_world_size(), (rank + 1) * 8 // dist.get_world_size())
    tokens, documents = tokens[rows], documents[rows]
    training = TrainingSettings(selection_exchange="radix")
    batch = batch_with(tokens, [[int(of_row)] for of_row in (documents >= 0).sum(1)])
    micro = load_micro_batches([batch], 0, HEADS, dist.get_world_size(), rank, torch.device("cpu"))
    counts, _, _ = count_step(micro, objective_of(training), 1, group).read()
    (losses,) = losses_of(Models(policy, reference, "shifted", group), micro, counts, training)
    sums = SelectionSums(HEADS, 1, torch.device("cpu"))
    sums.add(losses, micro[0].valid_BTH, batch.sources_BT)
    record = sums.record(counts.scale_H, ("",), group)
    selected = torch.cat([micro[0].valid_BTH[..., :1], losses.selection.selected_BTK], dim=-1)
    with torch.no_grad():
        policy_logits = policy.unembed.norm(policy.hidden_states(tokens, documents)) @ policy.unembed.weight.T
        ref_logits = (reference.unembed.norm(reference.hidden_states(tokens, documents)) @ reference.unembed.weight.T)[:, :, 0]
    weights, stats = compute_mtp_selective_weights(policy_logits, ref_logits, tokens, documents >= 0, group=group)
    return selected, weights, record, stats


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_dense_api_equals_the_trainings_own_path(world_size: int) -> None:
    for selected, weights, record, stats in run_ranks(training_beside_dense_api, world_size):
        assert torch.equal(weights, selected.float())
        for head in range(HEADS):
            assert stats[f"head_{head}_count"] == record[f"selected_count_head_{head}"]
            assert stats[f"head_{head}_ratio"] == record[f"selected_ratio_head_{head}"]
            if head:
                assert stats[f"head_{head}_threshold"] == pytest.approx(record[f"threshold_head_{head}"], abs=1e-5)
                assert stats[f"head_{head}_excess_mean"] == pytest.approx(record[f"excess_mean_head_{head}"], abs=1e-5)
        assert stats["selection_ratio"] == record["selection_ratio"]
        assert stats["avg_heads_per_position"] == record["heads_per_position"]


def test_statistics_refuse_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="expected excess_loss and weights"):
        compute_rho1_stats(torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"excess_loss": torch.full((3, 12, 4), math.inf)}, "excess_loss: expected finite values, or NaN"),
        ({"weights": torch.full((3, 12, 4), 0.5)}, "weights: expected 0 or 1, got 0.5"),
        ({"attention_mask": torch.full((3, 12), 7)}, "attention_mask: expected 0 or 1, got 7"),
        (
            {"excess_loss": torch.zeros(0, 12, 4), "weights": torch.zeros(0, 12, 4), "attention_mask": torch.ones(0, 12)},
            "none of",
        ),
        ({"weights": [1]}, "weights: expected a tensor, got list"),
    ],
)
def test_statistics_of_values_that_make_no_sense_are_refused(change: dict, message: str) -> None:
    good = {"excess_loss": torch.zeros(3, 12, 4), "weights": torch.ones(3, 12, 4), "attention_mask": torch.ones(3, 12)}
    with pytest.raises(ValueError, match=message):
        compute_rho1_stats(**(good | change))
