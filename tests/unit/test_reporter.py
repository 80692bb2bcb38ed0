"""Validations as they are reported: a line for each folder, and what is missing said once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.corpus.documents import Document
from pipeline.data.corpus.prepare import prepare
from pipeline.data.loading.held_out import HeldOutRows
from pipeline.data.loading.mixture import DataSet
from pipeline.data.shards.manifest import read_manifest, write_manifest
from pipeline.data.tokenizer import byte_tokenizer
from pipeline.micro_step import Models
from pipeline.progress import Progress
from pipeline.reporter import Reporter
from pipeline.run import Run
from pipeline.runtime.distributed import World
from pipeline.runtime.logbook import read_records
from pipeline.runtime.preemption import StopRequest
from tests.dense import dense_model, settings_for


def folder(directory: Path, num_texts: int) -> Path:
    texts = [Document(f"{number}: a text of some words", "") for number in range(num_texts)]
    prepare(texts, directory, byte_tokenizer(), 14, seed=0)
    return directory


def reporter_for(run_dir: Path, **folders: Path) -> Reporter:
    """A reporter of an untrained policy without a reference."""
    settings = settings_for(1, 1, model={"vocab_size": 257})
    sizes = {"num_rows": 7, "micro_batch": 4, "rank": 0, "world_size": 1}
    policy: Any = dense_model(settings)
    nothing: Any = None
    run = Run(
        settings=settings,
        world=World(0, 1, 0, 1),
        device=torch.device("cpu"),
        run_dir=run_dir,
        engine=policy,
        models=Models(policy, None, "shifted", None),
        stream=nothing,
        held_out=[HeldOutRows(DataSet(path, name=name), **sizes) for name, path in folders.items()],  # type: ignore[arg-type]
        checkpoints=nothing,
        fixed_batch=nothing,
    )
    return Reporter(run, 0)


def test_each_held_out_folder_has_a_line_under_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = reporter_for(tmp_path, web=folder(tmp_path / "a", 10), books=folder(tmp_path / "b", 20))
    reporter.validate_if_due(Progress(), StopRequest())
    reporter.close()
    assert [(line["step"], line["split"], line["set"], line["rows"]) for line in read_records(tmp_path)] == [
        (0, "validation", "web", 7),
        (0, "validation", "books", 7),
    ]
    assert all(line["bits_per_byte"] > 7 for line in read_records(tmp_path))
    assert [line[:37] for line in capsys.readouterr().out.splitlines()] == [
        "step 0: held-out loss of web per head",
        "step 0: held-out loss of books per he",
    ]


def test_a_folder_whose_tokens_bytes_are_not_known_says_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path / "a", 10)
    write_manifest(path, read_manifest(path).model_copy(update={"tokenizer_sha256": "0" * 64}))
    reporter = reporter_for(tmp_path, web=path)
    reporter.validate_if_due(Progress(), StopRequest())
    reporter.validate_if_due(Progress(step=reporter.run.settings.training.steps), StopRequest())
    reporter.close()
    assert all("bits_per_byte" not in line for line in read_records(tmp_path))
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "bits per byte" in line]
    assert said == f"no bits per byte of web: {path}/tokenizer.json is not the tokenizer that the data was prepared with"
