"""The layout of checkpoints: complete or absent, the newest is found, changed settings are refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from pipeline.config import ConfigError
from pipeline.progress import Progress
from pipeline.runtime.checkpoint import Checkpoints
from pipeline.runtime.distributed import World
from pipeline.weighting.prediction import Prediction
from tests.ranks import run_ranks

EXPECTED = Prediction.of([1 / 3, None])
IDENTITY = {
    "data.global_batch": 8,
    "data.lanes": 8,
    "training.k_percent": 0.6,
    "logging.metrics_every": 1,
    "training.check_ranks_every": 9,
    "reference.horizon": "shifted",
    "data": "abc",
}


class FileEngine:
    """Stands in for DeepSpeed's part: one file a rank."""

    def __init__(self, content: str = ""):
        self.content = content
        self.optimizer = SimpleNamespace(param_groups=[], clip_grad=1.0)

    def save_checkpoint(self, directory: str, tag: str, save_latest: bool) -> None:
        assert not save_latest
        (Path(directory) / tag / f"rank-{dist.get_rank()}").write_text(self.content)

    def load_checkpoint(self, directory: str, tag: str) -> tuple[str, dict]:
        self.content = (Path(directory) / tag / f"rank-{dist.get_rank()}").read_text()
        return tag, {}


def checkpoints(run_dir: Path, size: int, identity: dict[str, Any] = IDENTITY, keep: int | None = None) -> Checkpoints:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Checkpoints(run_dir, World(rank, size, rank, size), identity, keep)


def save_three(run_dir: Path, keep: int | None) -> None:
    store = checkpoints(run_dir, dist.get_world_size(), keep=keep)
    for step in (2, 10, 4):
        store.save(FileEngine(f"{dist.get_rank()} at {step}"), Progress(step, 8 * step, 100 * step, 1, 0, EXPECTED))  # type: ignore[arg-type]
    (run_dir / "checkpoints" / "step-00000012.partial").mkdir(exist_ok=True)


def resume_content(run_dir: Path) -> tuple[str, Progress]:
    engine = FileEngine()
    progress = checkpoints(run_dir, dist.get_world_size()).resume(engine, allow_changed=False)  # type: ignore[arg-type]
    return engine.content, progress


