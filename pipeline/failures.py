"""Turn what a user or a machine can cause into one message and an exit code.

The message names the file and what to do; it is never a traceback. What is left with a traceback is a mistake of the program's.
"""

import errno
import sys
import threading
from collections.abc import Callable

from pipeline.runtime.preemption import EXIT_INTERRUPTED
from pipeline.storage.masking import masked_text

EXIT_USAGE = 2


def guarded(
    prefix: str,
    body: Callable[[], int],
    mistakes: tuple[type[Exception], ...],
    is_first: bool = True,
    interrupted: str = "interrupted",
) -> int:
    """Run the body of a command and return its exit code; a failure that a user or a machine can cause is one message.

    Args:
        prefix: what the message begins with.
        mistakes: errors whose message is ready to be shown, and which all ranks raise alike.
        is_first: true on the rank that speaks for all.
    """
    of_threads, threading.excepthook = threading.excepthook, _leave_to_the_main_thread
    try:
        return body()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr) if is_first else None
        return EXIT_INTERRUPTED
    except mistakes as error:
        return fail(prefix, error, EXIT_USAGE, is_first)
    except (OSError, MemoryError) as error:
        # Each rank has a machine of its own, so each says what happened there.
        return fail(prefix, failure_of_machine(error), EXIT_USAGE, True)
    except BaseException as error:
        if is_of_memory(error):
            return fail(prefix, failure_of_machine(MemoryError(str(error).partition("\n")[0])), EXIT_USAGE, True)
        # Libraries written in Rust raise their errors and panics by classes that cannot be imported; a panic is no Exception.
        if type(error).__name__ not in ("PanicException", "SafetensorError"):
            raise
        remedy = "is the disk full, or a regular expression of the tokenizer's one that its library cannot run?"
        return fail(prefix, f"a library failed: {error}; {remedy}", EXIT_USAGE, True)
    finally:
        threading.excepthook = of_threads


def is_of_memory(error: BaseException) -> bool:
    """Return whether an error is one of torch's about memory, a GPU's or the machine's, which are told apart by their names
    and words."""
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def fail(prefix: str, error: Exception | str, exit_code: int, is_first: bool) -> int:
    """Print an error, on the first rank or wherever it happened, and return the exit code."""
    if is_first:
        print(masked_text(f"{prefix}: {error}"), file=sys.stderr, flush=True)
    return exit_code


def failure_of_machine(error: OSError | MemoryError) -> str:
    """One sentence for a failure of files, disks, network or memory: the file, the failure, the remedy."""
    if isinstance(error, MemoryError):
        return f"this machine's memory is used up ({error}); use smaller sizes or fewer processes"
    if error.errno is None or error.strerror is None:
        return str(error)  # a message of our own
    # Of a copy or a renaming, what was to be there: the other is a temporary file, or has been opened already.
    name = error.filename2 or error.filename
    where = f"{name}: " if name else ""
    return f"{where}{error.strerror}; {_REMEDIES.get(error.errno, 'mend that and start again')}"


_REMEDIES = {
    errno.ENOSPC: "free some of the disk, or write elsewhere",
    errno.EDQUOT: "free some of your share of the disk, or write elsewhere",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or write elsewhere",
    errno.EACCES: "have its permissions changed, or name another one",
    errno.EPERM: "have its permissions changed, or name another one",
    errno.EROFS: "the file system can only be read: name another one",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of this path is a file, where a folder is expected",
    errno.EISDIR: "expected a file, and this is a folder",
    errno.EEXIST: "expected a folder, or nothing yet",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EADDRINUSE: "choose another port",
}


def _leave_to_the_main_thread(failure: threading.ExceptHookArgs) -> None:
    """Print no traceback of a thread that could not write: TensorBoard's raises the same error again where the next record is
    written."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)
