"""A disk that loses power while checkpoints are written holds one that loads, and the records up to it.

The disk is a file with an ext4 file system, mounted as root. EXT4_IOC_SHUTDOWN without flushing is the loss of power:
what was not synced is gone. Skipped where that cannot be done.
"""

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.progress import Progress
from pipeline.runtime.checkpoint.state import HeldOut
from pipeline.runtime.events import EventLog, last_event
from pipeline.runtime.logbook import Logbook, read_records
from tests.forked import CAN_FORK, call, forking
from tests.ranks import run_ranks
from tests.standing_in import StandIn, checkpoints, go_on_to_the_end

_SHUTDOWN, _WITHOUT_FLUSHING = 0x8004587D, 2


@contextlib.contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    subprocess.run(["mount", "-o", "loop", image, folder], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True, capture_output=True)


def cut_power(folder: Path) -> None:
    """Have the file system that is mounted there lose all that was not synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", _WITHOUT_FLUSHING))
    finally:
        os.close(descriptor)


@pytest.fixture
def disk(tmp_path: Path) -> tuple[Path, Path]:
    """(image of a file system, folder to mount it at)."""
    image, folder = tmp_path / "disk.img", tmp_path / "disk"
    folder.mkdir()
    image.write_bytes(b"")
    os.truncate(image, 64 * 2**20)
    try:
        subprocess.run(["mkfs.ext4", "-q", image], check=True, capture_output=True)
        with mounted(image, folder):
            cut_power(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot make and mount a file system: {error}")
    return image, folder


def save_for_ever(run_dir: Path) -> None:
    """As the training does: a record a step, on the disk before the checkpoint that follows it; every second step one."""
    run_ranks(save_on_one_rank, 1, run_dir)


def save_on_one_rank(run_dir: Path) -> None:
    store, logbook, events = checkpoints(run_dir, every=2, keep=2), Logbook(run_dir, 0, num_heads=1), EventLog(run_dir)
    for step in range(1, 10_000):
        logbook.write({"step": step, "loss": 1.0})
        events.write("step", step=step)
        if step % 2 == 0:
            logbook.sync()
            events.sync()
            store.save(StandIn(step, step), Progress(step), HeldOut(), in_background=True)
        else:
            go_on_to_the_end(store)


def resumed(run_dir: Path) -> int:
    engine = StandIn(-1000.0)
    step = checkpoints(run_dir, every=2).resume(engine, allow_changed=False).step
    assert engine.values == StandIn(step, step).values
    return step


@pytest.mark.slow
@pytest.mark.skipif(not CAN_FORK, reason="forks the process that writes")
def test_after_a_loss_of_power_a_checkpoint_loads_and_the_records_reach_it(disk: tuple[Path, Path]) -> None:
    image, folder = disk
    for trial in range(6):
        run_dir = folder / "run"
        with mounted(image, folder):
            shutil.rmtree(run_dir, ignore_errors=True)
            run_dir.mkdir()
            writer = forking().Process(target=call, args=(save_for_ever, run_dir))
            writer.start()
            ends = time.monotonic() + 600
            while len(list(run_dir.glob("checkpoints/step-*[0-9]"))) < 2:
                assert time.monotonic() < ends
                time.sleep(0.01)
            time.sleep(0.037 * trial)
            complete = max(int(path.name[5:]) for path in run_dir.glob("checkpoints/step-*[0-9]"))
            cut_power(folder)
            # The rank, a process of that one, ends by itself when its parent is gone.
            writer.kill()
            writer.join()
            time.sleep(1)

        with mounted(image, folder):
            (step,) = run_ranks(resumed, 1, run_dir)
            assert step >= complete > 0
            assert max(record["step"] for record in read_records(run_dir)) >= step
            last = last_event(run_dir, "step")
            assert last is not None
            assert last["step"] >= step
