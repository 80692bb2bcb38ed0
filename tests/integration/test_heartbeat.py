"""A rank that dies or stands still is named, and the job ends on all ranks; real processes, gloo."""

import json
import multiprocessing
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline import processes
from pipeline.runtime import heartbeat, rank_watch
from pipeline.runtime.distributed import find_world
from pipeline.runtime.events import begun_and_ended, last_event
from pipeline.runtime.preemption import EXIT_HANG
from tests.forked import CAN_FORK, call, forking
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="forks its ranks")

RANKS, TIMEOUT = 3, 10.0

LEFT_BEHIND = 999


def run_rank(rank: int, case: str, victim: int, folder: Path) -> None:
    """Step after step; in step 20 something happens to the victim. The process ends as a rank's does."""
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(RANKS)}
    world = find_world()
    dist.init_process_group("gloo", f"file://{folder}/meet", timedelta(seconds=300), RANKS, rank)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True) if rank == 0 else None
    address: list[Any] = [store.port if store is not None else None]
    dist.broadcast_object_list(address)
    store = store or dist.TCPStore("127.0.0.1", address[0], is_master=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
        heartbeat.begin(world, None if case == "killed, unwatched" else TIMEOUT, folder)

    try:
        with begun_and_ended(folder if rank == 0 else None, 1.0, RANKS), heartbeat.telling_of_errors(()):
            for step in range(1, 20 if case == "ends" else 10_000):
                heartbeat.enter("training", step)
                if step == 20 and (rank == victim or (case == "two stopped" and rank > 0)):
                    HAPPENS[case]()
                dist.all_reduce(torch.ones(1))
                time.sleep(0.02)
    except RuntimeError:
        heartbeat.wait_for_verdict()
    dist.barrier()
    heartbeat.stop()
    sys.stdout.write("ended\n")
    sys.stdout.flush()
    os._exit(0)


def suspend_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def stand_still() -> None:
    worker = multiprocessing.get_context("fork").Process(target=suspend_itself, daemon=True)
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(1000)


def fail() -> None:
    raise ValueError("of this rank alone")


HAPPENS = {
    "fails": fail,
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "two stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "killed, unwatched": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stands still": stand_still,
}
NAMED = {
    "stopped": "has been silent for ",
    "killed": "died in ",
    "killed, unwatched": "died in ",
    "stands still": "has stood still for ",
}


def end_of(process: Any) -> int:
    """The exit code of a rank, or `LEFT_BEHIND`."""
    process.join(100)
    if process.exitcode is not None:
        return int(process.exitcode)
    process.kill()
    process.join()
    return LEFT_BEHIND


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[list[int], list[str], Path]]:
    """{(what happens, to which rank): (exit codes, what each rank wrote to stderr, its folder)}; all jobs side by side."""
    jobs = {}
    for case, victim in [
        *(("stopped", 0), ("stopped", 1), ("two stopped", 1), ("killed", 0), ("killed", 1)),
        *(("killed, unwatched", 1), ("stands still", 1), ("fails", 0), ("fails", 1), ("ends", -1)),
    ]:
        folder = tmp_path_factory.mktemp("job")
        ranks = [forking().Process(target=call, args=(run_rank, rank, case, victim, folder)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        jobs[case, victim] = (ranks, folder)

    found = {}
    for key, (ranks, folder) in jobs.items():
        codes = [end_of(process) for process in ranks]
        errors = [(folder / f"{rank}.err").read_text() for rank in range(RANKS)]
        found[key] = (codes, errors, folder)
    return found


def recorded(folder: Path, rank: int) -> list[dict[str, Any]]:
    """The collectives that a rank's flight recorder left in its folder."""
    return json.loads((folder / "flight_recorder" / f"rank-{rank:05d}.json").read_bytes())["entries"]


@pytest.mark.parametrize(
    ("case", "victim"), [*(("stopped", 0), ("stopped", 1), ("killed", 0), ("killed", 1)), ("killed, unwatched", 1)]
)
def test_survivors_name_a_rank_that_was_killed_or_stopped_and_exit(cases: Any, case: str, victim: int) -> None:
    codes, errors, folder = cases[case, victim]
    assert codes[victim] == -signal.SIGKILL, codes
    for rank in {0, 1, 2} - {victim}:
        assert codes[rank] == EXIT_HANG, (codes, errors)
        assert f"the job cannot go on: rank {victim} on " in errors[rank], errors
        assert errors[rank].count("the job cannot go on") == 1
        assert "stacks of this rank's threads:" in errors[rank]
        assert "run_rank" in errors[rank]
        # The collective in which each survivor waits is the last one of which torch knows.
        (last,) = recorded(folder, rank)[-1:]
        assert last["profiling_name"] == "gloo:all_reduce"
    # Who is stopped is silent, and killed by the first to notice; the other may then see it dead.
    assert any(NAMED[case] in errors[rank] for rank in {0, 1, 2} - {victim}), errors


def test_of_several_stopped_ranks_of_a_machine_none_is_left_behind(cases: Any) -> None:
    codes, errors, _ = cases["two stopped", 1]
    assert codes == [EXIT_HANG, -signal.SIGKILL, -signal.SIGKILL], errors
    assert "has been silent for " in errors[0]


def test_a_rank_that_stands_still_is_named_with_the_function_it_is_in(cases: Any) -> None:
    codes, errors, _ = cases["stands still", 1]
    assert codes == [EXIT_HANG] * 3
    for text in errors:
        assert "the job cannot go on: rank 1 on " in text
        assert "in training step 20, in stand_still (test_heartbeat.py:" in text


def test_a_suspended_worker_is_not_left_behind_by_the_rank_that_it_held_up(cases: Any) -> None:
    _, _, folder = cases["stands still", 1]
    worker, ends = int((folder / "1.out").read_text()), time.monotonic() + 300
    while processes.find(worker).started:
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_a_job_that_its_heartbeat_ends_has_its_end_among_its_events(cases: Any) -> None:
    _, _, folder = cases["stands still", 1]
    end = last_event(folder, "end")
    assert end is not None
    assert end["code"] == EXIT_HANG


@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_of_one_rank_alone_ends_the_others_which_name_it(cases: Any, victim: int) -> None:
    codes, errors, _ = cases["fails", victim]
    assert codes == [1 if rank == victim else EXIT_HANG for rank in range(RANKS)], errors
    assert "ValueError: of this rank alone" in errors[victim]
    for rank in {0, 1, 2} - {victim}:
        named = f"rank {victim} on "
        assert f"the job cannot go on: {named}" in errors[rank], errors
        assert "ended with an error of its own in training step 20: ValueError" in errors[rank], errors


def test_a_job_that_ends_is_left_in_peace(cases: Any) -> None:
    codes, errors, _ = cases["ends", -1]
    assert codes == [0, 0, 0], errors
    assert not any("cannot go on" in text for text in errors)


def waits_in_a_phase() -> list[float]:
    """Seconds for which a validation seems to be in its phase, before and after one of its micro-batches."""
    heartbeat.begin(find_world(), 1000.0)
    found = []
    with heartbeat.during("validating"):
        for _ in range(2):
            time.sleep(1.0)
            assert heartbeat._current is not None
            found.append(heartbeat._current._own(0).since)
            heartbeat.go_on()
        assert heartbeat._current.phase == ("validating", 0)
    heartbeat.stop()
    return found


def test_a_validation_may_take_as_long_as_it_gets_on() -> None:
    ((before, after),) = run_ranks(waits_in_a_phase, 1)
    assert before >= 1.0
    assert 1.0 <= after < before + 1.0


def waits_for_a_verdict_after_a_long_step() -> float:
    """Seconds for which a rank waits for what others know, at a patience of one second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_watch, "_SECONDS_TO_LEARN", 3.0)
        heartbeat.begin(find_world(), 0.7)
        heartbeat.enter("training", 1)
        began = time.monotonic()
        heartbeat.wait_for_verdict()
        heartbeat.stop()
    return time.monotonic() - began


def test_a_rank_that_waits_for_the_verdict_of_others_does_not_judge_itself() -> None:
    (seconds,) = run_ranks(waits_for_a_verdict_after_a_long_step, 1)
    assert seconds >= 3.0
