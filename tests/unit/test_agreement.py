"""Ranks that differ are named."""

import math

import pytest
import torch
import torch.distributed as dist

from pipeline.runtime import agreement
from pipeline.runtime.agreement import RanksDisagreeError, check_ranks_agree, checksum
from pipeline.runtime.non_finite import describe_bad_numbers
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def compare() -> tuple[str, str, str]:
    rank = dist.get_rank()
    check_ranks_agree({"step": 7, "threshold": 0.1 + 0.2, "weights": b"abc"}, CPU)
    said = []
    for own in (
        {"step": 7, "learning rate": 1e-3 if rank != 2 else math.nextafter(1e-3, 1)},
        {"step": rank // 2, "learning rate": 1},
        {"step": rank % 3},
    ):
        with pytest.raises(RanksDisagreeError) as caught:
            check_ranks_agree(own, CPU)
        said.append(str(caught.value))
    bad = torch.zeros(2, 3, dtype=torch.bool)
    bad[1, 2] = rank == 1
    of_reference = torch.zeros(2, 3, dtype=torch.bool)
    of_reference[0, 1] = rank == 2
    keys, spoilt = [("a", "b"), ("c", "d")], [torch.ones(2, dtype=torch.bool)] * 2
    assert said[2].startswith("ranks that must hold the same values do not: step: rank(s) 1, 2 differ from rank(s) 0. Continue")
    return said[0], said[1], describe_bad_numbers([(bad & False, bad & False), (bad, of_reference)], spoilt, keys)


def test_every_rank_learns_which_ranks_differ_and_in_what() -> None:
    for one, several, bad in run_ranks(compare, 3):
        assert "do not: learning rate: rank(s) 2 differ from the others. Continue from the last checkpoint" in one
        assert "do not: step: rank(s) 2 differ from the others. Continue" in several
        assert bad == "rank 1, policy loss of head 2: d; rank 2, reference loss of head 1: c"


def finite_losses() -> tuple[str, str]:
    losses, keys = [(torch.zeros(2, 3, dtype=torch.bool),) * 2], [("a", "b")]
    own = torch.tensor([False, dist.get_rank() == 1])
    return describe_bad_numbers(losses, [own], keys), describe_bad_numbers(losses, [own & False], keys)


def test_where_every_loss_was_finite_it_was_a_gradient() -> None:
    everywhere = "the gradient of all ranks together (each rank's own was finite)"
    assert run_ranks(finite_losses, 2) == [("rank 1, policy gradient: b", everywhere)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8])
def test_any_flipped_bit_changes_the_checksum_of_a_weight(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).mul(40).to(dtype)
    before = checksum(weight)
    for byte in range(weight.numel() * weight.element_size()):
        for bit in range(8):
            flipped = weight.clone()
            flipped.view(-1).view(torch.uint8)[byte] ^= 1 << bit
            assert checksum(flipped) != before, (byte, bit)
    assert checksum(weight.clone()) == before


def test_large_weights_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    whole = checksum(weight)
    assert whole == weight.view(torch.int32).long().sum()
    monkeypatch.setattr(agreement, "_AT_A_TIME", 100)
    assert checksum(weight) == whole
    assert checksum(weight[:0]) == 0
