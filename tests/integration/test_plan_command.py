"""launch/plan.py as its users meet it."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.forked import ROOT, run_script

# Seven billion parameters, of which nothing is on this machine.
LARGE = [
    "data.builtin=false", "data.path=not/here", "data.sequence_length=4096", "data.global_batch=4096", "data.micro_batch=1",
    "data.lanes=4096", "data.num_workers=0", "reference.training_steps=null", "reference.path=not/here/either",
    "model.vocab_size=32000", "model.dim=4096", "model.num_layers=32", "model.num_attention_heads=32",
    "model.num_key_value_heads=8", "model.ffn_dim=14336",
]  # fmt: skip


def plan(*arguments: Any, stage: str = "zero3", start_afresh: bool = False) -> subprocess.CompletedProcess[str]:
    deepspeed = ROOT / "ds_configs" / f"{stage}.json"
    return run_script("plan.py", "--deepspeed", deepspeed, *arguments, start_afresh=start_afresh)


def test_a_plan_says_what_a_large_job_takes_whether_it_fits_and_what_would_make_it_fit(tmp_path: Path) -> None:
    found = {}
    for gpus in (64, 4096):
        done = plan("--gpus", gpus, "--device-memory", 24, "--json", tmp_path / "plan.json", *LARGE)
        assert done.returncode == 1, done.stderr
        found[gpus] = json.loads((tmp_path / "plan.json").read_text())
        total = f"{found[gpus]['total'] / 2**30:,.3f}"
        assert any(line.split()[0] == "total" and line.split()[2] == total for line in done.stdout.splitlines() if line)
        assert "reference.path: not/here/either cannot be read here" in done.stdout
        assert "It does not fit 24.00 GiB." in done.stdout
        assert "training.activation_checkpointing=full" in done.stdout
    few, many = found[64], found[4096]
    assert few["parameters"] == many["parameters"] > 7e9
    assert few["peak"]["optimiser"] == pytest.approx(64 * many["peak"]["optimiser"], rel=0.01)
    assert few["peak"]["activations"] > 2**30
    assert few["verdict"] == "does not fit"
    assert few["device_memory"] == 24 * 2**30
    assert sum(few["peak"].values()) == few["total"] == max(few["moments"].values())
    # What is advised is what a plan of it says.
    full = next(change["total"] for change in few["changes"] if "checkpointing=full" in change["setting"])
    done = plan(
        "--gpus", 64, "--device-memory", 24, "--json", tmp_path / "plan.json", *LARGE, "training.activation_checkpointing=full"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "plan.json").read_text())["total"] == full


def test_the_gpus_of_a_node_hold_its_copy_of_the_weights(tmp_path: Path) -> None:
    held = {}
    for of_a_node in (None, 8, 4):
        told = [] if of_a_node is None else ["--gpus-per-node", of_a_node]
        done = plan("--gpus", 16, *told, "--json", tmp_path / "plan.json", *LARGE, stage="zero3_hpz")
        assert done.returncode == 0, done.stderr
        figures = json.loads((tmp_path / "plan.json").read_text())
        held[of_a_node] = figures["total"]
    assert held[None] == held[8]
    # Of the policy's weights in bf16 a quarter, and not an eighth.
    assert held[4] - held[8] == pytest.approx(2 * figures["parameters"] / 8, rel=0.02)


def test_the_demo_is_planned_without_its_data_on_a_cpu(tmp_path: Path) -> None:
    sizes = ["--gpus", 2, "--device", "cpu", "--device-memory", 4]
    done = plan(*sizes, "--json", tmp_path / "plan.json", stage="zero3_offload", start_afresh=True)
    assert done.returncode == 0, done.stderr
    assert "float32 on 2 CPU ranks" in done.stdout
    assert "It fits 4.00 GiB" in done.stdout
    assert "on the host" in done.stdout
    assert json.loads((tmp_path / "plan.json").read_text())["host"]["optimiser"] > 0


def test_everything_that_is_wrong_is_said_at_once() -> None:
    done = plan("--gpus", 5, "--gpu=4", "training.k_percent=2", "model.dmi=3", "--device-memory", 0)
    assert done.returncode == 2
    head, *problems = done.stderr.rstrip("\n").split("\n  - ")
    assert head == "plan.py: error: 5 problems with the settings:"
    assert problems[0] == "--gpu=4: unknown option; did you mean '--gpus'?"
    for problem, expected in zip(
        problems[1:],
        ("model.dmi: unknown", "training.k_percent: got 2", "--device-memory: got 0", "data.lanes = 24 is not a multiple"),
        strict=True,
    ):
        assert expected in problem
    done = plan("--gpus", 5)
    assert done.returncode == 2
    assert "numbers of ranks that fit: 1, 2, 3, 4, 6, 8, 12, 24" in done.stderr


def test_figures_that_cannot_be_written_and_a_memory_without_end_are_refused_before_anything_is_computed(
    tmp_path: Path,
) -> None:
    expected = {
        tmp_path / "nowhere" / "plan.json": f"--json: {tmp_path / 'nowhere'} is not a directory",
        tmp_path: f"--json: {tmp_path} is a directory",
    }
    for path, problem in expected.items():
        done = plan("--gpus", 2, "--device-memory", "inf", "--json", path)
        assert done.returncode == 2
        assert done.stdout == ""
        assert problem in done.stderr
        assert "--device-memory: got inf; expected a number of GiB above 0" in done.stderr
        assert "Traceback" not in done.stderr
    done = plan("--gpus", 2, "--device-memory", "nan")
    assert "--device-memory: got nan" in done.stderr


def test_a_plan_that_fits_says_what_was_left_aside_on_a_gpu() -> None:
    done = plan("--gpus", 2, "--device-memory", 40)
    assert done.returncode == 0, done.stderr
    assert "It fits 40.00 GiB, with 15% to spare. 2.00 GiB of it are left aside" in done.stdout
    assert "CUDA, NCCL and fragmentation" in done.stdout
    done = plan("--gpus", 2, "--device", "cpu", "--device-memory", 40)
    assert "left aside" not in done.stdout


def test_a_plan_says_how_fast_a_job_will_be_from_stated_peaks_and_what_would_make_it_faster(tmp_path: Path) -> None:
    network = ["--card", "H100", "--network-bandwidth", 1, "--json", tmp_path / "plan.json"]
    done = plan("--gpus", 64, *network, *LARGE)
    assert done.returncode == 0, done.stderr
    speed = json.loads((tmp_path / "plan.json").read_text())["speed"]
    assert speed["hardware"]["matrix_flops"] == 0.8 * 989e12
    assert sum(speed["parts"].values()) == pytest.approx(speed["step_seconds"])
    assert f"Expected: {speed['tokens_per_second']:,.0f} tokens/s, {speed['tokens_per_second'] / 64:,.0f} a rank" in done.stdout
    assert f"{speed['mfu']:.1%} MFU" in done.stdout
    assert speed["parts"]["exposed traffic"] > 0.5 * speed["step_seconds"]
    assert '"zero_hpz_partition_size": 8' in done.stdout
    # A faster network ends the waiting, a card that is half as fast lengthens the step.
    done = plan("--gpus", 64, "--card", "H100", "--matrix-tflops", 400, "--json", tmp_path / "plan.json", *LARGE)
    slower = json.loads((tmp_path / "plan.json").read_text())["speed"]
    assert slower["parts"].get("exposed traffic", 0) < 0.05 * slower["step_seconds"]
    assert slower["parts"]["products"] == pytest.approx(speed["parts"]["products"] * 0.8 * 989 / 400)


def test_no_speed_is_made_up_for_a_device_that_is_not_known() -> None:
    done = plan("--gpus", 2, "--card", "TPU")
    assert done.returncode == 2
    assert "--card: got 'TPU'; expected one of H100 PCIe, H100, H200, A100" in done.stderr
    done = plan("--gpus", 2, "--device", "cpu")
    assert "How fast this is, is not known here" in done.stdout
    done = plan("--gpus", 2, "--device", "cpu", "--matrix-tflops", 0.1, "--memory-bandwidth", 10)
    assert "Expected: " in done.stdout
    assert "MFU" not in done.stdout
