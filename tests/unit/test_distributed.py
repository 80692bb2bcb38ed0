"""Which rank a process is, and work that one rank does for all."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.data.errors import DataError
from pipeline.runtime import distributed
from pipeline.runtime.distributed import (
    World,
    any_rank,
    cores_of_rank,
    device_of,
    find_world,
    make_once,
    max_over_ranks,
    min_over_ranks,
    missing_devices,
    ranks_of_each_node,
    share_cores,
)
from tests.ranks import run_ranks

CPU = torch.device("cpu")
LAUNCHER = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "6",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, World(rank=0, size=1, local_rank=0, local_size=1)),
        (LAUNCHER, World(rank=5, size=8, local_rank=1, local_size=4)),
        (SLURM, World(rank=6, size=7, local_rank=0, local_size=1)),
        (SLURM | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}, World(1, 7, 1, 2)),
        (SLURM | LAUNCHER, World(rank=5, size=8, local_rank=1, local_size=4)),
    ],
    ids=["alone", "launcher", "slurm-last-node", "slurm-first-node", "launcher-inside-slurm"],
)
def test_the_world_is_read_from_the_launchers_variables(monkeypatch, variables, expected) -> None:
    for name in (*LAUNCHER, *SLURM, "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # find_world fills in what is missing; setting those through monkeypatch first has them taken back afterwards.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in variables:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
    assert find_world() == expected


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(8, 5, 5), (1, 5, 0), (2, 5, 1), (1, 0, 0)])
def test_a_rank_takes_one_of_the_gpus_that_it_sees_and_has_deepspeed_take_it_too(
    monkeypatch: pytest.MonkeyPatch, visible: int, local_rank: int, index: int
) -> None:
    """With --gpus-per-task=1 each task sees one GPU, whose index is 0 in every task."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert device_of(World(13, 16, local_rank, 8)) == torch.device("cuda", index)
    assert (chosen, os.environ["LOCAL_RANK"]) == ([index], str(index))


