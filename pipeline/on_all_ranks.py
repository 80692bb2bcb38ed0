"""Run a command on every rank: check, bring the ranks together, run its body, and turn what fails into an exit code."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from pipeline.assembly import Job
from pipeline.checks import check_before_start
from pipeline.config import ConfigError, Settings
from pipeline.data.errors import DataError
from pipeline.failures import EXIT_USAGE, fail, is_of_memory
from pipeline.model.huggingface import ModelFilesError
from pipeline.planning.micro_batch import with_micro_batch
from pipeline.run_length import resolution
from pipeline.runtime import heartbeat
from pipeline.runtime.agreement import RanksDisagreeError
from pipeline.runtime.checkpoint.commit import SaveError
from pipeline.runtime.deepspeed_json import with_nodes_of
from pipeline.runtime.distributed import (
    UnknownAddressError,
    World,
    device_of,
    find_world,
    look_up_meeting_point,
    min_over_ranks,
    missing_devices,
    ranks_of_each_node,
    share_cores,
)
from pipeline.runtime.engine import initialize_distributed
from pipeline.runtime.memory import bytes_for_a_rank
from pipeline.runtime.network import choose_interface
from pipeline.runtime.non_finite import TrainingDivergedError
from pipeline.runtime.preemption import EXIT_TRY_AGAIN, StoppedError, StopRequest
from pipeline.runtime.profiling import use_deterministic_kernels

EXIT_DIVERGED = 3

Command = Callable[[Job, argparse.Namespace, StopRequest], int]
"""The body of a command, run on every rank after all checks, with the process group up; returns the exit code."""

OwnChecks = Callable[[Settings, argparse.Namespace, Path], list[str]]
"""Checks that one command alone makes before its start, by settings, options and run directory; lists the problems."""


def run_on_all_ranks(
    prefix: str,
    options: argparse.Namespace,
    settings: Settings,
    run_dir: Path,
    problems: list[str],
    stop: StopRequest,
    command: Command,
    own_checks: OwnChecks | None,
) -> int:
    """Run `command` on this rank, together with all others; returns the exit code.

    Args:
        prefix: what messages of errors begin with.
        problems: what reading options and recipe has found already, reported with what the checks find.

    Raises:
        ConfigError: with all problems at once, before any compute is spent.
    """
    try:
        world = find_world()
    except (ValueError, KeyError) as error:
        return fail(prefix, f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers, all or none set: {error}", EXIT_USAGE, True)

    # Checks, and what only the data tells.
    own = [] if own_checks is None else own_checks(settings, options, run_dir)
    content = check_before_start(settings, options.deepspeed, run_dir, world, problems, own)
    settings, notes = resolution(settings)
    if world.is_first and notes:
        print("\n".join(notes), flush=True)

    # The device, and the other ranks.
    if settings.training.deterministic:
        use_deterministic_kernels()
    device, patience = device_of(world), settings.run.hang_timeout
    share_cores(world)
    if world.is_first and (reason := missing_devices()) is not None:
        print(reason, flush=True)
    try:
        look_up_meeting_point()
        choose_interface(world.size, world.local_size)
        initialize_distributed(device, settings.logging.deepspeed_level, heartbeat.longest_collective(patience))
    except (dist.DistError, ValueError) as error:
        return fail(prefix, _cannot_meet(error), EXIT_USAGE, True)

    # The command. Nodes may have unlike numbers of ranks, and all ranks have to hold the same settings.
    content = with_nodes_of(content, ranks_of_each_node(world), world.size)
    usable = min_over_ranks(bytes_for_a_rank(device, world.local_size), device)
    settings = with_micro_batch(settings, content, world.size, device.type == "cuda", usable)
    job = Job(settings, content, run_dir, world, device, getattr(options, "allow_changed", False), _from_step(options))
    stop.wait_for_agreement()
    heartbeat.begin(world, patience, run_dir)
    try:
        with heartbeat.telling_of_errors((ConfigError, SaveError, TrainingDivergedError, RanksDisagreeError)):
            exit_code = _stopped_or(command, job, options, stop)
        heartbeat.enter("ending")
        dist.barrier()
    except Exception as error:
        failed = _exit_code_of(prefix, error, world)
        if failed is None:
            raise
        return failed
    finally:
        heartbeat.stop()
    dist.destroy_process_group()
    return exit_code


def _from_step(options: argparse.Namespace) -> int | None:
    """The step to go back to. A job that Slurm requeued went back in its first life, and continues from there."""
    return None if int(os.environ.get("SLURM_RESTART_COUNT", 0)) else getattr(options, "from_step", None)


def _stopped_or(command: Command, job: Job, options: argparse.Namespace, stop: StopRequest) -> int:
    """Run a command's body; a request to stop that came where nothing is to be saved is its exit code too."""
    try:
        return command(job, options, stop)
    except StoppedError:
        if job.world.is_first:
            print("stopped on request; nothing was to be saved; run the same command again to continue", flush=True)
        return EXIT_TRY_AGAIN


def _exit_code_of(prefix: str, error: Exception, world: World) -> int | None:
    """Say what has failed, and return the exit code; None for a mistake of the program's."""
    match error:
        case DataError() | ModelFilesError():
            # An error that all ranks raise alike is printed by the first only.
            return fail(prefix, error, EXIT_USAGE, world.is_first or not getattr(error, "agreed", False))
        case SaveError():
            return fail(prefix, error, EXIT_USAGE, world.is_first)
        case TrainingDivergedError() | RanksDisagreeError():
            return fail(prefix, error, EXIT_DIVERGED, world.is_first)
        case Exception() if is_of_memory(error):
            remedy = "launch/plan.py says what takes it, and which settings save some"
            return fail(prefix, f"rank {world.rank}: {str(error).partition(chr(10))[0]} {remedy}", EXIT_USAGE, True)
        case RuntimeError():
            # A peer that died breaks the collectives of the others: then the heartbeat ends this process, and names the peer.
            if world.size > 1 and heartbeat.is_of_a_peer(error):
                heartbeat.wait_for_verdict()
            # One that failed with an error of its own is not meant, whose message has the same words.
            if "DataLoader worker (pid" in str(error):
                reason = (
                    f"a process that reads data died: {error}; is the machine's memory used up? Try a smaller data.num_workers"
                )
                return fail(prefix, f"rank {world.rank}: {reason}", EXIT_USAGE, True)
    return None


def _cannot_meet(error: Exception) -> str:
    if isinstance(error, UnknownAddressError):
        return f"the ranks cannot meet: {error}"
    address, port = (os.environ.get(name, "not set") for name in ("MASTER_ADDR", "MASTER_PORT"))
    reason = str(error).partition("\n")[0]
    return (
        f"the ranks cannot meet at MASTER_ADDR {address}, MASTER_PORT {port}: {reason}; if another job uses this port, choose "
        "another one (deepspeed --master_port N, or MASTER_PORT=N)"
    )
