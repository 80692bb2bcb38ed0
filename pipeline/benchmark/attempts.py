"""Parts of a measurement that may fail without the others: each failure is said, and kept by name for table and JSON."""

import contextlib
import gc
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

Found = TypeVar("Found")


def attempted(name: str, failed: dict[str, str], work: Callable[..., Found], *arguments: object) -> Found | None:
    """Return what `work` returns; None, with the reason in `failed` and the traceback said, where it fails."""
    try:
        return work(*arguments)
    except Exception as error:
        traceback.print_exc()
        failed[name] = reason_of(error)

    # Once the exception is gone, what it held can go. After an error that ends the device's context even that fails.
    gc.collect()
    with contextlib.suppress(Exception):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return None


def reason_of(error: Exception) -> str:
    """Return an error's name and the first line of its message; CUDA's go on with advice about debugging."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def describe_failures(failed: dict[str, str]) -> list[str]:
    """Return a line for each part that was not measured."""
    return [f"{name} was not measured: {reason}" for name, reason in failed.items()]


def say(line: str) -> None:
    """Print a figure as soon as it is known: what comes after it may end the process."""
    print(line, file=sys.stderr, flush=True)
