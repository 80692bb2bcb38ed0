"""A disk that is full at any moment of preparing or scoring: one message, and the same command ends with the same bytes.

The disk is a file system in memory of a given size, mounted as root, which grows before the command is run again. Skipped where
that cannot be done.
"""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import Settings
from tests.forked import run_script
from tests.integration.test_command_line import ENVIRONMENT
from tests.integration.test_pipeline_rho1 import settings_for
from tests.integration.test_scoring import score_again
from tests.ranks import run_ranks

SIZES, ENOUGH = [4096 * 2**power for power in range(10)], 2**26


@contextlib.contextmanager
def disk_of(size: int, folder: Path) -> Iterator[Path]:
    """A file system of so many bytes."""
    folder.mkdir(exist_ok=True)
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a file system: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True, capture_output=True)


def grow(disk: Path) -> None:
    subprocess.run(["mount", "-o", f"remount,size={ENOUGH}", disk], check=True, capture_output=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_preparing_goes_on_after_a_full_disk_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    text = tmp_path / "in.jsonl"
    text.write_text("".join(f'{{"text": "number {number} of many, by {number % 11}"}}\n' for number in range(3000)))
    arguments = ["--input", text, "--tokenizer", "bytes", "--sequence-length", 32, "--processes", 1, "--packing", "best_fit"]
    whole = tmp_path / "whole"
    done = run_script("prepare.py", *arguments, "--output", whole, environment=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    expected = contents(whole)

    places = set()
    for size in SIZES:
        with disk_of(size, tmp_path / "disk") as disk:
            # The output is a folder of the disk, because a mount point cannot be replaced.
            command = [*arguments, "--output", disk / "data"]
            full = run_script("prepare.py", *command, environment=ENVIRONMENT)
            if full.returncode:
                assert full.returncode == 2, full.stderr
                assert "No space left on device; free some of the disk" in full.stderr
                assert "Traceback" not in full.stderr
                places.add(Path(full.stderr.partition("error: ")[2].partition(":")[0]).name)
                grow(disk)
                again = run_script("prepare.py", *command, environment=ENVIRONMENT)
                assert again.returncode == 0, again.stderr
            assert contents(disk / "data") == expected
    assert len(places) >= 3, f"the disk was full in {places} alone"


def score_on(settings: Settings, cache: Path, run_dir: Path) -> str:
    """As `score_again`; a failure of the machine by its name, which the command shows."""
    try:
        return score_again(settings, cache, "float32", run_dir)
    except OSError as error:
        return f"{error.strerror}: {error.filename}"


@pytest.mark.slow
def test_scoring_goes_on_after_a_full_disk_and_ends_with_the_same_bytes(
    tiny_data: Path, tiny_reference: Path, tmp_path: Path
) -> None:
    settings = settings_for(tiny_data, tiny_reference)
    assert run_ranks(score_on, 1, settings, tmp_path / "whole", tmp_path / "run") == ["scored"]
    expected = contents(tmp_path / "whole")

    places = set()
    for size in SIZES[::2]:
        with disk_of(size, tmp_path / "disk") as disk:
            (said,) = run_ranks(score_on, 1, settings, disk / "cache", tmp_path / "run")
            if said != "scored":
                assert said.startswith("No space left on device: "), said
                places.add(Path(said).name)
                grow(disk)
                assert run_ranks(score_on, 1, settings, disk / "cache", tmp_path / "run") == ["scored"]
            assert contents(disk / "cache") == expected
    assert len(places) >= 2, f"the disk was full in {places} alone"
