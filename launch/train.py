"""Train a policy with selective multi-token prediction.

    deepspeed launch/train.py --deepspeed ds_configs/zero3.json [--config launch/recipes/NAME.yaml] [section.key=value ...]

Without --config it runs the demo. Run again with the same run directory it continues by itself. Exit codes: 0 finished,
2 the settings are wrong, 3 training diverged or the ranks did, 75 stopped on request with more to do.
"""

import argparse
import os
import sys
from pathlib import Path

from pipeline.runtime.preemption import StopRequest

DEMO = Path(__file__).parent / "recipes" / "demo.yaml"
EXIT_USAGE, EXIT_DIVERGED, EXIT_INTERRUPTED = 2, 3, 130


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    parser.add_argument("--deepspeed", type=Path, required=True, metavar="JSON", help="ZeRO, precision, communication")
    parser.add_argument("--config", type=Path, default=DEMO, metavar="YAML", help="recipe (default: the demo)")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/ and the recipe's run.name")
    parser.add_argument("--dry-run", action="store_true", help="build everything, run one step, report, stop")
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings and stop")
    parser.add_argument("--allow-changed", action="store_true", help="continue a run with settings that change its result")
    # The deepspeed launcher appends it; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parsed, unknown = parser.parse_known_intermixed_args(arguments)
    parsed.unknown = unknown
    parsed.options = [option for action in parser._actions for option in action.option_strings if option != "--local_rank"]
    return parsed


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    is_first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    stop = StopRequest()
    if is_first and not options.print_config:
        print("selective multi-token prediction: loading torch and DeepSpeed", flush=True)

    from pipeline.config import ConfigError, did_you_mean
    from pipeline.recipe import read_settings

    problems = [
        f"{option}: unknown option; {did_you_mean(option.partition('=')[0], options.options)}" for option in options.unknown
    ]
    try:
        try:
            settings, found = read_settings(options.config, options.overrides)
        except ConfigError as error:
            raise ConfigError(problems + error.problems) from None
        problems += found
        if options.print_config and problems:
            raise ConfigError(problems)
        if options.print_config:
            print(settings.to_yaml(), end="") if is_first else None
            return 0
        return train(options, settings, problems, stop)
    except ConfigError as error:
        return fail(error, EXIT_USAGE, is_first)
    except KeyboardInterrupt:
        print(
            "train.py: interrupted; the same command continues from the last checkpoint", file=sys.stderr
        ) if is_first else None
        return EXIT_INTERRUPTED


def train(options: argparse.Namespace, settings, problems: list[str], stop: StopRequest) -> int:
    import torch.distributed as dist

    from pipeline.checks import check_before_start
    from pipeline.data.manifest import DataError
    from pipeline.job import Job, dry_run, run_job
    from pipeline.model.huggingface import ModelFilesError
    from pipeline.runtime.agreement import RanksDisagreeError
    from pipeline.runtime.distributed import device_of, find_world, share_cores
    from pipeline.runtime.engine import initialize_distributed
    from pipeline.train import TrainingDivergedError

    world = find_world()
    run_dir = options.run_dir or Path("runs") / settings.run.name
    content = check_before_start(settings, options.deepspeed, run_dir, world, problems)
    device = device_of(world)
    share_cores(world)
    initialize_distributed(device, settings.logging.deepspeed_level)
    job = Job(settings, content, run_dir, world, device, options.allow_changed)
    try:
        exit_code = dry_run(job) if options.dry_run else run_job(job, stop)
    except (DataError, ModelFilesError) as error:
        # Where all ranks raise the same one says it.
        return fail(error, EXIT_USAGE, world.is_first or not getattr(error, "agreed", False))
    except (TrainingDivergedError, RanksDisagreeError) as error:
        return fail(error, EXIT_DIVERGED, world.is_first)
    dist.barrier()
    dist.destroy_process_group()
    return exit_code


def fail(error: Exception, exit_code: int, is_first: bool) -> int:
    if is_first:
        print(f"train.py: error: {error}", file=sys.stderr, flush=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
