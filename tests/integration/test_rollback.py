"""Runs that go back from a loss spike: what they come to, and that no kill on the way changes it.

The rows are of one token each, which a tiny model soon knows; those of two steps are random, and spike.
"""

import hashlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.audit.report import audit
from pipeline.data.loading.order import EpochOrder
from pipeline.data.shards.manifest import Manifest, write_manifest
from pipeline.data.shards.writer import Row, write_shards
from pipeline.recipe import load_settings
from pipeline.runtime.logbook import read_records
from pipeline.runtime.metrics import OF_THE_MACHINE
from tests.forked import forking
from tests.ranks import run_ranks

ROWS, TOKENS, VOCAB, STEPS = 8, 16, 32, 36
SPIKES = (21, 33)
"""The steps that would read random rows, if nothing were left out."""
SKIPPED = [[17 * ROWS, 23 * ROWS], [29 * ROWS, 35 * ROWS]]
"""From four steps before a spike on, itself among them, the rows of six."""
ORDER = {"lanes": ROWS, "seed": 0, "shuffle_block": 1024}
ZERO3: dict[str, Any] = {"stage": 3}
SETTINGS = (
    f"data.sequence_length={TOKENS}",
    f"data.global_batch={ROWS}",
    "data.num_workers=0",
    "model.dim=16",
    "model.num_layers=2",
    "model.num_attention_heads=2",
    f"training.steps={STEPS}",
    "training.warmup_steps=2",
    "training.learning_rate=0.01",
    "training.k_percent=1",
    "training.rollback_on_spike=8",
    "training.rollback_steps=4",
    "training.rollback_skip_steps=6",
    "training.check_ranks_every=1",
    "checkpoint.every=5",
    "logging.metrics_every=1",
)
# Of a start, and of a returned run: whose clock it is, and by how much it was left alone.
OF_TIME = OF_THE_MACHINE


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("spikes")
    sizes = [100] * 4
    order = EpochOrder(sizes, **ORDER)
    spikes = {order.locate_row((step - 1) * ROWS + row)[1:] for step in SPIKES for row in range(ROWS)}
    draw = np.random.default_rng(0)

    def rows() -> Iterator[Row]:
        for number in range(sum(sizes)):
            is_spike = divmod(number, 100) in spikes
            tokens = draw.integers(1, VOCAB, TOKENS) if is_spike else np.full(TOKENS, 1 + number % 3)
            yield Row(tokens.astype(np.uint32), np.array([TOKENS], np.uint32), None)

    shards = write_shards(rows(), directory, vocab_size=VOCAB, samples_per_shard=100, named_sources=False)
    manifest = Manifest(
        sequence_length=TOKENS,
        vocab_size=VOCAB,
        end_of_document_id=0,
        tokenizer_file="tokenizer.json",
        tokenizer_sha256="0" * 64,
        sources=(),
        shards=tuple(shards),
    )
    write_manifest(directory, manifest)
    (directory / "tokenizer.json").touch()
    return directory


def train_here(
    data: Path,
    run_dir: Path,
    *overrides: str,
    zero: dict[str, Any] = ZERO3,
    prepare: Callable[[Any], None] = lambda patch: None,
) -> str:
    """Train on this rank; returns the message with which it stopped, if it did. Windows are short, to make the runs so."""
    import torch.distributed as dist

    from pipeline import loss_spikes
    from pipeline.assembly import Job, build_run
    from pipeline.runtime.distributed import World
    from pipeline.runtime.engine import initialize_distributed
    from pipeline.runtime.non_finite import TrainingDivergedError
    from pipeline.runtime.preemption import StopRequest
    from pipeline.train import train

    run_dir.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    initialize_distributed(torch.device("cpu"), "error")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    settings = load_settings(None, [f"data.path={data}", f"data.micro_batch={ROWS // ranks}", *SETTINGS, *overrides])
    world = World(rank, ranks, rank, ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_spikes, "WINDOW", 8)
        patch.setattr(loss_spikes, "FEWEST", 4)
        prepare(patch)
        job = Job(settings, {"zero_optimization": zero}, run_dir, world, torch.device("cpu"))
        try:
            train(build_run(job, settings, run_dir), StopRequest())
        except TrainingDivergedError as error:
            return str(error)
    return ""


def records(run_dir: Path, *without: str) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in record.items() if key not in (*OF_TIME, *without)} for record in read_records(run_dir)
    ]


def last_weights(run_dir: Path) -> list[str]:
    files = sorted((run_dir / "checkpoints" / f"step-{STEPS:08d}").glob("rank-*"))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def leave_out(patch: pytest.MonkeyPatch, skipped: Sequence[Sequence[int]] = SKIPPED) -> None:
    """Begin with what the returns will leave out."""
    from pipeline.progress import Progress
    from pipeline.runtime.checkpoint.checkpoints import Checkpoints

    patch.setattr(Checkpoints, "resume", lambda *arguments: Progress(skipped=skipped))


def train_without(data: Path, run_dir: Path, *overrides: str) -> str:
    return train_here(data, run_dir, "training.rollback_on_spike=null", *overrides, prepare=leave_out)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupts."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert run_ranks(train_here, 1, data, run_dir, timeout=1500) == [""]
    return run_dir


