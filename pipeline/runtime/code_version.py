"""The commit of the code that runs, be it a checkout or the copy that a job on Slurm keeps."""

import subprocess
from pathlib import Path

COMMIT_FILE = "COMMIT"
"""File in a copy of the code that has the commit of its origin: the copy itself may lie in a checkout of another one."""


def git_commit(directory: Path) -> str | None:
    """The commit of the code in a directory, with `-dirty` where it was changed since; None if nothing tells."""
    noted = directory / COMMIT_FILE
    if noted.is_file():
        return noted.read_text(encoding="utf-8").strip() or None
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
