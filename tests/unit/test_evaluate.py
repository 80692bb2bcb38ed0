"""A validation over several batches against dense losses, over whole folders, and of a model that has diverged."""

import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline.config import Settings
from pipeline.data.corpus.documents import Document
from pipeline.data.corpus.prepare import prepare
from pipeline.data.errors import DataError
from pipeline.data.loading.batch import Batch, collate, targets_and_valid
from pipeline.data.loading.held_out import HeldOutRows
from pipeline.data.loading.mixture import DataSet
from pipeline.data.shards.sample import Sample
from pipeline.data.token_bytes import NO_TEXT, UNKNOWN, TokenBytes
from pipeline.data.tokenizer import byte_tokenizer
from pipeline.evaluate import evaluate
from pipeline.micro_step import Models
from pipeline.model.mtp import MTPModel
from pipeline.runtime.distributed import World
from pipeline.runtime.logbook import without_non_finite
from pipeline.schedule import objective_at
from tests.dense import HEADS, VOCAB, all_losses, dense_model, dense_objective, settings_for, whole_batch
from tests.ranks import run_ranks
from tests.rows import part_of

ONE_BYTE = TokenBytes(np.ones(VOCAB, np.int32))


def validated(settings: Settings, policy: MTPModel, reference: MTPModel, token_bytes: TokenBytes = ONE_BYTE) -> dict[str, Any]:
    batches = [part_of(whole_batch(), slice(start, start + 2)) for start in (2, 4, 6)]
    record, replaced = evaluated(settings, policy, reference, batches, token_bytes)
    assert replaced == []
    return record


def evaluated(
    settings: Settings,
    policy: MTPModel,
    reference: MTPModel,
    batches: Iterable[Batch],
    token_bytes: TokenBytes,
    source_names: Sequence[str] = ("",),
) -> tuple[dict[str, Any], list[str]]:
    """Evaluate on one process, or on each rank of the process group."""
    group = dist.group.WORLD if dist.is_initialized() else None
    world = World(dist.get_rank(), dist.get_world_size(), 0, 1) if group is not None else World(0, 1, 0, 1)
    models, objective = Models(policy, reference, "shifted", group), objective_at(settings, 0)
    return evaluate(models, batches, settings, objective, source_names, token_bytes, world, torch.device("cpu"))


def test_held_out_losses_are_means_over_all_valid_pairs() -> None:
    settings = settings_for(1, 4)
    policy, reference = dense_model(settings), dense_model(settings, num_prediction_heads=1, seed=1)
    record = validated(settings, policy, reference)
    batch = whole_batch()
    losses = all_losses(policy, batch).detach()
    _, valid = targets_and_valid(batch.tokens_BT, batch.document_ids_BT, HEADS)
    for head in range(HEADS):
        assert record[f"loss_head_{head}"] == pytest.approx(losses[..., head][valid[..., head]].mean().item(), rel=1e-6)
        assert record[f"valid_count_head_{head}"] == valid[..., head].sum()
    assert None not in record.values()