@pytest.mark.slow
def test_a_run_that_went_back_is_one_that_never_saw_the_samples(data: Path, whole: Path, tmp_path: Path) -> None:
    assert run_ranks(train_without, 1, data, tmp_path / "without", timeout=1500) == [""]
    own = ("rollbacks", "samples_skipped")
    assert records(whole, *own) == records(tmp_path / "without", *own)
    assert last_weights(whole) == last_weights(tmp_path / "without")

    # An audit knows what was left out, and finds nothing else missing.
    found = audit(whole)
    assert found.problems == []
    assert found.history.left_out == tuple(map(tuple, SKIPPED))
    assert [each.left_out for each in found.history.returns] == list(found.history.left_out)

    # Its records say how often it went back, and what it left out.
    logged = records(whole)
    assert [record["step"] for record in logged] == list(range(1, STEPS + 1))
    assert [record["samples"] for record in logged] == [ROWS * step for step in range(1, STEPS + 1)]
    counted = [(record["rollbacks"], record["samples_skipped"]) for record in logged]
    assert sorted(set(counted)) == [(0, 0), (1, 6 * ROWS), (2, 12 * ROWS)]
    assert max(record["loss_spike_score"] or 0 for record in logged) < 8
    # Set aside are the checkpoints from between the returns' ends.
    assert len(list(whole.glob("checkpoints/abandoned-step-*"))) > 0


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before_loading(patch: pytest.MonkeyPatch) -> None:
    from pipeline.runtime.checkpoint.checkpoints import Checkpoints

    patch.setattr(Checkpoints, "go_back", lambda *arguments: kill())


def kill_before_retiring(patch: pytest.MonkeyPatch) -> None:
    from pipeline.runtime.checkpoint import checkpoints, folders

    def retire(directory: Path, step: int) -> None:
        if folders.saved_steps(directory)[0] > step:
            kill()

    patch.setattr(checkpoints, "retire_later", retire)


def kill_while_retiring(patch: pytest.MonkeyPatch) -> None:
    from pipeline.runtime.checkpoint import retention

    def rename(source: Path, target: Path) -> None:
        os.rename(source, target)
        kill()

    patch.setattr(retention.os, "replace", rename)


def kill_after_retiring(patch: pytest.MonkeyPatch) -> None:
    from pipeline.reporter import Reporter

    patch.setattr(Reporter, "close", lambda *arguments: kill())


def kill_after_cutting(patch: pytest.MonkeyPatch) -> None:
    from pipeline import train

    original = train.train_on

    def train_on(run: Any, progress: Any, *arguments: Any) -> Any:
        if progress.rollbacks:
            kill()
        return original(run, progress, *arguments)

    patch.setattr(train, "train_on", train_on)


def kill_in_the_first_step(patch: pytest.MonkeyPatch) -> None:
    from pipeline import train

    original = train.train_step

    def train_step(run: Any, fetched: Any, progress: Any) -> Any:
        if progress.rollbacks:
            kill()
        return original(run, fetched, progress)

    patch.setattr(train, "train_step", train_step)


def kill_in_the_samples_after_the_stretch(patch: pytest.MonkeyPatch) -> None:
    from pipeline import train

    original = train.train_step

    def train_step(run: Any, fetched: Any, progress: Any) -> Any:
        if progress.rollbacks == 1 and progress.step == 22:
            kill()
        return original(run, fetched, progress)

    patch.setattr(train, "train_step", train_step)


KILLS = [
    kill_before_loading,
    kill_before_retiring,
    kill_while_retiring,
    kill_after_retiring,
    kill_after_cutting,
    kill_in_the_first_step,
    kill_in_the_samples_after_the_stretch,
]


def die(data: Path, run_dir: Path, number: int) -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    train_here(data, run_dir, prepare=KILLS[number])


@pytest.mark.slow
def test_a_run_that_is_killed_at_each_point_of_a_return_comes_to_the_same(data: Path, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "killed"
    for number, point in enumerate(KILLS):
        process = forking().Process(target=die, args=(data, run_dir, number))
        process.start()
        process.join(1500)
        assert process.exitcode == -signal.SIGKILL, point
    assert run_ranks(train_here, 1, data, run_dir, timeout=1500) == [""]
    assert records(run_dir) == records(whole)
    assert audit(run_dir).problems == []
    assert last_weights(run_dir) == last_weights(whole)


def train_from_the_beginning(data: Path, folder: Path, zero: dict[str, Any]) -> str:
    """With a worker that reads ahead, and no checkpoint but the first; beside it a run without the samples."""
    settings = ("data.num_workers=1", "checkpoint.every=100", "training.max_rollbacks=1")
    said = train_here(data, folder / "run", *settings, zero=zero)

    def leave_out_one(patch: pytest.MonkeyPatch) -> None:
        leave_out(patch, SKIPPED[:1])

    train_here(data, folder / "without", *settings, "training.rollback_on_spike=null", zero=zero, prepare=leave_out_one)
    return said


@pytest.mark.slow
@pytest.mark.parametrize("zero", [ZERO3, {"stage": 2}], ids=["zero3", "zero2"])
def test_two_ranks_decide_alike_and_stop_where_they_have_gone_back_often_enough(
    data: Path, tmp_path: Path, zero: dict[str, Any]
) -> None:
    said, other = run_ranks(train_from_the_beginning, 2, data, tmp_path, zero, timeout=1500)
    assert said == other
    assert said.startswith("step 27: loss spike, ")
    assert "after 1 rollbacks (training.max_rollbacks)" in said
    assert said.endswith("there are steps 0; continue with --from-step N to go back to one")

    own = ("rollbacks", "samples_skipped")
    found = records(tmp_path / "run", *own)
    assert [record["step"] for record in found] == list(range(1, 28))
    assert found == records(tmp_path / "without", *own)[:27]
    assert found[-1]["loss_spike_score"] > 8
    assert audit(tmp_path / "run").problems == []
