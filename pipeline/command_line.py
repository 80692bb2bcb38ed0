"""The shared part of commands that run on all ranks: options, checks, process group, exit codes.

torch and DeepSpeed take seconds to load, so the imports are inside the functions: signal handlers are installed and a first
line is printed before.

Exit codes: 0 done, 2 wrong settings or data, 3 training or the ranks diverged, 4 another rank or the launcher died, or a rank
stands still, 75 stopped on request with more to do, 130 interrupted.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pipeline.failures import EXIT_USAGE, fail, guarded
from pipeline.option_parser import OptionParser
from pipeline.options import read_options, read_recipe
from pipeline.processes import kill_children
from pipeline.runtime import launcher
from pipeline.runtime.preemption import EXIT_TRY_AGAIN, STOPPING_SIGNALS, StoppedError, StopRequest, interrupt_once

if TYPE_CHECKING:
    from pipeline.assembly import Job
    from pipeline.config import Settings

EXIT_DIVERGED = 3


Command = Callable[["Job", argparse.Namespace, StopRequest], int]
"""The body of a command, run on every rank after all checks, with the process group up; returns the exit code."""

OwnChecks = Callable[["Settings", argparse.Namespace, Path], list[str]]
"""Checks that one command alone makes before its start, by settings, options and run directory; lists the problems."""


def run_command(
    parser: OptionParser,
    arguments: Sequence[str],
    command: Command,
    own_overrides: Sequence[str] = (),
    own_checks: OwnChecks | None = None,
) -> int:
    """Read options and settings, make all checks, start the process group, run `command`; returns the exit code.

    own_overrides: `section.key=value` of settings that the command decides itself, whatever recipe and user say.
    own_checks: what the command checks beside what all do.
    """
    read = read_options(parser, arguments)
    options = read.options
    options.overrides += own_overrides
    is_first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    interrupt_once()
    stop = StopRequest()
    stop.end_at_once(is_first)
    launcher.watch(stop)
    only_prints = options.print_config or options.print_run_dir
    if is_first and not only_prints:
        print("selective multi-token prediction: loading torch and DeepSpeed", flush=True)

    def body() -> int:
        from pipeline.config import ConfigError

        try:
            settings, problems = read_recipe(parser, read)
            if not only_prints:
                return _run_on_all_ranks(parser.prog, options, settings, problems, stop, command, own_checks)
            if problems:
                raise ConfigError(problems)
        except ConfigError as error:
            return fail(prefix, error, EXIT_USAGE, is_first or stop.wait_for_the_first())
        if is_first:
            print(f"{run_dir_of(options, settings)}\n" if options.print_run_dir else _printed(settings), end="")
        return 0

    # Whatever takes time is imported inside, where an interruption is one line.
    prefix = f"{parser.prog}: error"
    saved = "the same command continues from what was saved last, if anything was"
    try:
        return guarded(prefix, body, (), is_first, interrupted=f"{parser.prog}: interrupted; {saved}")
    finally:
        stop.wait_for_agreement()


def _printed(settings: "Settings") -> str:
    """The settings as a recipe; in comments above them what was not simply given."""
    from pipeline.data.errors import DataError
    from pipeline.run_length import resolution

    try:
        settings, notes = resolution(settings)
    except DataError as error:
        notes = [f"training.steps: follows from the data, once it can be read ({error})"]
    return "".join(f"# {' '.join(note.split())}\n" for note in notes) + settings.to_yaml()


def run_dir_of(options: argparse.Namespace, settings: "Settings") -> Path:
    """The run directory that options and settings name."""
    return options.run_dir or Path("runs") / settings.run.name


def _run_on_all_ranks(
    prog: str,
    options: argparse.Namespace,
    settings: "Settings",
    problems: list[str],
    stop: StopRequest,
    command: Command,
    own_checks: OwnChecks | None,
) -> int:
    import torch
    import torch.distributed as dist

    from pipeline.assembly import Job
    from pipeline.checks import check_before_start
    from pipeline.config import ConfigError
    from pipeline.data.errors import DataError
    from pipeline.model.huggingface import ModelFilesError
    from pipeline.planning.micro_batch import with_micro_batch
    from pipeline.run_length import resolution
    from pipeline.runtime import heartbeat
    from pipeline.runtime.agreement import RanksDisagreeError
    from pipeline.runtime.checkpoint.commit import SaveError
    from pipeline.runtime.distributed import (
        device_of,
        find_world,
        look_up_meeting_point,
        min_over_ranks,
        missing_devices,
        share_cores,
    )
    from pipeline.runtime.engine import initialize_distributed
    from pipeline.runtime.memory import bytes_for_a_rank
    from pipeline.runtime.non_finite import TrainingDivergedError
    from pipeline.runtime.profiling import use_deterministic_kernels

    try:
        world = find_world()
    except (ValueError, KeyError) as error:
        return fail(
            f"{prog}: error", f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers, all or none set: {error}", EXIT_USAGE, True
        )
    run_dir = run_dir_of(options, settings)
    own = [] if own_checks is None else own_checks(settings, options, run_dir)
    content = check_before_start(settings, options.deepspeed, run_dir, world, problems, own)
    settings, notes = resolution(settings)
    if world.is_first and notes:
        print("\n".join(notes), flush=True)
    if settings.training.deterministic:
        use_deterministic_kernels()
    device = device_of(world)
    share_cores(world)
    if world.is_first and (reason := missing_devices()) is not None:
        print(reason, flush=True)
    try:
        patience = settings.run.hang_timeout
        look_up_meeting_point()
        initialize_distributed(device, settings.logging.deepspeed_level, heartbeat.longest_collective(patience))
    except (dist.DistError, ValueError) as error:
        return fail(f"{prog}: error", _cannot_meet(error), EXIT_USAGE, True)
    # A job that Slurm requeued went back in its first life, and continues from there.
    from_step = None if int(os.environ.get("SLURM_RESTART_COUNT", 0)) else getattr(options, "from_step", None)
    usable = min_over_ranks(bytes_for_a_rank(device, world.local_size), device)
    settings = with_micro_batch(settings, content, world.size, device.type == "cuda", usable)
    job = Job(settings, content, run_dir, world, device, getattr(options, "allow_changed", False), from_step)
    stop.wait_for_agreement()
    heartbeat.begin(world, patience, run_dir)
    try:
        with heartbeat.telling_of_errors((ConfigError, SaveError, TrainingDivergedError, RanksDisagreeError)):
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
        if world.size > 1 and heartbeat.is_of_a_peer(error):
            heartbeat.wait_for_verdict()
        # One that failed with an error of its own is not meant, whose message has the same words.
        if "DataLoader worker (pid" in str(error):
            remedy = "is the machine's memory used up? Try a smaller data.num_workers"
            return fail(
                f"{prog}: error", f"rank {world.rank}: a process that reads data died: {error}; {remedy}", EXIT_USAGE, True
            )
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
    from pipeline.runtime.distributed import UnknownAddressError

    if isinstance(error, UnknownAddressError):
        return f"the ranks cannot meet: {error}"
    address, port = (os.environ.get(name, "not set") for name in ("MASTER_ADDR", "MASTER_PORT"))
    reason = str(error).partition("\n")[0]
    return (
        f"the ranks cannot meet at MASTER_ADDR {address}, MASTER_PORT {port}: {reason}; if another job uses this port, choose "
        "another one (deepspeed --master_port N, or MASTER_PORT=N)"
    )


def end_process(exit_code: int) -> NoReturn:
    """End the process with this exit code.

    Two things would change the code. A launcher that sees one rank fail sends SIGTERM to the others, which are about to end
    with the same code, and a scheduler may send one signal after another, so both are ignored. And after an error the process
    group is still open; its threads abort a process that shuts down normally, so the process ends by `os._exit`. Processes
    that read data are not left behind.
    """
    for number in STOPPING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    kill_children()
    if exit_code == 0:
        sys.exit(exit_code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
