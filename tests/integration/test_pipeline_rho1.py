"""The real pipeline on two ranks: data, reference, policy under ZeRO-3, global selection, metrics."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.config import Settings
from pipeline.data.shards.manifest import read_manifest
from pipeline.data.shards.reader import ShardReader
from pipeline.recipe import load_settings
from pipeline.runtime.metrics import OF_THE_MACHINE
from tests.ranks import run_ranks

STEPS, K_PERCENT = 30, 0.6
DEEPSPEED_JSON = Path(__file__).parents[2] / "ds_configs" / "zero3.json"


def settings_for(tiny_data: Path, tiny_reference: Path, *more: str) -> Settings:
    overrides = [
        f"data.path={tiny_data / 'train'}",
        f"data.validation_path={tiny_data / 'validation'}",
        "data.sequence_length=16",
        "data.global_batch=16",
        "data.micro_batch=4",
        "data.num_workers=1",
        "model.dim=32",
        "model.num_layers=2",
        "model.num_attention_heads=2",
        f"reference.path={tiny_reference}",
        f"training.steps={STEPS}",
        "training.learning_rate=5e-3",
        "training.warmup_steps=5",
        f"training.k_percent={K_PERCENT}",
        "logging.metrics_every=1",
        "logging.selection_every=10",
        "logging.histogram_every=20",
        "logging.passage_every=null",
        "checkpoint.every=10",
    ]
    return load_settings(None, [*overrides, *more])


def job_on_this_rank(settings: Settings, run_dir: Path, allow_changed: bool = False) -> Any:
    from pipeline.checks import check_before_start
    from pipeline.job import Job
    from pipeline.runtime.distributed import World
    from pipeline.runtime.engine import initialize_distributed

    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, rank, size)
    content = check_before_start(settings, DEEPSPEED_JSON, run_dir, world)
    initialize_distributed(torch.device("cpu"), "error")
    return Job(settings, content, run_dir, world, torch.device("cpu"), allow_changed)


def run_pipeline(settings: Settings, run_dir: Path) -> dict[str, Any]:
    """Train, counting the forwards of both models and watching what reaches head 0."""
    from pipeline.job import build_run, describe
    from pipeline.runtime.preemption import StopRequest
    from pipeline.train import train

    job = job_on_this_rank(settings, run_dir)
    run = build_run(job, settings, run_dir)
    describe(job, run)
    counts = {"reference": 0, "policy": 0}
    gradients: list[torch.Tensor] = []
    inputs: list[torch.Tensor] = []

    def count_reference(*_: Any) -> None:
        counts["reference"] += 1
        assert torch.is_inference_mode_enabled()

    def watch_policy(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counts["policy"] += 1
        if torch.is_grad_enabled():
            inputs.append(args[3][..., 0])  # valid_BTH of head 0

    def watch_head_0(module: Any, args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradients.append(gradient.detach().clone()))

    assert run.models.reference is not None
    run.models.reference.module.register_forward_hook(count_reference)  # type: ignore[attr-defined]
    run.engine.module.register_forward_pre_hook(watch_policy, with_kwargs=True)
    run.engine.module.heads[0].register_forward_hook(watch_head_0)
    exit_code = train(run, StopRequest())
    reached = [gradient.abs().sum(-1) > 0 for gradient in gradients]
    return {
        "exit_code": exit_code,
        "counts": counts,
        "micro_batches": len(inputs),
        "every_valid_position_reached": all(bool(found[valid].all()) for found, valid in zip(reached, inputs, strict=True)),
        "lanes": run.stream.lanes,
        "validation_micro_batches": sum(each.num_micro_batches for each in run.held_out),
        "partitioned": all(parameter.shape == (0,) for parameter in run.engine.module.parameters() if parameter.ds_numel > 640),
    }


@pytest.fixture(scope="module")
def pipeline(tiny_data: Path, tiny_reference: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run_dir = tmp_path_factory.mktemp("pipeline") / "run"
    answers = run_ranks(run_pipeline, 2, settings_for(tiny_data, tiny_reference), run_dir)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "run_dir": run_dir,
        "ranks": answers,
        "steps": [line for line in lines if "split" not in line],
        "validation": [line for line in lines if line.get("split") == "validation"],
    }


def test_every_step_is_logged_once_and_the_job_ends_well(pipeline) -> None:
    assert [rank["exit_code"] for rank in pipeline["ranks"]] == [0, 0]
    assert [line["step"] for line in pipeline["steps"]] == list(range(1, STEPS + 1))
    assert [line["samples"] for line in pipeline["steps"]] == [16 * step for step in range(1, STEPS + 1)]
    assert pipeline["steps"][-1]["skipped_steps"] == 0


def test_head_0_learns_every_token_and_the_others_their_top_k(pipeline) -> None:
    for line in pipeline["steps"]:
        assert line["selected_ratio_head_0"] == 1.0
        for head in (1, 2, 3):
            # Two pools of a step, each rounded by itself.
            assert abs(line[f"selected_count_head_{head}"] - K_PERCENT * line[f"valid_count_head_{head}"]) <= 1.0
        assert 0.6 <= line["selection_ratio"] <= 0.8
        assert line["heads_per_position"] == pytest.approx(
            sum(line[f"selected_count_head_{head}"] for head in range(4)) / line["valid_count_head_0"]
        )


def test_the_objective_is_the_weighted_sum_over_selected_pairs(pipeline) -> None:
    for line in pipeline["steps"]:
        bound = sum(line[f"loss_head_{head}"] for head in range(4)) / 4
        assert 0 < line["loss"] < bound


def test_the_loss_falls(pipeline) -> None:
    for head in range(4):
        losses = [line[f"loss_head_{head}"] for line in pipeline["steps"]]
        assert sum(losses[-5:]) / 5 < 0.8 * sum(losses[:5]) / 5
        held_out = [line[f"loss_head_{head}"] for line in pipeline["validation"]]
        assert held_out[-1] < 0.8 * held_out[0]


def test_the_reference_and_the_policy_run_exactly_once_a_micro_batch(pipeline) -> None:
    for rank in pipeline["ranks"]:
        micro_batches = STEPS * 2
        assert rank["micro_batches"] == micro_batches
        evaluated = 2 * rank["validation_micro_batches"]
        # Each checkpoint remembers the policy's loss of one fixed row.
        saved = STEPS // 10
        assert rank["counts"] == {"reference": micro_batches + evaluated, "policy": micro_batches + evaluated + saved}


def test_a_validation_reads_every_row_of_the_folder(pipeline, tiny_data) -> None:
    manifest = read_manifest(tiny_data / "validation")
    reader = ShardReader(tiny_data / "validation", manifest)
    rows = [(shard, row) for shard, of in enumerate(manifest.shards) for row in range(of.samples)]
    lengths = np.concatenate([sample.lengths for sample in reader.read_many(*zip(*rows, strict=True))]).astype(int)
    assert len(rows) % 8, "the last micro-step is padded"
    for line in pipeline["validation"]:
        assert line["rows"] == len(rows)
        for head in range(4):
            assert line[f"valid_count_head_{head}"] == np.maximum(lengths - 1 - head, 0).sum()


def test_a_validation_has_perplexities_and_bits_per_byte(pipeline) -> None:
    for line in pipeline["validation"]:
        for head in range(4):
            assert line[f"perplexity_head_{head}"] == pytest.approx(math.exp(line[f"loss_head_{head}"]))
        # A token of the tiny BPE stands for one to a few bytes.
        assert 0.2 < line["bits_per_byte"] / (line["loss_head_0"] / math.log(2)) < 1


def test_every_position_with_a_target_receives_gradient_through_head_0(pipeline) -> None:
    assert all(rank["every_valid_position_reached"] for rank in pipeline["ranks"])


def test_no_rank_holds_the_whole_model_between_forwards(pipeline) -> None:
    assert all(rank["partitioned"] for rank in pipeline["ranks"])


def test_every_record_says_when_it_was_and_what_a_step_took(pipeline) -> None:
    steps = pipeline["steps"]
    times = [line["time"] for line in steps]
    assert times == sorted(times)
    assert all(line["seconds_per_step"] > 0 and line["memory_bytes"] > 1e7 for line in steps)
    # Checkpoints are begun after steps 10 and 20, and completed some steps later; the last one comes after the last record.
    saving = {line["step"] for line in steps if line["seconds_saving"] > 0}
    assert {11, 21} <= saving <= set(range(11, STEPS + 1))
    assert all("mfu" not in line for line in steps)  # of a CPU no peak is known


def test_the_run_directory_explains_itself(pipeline) -> None:
    run_dir = pipeline["run_dir"]
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["ranks"] == 2
    assert environment["versions"]["deepspeed"] == "0.19.8"
    assert load_settings(run_dir / "config.yaml").training.steps == STEPS
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == f"step-{STEPS:08d}"
    board, drawn_at = run_dir / "tensorboard", [1, *range(STEPS // 10, STEPS + 1, STEPS // 10)]
    for head in (1, 2, 3):
        drawn = (
            EventAccumulator(str(board / f"head_{head}"), size_guidance={"histograms": 0})
            .Reload()
            .Histograms("selection/excess")
        )
        # The setting asks for every 20 steps; a run has ten all the same.
        assert [each.step for each in drawn] == drawn_at
        counts = [line[f"valid_count_head_{head}"] for line in pipeline["steps"] if line["step"] in drawn_at]
        assert [each.histogram_value.num for each in drawn] == counts
    texts = EventAccumulator(str(board), size_guidance={"tensors": 0}).Reload()
    assert f"    steps: {STEPS}\n" in texts.Tensors("run/recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert {"run/command/text_summary", "_hparams_/session_start_info"} <= set(texts.Tags()["tensors"]) | set(
        texts.summary_metadata
    )


def resume(settings: Settings, run_dir: Path) -> int:
    from pipeline.job import run_job
    from pipeline.runtime.preemption import StopRequest

    return run_job(job_on_this_rank(settings, run_dir), StopRequest())


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(pipeline, tiny_data, tiny_reference, tmp_path) -> None:
    import shutil

    again = tmp_path / "again"
    # Neither move the training: where its data is read, and looks at what heads select.
    changed = ("data.num_workers=0", "logging.passage_every=8")
    shutil.copytree(pipeline["run_dir"], again)
    for step in (20, 30):
        shutil.rmtree(again / "checkpoints" / f"step-{step:08d}")
    (again / "checkpoints" / "latest").write_text("step-00000010\n")
    assert run_ranks(resume, 2, settings_for(tiny_data, tiny_reference, *changed), again) == [0, 0]
    lines = [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]
    resumed = [line for line in lines if "split" not in line]
    assert len(resumed) == STEPS

    def without_speed(line: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in line.items() if key not in OF_THE_MACHINE}

    assert [without_speed(line) for line in resumed] == [without_speed(line) for line in pipeline["steps"]]
    assert [line for line in lines if "split" in line] == pipeline["validation"]
    assert not math.isnan(resumed[-1]["grad_norm"])
    check_passages(again)


def check_passages(run_dir: Path) -> None:
    """There is a passage at its interval since the resume, and of the last step, as page, picture and TensorBoard's image."""
    steps = (16, 24, STEPS)
    found = sorted(path.name for path in (run_dir / "passages").iterdir())
    assert found == sorted(f"step-{step:08d}.{kind}" for step in steps for kind in ("html", "png"))
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0}).Reload()
    pictures = [(run_dir / "passages" / f"step-{step:08d}.png").read_bytes() for step in steps]
    assert [image.encoded_image_string for image in events.Images("selection/passage")] == pictures

    # Exactly 60 % of what a head predicts in the row is selected, by the page's own words.
    page = (run_dir / "passages" / f"step-{STEPS:08d}.html").read_text(encoding="utf-8")
    for head in (1, 2, 3):
        selected = page.count(f"head {head}: excess ") - len(re.findall(rf"head {head}: excess -?[0-9.]+, left out", page))
        assert selected == math.floor(K_PERCENT * page.count(f"head {head}: excess ") + 0.5) > 0
