"""Measure whether selection helps multi-token prediction: arms that differ in one thing, over learning rates and paired seeds.

    python launch/experiment.py --output DIR              about two hours on two cores, or on so many GPUs
    python launch/experiment.py --quick --output DIR      the same machinery in ten minutes; it decides nothing

Every run is an ordinary recipe in DIR/recipes, trained by launch/train.py on a core or GPU of its own. Run again, also by the
tasks of a Slurm array side by side, it goes on where it was; no run is made twice. What is run, and what is decided by it,
stands in a plan (launch/recipes/experiment/full.yaml) before the first run, and DIR refuses another one. It writes
DIR/results.json and DIR/index.html. Exit code 0; 2, with one message, if something must be corrected; 75 after SIGTERM, with
more to do.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.failures import guarded
from pipeline.option_parser import OptionParser, at_least
from pipeline.options import path_argument

PLANS = Path(__file__).parent / "recipes" / "experiment"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = OptionParser(prog="experiment.py", description=__doc__)
    parser.add_argument("--output", type=path_argument, required=True, metavar="DIR", help="the experiment's folder")
    parser.add_argument("--quick", action="store_true", help="fewer arms, seeds and tokens: ten minutes, and nothing decided")
    parser.add_argument(
        "--plan", type=path_argument, metavar="YAML", help="another plan; arms.yaml and base.yaml lie beside it"
    )
    parser.add_argument(
        "--workers", type=at_least(1), metavar="N", help="runs side by side (default: one a GPU, else one a core)"
    )

    def body() -> int:
        options = parser.read_or_refuse(arguments)
        plan = options.plan or PLANS / ("quick.yaml" if options.quick else "full.yaml")
        if not plan.is_file():
            raise ValueError(f"--plan: {plan}: no such file")
        return _conduct(plan, options.output, options.workers)

    return guarded(
        "experiment.py: error", body, (ValueError,), interrupted="interrupted; the same command goes on where it was"
    )


def _conduct(plan: Path, output: Path, workers: int | None) -> int:
    from pipeline.experiment.conduct import conduct
    from pipeline.experiment.plan import read_plan
    from pipeline.experiment.runs import StoppedOnRequestError
    from pipeline.runtime.preemption import EXIT_TRY_AGAIN

    try:
        results = conduct(read_plan(plan), output, workers)
    except StoppedOnRequestError:
        print("stopped on request; the same command goes on where it was", flush=True)
        return EXIT_TRY_AGAIN
    for each in results["comparisons"]:
        kind = "primary" if each["primary"] else "exploratory"
        print(
            f"{kind}: {each['first']} - {each['second']}: {each['mean']:+.4f} bits per byte, "
            f"{each['low']:+.4f} to {each['high']:+.4f}, p = {each['p_t']:.4f}"
        )
    print("\n".join(results["invalid_because"]) or "every head learned", flush=True)
    if not results["decides"]:
        print("this plan decides nothing: it is too small")
    print(f"{output / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
