"""Run a life of a job on Slurm, in the place of its batch script: `python3 -m pipeline.slurm.batch_job train.py …`.

The checks come first, so that what cannot work ends in seconds. Then srun starts a task a rank, from the job's own copy of the
code, with a log a rank. When they have ended the job is put into the queue again where that is of use. `RUN/slurm/JOB/` has all
of it: `code/`, the logs of each life (`life-0/`), and `lives.jsonl`, with what became of each and why.

Exit code: that of the first rank with an error of its own, else srun's, the highest of all, with 75 for ranks that a request
ended before they could listen; 2 if the job cannot start.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.runtime.preemption import EXIT_TRY_AGAIN
from pipeline.slurm.before_start import StartError, add_to_environment, check_gpus
from pipeline.slurm.code_copy import keep_code, with_kept_files
from pipeline.slurm.commands import SlurmError, host_names, name_of, properties, requeue, usable_nodes
from pipeline.slurm.rank_logs import Ended, accused_rank, code_of_job, ends_of_ranks, last_words, own_errors
from pipeline.slurm.ranks import Ranks, Request, or_none, say
from pipeline.slurm.requeueing import Decision, Life, decide, failures_in_a_row, lead_seconds, record

CONTAINER = "SELECTIVE_MTP_CONTAINER"
"""Environment variable with the command that runs another one in a container, such as `apptainer exec --nv image.sif`."""

EXIT_USAGE = 2
_OUTPUT = "--output"


@dataclass(frozen=True)
class Job:
    """A job as this life of it finds it. number: Slurm's. name: in its commands. restarts: lives before this one. arguments:
    the script's."""

    number: str
    name: str
    restarts: int
    nodes: list[str]
    script: str
    arguments: list[str]
    run_dir: Path

    @property
    def directory(self) -> Path:
        return self.run_dir / "slurm" / self.number

    @property
    def logs(self) -> Path:
        return self.directory / f"life-{self.restarts}"

    @property
    def records(self) -> Path:
        return self.directory / "lives.jsonl"

    def saved(self) -> set[Path]:
        """What the job has saved so far: checkpoints, a reference that it trained, pieces that it scored."""
        outputs = [value for option, value in zip(self.arguments, self.arguments[1:], strict=False) if option == _OUTPUT]
        outputs += [each.partition("=")[2] for each in self.arguments if each.startswith(f"{_OUTPUT}=")]
        looked_at = [(self.run_dir, pattern) for pattern in ("checkpoints/*/state.json", "reference/**/*.json")]
        looked_at += [(Path(output).expanduser(), "**/*") for output in outputs]
        # What a folder above is called says nothing.
        found = [(file, file.relative_to(folder)) for folder, pattern in looked_at for file in folder.glob(pattern)]
        return {file for file, name in found if ".partial" not in str(name)}


def main(arguments: Sequence[str]) -> int:
    """Run a life of a job; returns the exit code. arguments: a script of launch/, and its own."""
    request = Request(lead_seconds(os.environ))  # first of all, so that one which comes meanwhile is kept
    try:
        warning = check_gpus(os.environ)
        if warning is not None:
            say(warning)
        environment = add_to_environment(os.environ)
        job = find_job(arguments[0], arguments[1:])
    except (StartError, SlurmError) as error:
        say(f"error: {error}")
        return EXIT_USAGE

    environment["SLURM_RESTART_COUNT"] = str(job.restarts)
    before = job.saved()
    ranks = start(job, environment, request)
    ranks.wait()
    ends = ends_of_ranks(ranks.lines)
    code = code_of_job(ends, ranks.code)
    show_failure(job, code, ends)

    # The record comes before the requeueing, which ends this process.
    preempted = ranks.is_preempted
    asked, cancelled = preempted or ranks.asked_by_slurm, ranks.cancelled and not preempted
    life = Life(code, job.saved() != before, ends, asked, accused_node(job, ends), cancelled, preempted)
    decision = as_submitted(job, decide(life, failures_in_a_row(job.records)))
    record(job.records, life, decision, job.nodes)
    obey(job, decision)
    return code


