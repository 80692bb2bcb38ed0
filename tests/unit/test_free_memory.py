"""How much memory a rank may think is its own."""

import math
from pathlib import Path

import pytest
import torch

from pipeline.runtime.memory import _bytes_left_by_cgroups, free_bytes


def test_ranks_of_a_machine_share_its_memory() -> None:
    alone, among_four = (free_bytes(torch.device("cpu"), ranks) for ranks in (1, 4))
    assert among_four == pytest.approx(alone / 4, rel=0.2)


def test_a_gpu_is_its_ranks_own_however_many_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (77 * 2**30, 80 * 2**30))
    assert free_bytes(torch.device("cuda", 5), 8) == 77 * 2**30
    assert asked == [torch.device("cuda", 5)]


GROUPS = {
    # Version 2: the limit of a group above counts too; clean pages of files are given up.
    "0::/slurm/job_7/step_0": {
        "slurm/job_7": {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 500\ninactive_file 150\n"},
        "slurm/job_7/step_0": {"memory.max": "max", "memory.current": "600", "memory.stat": "inactive_file 0\n"},
    },
    # Version 1, in a container: the group's path is one of the machine's, and what is mounted is the container's own.
    "4:memory:/docker/abc\n3:cpuset:/": {
        "memory": {
            "memory.limit_in_bytes": "1000",
            "memory.usage_in_bytes": "600",
            "memory.stat": "inactive_file 10\ntotal_inactive_file 50\n",
        },
    },
}


@pytest.mark.parametrize("membership", GROUPS)
def test_the_limits_of_control_groups_are_kept(membership: str, tmp_path: Path) -> None:
    for group, files in GROUPS[membership].items():
        (tmp_path / group).mkdir(parents=True)
        for name, text in files.items():
            (tmp_path / group / name).write_text(text)
    (tmp_path / "membership").write_text(membership)
    assert _bytes_left_by_cgroups(tmp_path, tmp_path / "membership") == 450


def test_without_a_limit_all_that_is_free_is_left(tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("0::/\n")
    assert _bytes_left_by_cgroups(tmp_path, tmp_path / "membership") == math.inf
