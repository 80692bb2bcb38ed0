"""The collectives of a step's objective, from its counts to its metrics: how many, how large, the same on every rank."""

import hashlib
import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.benchmark.collectives import Collective, CollectiveRecorder
from pipeline.config import Settings, TrainingSettings
from pipeline.data.loading.batch import targets_and_valid
from pipeline.micro_step import Models, count_step, load_micro_batches
from pipeline.model.mtp import MTPModel
from pipeline.runtime.metrics import EXCESS_BINS, SelectionSums
from pipeline.runtime.non_finite import finite_and_loss
from pipeline.weighting.prediction import Prediction
from pipeline.weighting.score import random_scores
from tests.dense import (
    HEADS,
    ROWS,
    TOKENS,
    VOCAB,
    all_losses,
    dense_model,
    settings_for,
    whole_batch,
)
from tests.ranks import run_ranks
from tests.rows import batch_of, part_of, random_lengths
from tests.stepping import losses_of, objective_of

MICRO_STEPS, SELECTING = 2, HEADS - 1
WAYS = [(pool, exchange) for pool in ("global", "step") for exchange in ("all_gather", "radix")] + [
    ("rank", "auto"),
    ("row", "auto"),
]


def collectives_of_a_step() -> list[list[Collective]]:
    """For each way what this rank calls; the first rank begins with nothing but padding."""
    rank, group = dist.get_rank(), dist.group.WORLD
    settings = settings_for(2, MICRO_STEPS)
    policy, reference = dense_model(settings), dense_model(settings, num_prediction_heads=1, seed=1)
    rows = ROWS // 2 // MICRO_STEPS
    starts = [rank * ROWS // 2 + micro_step * rows for micro_step in range(MICRO_STEPS)]
    batches = [part_of(whole_batch(), slice(start, start + rows)) for start in starts]
    found = []
    for pool, exchange in WAYS:
        training = TrainingSettings(selection_pool=pool, selection_exchange=exchange)  # type: ignore[arg-type]
        with CollectiveRecorder() as recorder:
            micro_batches = load_micro_batches(batches, 0, HEADS, 2, rank, torch.device("cpu"))
            counts, _, _ = count_step(micro_batches, objective_of(training), 2, group).read()
            sums = SelectionSums(HEADS, 2, torch.device("cpu"))
            models = Models(policy, reference, "shifted", group)
            losses = losses_of(models, micro_batches, counts, training, Prediction())
            for micro, of_micro in zip(micro_batches, losses, strict=True):
                sums.add(of_micro, micro.valid_BTH, micro.batch.sources_BT)
            sums.record(counts.scale_H, ("a", "b"), group)
        found.append(recorder.collectives)
    return found


def test_a_step_runs_one_count_one_exchange_a_pool_and_one_reduction_of_metrics() -> None:
    padded, others = run_ranks(collectives_of_a_step, 2)
    assert padded == others
    pairs = ROWS // 2 // MICRO_STEPS * TOKENS * SELECTING

    def exchanged(name: str, micro_steps: int) -> list[Collective]:
        """The collectives of a pool of so many micro-steps."""
        if name == "all_gather":
            return [Collective("all_gather", 4 * pairs * micro_steps)]
        sizes = (2048, 2048, 1024, 2 * micro_steps)
        return [Collective("all_reduce", 4 * SELECTING * size) for size in sizes]

    for (pool, name), collectives in zip(WAYS, padded, strict=True):
        counting, *exchanges, metrics = collectives
        # What the data was is counted along, and the ranks, with their three flags: tokens, positions, damage, the digest
        # of the samples, and two numbers for each of two sources.
        assert counting == Collective("all_reduce", 8 * (MICRO_STEPS * HEADS + HEADS + 4 + 6 + 2 * 2))
        expected = {"global": 2 * exchanged(name, 1), "step": exchanged(name, 2)}.get(pool, [])
        assert exchanges == expected, (pool, name)
        assert metrics.kind == "all_reduce"
        # Two sources, each with a histogram for each selecting head, and some sums.
        assert 0 < metrics.payload - 8 * 2 * SELECTING * EXCESS_BINS < 1000


PARTS_OF_A_LOSS = (1e16, 1.0, -1e16)


def agreed_on_a_step() -> tuple[list[Collective], list[float], list[float]]:
    sums, part = SelectionSums(HEADS, 1, torch.device("cpu")), torch.tensor(PARTS_OF_A_LOSS[dist.get_rank()])
    with CollectiveRecorder() as recorder:
        before = finite_and_loss(sums.finite, part)
    sums.finite &= dist.get_rank() == 0
    after = finite_and_loss(sums.finite, part * math.nan if dist.get_rank() else part)
    return recorder.collectives, [each.item() for each in before], [each.item() for each in after]


def test_one_exchange_a_step_tells_every_rank_the_loss_and_whether_all_met_finite_numbers_alone() -> None:
    in_order = torch.tensor(PARTS_OF_A_LOSS).double().sum().item()
    for collectives, before, after in run_ranks(agreed_on_a_step, 3):
        assert collectives == [Collective("all_reduce", 8 * 2 * 3)]
        assert before == [1.0, in_order]
        assert [math.isnan(number) for number in after] == [True, True]


SETTINGS = list(
    itertools.product(
        ("global", "step", "rank", "row"),
        ("excess", "policy_loss", "random"),
        ("shifted", "matched"),
        ("predicted", "two_pass"),
    )
)
FIRST_ROW, SEED = 1000, 5


def references(settings: Settings) -> dict[str, MTPModel]:
    return {"shifted": dense_model(settings, num_prediction_heads=1, seed=1), "matched": dense_model(settings, seed=2)}


def selected_in_each_way() -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """For each of the settings what this rank selects in its micro-steps, bool [A, B, T, K], and the step's metrics."""
    rank, group = dist.get_rank(), dist.group.WORLD
    settings = settings_for(2, MICRO_STEPS)
    policy, frozen, rows = dense_model(settings), references(settings), settings.data.micro_batch
    found = []
    for pool, score, horizon, loss_phase in SETTINGS:
        training = settings.training.model_copy(
            update={
                "selection_pool": pool,
                "selection_score": score,
                "loss_phase": loss_phase,
                "selection_seed": SEED,
            }
        )
        starts = [(micro_step * 2 + rank) * rows for micro_step in range(MICRO_STEPS)]
        batches = [part_of(whole_batch(), slice(start, start + rows)) for start in starts]
        micro_batches = load_micro_batches(batches, FIRST_ROW, HEADS, 2, rank, torch.device("cpu"))
        counts, _, _ = count_step(micro_batches, objective_of(training), 1, group).read()
        sums, masks = SelectionSums(HEADS, 1, torch.device("cpu")), []
        models = Models(policy, frozen[horizon], horizon, group)
        expected = Prediction.of([0.1, 0.2, 0.3])
        losses_of_each = losses_of(models, micro_batches, counts, training, expected)
        for micro, losses in zip(micro_batches, losses_of_each, strict=True):
            sums.add(losses, micro.valid_BTH, micro.batch.sources_BT)
            masks.append(losses.selection.selected_BTK)
        found.append((torch.stack(masks), sums.record(counts.scale_H, ("",), group)))
    return found


def drawn_by_hand(seed: int, rows: range) -> torch.Tensor:
    """A number in [0, 1) of each pair [rows, T, K]: the upper 24 bits of SplitMix64's answer to the pair's number."""
    start = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "little")
    drawn = []
    for number in range(rows.start * TOKENS * SELECTING, rows.stop * TOKENS * SELECTING):
        mixed = (start + number * 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        drawn.append(((mixed ^ mixed >> 31) >> 40) / 2**24)
    return torch.tensor(drawn).view(len(rows), TOKENS, SELECTING)


@pytest.mark.parametrize("first_row", [0, 10**6, 2**40])
def test_random_scores_are_those_of_the_generator_as_it_was_published(first_row: int) -> None:
    rows = range(first_row, first_row + 5)
    for seed in (0, 7, 2**53):
        found = random_scores(seed, torch.tensor(list(rows)), TOKENS, SELECTING)
        assert torch.equal(found, drawn_by_hand(seed, rows))


def test_random_scores_are_even_and_those_of_neighbours_independent() -> None:
    drawn = random_scores(3, torch.arange(4000), TOKENS, SELECTING).double()
    counts = torch.histc(drawn.flatten().float(), 16, 0, 1) / drawn.numel()
    assert (counts - 1 / 16).abs().max() < 0.002
    for one, other in ((drawn[:-1], drawn[1:]), (drawn[:, :-1], drawn[:, 1:]), (drawn[..., :-1], drawn[..., 1:])):
        assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].abs() < 0.012
    assert not torch.equal(drawn, random_scores(4, torch.arange(4000), TOKENS, SELECTING).double())


