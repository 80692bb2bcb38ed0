"""The shared part of commands: options, checks, process group, exit codes, and failures as one message.

What a user or a machine can cause ends a command with one message that names the file and what to do, never with a traceback
(`guarded`). What is left with a traceback is a mistake of the program's.

torch and DeepSpeed take seconds to load, so the imports are inside the functions: signal handlers are installed and a first
line is printed before.

Exit codes: 0 done, 2 wrong settings or data, 3 training or the ranks diverged, 4 another rank or the launcher died, or a rank
stands still, 75 stopped on request with more to do, 130 interrupted.
"""

import argparse
import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.runtime import launcher
from pipeline.runtime.preemption import (
    EXIT_INTERRUPTED,
    EXIT_TRY_AGAIN,
    STOPPING_SIGNALS,
    StoppedError,
    StopRequest,
    interrupt_once,
)
from pipeline.storage.location import user_path
from pipeline.storage.whole_file import naming

if TYPE_CHECKING:
    from pipeline.assembly import Job
    from pipeline.config import Settings

EXIT_USAGE, EXIT_DIVERGED = 2, 3

Command = Callable[["Job", argparse.Namespace, StopRequest], int]
"""The body of a command, run on every rank after all checks, with the process group up; returns the exit code."""


def path_argument(text: str) -> Path:
    """Parse an option that is a path; `~` is expanded, which shells leave alone behind `=` and in quotes."""
    try:
        return user_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def recipe_parser(name: str, description: str | None, default_recipe: Path) -> argparse.ArgumentParser:
    """The options of every command that reads a recipe and a DeepSpeed JSON; a command adds its own."""
    parser = argparse.ArgumentParser(
        prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    parser.add_argument("--deepspeed", type=path_argument, required=True, metavar="JSON", help="ZeRO, precision, communication")
    parser.add_argument(
        "--config", type=path_argument, default=default_recipe, metavar="YAML", help="recipe (default: the demo)"
    )
    return parser


def job_parser(name: str, description: str | None, default_recipe: Path) -> argparse.ArgumentParser:
    """The options of every command that runs on all ranks of a job."""
    parser = recipe_parser(name, description, default_recipe)
    parser.add_argument("--run-dir", type=path_argument, metavar="DIR", help="default: runs/ and the recipe's run.name")
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings and stop")
    # Appended by the deepspeed launcher; LOCAL_RANK in the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def run_command(
    parser: argparse.ArgumentParser, arguments: Sequence[str], command: Command, own_overrides: Sequence[str] = ()
) -> int:
    """Read options and settings, make all checks, start the process group, run `command`; returns the exit code.

    own_overrides: `section.key=value` of settings that the command decides itself, whatever recipe and user say.
    """
    options, unknown = read_options(parser, arguments)
    options.overrides += own_overrides
    is_first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    interrupt_once()
    stop = StopRequest()
    stop.end_at_once(is_first)
    launcher.watch(stop)
    if is_first and not options.print_config:
        print("selective multi-token prediction: loading torch and DeepSpeed", flush=True)

    def body() -> int:
        settings, problems = read_recipe(parser, options, unknown)
        if not options.print_config:
            return _run_on_all_ranks(parser.prog, options, settings, problems, stop, command)
        if problems:
            raise ConfigError(problems)
        print(settings.to_yaml(), end="") if is_first else None
        return 0

    from pipeline.config import ConfigError

    try:
        return guarded(
            f"{parser.prog}: error",
            body,
            (ConfigError,),
            is_first,
            interrupted=f"{parser.prog}: interrupted; the same command continues from what was saved last, if anything was",
        )
    finally:
        stop.wait_for_agreement()


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
        # Libraries written in Rust raise their errors and panics by classes that cannot be imported; a panic is no Exception.
        if type(error).__name__ not in ("PanicException", "SafetensorError"):
            raise
        remedy = "is the disk full, or a regular expression of the tokenizer's one that its library cannot run?"
        return fail(prefix, f"a library failed: {error}; {remedy}", EXIT_USAGE, True)
    finally:
        threading.excepthook = of_threads


