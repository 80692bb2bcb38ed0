"""Ranks that differ are named."""

import math

import pytest
import torch
import torch.distributed as dist

from pipeline.runtime.agreement import RanksDisagreeError, check_ranks_agree, who_met_bad_numbers
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def compare() -> tuple[str, str, str]:
    rank = dist.get_rank()
    check_ranks_agree({"step": 7, "threshold": 0.1 + 0.2, "weights": b"abc"}, CPU)
    said = []
    for own in (
        {"step": 7, "learning rate": 1e-3 if rank != 2 else math.nextafter(1e-3, 1)},
        {"step": rank // 2, "learning rate": 1},
    ):
        with pytest.raises(RanksDisagreeError) as caught:
            check_ranks_agree(own, CPU)
        said.append(str(caught.value))
    bad = torch.zeros(2, 3, dtype=torch.bool)
    bad[1, 2] = rank == 1
    return said[0], said[1], who_met_bad_numbers([torch.zeros_like(bad), bad], [("a", "b"), ("c", "d")])


def test_every_rank_learns_which_ranks_differ_and_in_what() -> None:
    for one, several, bad in run_ranks(compare, 3):
        assert one.endswith("do not: learning rate: rank(s) 2 differ from the others")
        assert several.endswith("do not: step: rank(s) 2 differ from the others")
        assert bad == "rank 1, head 2: d"


def nothing_bad() -> str:
    return who_met_bad_numbers([torch.zeros(2, 3, dtype=torch.bool)], [("a", "b")])


def test_where_every_loss_was_finite_it_was_the_gradient() -> None:
    assert run_ranks(nothing_bad, 2) == ["the gradient (every loss was finite)"] * 2
