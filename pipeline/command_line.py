"""The shared part of commands that run on all ranks of a job: options, checks, process group, exit codes.

torch and DeepSpeed take seconds to load, so the imports are inside the functions: signal handlers are installed and a first
line is printed before.

Exit codes: 0 done, 2 wrong settings or data, 3 training or the ranks diverged, 75 stopped on request with more to do,
130 interrupted.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pipeline.runtime.preemption import StopRequest

if TYPE_CHECKING:
    from pipeline.assembly import Job
    from pipeline.config import Settings

EXIT_USAGE, EXIT_DIVERGED, EXIT_INTERRUPTED = 2, 3, 130

Command = Callable[["Job", argparse.Namespace, StopRequest], int]
"""The body of a command, run on every rank after all checks, with the process group up; returns the exit code."""


def recipe_parser(name: str, description: str | None, default_recipe: Path) -> argparse.ArgumentParser:
    """The options of every command that reads a recipe and a DeepSpeed JSON; a command adds its own."""
    parser = argparse.ArgumentParser(
        prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    parser.add_argument("--deepspeed", type=Path, required=True, metavar="JSON", help="ZeRO, precision, communication")
    parser.add_argument("--config", type=Path, default=default_recipe, metavar="YAML", help="recipe (default: the demo)")
    return parser


def job_parser(name: str, description: str | None, default_recipe: Path) -> argparse.ArgumentParser:
    """The options of every command that runs on all ranks of a job."""
    parser = recipe_parser(name, description, default_recipe)
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/ and the recipe's run.name")
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings and stop")
    # Appended by the deepspeed launcher; LOCAL_RANK in the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str], command: Command) -> int:
    """Read options and settings, make all checks, start the process group, run `command`; returns the exit code."""
    options, unknown = read_options(parser, arguments)
    is_first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    stop = StopRequest()
    if is_first and not options.print_config:
        print("selective multi-token prediction: loading torch and DeepSpeed", flush=True)

    from pipeline.config import ConfigError

    try:
        settings, problems = read_recipe(parser, options, unknown)
        if options.print_config and problems:
            raise ConfigError(problems)
        if options.print_config:
            print(settings.to_yaml(), end="") if is_first else None
            return 0
        return _run_on_all_ranks(parser.prog, options, settings, problems, stop, command)
    except ConfigError as error:
        return fail(parser.prog, error, EXIT_USAGE, is_first)
    except KeyboardInterrupt:
        interrupted = f"{parser.prog}: interrupted; the same command continues from what was saved last"
        print(interrupted, file=sys.stderr) if is_first else None
        return EXIT_INTERRUPTED


def read_options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options; returns them, overrides included, and a list of unknown ones."""
    options, unknown = parser.parse_known_intermixed_args(arguments)
    # argparse also returns the overrides that follow an unknown option as unknown.
    options.overrides += [argument for argument in unknown if not argument.startswith("-")]
    return options, [argument for argument in unknown if argument.startswith("-")]


def read_recipe(
    parser: argparse.ArgumentParser, options: argparse.Namespace, unknown: Sequence[str]
) -> tuple["Settings", list[str]]:
    """Read the settings that the options ask for; returns them with all problems, one sentence each.

    A refused setting keeps its default.

    Raises:
        ConfigError: the recipe cannot be read at all.
    """
    from pipeline.config import ConfigError
    from pipeline.recipe import read_settings

    problems = [_unknown(option, parser) for option in unknown]
    try:
        settings, found = read_settings(options.config, options.overrides)
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    return settings, problems + found


def _unknown(option: str, parser: argparse.ArgumentParser) -> str:
    from pipeline.config import did_you_mean
    from pipeline.recipe import settings_named

    name = option.partition("=")[0]
    settings = settings_named(name.lstrip("-").replace("-", "_"))
    if settings:
        meant = " or ".join(f"{setting}=VALUE" for setting in settings)
        return f"{option}: unknown option; a setting is given without dashes, {meant}"
    known = [option for action in parser._actions for option in action.option_strings if option != "--local_rank"]
    return f"{option}: unknown option; {did_you_mean(name, known)}"


def end_process(exit_code: int) -> NoReturn:
    """End the process with this exit code.

    Two things would change the code. A launcher that sees one rank fail sends SIGTERM to the others, which are about to end
    with the same code, so the signal is ignored. And after an error the process group is still open; its threads abort a
    process that shuts down normally, so the process ends by `os._exit`.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if exit_code == 0:
        sys.exit(exit_code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _run_on_all_ranks(
    prog: str, options: argparse.Namespace, settings: "Settings", problems: list[str], stop: StopRequest, command: Command
) -> int:
    import torch.distributed as dist

    from pipeline.assembly import Job
    from pipeline.checks import check_before_start
    from pipeline.data.errors import DataError
    from pipeline.model.huggingface import ModelFilesError
    from pipeline.runtime.agreement import RanksDisagreeError
    from pipeline.runtime.checkpoint.commit import SaveError
    from pipeline.runtime.distributed import device_of, find_world, share_cores
    from pipeline.runtime.engine import initialize_distributed
    from pipeline.runtime.non_finite import TrainingDivergedError

    world = find_world()
    run_dir = options.run_dir or Path("runs") / settings.run.name
    content = check_before_start(settings, options.deepspeed, run_dir, world, problems)
    device = device_of(world)
    share_cores(world)
    initialize_distributed(device, settings.logging.deepspeed_level)
    # A job that Slurm requeued went back in its first life, and continues from there.
    from_step = None if int(os.environ.get("SLURM_RESTART_COUNT", 0)) else getattr(options, "from_step", None)
    job = Job(settings, content, run_dir, world, device, getattr(options, "allow_changed", False), from_step)
    try:
        exit_code = command(job, options, stop)
    except (DataError, ModelFilesError) as error:
        # An error that all ranks raise alike is printed by the first only.
        return fail(prog, error, EXIT_USAGE, world.is_first or not getattr(error, "agreed", False))
    except SaveError as error:
        return fail(prog, error, EXIT_USAGE, world.is_first)
    except (TrainingDivergedError, RanksDisagreeError) as error:
        return fail(prog, error, EXIT_DIVERGED, world.is_first)
    dist.barrier()
    dist.destroy_process_group()
    return exit_code


def fail(prog: str, error: Exception, exit_code: int, is_first: bool) -> int:
    if is_first:
        print(f"{prog}: error: {error}", file=sys.stderr, flush=True)
    return exit_code
