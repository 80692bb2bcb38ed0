"""Two ranks on two machines as far as network and host name go: each in a namespace of its own, with a wire between."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from pipeline.runtime.preemption import EXIT_HANG
from tests.forked import ROOT
from tests.lives import difference, left_by, live, write_recipe

MACHINES = ("smtp-a", "smtp-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture(scope="module")
def machines() -> Iterator[Sequence[str]]:
    """Two network namespaces with a wire between them; the test is skipped where none can be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("needs root, ip and unshare")
    names = [f"{machine}-{os.getpid()}" for machine in MACHINES]
    wires = [f"v{letter}{os.getpid() % 10**6}" for letter in "ab"]
    with ExitStack() as made:
        for name in names:
            if ip("netns", "add", name).returncode:
                pytest.skip("this machine makes no network namespaces")
            made.callback(ip, "netns", "del", name)
        if ip("link", "add", wires[0], "type", "veth", "peer", "name", wires[1]).returncode:
            pytest.skip("this machine makes no wires between namespaces")
        for name, wire, address in zip(names, wires, ADDRESSES, strict=True):
            ip("link", "set", wire, "netns", name)
            ip("-n", name, "link", "set", wire, "name", "wire0")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "wire0")
            for link in ("lo", "wire0"):
                assert ip("-n", name, "link", "set", link, "up").returncode == 0
        yield names


def start(machines: Sequence[str], run_dir: Path, recipe: Path, *settings: str) -> list["subprocess.Popen[bytes]"]:
    """Start a rank on each machine, as srun does on two nodes. Nothing knows the machines' names, as gloo would want it."""
    command = [sys.executable, ROOT / "launch" / "train.py", "--deepspeed", ROOT / "ds_configs" / "zero3.json"]
    command += ["--config", recipe, "--run-dir", run_dir, "data.micro_batch=8", *settings]
    ranks = []
    for rank, machine in enumerate(machines):
        job = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "SLURM_CPUS_ON_NODE": 1}
        job |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": 29533}
        on_machine = ["ip", "netns", "exec", machine, "unshare", "--uts", "sh", "-c", f'hostname {machine}; exec "$@"', "sh"]
        with run_dir.with_name(f"{run_dir.name}-{rank}.log").open("wb") as log:
            environment = os.environ | {name: str(value) for name, value in job.items()}
            ranks.append(
                subprocess.Popen(
                    [*on_machine, *map(str, command)], env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
                )
            )
    return ranks


def codes_of(ranks: Sequence["subprocess.Popen[bytes]"]) -> list[int]:
    try:
        return [rank.wait(900) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def log_of(run_dir: Path, rank: int) -> str:
    return run_dir.with_name(f"{run_dir.name}-{rank}.log").read_text()


@pytest.mark.slow
def test_two_machines_train_as_one_does_and_the_survivor_names_the_one_that_is_gone(
    machines: Sequence[str], tiny_data: Path, tiny_reference: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_data, tiny_reference, 6)
    run_dir, here = tmp_path / "machines" / "run", tmp_path / "here" / "run"
    run_dir.parent.mkdir()
    here.parent.mkdir()

    # A rank dies with its machine: nobody there can tell, so it is the silence that tells.
    ranks = start(machines, run_dir, recipe, "training.steps=100000", "run.hang_timeout=8", "--allow-changed")
    ends = time.monotonic() + 900
    while "saved step 3" not in log_of(run_dir, 0):
        assert time.monotonic() < ends, log_of(run_dir, 0) + log_of(run_dir, 1)
        time.sleep(0.2)
    ip("-n", machines[1], "link", "set", "wire0", "down")
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert codes_of(ranks) == [EXIT_HANG, -signal.SIGKILL], log_of(run_dir, 0)
    assert f"the job cannot go on: rank 1 on {machines[1]} " in log_of(run_dir, 0)

    # All of a run crosses the wire, and it is the run of one machine.
    shutil.rmtree(run_dir)
    ip("-n", machines[1], "link", "set", "wire0", "up")
    assert codes_of(start(machines, run_dir, recipe)) == [0, 0], log_of(run_dir, 0) + log_of(run_dir, 1)
    assert live(here, recipe, 2).codes == [0, 0]
    assert difference(left_by(run_dir), left_by(here)) == ""