@pytest.mark.parametrize("normalize_by", ["valid", "selected"])
def test_the_held_out_objective_is_the_formula_with_every_batch_a_pool(normalize_by: str) -> None:
    settings = settings_for(1, 4, normalize_by=normalize_by)
    record = validated(settings, dense_model(settings), dense_model(settings, num_prediction_heads=1, seed=1))
    objective, _ = dense_objective(settings, 1)
    assert record["loss"] == pytest.approx(objective.item(), rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_policy_that_has_diverged_has_no_losses_rather_than_good_ones(value: float) -> None:
    settings = settings_for(1, 4)
    policy, reference = dense_model(settings), dense_model(settings, num_prediction_heads=1, seed=1)
    with torch.no_grad():
        policy.heads[2].ffn.down.weight[0, 0] = value
    record = validated(settings, policy, reference)
    assert record == without_non_finite(record), "null by itself, not because JSON cannot say it"
    assert [record[f"loss_head_{head}"] is None for head in range(HEADS)] == [False, False, True, False]
    assert record["loss"] is record["threshold_head_2"] is record["selected_loss_head_2"] is None


def test_a_reference_that_is_broken_leaves_the_policys_losses_and_no_comparison() -> None:
    settings = settings_for(1, 4)
    policy, reference = dense_model(settings), dense_model(settings, num_prediction_heads=1, seed=1)
    good = validated(settings, policy, reference)
    with torch.no_grad():
        reference.unembed.weight[3, 5] = math.nan
    record = validated(settings, policy, reference)
    for head in range(HEADS):
        assert record[f"loss_head_{head}"] == good[f"loss_head_{head}"]
    for key in ("loss", "excess_mean", *(f"{name}_head_{head}" for name in ("threshold", "excess_p50") for head in (1, 2, 3))):
        assert record[key] is None, key


def test_perplexity_and_bits_per_byte_say_the_same_loss_in_other_units() -> None:
    settings = settings_for(1, 4)
    policy, reference = dense_model(settings), dense_model(settings, num_prediction_heads=1, seed=1)
    record = validated(settings, policy, reference, TokenBytes(np.full(VOCAB, 3, np.int32)))
    for head in range(HEADS):
        assert record[f"perplexity_head_{head}"] == pytest.approx(math.exp(record[f"loss_head_{head}"]))
    assert record["bits_per_byte"] == pytest.approx(record["loss_head_0"] / math.log(2) / 3)


def pairs_of_head_0(policy: MTPModel) -> list[tuple[int, int, float]]:
    """(token, target, loss) of every valid pair of head 0."""
    batch = whole_batch()
    targets, valid = targets_and_valid(batch.tokens_BT, batch.document_ids_BT, HEADS)
    losses = all_losses(policy, batch).detach().double()
    columns = batch.tokens_BT, targets[..., 0], losses[..., 0]
    return list(zip(*(column[valid[..., 0]].tolist() for column in columns), strict=True))


@pytest.mark.parametrize("opens_with_space", [False, True])
def test_tokens_without_text_count_neither_bits_nor_bytes(opens_with_space: bool) -> None:
    settings = settings_for(1, 4)
    policy, reference = dense_model(settings), dense_model(settings, num_prediction_heads=1, seed=1)
    lengths = np.arange(VOCAB, dtype=np.int32) % 4  # every fourth token has no text
    record = validated(settings, policy, reference, TokenBytes(lengths, opens_with_space))
    nats = num_bytes = 0.0
    for token, target, loss in pairs_of_head_0(policy):
        # After a token without text the first token of a document has a space that is not in the text.
        if lengths[target] != NO_TEXT and not (opens_with_space and lengths[token] == NO_TEXT):
            nats, num_bytes = nats + loss, num_bytes + lengths[target]
    assert record["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)


def test_there_are_no_bits_per_byte_where_one_predicted_tokens_text_is_not_known() -> None:
    settings = settings_for(1, 4)
    policy, reference = dense_model(settings), dense_model(settings, num_prediction_heads=1, seed=1)
    targets = {target for _, target, _ in pairs_of_head_0(policy)}
    lengths = np.array([3 if token in targets else UNKNOWN for token in range(VOCAB)], np.int32)
    assert "bits_per_byte" in validated(settings, policy, reference, TokenBytes(lengths))
    lengths[min(targets)] = UNKNOWN
    assert "bits_per_byte" not in validated(settings, policy, reference, TokenBytes(lengths))
    assert "bits_per_byte" not in validated(settings, policy, reference, TokenBytes(np.zeros(VOCAB, np.int32)))


def test_a_source_whose_losses_are_not_finite_leaves_the_others_their_figures() -> None:
    settings = settings_for(1, 1)
    policy, reference = dense_model(settings), dense_model(settings, num_prediction_heads=1, seed=1)
    with torch.no_grad():
        policy.embed.weight[30] = math.nan
    lengths = np.array([14], np.uint32)
    samples = [
        Sample(name, np.arange(first, first + 14, dtype=np.uint32), lengths, np.array([source], np.uint8))
        for source, (name, first) in enumerate((("sound", 3), ("broken", 21)))
    ]
    record, _ = evaluated(settings, policy, reference, [collate(samples)], ONE_BYTE, ("sound", "broken"))
    for key in ("loss_head_0", "perplexity_head_0", "bits_per_byte"):
        assert record[key] is record[f"{key}_source_broken"] is None
        assert record[f"{key}_source_sound"] > 0
    assert record["bits_per_byte_source_sound"] == pytest.approx(record["loss_head_0_source_sound"] / math.log(2))


TEXTS = [f"{number}: größer, 日本 {'na ' * (number % 5)}" for number in range(13)]
BYTES_MODEL = {"dim": 16, "num_layers": 2, "num_attention_heads": 2, "ffn_dim": 32, "vocab_size": 257}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of which every byte is a token, in several shards."""
    directory = tmp_path_factory.mktemp("texts") / "data"
    prepare([Document(text, "") for text in TEXTS], directory, byte_tokenizer(), 14, seed=0, samples_per_shard=10)
    return directory


def models_for(settings: Settings) -> tuple[MTPModel, MTPModel]:
    return dense_model(settings), dense_model(settings, num_prediction_heads=1, seed=1)


def validate_folder(folder: Path, micro_batch: int, num_rows: int | None = None, **changes: Any) -> dict[str, Any]:
    """Validate on this rank, or on one process."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    settings = settings_for(1, 1, model=BYTES_MODEL).with_values(data={"micro_batch": micro_batch} | changes)
    rows = HeldOutRows(DataSet(folder), num_rows=num_rows, micro_batch=micro_batch, rank=rank, world_size=world_size)
    record, replaced = evaluated(settings, *models_for(settings), rows.batches(), rows.token_bytes)
    return record | {"rows": rows.num_rows, "replaced": replaced}


@pytest.fixture(scope="module")
def naive(folder: Path) -> dict[str, float]:
    """Losses over every row, one by one, in float64; the bits over the bytes of the texts."""
    rows = HeldOutRows(DataSet(folder), micro_batch=1, rank=0, world_size=1)
    policy = models_for(settings_for(1, 1, model=BYTES_MODEL))[0].double()
    sums, counts, nats, num_first = [0.0] * HEADS, [0] * HEADS, 0.0, 0
    for batch in rows.batches():
        losses, tokens, ids = all_losses(policy, batch)[0], batch.tokens_BT[0].tolist(), batch.document_ids_BT[0].tolist()
        num_first += sum(ids[t] >= 0 and (t == 0 or ids[t - 1] != ids[t]) and tokens[t] != 256 for t in range(len(ids)))
        for head in range(HEADS):
            for t in range(len(ids) - 1 - head):
                if ids[t] >= 0 and ids[t] == ids[t + 1 + head]:
                    sums[head], counts[head] = sums[head] + losses[t, head].item(), counts[head] + 1
                    nats += losses[t, head].item() if head == 0 and tokens[t + 1] != 256 else 0.0
    # The first token of a row's document is predicted from nothing; every other byte of the texts is predicted once.
    num_bytes = sum(len(text.encode()) for text in TEXTS) - num_first
    means = {f"loss_head_{head}": sums[head] / counts[head] for head in range(HEADS)}
    return means | {"bits_per_byte": nats / math.log(2) / num_bytes, "valid_count_head_0": counts[0]}


@pytest.mark.parametrize("micro_batch", [1, 7, 64])
def test_a_folders_losses_are_those_of_every_row_whatever_the_micro_batch(folder: Path, naive: Any, micro_batch: int) -> None:
    record = validate_folder(folder, micro_batch)
    for key, value in naive.items():
        assert record[key] == pytest.approx(value, rel=1e-6), key


@pytest.mark.parametrize(("world_size", "micro_batch"), [(3, 4), (2, 64)])  # at last one rank has padding alone
def test_a_folders_losses_are_those_of_every_row_whatever_the_ranks(
    folder: Path, naive: Any, world_size: int, micro_batch: int
) -> None:
    for record in run_ranks(validate_folder, world_size, folder, micro_batch):
        for key, value in naive.items():
            assert record[key] == pytest.approx(value, rel=1e-6), key


def test_a_subset_has_the_same_losses_for_any_micro_batch_and_others_than_the_whole(folder: Path, naive: Any) -> None:
    some = validate_folder(folder, 4, 10)
    assert some["loss_head_2"] == pytest.approx(validate_folder(folder, 3, 10)["loss_head_2"], rel=1e-6)
    assert some["valid_count_head_0"] < naive["valid_count_head_0"]


def test_a_damaged_held_out_row_ends_the_job_or_is_counted_and_named(folder: Path, naive: Any, tmp_path: Path) -> None:
    damaged = shutil.copytree(folder, tmp_path / "data")
    tar = min(damaged.glob("*.tar"))
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(content)
    with pytest.raises(DataError, match=f"shard {tar.stem}, sample 0, .* is damaged"):
        validate_folder(damaged, 4)
    record = validate_folder(damaged, 4, on_corrupt="skip")
    assert record["corrupt_samples"] == len(record["replaced"]) == 1
    assert record["valid_count_head_0"] < naive["valid_count_head_0"]
