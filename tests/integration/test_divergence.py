"""A run on two ranks whose steps are no longer finite: it stops, says what and where, and leaves what it had."""

import hashlib
import re
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.runtime.logbook import read_records
from tests.forked import run_script
from tests.integration.test_command_line import ENVIRONMENT, ZERO3, checkpoints


def run_two_ranks(*arguments: Any) -> list[tuple[int, str, str]]:
    """(exit code, standard output, standard error) of each rank."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    job = ENVIRONMENT | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def run_one(rank: str) -> tuple[int, str, str]:
        environment = job | {"RANK": rank, "LOCAL_RANK": rank}
        done = run_script("train.py", "--deepspeed", ZERO3, *arguments, environment=environment, timeout=1500)
        return done.returncode, done.stdout, done.stderr

    with ThreadPoolExecutor() as pool:
        return list(pool.map(run_one, ("0", "1")))


def poisoned_copy(reference: Path, directory: Path) -> Path:
    """The same model, whose weights are finite and all of whose losses are not."""
    shutil.copytree(reference, directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], 3e38)
    save_file(weights, directory / "model.safetensors")
    return directory


def files_of(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_a_run_that_diverges_stops_names_what_and_where_and_leaves_its_last_checkpoint(tiny_data, tiny_reference, tmp_path):
    recipe, run_dir = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(
        f"data: {{path: {tiny_data}/train, validation_path: {tiny_data}/validation, sequence_length: 16, "
        "global_batch: 8, micro_batch: 2, num_workers: 0}\n"
        "model: {dim: 16, num_layers: 2, num_attention_heads: 2}\n"
        "training: {warmup_steps: 2, max_skipped_steps: 3}\n"
        "checkpoint: {every: 4}\n"
        "logging: {metrics_every: 1, progress_every: 1, validation_every: 3, validation_samples: 8}\n",
        encoding="utf-8",
    )
    common = ["--config", recipe, "--run-dir", run_dir]
    finished = run_two_ranks(*common, f"reference.path={tiny_reference}", "training.steps=4")
    assert [code for code, _, _ in finished] == [0, 0], finished
    kept = files_of(run_dir / "checkpoints")
    assert checkpoints(run_dir) == ["step-00000004"]

    poisoned = poisoned_copy(tiny_reference, tmp_path / "poisoned")
    diverged = run_two_ranks(*common, f"reference.path={poisoned}", "training.steps=9", "--allow-changed")
    assert [code for code, _, _ in diverged] == [3, 3], diverged
    (_, printed, error), (_, _, other) = diverged
    assert "Traceback" not in error + other
    head = "train.py: error: 3 steps in a row, up to step 7, met numbers that were not finite; in the last of them "
    assert error.startswith(head), error
    # Each rank's samples of each head that is compared with the reference.
    for rank in (0, 1):
        for number in (1, 2, 3):
            assert re.search(rf"rank {rank}, reference loss of head {number}: shard-\d+/\d+, ", error), error
    assert "policy loss" not in error
    assert "Checkpoints hold finite numbers alone: there are steps" in error
    assert (
        len(re.findall(r"step [56]: discarded on all ranks; what was not finite: rank 0, reference loss of head 1: ", printed))
        == 2
    )

    assert files_of(run_dir / "checkpoints") == kept
    trained = {record["step"]: record for record in read_records(run_dir) if "split" not in record}
    assert list(trained) == [1, 2, 3, 4, 5, 6]
    for step in (5, 6):
        record = trained[step]
        assert record["loss"] is record["grad_norm"] is record["threshold_head_1"] is record["excess_mean"] is None
        # The policy's own losses are those of the weights that nothing has touched.
        assert abs(record["loss_head_0"] - trained[4]["loss_head_0"]) < 1
        assert record["skipped_steps"] == step - 4
        assert record["learning_rate"] == trained[5]["learning_rate"]
    (held_out,) = [record for record in read_records(run_dir) if "split" in record and record["step"] == 6]
    assert held_out["loss"] is held_out["threshold_head_2"] is None
    assert held_out["loss_head_0"] > 0

    healed = run_two_ranks(*common, f"reference.path={tiny_reference}", "training.steps=9", "--allow-changed")
    assert [code for code, _, _ in healed] == [0, 0], healed
    assert "continuing from step 4" in healed[0][1]
    assert [record["step"] for record in read_records(run_dir) if "split" not in record] == list(range(1, 10))
    assert all(record["loss"] > 0 for record in read_records(run_dir))
