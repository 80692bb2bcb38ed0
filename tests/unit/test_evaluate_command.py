"""launch/evaluate.py: the losses of the model over every row, per folder and source, from any kind of MODEL, on any ranks."""

import copy
import itertools
import json
import math
import re
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from launch.evaluate import main
from launch.export import main as export
from pipeline import time_left
from pipeline.data.loading.batch import collate, targets_and_valid
from pipeline.data.shards.manifest import read_manifest
from pipeline.data.shards.reader import ShardReader
from pipeline.data.token_bytes import bytes_of_tokens
from pipeline.data.tokenizer import load_tokenizer
from pipeline.model.mtp import MTPModel
from tests.data_sets import numbered_data
from tests.dense import all_losses
from tests.ranks import run_ranks
from tests.saved_models import model_of, write_checkpoint

HEADS = 4


@pytest.fixture(scope="module")
def model(tiny_data: Path) -> MTPModel:
    return model_of(read_manifest(tiny_data / "train").vocab_size, seed=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, model: MTPModel) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    write_checkpoint(run_dir, model, 6, tiny_data / "train", ranks=2)
    return run_dir


def evaluated(model: Path, data: Path, directory: Path, *options: str) -> dict[str, Any]:
    """What the command writes with these options."""
    file = directory / "figures.json"
    assert main([str(model), "--data", str(data), "--micro-batch", "7", *options, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def figures_by_hand(model: MTPModel, folder: Path) -> dict[str, float]:
    """Each head's mean loss over every valid pair of a folder, and bits per byte, from full logits in float64; by source."""
    manifest = read_manifest(folder)
    reader = ShardReader(folder, manifest)
    places = [(number, row) for number, shard in enumerate(manifest.shards) for row in range(shard.samples)]
    batch = collate(reader.read_many(*map(list, zip(*places, strict=True))))
    reader.close()
    losses = all_losses(copy.deepcopy(model).double(), batch)
    targets, valid = targets_and_valid(batch.tokens_BT, batch.document_ids_BT, HEADS)
    lengths = bytes_of_tokens(load_tokenizer(folder), manifest.end_of_document_id, manifest.vocab_size).lengths_V
    num_bytes = torch.from_numpy(lengths.astype(np.int64))[targets[..., 0]]

    found = {}
    for suffix, number in (("", None), ("_source_text", 0), ("_source_other", 1)):
        of_source = valid if number is None else valid & (batch.sources_BT == number)[..., None]
        counted = of_source[..., 0] & (num_bytes > 0)
        bits = losses[..., 0][counted].sum().item() / math.log(2)
        found[f"bits_per_byte{suffix}"] = bits / num_bytes[counted].sum().item()
        for head in range(HEADS):
            mean = losses[..., head][of_source[..., head]].mean().item()
            found |= {f"loss_head_{head}{suffix}": mean, f"perplexity_head_{head}{suffix}": math.exp(mean)}
    return found


def test_figures_are_those_of_full_logits_over_every_row_of_each_folder(run, tiny_data, model, tmp_path, capsys) -> None:
    found = evaluated(run, tiny_data, tmp_path)
    assert found["step"] == 6
    assert set(found["folders"]) == {str(tiny_data / name) for name in ("train", "validation")}
    for name, figures in found["folders"].items():
        by_hand = figures_by_hand(model, Path(name))
        assert {key: figures[key] for key in by_hand} == pytest.approx(by_hand, rel=1e-6)
        assert figures["rows"] == read_manifest(Path(name)).num_samples

        # The pairs of each source, and the drafts that head 0 accepts.
        of_sources = [figures[f"valid_count_head_0_source_{source}"] for source in ("text", "other")]
        assert sum(of_sources) == figures["valid_count_head_0"]
        assert figures["accepted_per_step"] == 1 + sum(figures[f"acceptance_head_{head}"] for head in (1, 2, 3))

    # A table for each folder, with a column for each source.
    printed = capsys.readouterr().out
    assert re.search(r"train\n +all +source text +source other\nrows", printed)
    assert re.search(r"bits per byte +[\d.]+ +[\d.]+ +[\d.]+\n", printed)


def test_checkpoint_and_export_have_the_figures_of_their_run(run, tiny_data, tmp_path) -> None:
    assert export([str(run), str(tmp_path / "export")]) == 0
    expected = evaluated(run, tiny_data / "validation", tmp_path)
    assert expected["loss_head_0"] == expected["folders"][str(tiny_data / "validation")]["loss_head_0"]
    for place in (run / "checkpoints" / "step-00000006", tmp_path / "export"):
        assert evaluated(place, tiny_data / "validation", tmp_path)["folders"] == expected["folders"]


def evaluate_on_this_rank(run: Path, data: Path, directory: Path) -> dict[str, Any] | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(dist.get_rank()))
        patch.setenv("WORLD_SIZE", str(dist.get_world_size()))
        patch.setenv("LOCAL_RANK", str(dist.get_rank()))
        directory = directory / f"{dist.get_rank()}"
        directory.mkdir()
        main([str(run), "--data", str(data), "--json", str(directory / "figures.json")])
        return json.loads((directory / "figures.json").read_text()) if dist.get_rank() == 0 else None


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_rows_and_have_the_figures_of_one_process(run, tiny_data, tmp_path, world_size) -> None:
    alone = evaluated(run, tiny_data / "validation", tmp_path)
    first, *others = run_ranks(evaluate_on_this_rank, world_size, run, tiny_data / "validation", tmp_path)
    assert others == [None] * (world_size - 1)
    assert first.keys() == alone.keys()
    figures, expected = (each["folders"][str(tiny_data / "validation")] for each in (first, alone))
    assert figures == pytest.approx(expected, rel=1e-6)
    assert not (tmp_path / "1" / "figures.json").exists()


def evaluate_where_only_the_first_has_the_model(name: str, run: Path, data: Path) -> tuple[int, str]:
    """(exit code, what the rank prints as an error)."""
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(StringIO()) as printed:
        for variable, value in (("RANK", rank), ("WORLD_SIZE", dist.get_world_size()), ("LOCAL_RANK", rank)):
            patch.setenv(variable, str(value))
        return main([str(run if rank == 0 else run / name), "--data", str(data)]), printed.getvalue()


@pytest.mark.parametrize(
    ("name", "said"),
    [("elsewhere", "no such folder; expected a run directory"), ("x" * 300, "choose a shorter name")],
)
def test_what_one_machine_lacks_is_said_once_and_ends_all_ranks(run, tiny_data, name: str, said: str) -> None:
    (code, message), (other_code, other_message) = run_ranks(
        evaluate_where_only_the_first_has_the_model, 2, name, run, tiny_data / "validation"
    )
    assert code == other_code == 2
    assert re.search(rf"^evaluate.py: error: rank 1 on .*{said}", message)
    assert other_message == ""


def test_a_long_evaluation_says_how_far_it_has_come(run, tiny_data, monkeypatch, capsys) -> None:
    ticks = itertools.count(step=4.0)
    monkeypatch.setattr(time_left, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    assert main([str(run), "--data", str(tiny_data / "validation"), "--micro-batch", "10", "--rows", "45"]) == 0
    said = re.findall(r"validation: (.* left)\n", capsys.readouterr().out)
    # The clock ticks once a micro-batch: three of them take more than ten seconds.
    assert said == ["30 of 45 rows evaluated, about 6 s left"]


def test_some_rows_alone_are_read_and_drafts_are_left_out_on_request(run, tiny_data, tmp_path) -> None:
    found = evaluated(run, tiny_data / "train", tmp_path, "--rows", "9", "--drafts", "0")
    assert found["rows"] == 9
    assert not any(key.startswith("accept") for key in found)


def test_a_tokenizer_with_the_datas_ids_and_other_merges_is_another_one(run, tiny_data, tmp_path, capsys) -> None:
    assert export([str(run), str(tmp_path / "export")]) == 0
    file = tmp_path / "export" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"].reverse()
    file.write_text(json.dumps(content))
    assert main([str(tmp_path / "export"), "--data", str(tiny_data / "train")]) == 2
    assert "has the ids of the data's, but makes other ids out of a text" in capsys.readouterr().err


def test_data_that_is_not_the_models_is_refused(run, tiny_data, tmp_path, capsys) -> None:
    long = numbered_data(tmp_path / "long", 3, sequence_length=32, vocab_size=100)
    wide = numbered_data(tmp_path / "wide", 3, vocab_size=60_000)
    other = numbered_data(tmp_path / "other", 3, vocab_size=100)
    for data, options, message in (
        (long, [], "has rows of 32 tokens, and .* was trained on rows of 16; prepare shorter rows"),
        (wide, [], "has 60000 ids, and "),
        (other, [], "was prepared with another tokenizer than that of"),
        (tmp_path / "nowhere", [], "nowhere"),
        (
            tiny_data / "validation",
            ["--rows", "9999"],
            r"error: --rows: 9999, but .* holds \d+ rows; set at most \d+, or leave",
        ),
        (
            tiny_data / "train",
            ["--rows", "0", "--drafts", "-1"],
            "2 problems with the options:\n  - --rows: .* at least 1, got '0'\n  - --drafts: .* at least 0, got '-1'",
        ),
    ):
        assert main([str(run), "--data", str(data), *options]) == 2
        assert re.search(message, capsys.readouterr().err)