def _leave_to_the_main_thread(failure: threading.ExceptHookArgs) -> None:
    """Print no traceback of a thread that could not write: TensorBoard's raises the same error again where the next record is
    written."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


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


def failure_of_machine(error: OSError | MemoryError) -> str:
    """One sentence for a failure of files, disks, network or memory: the file, the failure, the remedy."""
    if isinstance(error, MemoryError):
        return f"this machine's memory is used up ({error}); use smaller sizes or fewer processes"
    if error.errno is None or error.strerror is None:
        return str(error)  # a message of our own
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}; {_REMEDIES.get(error.errno, 'mend that and start again')}"


def read_options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options; returns them, overrides included, and a list of unknown ones, `--option` or `--option=value`."""
    options, left = parser.parse_known_intermixed_args(arguments)
    # argparse also returns the overrides that follow an unknown option as unknown.
    options.overrides += [argument for argument in left if not _is_option(argument)]

    # What follows an unknown option and is no override is its value; the same option may be there again.
    unknown, place = [], -1
    for option in filter(_is_option, left):
        place = list(arguments).index(option, place + 1)
        after = arguments[place + 1 :][:1]
        if "=" not in option and after and "=" not in after[0] and after[0] in options.overrides:
            options.overrides.remove(after[0])
            option = f"{option}={after[0]}"
        unknown.append(option)
    return options, unknown


def _is_option(argument: str) -> bool:
    """True for `--option` and `-o`; a negative number is a value."""
    return argument.startswith("-") and not argument[1:2].isdigit() and argument[1:2] != "."


def read_recipe(
    parser: argparse.ArgumentParser, options: argparse.Namespace, unknown: Sequence[str]
) -> tuple["Settings", list[str]]:
    """Read the settings that the options ask for; returns them with all problems, one sentence each.

    A refused setting keeps its default.
    """
    from pipeline.recipe import read_settings

    settings, found = read_settings(options.config, options.overrides)
    return settings, [_unknown(option, parser) for option in unknown] + found


def _unknown(option: str, parser: argparse.ArgumentParser) -> str:
    from pipeline.config import did_you_mean
    from pipeline.recipe import meaning_of, settings_meant

    name, _, value = option.partition("=")
    word = name.lstrip("-")
    if settings_meant(word):
        return f"{option}: unknown option; settings have no dashes: {meaning_of(word, value or 'VALUE')}"
    known = [option for action in parser._actions for option in action.option_strings if option != "--local_rank"]
    return f"{option}: unknown option; {meaning_of(word) or did_you_mean(name, known)}"


