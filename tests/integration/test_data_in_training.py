"""What reaches the training loop, with ranks and loader workers: what launch/shards.py order says; and damage on one rank."""

import importlib.util
import json
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from pipeline.config import Settings
from pipeline.data.errors import DataError
from tests.integration.test_command_line import ZERO3, run
from tests.integration.test_pipeline_rho1 import job_on_this_rank, settings_for
from tests.ranks import run_ranks
from tests.unit.test_storage import Server

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "shards.py"
SIZES = ["--global-batch", "16", "--ranks", "2", "--micro-batch", "4", "--seed", "3"]


def order(capsys, *arguments):
    """The lines that launch/shards.py prints, split."""
    spec = importlib.util.spec_from_file_location("launch_shards", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["order", *map(str, arguments)]) == 0
    return [line.split(" ") for line in capsys.readouterr().out.splitlines()]


def test_the_order_is_printed_a_line_a_sample_and_goes_on_where_it_is_told(tiny_data, capsys):
    lines = order(capsys, tiny_data / "train", *SIZES, "--lanes", "8", "--steps", "5")
    assert [int(step) for step, *_ in lines] == [step for step in range(5) for _ in range(16)]
    assert [int(rank) for _, rank, *_ in lines] == [0, 0, 0, 0, 1, 1, 1, 1] * 10
    assert len({(shard, key) for _, _, shard, key in lines}) == 80
    assert all(re.fullmatch(r"shard-0000\d", shard) and re.fullmatch(r"\d{9}", key) for _, _, shard, key in lines)
    later = order(capsys, tiny_data / "train", *SIZES, "--lanes", "8", "--steps", "2", "--start", "48", "--workers", "2")
    assert later == lines[48:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--lanes", "5"], "data.lanes = 5"), (["--start", "3"], "multiple of 16"), (["--lanes", "100000"], "lanes that fit")],
)
def test_the_order_of_sizes_that_do_not_fit_is_refused(tiny_data, capsys, arguments, message):
    with pytest.raises(AssertionError, match="assert 2 == 0"):
        order(capsys, tiny_data / "train", *SIZES, "--steps", "1", *arguments)
    assert message in capsys.readouterr().err


def train_and_watch(settings: Settings, run_dir: Path) -> tuple[list[list[str]], str | None, bool]:
    """Train; the keys of each step's batches as they reach the loop, and the error that ended it."""
    from pipeline.job import build_run
    from pipeline.runtime.preemption import StopRequest
    from pipeline.train import train

    run = build_run(job_on_this_rank(settings, run_dir), settings, run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    iterate, arrived = run.stream.iterate, []

    def watched(start_sample: int, **given: Any) -> Any:
        for number, batch in enumerate(iterate(start_sample, **given)):
            if number % run.stream.micro_steps == 0:
                arrived.append([])
            arrived[-1] += batch.keys
            yield batch

    run.stream.iterate = watched  # type: ignore[method-assign]
    try:
        train(run, StopRequest())
    except DataError as error:
        return arrived, str(error), error.agreed
    finally:
        dist.barrier()
    return arrived, None, False


@pytest.mark.slow
def test_training_sees_that_order_and_all_ranks_pass_over_damage_until_there_is_too_much(tiny_data, tmp_path, capsys):
    steps = 8
    expected = order(capsys, tiny_data / "train", *SIZES, "--steps", steps, "--workers", "2")
    data = shutil.copytree(tiny_data / "train", tmp_path / "data")
    # One sample of step 2 and one of step 5, both rank 1's.
    victims = [next(line[2:] for line in expected if line[:2] == [str(step), "1"]) for step in (2, 5)]
    for shard, key in victims:
        damage(data, shard, key)
    settings = settings_for(
        tiny_data,
        tmp_path,
        f"data.path={data}",
        "data.validation_path=null",
        "data.num_workers=2",
        "data.seed=3",
        "data.on_corrupt=skip",
        "data.max_corrupt=1",
        "reference.path=null",
        "training.k_percent=1",
        f"training.steps={steps}",
        "checkpoint.every=100",
    )
    ranks = run_ranks(train_and_watch, 2, settings, tmp_path / "run")
    for rank, (arrived, error, agreed) in enumerate(ranks):
        assert agreed
        assert error.startswith("2 damaged samples, more than data.max_corrupt = 1; the last: shard ")
        assert victims[1][0] in error
        seen = [[str(step), str(rank), *key.split("/")] for step, keys in enumerate(arrived) for key in keys]
        # A step is begun, with its data, before the one before it is run.
        right = [line for line in expected if line[1] == str(rank) and int(line[0]) < 7]
        assert len(seen) == len(right)
        for found, wanted in zip(seen, right, strict=True):
            if wanted[2:] in victims:
                assert found[:3] == wanted[:3]
                assert found[3].startswith("(damaged: sample ")
            else:
                assert found == wanted
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["corrupt_samples"] for record in records] == [0, 0, 1, 1, 1]
    for record in records:
        assert 0 <= record["data_wait"] < 1
        assert record["data_tokens_source_text"] + record["data_tokens_source_other"] == record["tokens"]
        assert record["data_samples_source_text"] <= record["samples"]
        assert 0 <= record["data_padding_share"] < 0.5


def damage(folder: Path, shard: str, key: str) -> None:
    path = folder / f"{shard}.tar"
    data = bytearray(path.read_bytes())
    place = data.index(f"{key}.tokens.npy".encode())
    start = np.fromfile(f"{path}.idx", "<u8")
    assert start[0] <= place < start[-1]
    data[place + 512 + 130] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
def test_the_command_line_trains_on_a_mixture_of_a_server_and_a_folder(tiny_data, tmp_path):
    recipe = tmp_path / "mixture.yaml"
    with Server(tiny_data / "train") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.faults = ["truncate", "drop", 503] * 3
        recipe.write_text(
            f"data:\n  mixture:\n    - {{path: '{server.url}', weight: 0.75, name: far}}\n"
            f"    - {{path: {tiny_data}/validation, weight: 0.25, name: near}}\n"
            f"  sequence_length: 16\n  global_batch: 4\n  micro_batch: 2\n  num_workers: 1\n  cache_dir: {tmp_path}/cache\n"
            "model: {dim: 16, num_layers: 2, num_attention_heads: 2}\n"
            "training: {steps: 4, k_percent: 1}\nlogging: {metrics_every: 1}\n",
            encoding="utf-8",
        )
        finished = run("--deepspeed", ZERO3, "--config", recipe, "--run-dir", tmp_path / "run")
        server.shutdown()
    assert finished.returncode == 0, finished.stderr
    assert server.faults == []
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["data_samples_set_far"], last["data_samples_set_near"]) == (12, 4)
    assert list((tmp_path / "cache").glob("*-000000"))