def test_every_pool_score_and_horizon_selects_what_a_sort_of_the_whole_pool_does() -> None:
    settings, batch = settings_for(2, MICRO_STEPS), whole_batch()
    policy, frozen, rows = dense_model(settings), references(settings), settings.data.micro_batch
    _, valid = targets_and_valid(batch.tokens_BT, batch.document_ids_BT, HEADS)
    with torch.no_grad():
        policy_loss, next_token = all_losses(policy, batch), all_losses(frozen["shifted"], batch)[..., 0]
        compared = {"shifted": torch.zeros_like(policy_loss), "matched": all_losses(frozen["matched"], batch)}
    for head, t in itertools.product(range(HEADS), range(TOKENS)):
        if t + 1 + head < TOKENS:
            compared["shifted"][:, t, head] = next_token[:, t + head]
    drawn = drawn_by_hand(SEED, range(FIRST_ROW, FIRST_ROW + ROWS))
    assert len(set(drawn.flatten().tolist())) > 0.99 * drawn.numel()
    for (pool, score, horizon, _), *answers in zip(SETTINGS, *run_ranks(selected_in_each_way, 2), strict=True):
        excess = (policy_loss - compared[horizon])[..., 1:]
        scores = {"excess": excess, "policy_loss": policy_loss[..., 1:], "random": drawn}[score]
        rows_a_pool = {"global": 2 * rows, "step": ROWS, "rank": rows, "row": 1}[pool]
        found = torch.cat([answers[rank][0][step] for step in range(MICRO_STEPS) for rank in range(2)])
        assert answers[0][1] == answers[1][1]
        for head in range(1, HEADS):
            chosen, weighted = set(), []
            for first in range(0, ROWS, rows_a_pool):
                pairs = [(row, t) for row, t in valid[..., head].nonzero().tolist() if first <= row < first + rows_a_pool]
                count = max(1, math.floor(0.6 * len(pairs) + 0.5)) if pairs else 0
                top = sorted(pairs, key=lambda pair: (-scores[(*pair, head - 1)].item(), pair))[:count]
                chosen |= set(top)
                if top:
                    weighted += [scores[(*top[-1], head - 1)].item()] * len(pairs)
            assert {tuple(pair) for pair in found[..., head - 1].nonzero().tolist()} == chosen, (pool, score, horizon)
            record = answers[0][1]
            assert record[f"threshold_head_{head}"] == pytest.approx(sum(weighted) / len(weighted), abs=1e-5)
            here = valid[..., head]
            assert record[f"excess_mean_head_{head}"] == pytest.approx(excess[..., head - 1][here].mean().item(), abs=1e-5)


