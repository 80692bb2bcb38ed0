"""README's first command as its users run it, and what it is meant to show."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | {"PATH": PATH} | environment,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "split" not in line]


def noise_share(steps: list[dict[str, Any]], kind: str, head: int) -> float:
    noise = sum(step[f"{kind}_count_head_{head}_source_noise"] for step in steps)
    return noise / sum(step[f"{kind}_count_head_{head}"] for step in steps)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run directory of one whole demo, and what it printed."""
    run_dir = tmp_path_factory.mktemp("demo") / "runs" / "demo"
    return run_dir, run(
        "deepspeed", "--master_port", "29611", "launch/train.py", "--deepspeed", "ds_configs/zero3.json", "--run-dir", run_dir
    )


@pytest.mark.slow
def test_the_selecting_heads_are_spared_most_of_the_noise(demo) -> None:
    steps = steps_of(demo[0])
    assert [step["step"] for step in steps] == list(range(1, 81))
    last_quarter = steps[-len(steps) // 4 :]
    assert 0.25 < noise_share(last_quarter, "valid", 0) < 0.4
    assert noise_share(last_quarter, "selected", 0) == noise_share(last_quarter, "valid", 0)
    for head in (1, 2, 3):
        assert noise_share(last_quarter, "selected", head) < 0.7 * noise_share(last_quarter, "valid", head)


@pytest.mark.slow
def test_the_demo_ends_with_its_table_and_says_where_to_look(demo) -> None:
    run_dir, printed = demo
    table = printed[printed.index("head 0 (t+1)") :]
    for line in (
        "held-out loss, start (step 0)",
        "held-out loss, end (step 80)",
        "selected ",
        "share of noise among selected",
    ):
        assert line in table
    assert f"run directory:  {run_dir}" in table
    assert f"tensorboard --logdir {run_dir.parent}" in table
    assert "\nstep 80: 70.1% of all pairs selected" in printed
    assert (run_dir / "reference" / "model.safetensors").is_file()


@pytest.mark.slow
def test_two_ranks_without_selection_train_on_noise_as_often_as_it_comes(demo, tmp_path) -> None:
    made, run_dir = demo[0], tmp_path / "run"
    command = ["deepspeed", "--num_accelerators", "2", "--master_port", "29612", "launch/train.py"]
    overrides = ["training.k_percent=1", "training.steps=6", "logging.validation_samples=8", "data.builtin=false"]
    overrides += [f"data.path={made}/data/mix", f"data.validation_path={made}/data/validation"]
    overrides += [f"reference.path={made}/reference", "reference.training_steps=null"]
    run(*command, "--deepspeed", "ds_configs/zero3.json", "--run-dir", run_dir, *overrides)
    steps = steps_of(run_dir)
    assert len(steps) == 6
    for head in range(4):
        assert noise_share(steps, "selected", head) == noise_share(steps, "valid", head)
    assert all(step["threshold_head_1"] is not None and step["excess_mean_head_1"] != 0 for step in steps)


@pytest.mark.slow
def test_the_slurm_script_runs_one_task_a_rank(tmp_path) -> None:
    """Under stand-ins for Slurm's commands that start two tasks with the variables srun gives them."""
    commands, run_dir = tmp_path / "bin", tmp_path / "run"
    commands.mkdir()
    (commands / "scontrol").write_text("#!/bin/sh\nprintf '127.0.0.1\\nother\\n'\n")
    (commands / "sinfo").write_text("#!/bin/sh\necho '(null)'\n")
    (commands / "srun").write_text(
        "#!/bin/bash\n[[ $1 == --kill-on-bad-exit=1 ]] && out=${2#--output=} err=${3#--error=} && shift 4\n"
        "export SLURM_STEP_ID=0 SLURM_NTASKS=2 SLURM_STEP_TASKS_PER_NODE='1(x2)' SLURM_LOCALID=0 SLURM_CPUS_ON_NODE=1\n"
        'task() { SLURM_PROCID=$1 SLURM_NODEID=$1 "${@:2}" >"${out/\\%5t/0000$1}" 2>"${err/\\%5t/0000$1}"; }\n'
        'task 1 "$@" &\ntask 0 "$@" && wait $!\n'
    )
    # A container is a command before python3.
    (commands / "contained").write_text(f'#!/bin/sh\necho "$3" >>{tmp_path}/contained\nshift\nexec "$@"\n')
    for command in commands.iterdir():
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "n[1-2]", "RANK": "0"}
    slurm["SELECTIVE_MTP_CONTAINER"] = "contained --nv"
    short = ["training.steps=3", "reference.training_steps=3", "logging.validation_samples=8", "data.num_workers=0"]
    printed = run("launch/train.sbatch", "--run-dir", run_dir, *short, PATH=f"{commands}{os.pathsep}{PATH}", **slurm)
    assert [step["step"] for step in steps_of(run_dir)] == [1, 2, 3]
    environment = json.loads((run_dir / "environment.json").read_text())
    assert (environment["ranks"], environment["threads_per_rank"]) == (2, 1)

    code = f"{run_dir}/slurm/12345/code/launch/train.py"
    assert (tmp_path / "contained").read_text().splitlines() == [f"{ROOT}/launch/train.py", code, code]

    # The job's log is the first rank's; the job keeps its code, by which the run is described.
    assert (run_dir / "slurm" / "12345" / "life-0" / "rank-00000.out").read_text() in printed
    assert environment["command"][0] == code
    assert (run_dir / "slurm" / "12345" / "code" / "COMMIT").read_text() == (environment["git_commit"] or "")
