"""How much memory a rank may think is its own."""

import pytest
import torch

from pipeline.runtime.memory import free_bytes


def test_ranks_of_a_machine_share_its_memory() -> None:
    alone, among_four = (free_bytes(torch.device("cpu"), ranks) for ranks in (1, 4))
    assert among_four == pytest.approx(alone / 4, rel=0.2)


def test_a_gpu_is_its_ranks_own_however_many_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (77 * 2**30, 80 * 2**30))
    assert free_bytes(torch.device("cuda", 5), 8) == 77 * 2**30
    assert asked == [torch.device("cuda", 5)]
