"""The shared part of commands that run on all ranks: options, signals, exit codes.

torch and DeepSpeed take seconds to load, so what needs them (`on_all_ranks`) is imported inside the functions: signal handlers
are installed and a first line is printed before.

Exit codes: 0 done, 2 wrong settings or data, 3 training or the ranks diverged, 4 another rank or the launcher died, or a rank
stands still, 75 stopped on request with more to do, 130 interrupted.
"""

import argparse
import atexit
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pipeline.failures import EXIT_USAGE, fail, guarded
from pipeline.option_parser import OptionParser
from pipeline.options import read_options, read_recipe
from pipeline.processes import kill_children
from pipeline.runtime import launcher
from pipeline.runtime.preemption import STOPPING_SIGNALS, StopRequest, interrupt_once

if TYPE_CHECKING:
    from pipeline.config import Settings
    from pipeline.on_all_ranks import Command, OwnChecks


def run_command(
    parser: OptionParser,
    arguments: Sequence[str],
    command: "Command",
    own_overrides: Sequence[str] = (),
    own_checks: "OwnChecks | None" = None,
) -> int:
    """Read options and settings, make all checks, start the process group, run `command`; returns the exit code.

    own_overrides: `section.key=value` of settings that the command decides itself, whatever recipe and user say.
    own_checks: what the command checks beside what all do.
    """
    read = read_options(parser, arguments)
    options = read.options
    options.overrides += own_overrides
    is_first = launcher.is_first_rank()
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
                from pipeline.on_all_ranks import run_on_all_ranks

                return run_on_all_ranks(
                    prefix, options, settings, run_dir_of(options, settings), problems, stop, command, own_checks
                )
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


def end_process(exit_code: int) -> NoReturn:
    """End the process with this exit code.

    Two things would change the code. A launcher that sees one rank fail sends SIGTERM to the others, which are about to end
    with the same code, and a scheduler may send one signal after another, so both are ignored. And threads of torch's process
    group, open after an error and seldom slow to go after none, abort a process that shuts down normally ("terminate called
    without an active exception"), so the process ends by `os._exit`: after none only when its own threads have ended, and what
    libraries do at an exit is done. Processes that read data are not left behind.
    """
    for number in STOPPING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    kill_children()
    if exit_code == 0:
        # The interpreter's own two steps: idle threads of an executor end at the first alone.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