STEP = {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_NODEID": "1", "SLURM_CPUS_ON_NODE": "128"}


@pytest.mark.parametrize(
    ("variables", "local_size", "allowed", "cores"),
    [
        ({}, 2, 8, 4),
        ({}, 4, 2, 1),
        # Within an allocation of half a node whose processes are bound to nothing.
        ({"SLURM_CPUS_ON_NODE": "64"}, 8, 128, 8),
        # Tasks that are bound to their own cores, to nothing, and, as srun does without --cpus-per-task, to one.
        (STEP | {"SLURM_CPUS_PER_TASK": "16"}, 8, 16, 16),
        (STEP | {"SLURM_CPUS_PER_TASK": "12"}, 8, 128, 12),
        (STEP, 8, 128, 16),
        (STEP, 8, 1, 1),
        # One task a node, in which torchrun starts eight ranks.
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_CPUS_PER_TASK": "96"}, 8, 128, 12),
    ],
)
def test_a_rank_has_the_smaller_of_what_it_may_use_and_what_slurm_gives_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], local_size: int, allowed: int, cores: int
) -> None:
    for name in (*STEP, "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cores_of_rank(World(0, 16, 0, local_size), allowed) == cores


def test_gpus_that_torch_does_not_see_are_said_unless_somebody_hid_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for number in range(2):
        (tmp_path / f"0000:0{number}:00.0").mkdir()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    said = missing_devices(tmp_path)
    assert said is not None
    assert "2 GPU(s), and torch sees none" in said
    assert "built without CUDA" in said
    assert missing_devices(tmp_path / "none") is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert missing_devices(tmp_path) is None


def make_slowly(path: Path) -> tuple[bool, str]:
    """(whether this rank made it, what it then finds)"""
    rank = dist.get_rank()
    made = False

    def make() -> None:
        nonlocal made
        made = True
        time.sleep(1.0)
        partial = path.with_suffix(".partial")
        partial.write_text(f"made by {rank}")
        partial.rename(path)

    make_once(path, make, World(rank, dist.get_world_size(), rank, dist.get_world_size()))
    return made, path.read_text()


def test_one_rank_makes_what_is_missing_while_the_others_wait(tmp_path: Path) -> None:
    assert run_ranks(make_slowly, 2, tmp_path / "it") == [(True, "made by 0"), (False, "made by 0")]
    assert run_ranks(make_slowly, 1, tmp_path / "it") == [(False, "made by 0")]


def fail_to_make(path: Path) -> str:
    def make() -> None:
        raise DataError("the disk is full")

    try:
        make_once(path, make, World(dist.get_rank(), 2, dist.get_rank(), 2))
    except DataError as error:
        return str(error)
    return "no error"


def test_what_the_one_rank_meets_is_raised_on_all(tmp_path: Path) -> None:
    assert run_ranks(fail_to_make, 2, tmp_path / "it") == ["the disk is full"] * 2


def make_elsewhere(path: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "SECONDS_TO_APPEAR", 0.5)
        try:
            make_once(path, lambda: None, World(dist.get_rank(), 2, dist.get_rank(), 2))
        except OSError as error:
            return str(error)
    return "no error"


def test_what_is_made_where_this_machine_does_not_see_it_is_not_waited_for_without_end(tmp_path: Path) -> None:
    for said in run_ranks(make_elsewhere, 2, tmp_path / "it"):
        assert said.startswith(f"{tmp_path / 'it'}: the first rank has made it, but ")
        assert said.endswith("must be on a file system that all machines share")


DIE_WHILE_MAKING = """
import os, sys
from pathlib import Path
import torch.distributed as dist
from pipeline.runtime.distributed import World, make_once

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
make_once(folder / "it", lambda: os._exit(9), World(rank, 2, rank, 2))
"""


def test_the_death_of_the_one_rank_ends_the_wait_of_the_others(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", DIE_WHILE_MAKING, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    (_, first), (_, second) = (rank.communicate(timeout=600) for rank in ranks)
    assert ranks[0].returncode == 9, first
    assert ranks[1].returncode not in (0, None)
    assert "RuntimeError" in second or "DistBackendError" in second


def ask_all() -> list[bool]:
    return [any_rank(False, CPU), any_rank(dist.get_rank() == 1, CPU), any_rank(True, CPU)]


def extremes() -> tuple[float, float]:
    """Of -1 and -3."""
    value = -1.0 - 2 * dist.get_rank()
    return max_over_ranks(value, CPU), min_over_ranks(value, CPU)


def test_extremes_over_ranks() -> None:
    assert run_ranks(extremes, 2) == [(-1.0, -3.0)] * 2


def test_a_flag_of_one_rank_is_everybodys() -> None:
    assert run_ranks(ask_all, 2) == [[False, True, True]] * 2


@pytest.mark.parametrize(("asked", "threads"), [("1", 1), ("3", 3), ("2,1", 2), ("", None), ("0", None), ("all", None)])
def test_as_many_threads_as_the_environment_asks_for_else_a_share_of_the_cores(monkeypatch, asked, threads) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    before = torch.get_num_threads()
    try:
        share_cores(World(0, 2, 0, 2))
        share = cores_of_rank(World(0, 2, 0, 2), len(os.sched_getaffinity(0)))
        assert torch.get_num_threads() == (threads or share)
    finally:
        torch.set_num_threads(before)


def nodes_of(local_sizes: list[int]) -> int:
    return ranks_of_each_node(World(dist.get_rank(), 3, 0, local_sizes[dist.get_rank()]))


def test_every_rank_has_the_same_number_of_ranks_a_node_also_where_nodes_differ() -> None:
    assert run_ranks(nodes_of, 3, [3, 3, 3]) == [3, 3, 3]
    assert run_ranks(nodes_of, 3, [2, 2, 1]) == [1, 1, 1]