def find_job(script: str, arguments: Sequence[str]) -> Job:
    """Describe the job by Slurm's variables; the script itself says which run directory its options mean.

    Raises:
        StartError: the script refuses its options, and has said why.
    """
    # This module's own code is the checkout's, or in a life after the first the copy's.
    here = Path(__file__).resolve().parents[2]
    named = any(argument.partition("=")[0] == "--deepspeed" for argument in arguments)
    given = [*arguments] if named else ["--deepspeed", "ds_configs/zero3.json", *arguments]
    if here != Path.cwd().resolve():
        given = with_kept_files(given, here)

    command = [*_python(), str(here / "launch" / script), *given, "--print-run-dir"]
    environment = dict(os.environ) | {"PYTHONPATH": _python_path(here)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == EXIT_USAGE:
        raise StartError("the options or the recipe are to be corrected, see above")
    if done.returncode != 0 or not done.stdout.strip():
        raise StartError(
            f"{' '.join(_python())} ({shutil.which(_python()[0])}) cannot run {script}, see above; activate the virtual "
            "environment before sbatch, or set it up in launch/site.sh"
        )

    name, nodes = name_of(os.environ), host_names(os.environ["SLURM_JOB_NODELIST"])
    return Job(os.environ["SLURM_JOB_ID"], name, _restarts(name), nodes, script, given, Path(done.stdout.splitlines()[-1]))


def _restarts(name: str) -> int:
    """The lives of a job before this one, from Slurm: SLURM_RESTART_COUNT may be that of a requeued job that submitted it."""
    found = or_none(properties, name) or {}
    return int(found.get("Restarts", os.environ.get("SLURM_RESTART_COUNT", "0")))


def start(job: Job, environment: dict[str, str], request: Request) -> Ranks:
    """Start the ranks, from the copy of the code."""
    job.logs.mkdir(parents=True, exist_ok=True)
    here, copy = Path(__file__).resolve().parents[2], (job.directory / "code").resolve()
    keep_code(here, copy)
    arguments = with_kept_files(job.arguments, copy)
    command = [*_python(), str(copy / "launch" / job.script), *arguments]
    say(f"life {job.restarts} on {' '.join(job.nodes)}; the logs of the ranks are in {job.logs}")
    return Ranks(job.name, command, environment | {"PYTHONPATH": _python_path(copy)}, job.logs, request)


def show_failure(job: Job, code: int, ends: Sequence[Ended]) -> None:
    """Print the message of the rank that failed first: one with an error of its own, else one that names another."""
    accused = accused_rank(job.logs)
    first = [end.rank for end in own_errors(ends)] or ([] if accused is None else [accused[0]]) or [end.rank for end in ends]
    words = "" if code in (0, EXIT_TRY_AGAIN) else last_words(job.logs, [*first, 0])
    if words:
        say(words)


def accused_node(job: Job, ends: Sequence[Ended]) -> str | None:
    """The node of the rank that the others name as dead or standing still; of one that a signal ended, where none is named."""
    accused = accused_rank(job.logs)
    killed = [end for end in ends if end.code is None]
    named = [end for end in ends if accused is not None and end.rank == accused[1]]
    return next((end.node for end in [*named, *(killed if accused is None else [])]), None)


def as_submitted(job: Job, decision: Decision) -> Decision:
    """The decision, unless the job may not be put into the queue again."""
    if decision.requeue and (or_none(properties, job.name) or {}).get("Requeue") == "0":
        return Decision(False, f"it was submitted with --no-requeue ({decision.why}); the same command continues it")
    return decision


def obey(job: Job, decision: Decision) -> None:
    """Put the job into the queue again if that was decided, and say what was."""
    if not decision.requeue:
        if decision.why:
            say(f"not put into the queue again by this script: {decision.why}")
        return
    found = or_none(properties, job.name) or {}
    excluded = {node for node in found.get("ExcNodeList", "").split(",") if node and node != "(null)"}
    if decision.exclude is not None:
        left = usable_nodes(os.environ["SLURM_JOB_PARTITION"]) - set(_expanded(excluded)) - {decision.exclude}
        if len(left) >= len(job.nodes):
            excluded.add(decision.exclude)
            say(f"it goes on without {decision.exclude}")
        else:
            say(f"it may come to {decision.exclude} again: no other node of the partition can take its place")
    say(f"put into the queue again: {decision.why}")
    try:
        requeue(job.name, sorted(excluded))
    except SlurmError as error:
        say(f"Slurm refuses that ({error}); the same command continues it")


def _expanded(nodes: set[str]) -> list[str]:
    return host_names(",".join(sorted(nodes))) if nodes else []


def _python() -> list[str]:
    return [*shlex.split(os.environ.get(CONTAINER, "")), "python3"]


def _python_path(code: Path) -> str:
    return os.pathsep.join([str(code), *filter(None, [os.environ.get("PYTHONPATH")])])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