def end_process(exit_code: int) -> NoReturn:
    """End the process with this exit code.

    Two things would change the code. A launcher that sees one rank fail sends SIGTERM to the others, which are about to end
    with the same code, and a scheduler may send one signal after another, so both are ignored. And after an error the process
    group is still open; its threads abort a process that shuts down normally, so the process ends by `os._exit`.
    """
    for number in STOPPING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if exit_code == 0:
        sys.exit(exit_code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _run_on_all_ranks(
    prog: str, options: argparse.Namespace, settings: "Settings", problems: list[str], stop: StopRequest, command: Command
) -> int:
    import torch
    import torch.distributed as dist

    from pipeline.assembly import Job
    from pipeline.checks import check_before_start
    from pipeline.data.errors import DataError
    from pipeline.model.huggingface import ModelFilesError
    from pipeline.runtime import heartbeat
    from pipeline.runtime.agreement import RanksDisagreeError
    from pipeline.runtime.checkpoint.commit import SaveError
    from pipeline.runtime.distributed import device_of, find_world, share_cores
    from pipeline.runtime.engine import initialize_distributed
    from pipeline.runtime.non_finite import TrainingDivergedError

    try:
        world = find_world()
    except (ValueError, KeyError) as error:
        return fail(
            f"{prog}: error", f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers, all or none set: {error}", EXIT_USAGE, True
        )
    run_dir = options.run_dir or Path("runs") / settings.run.name
    content = check_before_start(settings, options.deepspeed, run_dir, world, problems)
    device = device_of(world)
    share_cores(world)
    try:
        patience = settings.run.hang_timeout
        longest = timedelta(minutes=10) if patience is None else timedelta(seconds=heartbeat.longest_patience(patience) + 600)
        initialize_distributed(device, settings.logging.deepspeed_level, longest)
    except (dist.DistError, ValueError) as error:
        return fail(f"{prog}: error", _cannot_meet(error), EXIT_USAGE, True)
    # A job that Slurm requeued went back in its first life, and continues from there.
    from_step = None if int(os.environ.get("SLURM_RESTART_COUNT", 0)) else getattr(options, "from_step", None)
    job = Job(settings, content, run_dir, world, device, getattr(options, "allow_changed", False), from_step)
    stop.wait_for_agreement()
    if patience is not None:
        heartbeat.begin(world, patience, run_dir)
    try:
        exit_code = _stopped_or(command, job, options, stop)
        heartbeat.enter("ending")
        dist.barrier()
    except (DataError, ModelFilesError) as error:
        # An error that all ranks raise alike is printed by the first only.
        return fail(f"{prog}: error", error, EXIT_USAGE, world.is_first or not getattr(error, "agreed", False))
    except SaveError as error:
        return fail(f"{prog}: error", error, EXIT_USAGE, world.is_first)
    except (TrainingDivergedError, RanksDisagreeError) as error:
        return fail(f"{prog}: error", error, EXIT_DIVERGED, world.is_first)
    except torch.OutOfMemoryError as error:
        remedy = "launch/plan.py says what takes it, and which settings save some"
        return fail(f"{prog}: error", f"rank {world.rank}: {str(error).partition(chr(10))[0]} {remedy}", EXIT_USAGE, True)
    except RuntimeError as error:
        # A peer that died breaks the collectives of the others: then the heartbeat ends this process, and names the peer.
        if world.size > 1 and any(word in str(error) for word in ("gloo", "NCCL", "Connection", "Broken pipe")):
            heartbeat.wait_for_verdict()
        raise
    finally:
        heartbeat.stop()
    dist.destroy_process_group()
    return exit_code


def _stopped_or(command: Command, job: "Job", options: argparse.Namespace, stop: StopRequest) -> int:
    """Run a command's body; a request to stop that came where nothing is to be saved is its exit code too."""
    try:
        return command(job, options, stop)
    except StoppedError:
        if job.world.is_first:
            print("stopped on request; nothing was to be saved; run the same command again to continue", flush=True)
        return EXIT_TRY_AGAIN


def _cannot_meet(error: Exception) -> str:
    address, port = (os.environ.get(name, "not set") for name in ("MASTER_ADDR", "MASTER_PORT"))
    reason = str(error).partition("\n")[0]
    return (
        f"the ranks cannot meet at MASTER_ADDR {address}, MASTER_PORT {port}: {reason}; if another job uses this port, choose "
        "another one (deepspeed --master_port N, or MASTER_PORT=N)"
    )


def fail(prefix: str, error: Exception | str, exit_code: int, is_first: bool) -> int:
    """Print an error, on the first rank or wherever it happened, and return the exit code."""
    if is_first:
        print(f"{prefix}: {error}", file=sys.stderr, flush=True)
    return exit_code


def write_json(path: Path, figures: Any) -> None:
    """Write a command's figures as it prints them, at full precision."""
    with naming(path):
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def json_problems(path: Path | None) -> list[str]:
    """List what speaks against writing figures to the --json path, before they are computed."""
    if path is None:
        return []
    if path.is_dir():
        return [f"--json: {path} is a directory; expected a file to write"]
    if not path.parent.is_dir():
        return [f"--json: {path.parent} is not a directory; make it first, or write elsewhere"]
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return [f"--json: {path} cannot be written to; choose another file"]
    return []