def test_a_run_continues_from_the_checkpoint_that_latest_names(tmp_path: Path) -> None:
    run_ranks(save_three, 2, tmp_path, None)
    for rank, (content, progress) in enumerate(run_ranks(resume_content, 2, tmp_path)):
        assert content == f"{rank} at 4"
        assert progress.to_json() == Progress(4, 32, 400, 1, 0, EXPECTED).to_json()
        assert progress.applied_steps == 3
    (tmp_path / "checkpoints" / "latest").unlink()
    assert checkpoints(tmp_path, 2).newest() == "step-00000010"


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    run_ranks(save_three, 1, tmp_path, 2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*") if path.suffix != ".partial")
    assert names == ["step-00000004", "step-00000010"]


def save_after_a_return(run_dir: Path, keep: int) -> list[str]:
    store = checkpoints(run_dir, 1, keep=keep)
    found = []
    for step in (10, 20, 30, 4, 6):
        store.save(FileEngine(), Progress(step))  # type: ignore[arg-type]
        assert store.newest() == f"step-{step:08d}"
        found.append(" ".join(str(int(path.name[5:])) for path in sorted(store.directory.glob("step-*"))))
    return found


def test_the_one_just_written_is_kept_though_others_have_higher_numbers(tmp_path: Path) -> None:
    assert run_ranks(save_after_a_return, 1, tmp_path / "a", 2) == [["10", "10 20", "20 30", "4 30", "6 30"]]
    assert run_ranks(save_after_a_return, 1, tmp_path / "b", 4) == [["10", "10 20", "10 20 30", "4 10 20 30", "6 10 20 30"]]


def with_state(run_dir: Path, size: int = 2) -> Path:
    directory = run_dir / "checkpoints" / "step-00000007"
    directory.mkdir(parents=True)
    state = {"progress": {"step": 7}, "world_size": size, "identity": IDENTITY}
    (directory / "state.json").write_text(json.dumps(state))
    return directory


def test_an_empty_run_directory_starts_from_nothing(tmp_path: Path) -> None:
    assert checkpoints(tmp_path, 2).newest() is None
    assert checkpoints(tmp_path, 2).check(allow_changed=False) == {}


def test_settings_that_change_the_result_are_refused_with_a_list(tmp_path: Path) -> None:
    with_state(tmp_path)
    changed = IDENTITY | {"training.k_percent": 0.5, "logging.metrics_every": 7, "training.check_ranks_every": None}
    changed |= {"data": "xyz", "reference.horizon": "matched"}
    with pytest.raises(ConfigError) as caught:
        checkpoints(tmp_path, 2, changed).check(allow_changed=False)
    text = str(caught.value)
    assert "training.k_percent: was 0.6, is now 0.5" in text
    assert "data: was 'abc', is now 'xyz'" in text
    assert "reference.horizon: was 'shifted', is now 'matched'" in text
    assert "metrics_every" not in text
    assert "check_ranks_every" not in text
    assert "--allow-changed" in text
    assert checkpoints(tmp_path, 2, changed).check(allow_changed=True)["progress"] == {"step": 7}


def test_what_the_position_is_counted_in_is_never_free_to_change(tmp_path: Path) -> None:
    with_state(tmp_path)
    store = checkpoints(tmp_path, 2, IDENTITY | {"data.global_batch": 16, "data.lanes": 8, "training.k_percent": 0.5})
    with pytest.raises(ConfigError) as caught:
        store.check(allow_changed=True)
    assert caught.value.problems == [
        "data.global_batch: was 8, is now 16; it is fixed for the life of a run",
        "training.k_percent: was 0.6, is now 0.5 (step-00000007 was trained with the former)",
    ]
    assert caught.value.remedy == "to start anew choose another --run-dir"


@pytest.mark.parametrize(
    ("key", "before", "after"),
    [("model.dim", 16, 32), ("model.seed", 0, 1), ("deepspeed stage", 3, 1), ("deepspeed bf16", False, True)],
)
def test_what_could_not_take_effect_after_a_resume_is_refused_whatever_is_allowed(tmp_path, key, before, after) -> None:
    directory = with_state(tmp_path)
    state = json.loads((directory / "state.json").read_text())
    (directory / "state.json").write_text(json.dumps(state | {"identity": IDENTITY | {key: before}}))
    with pytest.raises(ConfigError) as caught:
        checkpoints(tmp_path, 2, IDENTITY | {key: after}).check(allow_changed=True)
    assert caught.value.problems == [f"{key}: was {before!r}, is now {after!r}; it is fixed for the life of a run"]


def test_another_number_of_ranks_is_refused_with_both_numbers(tmp_path: Path) -> None:
    with_state(tmp_path, size=4)
    with pytest.raises(ConfigError, match="written by 4, this job has 2"):
        checkpoints(tmp_path, 2).check(allow_changed=True)


def test_broken_checkpoints_are_never_taken_for_none(tmp_path: Path) -> None:
    directory = with_state(tmp_path)
    (directory / "state.json").write_text("{")
    with pytest.raises(ConfigError, match=r"state.json cannot be read .*; remove that checkpoint"):
        checkpoints(tmp_path, 2).check(allow_changed=True)
    (directory / "state.json").unlink()
    with pytest.raises(ConfigError, match="has checkpoints, but none with a state"):
        checkpoints(tmp_path, 2).check(allow_changed=True)


@pytest.mark.parametrize("state", ["[" * 100_000, "[]", "{}", '{"identity": 3}', "\0"])
def test_a_state_that_is_no_checkpoints_is_refused_and_never_taken_for_none(tmp_path: Path, state: str) -> None:
    (with_state(tmp_path) / "state.json").write_text(state)
    with pytest.raises(ConfigError, match=r"step-00000007: state.json (cannot be read|is not a checkpoint's)"):
        checkpoints(tmp_path, 2).check(allow_changed=True)


def save_on_a_full_disk(run_dir: Path, message: str) -> None:
    def save_checkpoint(*arguments: Any, **options: Any) -> None:
        raise RuntimeError(message)

    engine = FileEngine()
    engine.save_checkpoint = save_checkpoint  # type: ignore[method-assign]
    with pytest.raises(OSError, match=r"step-00000003.partial: the checkpoint could not be written; is the disk full\?"):
        checkpoints(run_dir, 1).save(engine, Progress(3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "message",
    [
        "[enforce fail at inline_container.cc:672] . unexpected pos 2688 vs 2580",
        "[enforce fail at x.cc:764] . PytorchStreamWriter failed writing file data.pkl: file write failed",
        "File runs/a/model_states.pt cannot be opened.",
    ],
)
def test_a_checkpoint_that_a_full_disk_cuts_is_an_error_that_names_its_folder(tmp_path: Path, message: str) -> None:
    run_ranks(save_on_a_full_disk, 1, tmp_path, message)
