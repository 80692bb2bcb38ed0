"""Running ranks: each that fails, dies or is late is named, and its peers' errors are not."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from pipeline.benchmark.ranks import RankError
from tests.ranks import run_ranks


def return_rank_and_handler():
    return torch.tensor([dist.get_rank()]), signal.getsignal(signal.SIGINT) is signal.default_int_handler


def raise_on_rank_1(error):
    if dist.get_rank() == 1:
        raise error
    dist.barrier()


def die_on_rank_1(how):
    if dist.get_rank() == 1:
        os._exit(3) if how == "exit" else os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def sleep_too_long_on_rank_1():
    if dist.get_rank() == 1:
        time.sleep(600)
    return dist.get_rank()


def test_every_rank_returns_its_result_in_order():
    assert run_ranks(return_rank_and_handler, 2) == [(torch.tensor([0]), True), (torch.tensor([1]), True)]


def test_the_rank_that_raised_is_named_and_not_the_peer_whose_connection_broke():
    with pytest.raises(RankError, match=r"\Arank 1 failed:[\s\S]*ValueError: three is bad") as caught:
        run_ranks(raise_on_rank_1, 3, ValueError("three is bad"))
    assert "rank 0 failed" not in str(caught.value)


@pytest.mark.parametrize(("how", "said"), [("exit", "exit code 3"), ("kill", r"killed by SIGKILL \(exit code -9\)")])
def test_a_rank_that_dies_is_named_with_its_exit_code_at_once(how, said):
    start = time.monotonic()
    with pytest.raises(RankError, match=rf"\Arank 1 died without an answer: {said}"):
        run_ranks(die_on_rank_1, 2, how)
    assert time.monotonic() - start < 300


def test_a_rank_that_is_late_is_named_with_its_stack():
    with pytest.raises(RankError, match=r"\Ano answer within 15 seconds from rank 1\n") as caught:
        run_ranks(sleep_too_long_on_rank_1, 2, timeout=15)
    assert "in sleep_too_long_on_rank_1" in str(caught.value)


DEAF_PARENT = """
from pipeline.benchmark.ranks import run_ranks
from tests.unit.test_benchmark_ranks import return_rank_and_handler

if __name__ == "__main__":
    print([handles for _, handles in run_ranks(return_rank_and_handler, 1)])
"""


def test_ranks_hear_ctrl_c_though_nohup_had_this_process_ignore_it(tmp_path):
    (tmp_path / "parent.py").write_text(DEAF_PARENT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "parent.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=600,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert (done.stdout, done.returncode) == ("[True]\n", 0), done.stderr