@pytest.mark.parametrize("pool", ["global", "step"])
@pytest.mark.parametrize("horizon", ["shifted", "matched"])
def test_what_a_model_is_told_beforehand_is_what_it_is_given(pool: Any, horizon: str) -> None:
    settings = settings_for(1, MICRO_STEPS)
    policy, reference = dense_model(settings), references(settings)[horizon]
    given, shares = [], []

    def told(model: MTPModel, *inputs: torch.Tensor, num_valid_H: list[int], spans: Any, **others: Any) -> Any:
        tokens, documents, _, valid = inputs
        if "selector" in others:
            assert others["selector"].predicts
            shares.append(others["selector"].share)
        given.append((list(num_valid_H), valid.sum((0, 1)).tolist()))
        assert int(spans.starts_S[-1]) == tokens.numel() == documents.numel()
        return model(*inputs, num_valid_H=num_valid_H, spans=spans, **others)

    batches = [batch_of(random_lengths(4, TOKENS, seed), TOKENS, VOCAB) for seed in range(MICRO_STEPS)]
    micro_batches = load_micro_batches(batches, 0, HEADS, 1, 0, torch.device("cpu"))
    training = TrainingSettings(selection_pool=pool)
    counts, _, _ = count_step(micro_batches, objective_of(training), 1, None).read()
    models = Models(partial(told, policy), partial(told, reference), horizon, None)
    losses = losses_of(models, micro_batches, counts, training, Prediction.of([0.1, 0.2, 0.3]))
    assert len(list(losses)) == MICRO_STEPS
    assert shares == [0.6] * MICRO_STEPS
    assert len(given) == MICRO_STEPS * (3 if pool == "step" else 2)
    assert all(numbers == of_tensor for numbers, of_tensor in given)
