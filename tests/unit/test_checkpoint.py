"""Checkpoints on disk: complete or absent, the newest sound one is found, damage is named, changed settings are refused.

The engine is a stand-in with the attributes of DeepSpeed's stage 1; real ones are in tests/integration/test_checkpoint_layouts.
"""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from pipeline.config import ConfigError
from pipeline.progress import Progress
from pipeline.runtime.checkpoint import commit, read
from pipeline.runtime.checkpoint.commit import SaveError
from pipeline.runtime.checkpoint.continuing import other_losses
from pipeline.runtime.checkpoint.fragments import fragments_of
from pipeline.runtime.checkpoint.state import HeldOut, StateError, encode, read_state
from pipeline.weighting.prediction import Prediction
from tests.ranks import run_ranks
from tests.standing_in import IDENTITY, StandIn, checkpoints, go_on_to_the_end

EXPECTED = Prediction.of([1 / 3, None])


def save(run_dir: Path, *steps: int, **settings: Any) -> None:
    store = checkpoints(run_dir, **settings)
    for step in steps:
        progress = Progress(step, 8 * step, 100 * step, 1, 0, EXPECTED)
        store.save(StandIn(step, step), progress, HeldOut(losses=[float(step)]), in_background=False)


def resumed(run_dir: Path, said: list[str] | None = None) -> tuple[int, StandIn]:
    engine = StandIn(-1000.0)
    return checkpoints(run_dir, said=said).resume(engine, allow_changed=False).step, engine


def on_first(do: Callable[[], Any]) -> None:
    """On the first rank, while the others wait."""
    if dist.get_rank() == 0:
        do()
    dist.barrier()


def test_what_was_saved_is_what_is_loaded_on_any_number_of_ranks(tmp_path: Path) -> None:
    for ranks in (1, 2, 3):
        run_ranks(save, ranks, tmp_path / f"{ranks}", 3, 7)
        for others in (1, 2, 4):
            run_ranks(loads_step_7, others, tmp_path / f"{ranks}")


def loads_step_7(run_dir: Path) -> None:
    engine = StandIn(-1000.0)
    progress = checkpoints(run_dir).resume(engine, allow_changed=False, held_out=lambda: HeldOut(losses=[7.0]))
    assert progress.to_json() == Progress(7, 56, 700, 1, 0, EXPECTED).to_json()
    assert progress.applied_steps == 6
    assert engine.values == StandIn(7, 7).values


def test_a_save_in_the_background_is_that_of_its_moment(tmp_path: Path) -> None:
    run_ranks(changes_while_it_is_written, 2, tmp_path)


def changes_while_it_is_written(run_dir: Path) -> None:
    store, engine = checkpoints(run_dir), StandIn(7, 7)
    expected = engine.values
    store.save(engine, Progress(7), HeldOut(), in_background=True)
    with torch.no_grad():
        for fragment in fragments_of(engine):
            for tensor in fragment.tensors.values():
                tensor.zero_()
    # Not a checkpoint before all ranks have agreed.
    assert not (store.directory / "step-00000007").exists()
    dist.barrier()
    store.go_on()
    store.go_on()
    step, engine = resumed(run_dir)
    assert (step, engine.values) == (7, expected)


def test_the_files_are_safetensors_and_json(tmp_path: Path) -> None:
    run_ranks(save, 2, tmp_path, 7)
    folder = tmp_path / "checkpoints/step-00000007"
    assert sorted(path.name for path in folder.iterdir()) == ["rank-00000.safetensors", "rank-00001.safetensors", "state.json"]
    # 30 values of one dtype over two ranks: [5, 3], [5], [2, 5].
    first, second = (load_file(folder / f"rank-0000{rank}.safetensors") for rank in range(2))
    assert first["a.weight|master"].tolist() == list(range(7, 22))
    assert second["a.bias|exp_avg"].tolist() == [value + 0.25 for value in range(22, 27)]
    assert second["b.weight|exp_avg_sq"].dtype == torch.float32
    state = json.loads((folder / "state.json").read_text())
    assert state["parameters"]["a.weight"]["shape"] == [5, 3]
    assert list(state)[-1] == "sha256"


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def damages(folder: Path) -> dict[str, Callable[[], Any]]:
    """Ways to damage a checkpoint, each file of it."""
    found: dict[str, Callable[[], Any]] = {}
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        found |= {
            f"{path.name} truncated": lambda path=path, size=size: path.write_bytes(path.read_bytes()[: size // 2]),
            f"{path.name} without its last byte": lambda path=path: path.write_bytes(path.read_bytes()[:-1]),
            f"{path.name} with one more byte": lambda path=path: path.write_bytes(path.read_bytes() + b"\n"),
            f"{path.name} emptied": lambda path=path: path.write_bytes(b""),
            f"{path.name} missing": lambda path=path: path.unlink(),
            f"{path.name} a folder": lambda path=path: (path.unlink(), path.mkdir()),
            f"{path.name} of another step": lambda path=path: shutil.copy(folder.parent / "step-00000003" / path.name, path),
        }
        bits = range(0, 8 * size, 8 * size // 97)
        found |= {f"{path.name} bit {bit}": lambda path=path, bit=bit: flip(path, bit) for bit in bits}
    state = folder / "state.json"
    for content in ("{}", "[]", "null", "7", '"a"', "[" * 100_000, "\ufeff{}"):
        found[f"state.json is {content[:9]}"] = lambda content=content: state.write_text(content)
    found["state.json not UTF-8"] = lambda: state.write_bytes(b"\xff\xfe\x00")
    return found


def falls_back(run_dir: Path) -> int:
    folder, kept = run_dir / "checkpoints/step-00000007", run_dir / "kept"
    on_first(lambda: shutil.copytree(run_dir / "checkpoints", kept))
    for name in damages(kept / "step-00000007"):
        _restore(run_dir, kept)
        on_first(lambda name=name: damages(folder)[name]())
        said: list[str] = []
        step, engine = resumed(run_dir, said)
        assert (step, engine.values) == (3, StandIn(3, 3).values), name
        if dist.get_rank() == 0:
            # Then it may be said that this number of ranks has another pool.
            assert len([line for line in said if "not used" in line]) == 1, (name, said)
            assert said[0].startswith("checkpoint not used: step-00000007: "), said
            assert name.split()[0] in said[0], (name, said)
    return len(damages(kept / "step-00000007"))


def _restore(run_dir: Path, kept: Path) -> None:
    def do() -> None:
        shutil.rmtree(run_dir / "checkpoints")
        shutil.copytree(kept, run_dir / "checkpoints")

    dist.barrier()
    on_first(do)


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_damage_is_named_and_the_older_checkpoint_is_taken_on_all_ranks(tmp_path: Path, ranks: int) -> None:
    run_ranks(save, 2, tmp_path, 3, 7)
    assert min(run_ranks(falls_back, ranks, tmp_path)) > 300


def is_refused(run_dir: Path) -> str:
    on_first(lambda: flip(run_dir / "checkpoints/step-00000007/rank-00001.safetensors", 3600))
    with pytest.raises(ConfigError) as caught:
        resumed(run_dir)
    return str(caught.value)


def reads_what_fails_once(run_dir: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        reading = FailsOnce(read.read_pieces, OSError(errno.ESTALE, "Stale file handle"))
        patch.setattr(read, "read_pieces", reading)
        patch.setattr(read, "problem_of", FailsOnce(read.problem_of, "cannot be read (Stale file handle)"))
        step, engine = resumed(run_dir)
    assert (step, engine.values) == (7, StandIn(7, 7).values)
    assert reading.has_failed


class FailsOnce:
    """A function that is another one from its second call on. failure: what the first one raises, or returns."""

    def __init__(self, function: Callable[..., Any], failure: Exception | str):
        self.function, self.failure, self.has_failed = function, failure, False

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self.has_failed:
            return self.function(*arguments, **named)
        self.has_failed = True
        if isinstance(self.failure, Exception):
            raise self.failure
        return self.failure


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_file_system_that_fails_for_a_moment_costs_no_checkpoint(tmp_path: Path, ranks: int) -> None:
    run_ranks(save, 2, tmp_path, 3, 7)
    run_ranks(reads_what_fails_once, ranks, tmp_path)
    assert not list(tmp_path.glob("checkpoints/abandoned-*"))


def test_without_a_sound_checkpoint_no_rank_starts_anew(tmp_path: Path) -> None:
    run_ranks(save, 2, tmp_path, 7)
    first, second = run_ranks(is_refused, 2, tmp_path)
    assert first == second
    assert "step-00000007: rank-00001.safetensors: its bytes are not those that were written" in first
    assert "no checkpoint can be used" in first
    assert "repair or remove what is there" in first
    assert (tmp_path / "checkpoints/step-00000007/state.json").exists()


POINTERS: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\x00"),
    "of an older one": lambda path: path.write_text("step-00000003\n"),
    "of none": lambda path: path.write_text("step-00000099\n"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("kind", POINTERS)
def test_the_newest_complete_folder_wins_whatever_latest_says(tmp_path: Path, kind: str) -> None:
    run_ranks(save, 1, tmp_path, 3, 7)
    POINTERS[kind](tmp_path / "checkpoints/latest")
    run_ranks(loads_step_7, 1, tmp_path)


def test_what_a_killed_job_had_begun_is_removed_and_never_loaded(tmp_path: Path) -> None:
    run_ranks(save, 2, tmp_path, 7)
    shutil.copytree(tmp_path / "checkpoints/step-00000007", tmp_path / "checkpoints/step-00000001.deleted.partial")
    shutil.copytree(tmp_path / "checkpoints/step-00000007", tmp_path / "checkpoints/step-00000009.partial")
    run_ranks(loads_step_7, 2, tmp_path)
    assert not list(tmp_path.glob("checkpoints/*.partial"))


def goes_back_and_on(run_dir: Path) -> None:
    for _ in range(5):
        on_first(lambda: flip(run_dir / "checkpoints/step-00000007/state.json", 800))
        assert resumed(run_dir)[0] == 3
        save(run_dir, 5, 7)
        assert resumed(run_dir)[0] == 7
        on_first(lambda: shutil.rmtree(run_dir / "checkpoints/step-00000005"))


def test_checkpoints_of_an_abandoned_past_never_come_back(tmp_path: Path) -> None:
    run_ranks(save, 1, tmp_path, 3, 7)
    run_ranks(goes_back_and_on, 1, tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoints/abandoned-*")] == ["abandoned-step-00000007"]


def test_the_newest_are_kept_and_every_mth(tmp_path: Path) -> None:
    run_ranks(save_eight, 1, tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert [int(name[5:]) for name in names] == [3, 6, 7, 8]
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000008\n"


def save_eight(run_dir: Path) -> None:
    save(run_dir, *range(1, 9), keep=2, keep_every=3)


def saves_among_what_a_user_keeps_there(run_dir: Path, elsewhere: Path) -> None:
    folder = run_dir / "checkpoints"
    save(run_dir, 3, 7)
    for copy in ("step-00000007.bak", "step-00000007 (copy)", "step-best", "step-00000003.old", "my-step-00000009"):
        shutil.copytree(folder / "step-00000007", folder / copy)
    # A user has moved one to another disk, and a killed job's rest lies behind such a link, too.
    shutil.move(folder / "step-00000007", elsewhere / "moved")
    (folder / "step-00000007").symlink_to(elsewhere / "moved")
    (folder / "step-00000008.partial").symlink_to(elsewhere)
    assert resumed(run_dir)[0] == 7
    save(run_dir, 8, 99_999_999, 100_000_000, keep=2)
    assert resumed(run_dir)[0] == 100_000_000


def test_folders_and_links_of_a_user_are_left_alone_and_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    run_ranks(saves_among_what_a_user_keeps_there, 1, tmp_path, tmp_path / "elsewhere")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()) == [
        "my-step-00000009",
        *("step-00000003.old", "step-00000007 (copy)", "step-00000007.bak", "step-100000000", "step-99999999", "step-best"),
    ]
    assert (tmp_path / "elsewhere/moved/state.json").exists(), "only the link to it was the run's"


def fails_to_save(run_dir: Path) -> list[str]:
    """Rank 1's disk is full from the second save on, until the fifth."""
    said: list[str] = []
    store = checkpoints(run_dir, said=said, max_failed_saves=2)
    for step in range(1, 6):
        with pytest.MonkeyPatch.context() as patch:
            if step in (2, 3) and dist.get_rank() == 1:
                patch.setattr(commit, "write_tensors", no_space)
            store.save(StandIn(step, step), Progress(step), HeldOut(), in_background=True)
            go_on_to_the_end(store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "write_tensors", no_space)
        for step in (6, 7, 8):
            store.save(StandIn(step, step), Progress(step), HeldOut(), in_background=True)
            if step < 8:
                go_on_to_the_end(store)
        with pytest.raises(SaveError, match=r"step-00000008 was not saved: rank 0: .*No space left on device; rank 1: "):
            store.go_on()
    return said


def no_space(*arguments: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_save_that_fails_is_said_and_bounded_and_the_run_goes_on(tmp_path: Path) -> None:
    said, _ = run_ranks(fails_to_save, 2, tmp_path)
    assert not list(tmp_path.glob("checkpoints/*.partial"))
    assert [line.split(":")[0] for line in said if line.startswith("saved")] == ["saved step 1", "saved step 4", "saved step 5"]
    failed = [line for line in said if not line.startswith("saved")]
    assert (
        "step-00000002 was not saved: rank 1: OSError: [Errno 28] No space left on device; the run goes on (1 of at"
        in failed[0]
    )
    assert ["(1 of" in failed[0], "(2 of" in failed[1], "(1 of" in failed[2], "(2 of" in failed[3]] == [True] * 4
    assert run_ranks(step_resumed, 2, tmp_path) == [5, 5]


def step_resumed(run_dir: Path) -> int:
    return resumed(run_dir)[0]


def saves_a_bad_weight(run_dir: Path) -> None:
    engine = StandIn(7, 7)
    if dist.get_rank() == 1:
        fragments_of(engine)[0].tensors["exp_avg"][0] = torch.nan
    with pytest.raises(SaveError, match=r"rank 1: [ab].*, exp_avg: has a number that is not finite"):
        checkpoints(run_dir).save(engine, Progress(7), HeldOut(), in_background=False)


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    run_ranks(saves_a_bad_weight, 2, tmp_path)
    assert not list(tmp_path.glob("checkpoints/step-*"))


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path) -> None:
    run_ranks(saves_without_space, 2, tmp_path)
    assert not list(tmp_path.glob("checkpoints/step-*"))


def saves_without_space(run_dir: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(
            SaveError, match=r"step-00000007 was not saved: 1,0\d\d,\d\d\d bytes are needed in .*, 1,000 are free"
        ):
            checkpoints(run_dir).save(StandIn(7, 7), Progress(7), HeldOut(), in_background=False)


def starts_without_space(run_dir: Path) -> None:
    store = checkpoints(run_dir)
    store.resume(StandIn(7, 7), False)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(
            ConfigError, match=r"no room for a checkpoint: 1,0\d\d,\d\d\d bytes are needed in .*, 1,000 are free"
        ):
            store.prepare(StandIn(7, 7))
    store.prepare(StandIn(7, 7))


def test_a_disk_without_room_for_one_checkpoint_is_refused_before_the_first_step(tmp_path: Path) -> None:
    run_ranks(starts_without_space, 2, tmp_path)


def sees_other_losses(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"step-00000007: the held-out batch has losses \[7.1\], and had \[7.0\]"):
        checkpoints(run_dir).resume(StandIn(), False, held_out=lambda: HeldOut(losses=[7.1]))


def test_what_a_forward_sees_is_compared_with_what_it_saw(tmp_path: Path) -> None:
    run_ranks(save, 1, tmp_path, 7)
    run_ranks(sees_other_losses, 1, tmp_path)


def test_what_rounding_makes_of_a_batch_known_by_heart_is_no_other_loss() -> None:
    """In float32 the loss of a token is a multiple of 2^-23 where it is next to nothing: the last bit is all of it."""
    sure = torch.tensor([[16.5, 0.0], [16.7, 0.0]])
    losses = torch.nn.functional.cross_entropy(sure, torch.tensor([0, 0]), reduction="none").tolist()
    assert losses[0] > 1.01 * losses[1]
    state = SimpleNamespace(step=7, held_out=HeldOut(losses=losses[:1]), identity=IDENTITY)
    assert other_losses(state, IDENTITY, HeldOut(losses=losses[1:])) == []
    assert other_losses(state, IDENTITY, HeldOut(losses=[losses[0] + 0.01])) != []


def other_model(run_dir: Path) -> None:
    engine = StandIn()
    engine.module["a"].weight.data = engine.module["a"].weight.data.T
    with pytest.raises(ConfigError, match=r"step-00000007: a.weight: saved is \[5, 3\], this model's is \[3, 5\]"):
        checkpoints(run_dir).resume(engine, False)


def test_another_shape_is_refused_with_both(tmp_path: Path) -> None:
    run_ranks(save, 1, tmp_path, 7)
    run_ranks(other_model, 1, tmp_path)


def test_an_empty_run_directory_starts_from_nothing(tmp_path: Path) -> None:
    assert checkpoints(tmp_path).check(allow_changed=False) is None
    assert run_ranks(step_resumed, 2, tmp_path) == [0, 0]


def test_a_former_format_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints/step-00000007"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"progress": {"step": 7}, "world_size": 2, "identity": IDENTITY}))
    with pytest.raises(ConfigError, match=r"step-00000007: state\.json: written by a former version of this program"):
        checkpoints(tmp_path).check(allow_changed=True)


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    run_ranks(save, 1, tmp_path, 7)
    path = tmp_path / "checkpoints/step-00000007/state.json"
    path.write_text(path.read_text().replace('"format":1', '"format":2'))
    with pytest.raises(StateError, match="format 2 is newer than this program, which reads 1; update"):
        read_state(path)


def test_no_state_leads_out_of_its_folder_or_leaves_a_value_out(tmp_path: Path) -> None:
    run_ranks(save, 1, tmp_path, 7)
    path = tmp_path / "checkpoints/step-00000007/state.json"
    state = read_state(path)
    outside = state.files[0].model_copy(update={"name": "../rank-00000.safetensors"})
    short = state.parameters["a.weight"].model_copy(update={"fragments": [[0, 0, 14]]})
    for changes in ({"files": [outside]}, {"parameters": state.parameters | {"a.weight": short}}):
        path.write_bytes(encode(state.model_copy(update=changes)))
        with pytest.raises(StateError, match="unexpected content: "):
            read_state(path)


def test_settings_that_change_the_result_are_refused_with_a_list(tmp_path: Path) -> None:
    run_ranks(save, 1, tmp_path, 7)
    changed = IDENTITY | {"training.k_percent": 0.5, "logging.metrics_every": 7, "training.check_ranks_every": None}
    changed |= {"data": "xyz", "reference.horizon": "matched", "data.micro_batch": 2}
    with pytest.raises(ConfigError) as caught:
        checkpoints(tmp_path, changed).check(allow_changed=False)
    text = str(caught.value)
    assert "training.k_percent: was 0.6, is now 0.5" in text
    assert "data: was 'abc', is now 'xyz'" in text
    assert "reference.horizon: was 'shifted', is now 'matched'" in text
    assert not any(free in text for free in ("metrics_every", "check_ranks_every", "micro_batch"))
    assert "--allow-changed" in text
    state = checkpoints(tmp_path, changed).check(allow_changed=True)
    assert state is not None
    assert state.step == 7


def test_what_the_position_is_counted_in_is_never_free_to_change(tmp_path: Path) -> None:
    run_ranks(save, 1, tmp_path, 7)
    store = checkpoints(tmp_path, IDENTITY | {"data.global_batch": 16, "data.lanes": 8, "training.k_percent": 0.5})
    with pytest.raises(ConfigError) as caught:
        store.check(allow_changed=True)
    assert caught.value.problems == [
        "data.global_batch: was 8, is now 16; it is fixed for the life of a run",
        "training.k_percent: was 0.6, is now 0.5 (step-00000007 was trained with the former)",
    ]
    assert caught.value.remedy == "to start anew choose another --run-dir"


@pytest.mark.parametrize(("key", "before", "after"), [("model.dim", 16, 32), ("model.seed", 0, 1)])
def test_what_could_not_take_effect_after_a_resume_is_refused_whatever_is_allowed(
    tmp_path: Path, key: str, before: int, after: int
) -> None:
    run_ranks(save_under, 1, tmp_path, IDENTITY | {key: before})
    with pytest.raises(ConfigError) as caught:
        checkpoints(tmp_path, IDENTITY | {key: after}).check(allow_changed=True)
    assert caught.value.problems == [f"{key}: was {before!r}, is now {after!r}; it is fixed for the life of a run"]


def save_under(run_dir: Path, identity: dict[str, Any]) -> None:
    checkpoints(run_dir, identity).save(StandIn(7, 7), Progress(7), HeldOut(), in_background=False)


def notes_of_a_change(run_dir: Path, identity: dict[str, Any]) -> list[str]:
    said: list[str] = []
    checkpoints(run_dir, IDENTITY | identity, said).resume(StandIn(), allow_changed=True)
    return said


def test_another_pool_of_the_selection_is_said(tmp_path: Path) -> None:
    run_ranks(save, 1, tmp_path, 7)
    said, _ = run_ranks(notes_of_a_change, 2, tmp_path, {})
    assert said == ["the selection's pool (global) was a micro-step of 4 rows and is now one of 8"]
    assert run_ranks(notes_of_a_change, 2, tmp_path, {"data.micro_batch": 2}) == [[], []]
    assert run_ranks(notes_of_a_change, 1, tmp_path, {"data.micro_batch": 2, "training.selection_pool": "row"}) == [[]]
    assert run_ranks(notes_of_a_change, 2, tmp_path, {"training.selection_pool": "rank"}) == [[], []]


def test_a_run_whose_checkpoints_are_gone_does_not_start_anew(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 40}\n{"step": 50}\n')
    # A stop saves at any step, so the interval says nothing.
    for every in (50, 51):
        with pytest.raises(ConfigError, match=r"metrics\.jsonl goes to step 50, and the run had a checkpoint, which is gone"):
            checkpoints(tmp_path, every=every).check(allow_changed=True)
    # One that has trained no step does.
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "split": "validation"}\n')
    assert checkpoints(tmp_path, every=50).check(allow_changed=True) is None


def begin(run_dir: Path) -> None:
    resumed(run_dir)


def test_a_run_that_was_killed_before_its_first_checkpoint_was_complete_begins_anew(tmp_path: Path) -> None:
    run_ranks(begin, 2, tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n')
    assert checkpoints(tmp_path, every=3).check(allow_changed=False) is None

    # Once there was one, its absence is no beginning.
    run_ranks(save, 2, tmp_path, 3)
    for folder in (tmp_path / "checkpoints").glob("step-*"):
        shutil.rmtree(folder)
    with pytest.raises(ConfigError, match="no checkpoint can be used"):
        checkpoints(tmp_path, every=3).check(allow_changed=False)


def goes_back_to_3(run_dir: Path) -> None:
    said: list[str] = []
    store = checkpoints(run_dir, said=said)
    store.from_step = 3
    engine = StandIn()
    assert store.resume(engine, allow_changed=False).step == 3
    assert engine.values == StandIn(3, 3).values
    assert said == []


def test_a_run_goes_back_to_the_step_asked_for_and_later_ones_are_kept_aside(tmp_path: Path) -> None:
    run_ranks(save, 1, tmp_path, 3, 5, 7)
    run_ranks(goes_back_to_3, 1, tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()) == [
        "abandoned-step-00000005",
        "abandoned-step-00000007",
        "step-00000003",
    ]
    store = checkpoints(tmp_path)
    store.from_step = 4
    with pytest.raises(ConfigError) as caught:
        store.check(allow_changed=False)
    assert caught.value.problems == ["--from-step 4: no checkpoint of that step; there are: 3"]
    assert not caught.value.remedy


def names_of(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir())


def goes_back_while_it_runs(run_dir: Path, damaged: bool) -> list[str]:
    said: list[str] = []
    store = checkpoints(run_dir, said=said, keep=None)
    for step in (3, 5, 7):
        # The last one is still being written.
        store.save(StandIn(step, step), Progress(step), HeldOut(), in_background=step == 7)
    if damaged and dist.get_rank() == 0:
        (run_dir / "checkpoints" / "step-00000005" / "state.json").write_text("{}")
    dist.barrier()

    engine = StandIn(9, 9)
    assert store.go_back(engine, 2) is None, "before the first of them"
    assert engine.values == StandIn(9, 9).values
    to = 3 if damaged else 5
    progress = store.go_back(engine, 6)
    assert progress is not None
    assert (progress.step, engine.values) == (to, StandIn(to, to).values)

    # It goes on as if it had never been further.
    store.save(StandIn(6, 6), Progress(6), HeldOut(), in_background=False)
    dist.barrier()
    return [line for line in said if not line.startswith("saved step")]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_running_run_goes_back_to_the_newest_sound_checkpoint_that_is_early_enough(tmp_path: Path, damaged: bool) -> None:
    said, _ = run_ranks(goes_back_while_it_runs, 2, tmp_path, damaged)
    left = ["step-00000003"] if damaged else ["step-00000003", "step-00000005"]
    abandoned = ["abandoned-step-00000005", "abandoned-step-00000007"] if damaged else ["abandoned-step-00000007"]
    assert names_of(tmp_path) == sorted([*left, *abandoned, "step-00000006"])
    assert [line.startswith("checkpoint not used: step-00000005: state.json: ") for line in said] == [True] * damaged


def saves_and_may_go_back(run_dir: Path, back: int | None) -> list[str]:
    store, there = checkpoints(run_dir, keep=2), []
    for step in range(0, 70, 10):
        return_to = None if back is None else max(step - back, 0)
        store.save(StandIn(step, step), Progress(step), HeldOut(), in_background=False, return_to=return_to)
        there.append(" ".join(name.removeprefix("step-000000") for name in names_of(run_dir)))
    return there


@pytest.mark.parametrize(
    ("back", "expected"),
    [
        (None, ["00", "00 10", "10 20", "20 30", "30 40", "40 50", "50 60"]),
        (15, ["00", "00 10", "00 10 20", "10 20 30", "20 30 40", "30 40 50", "40 50 60"]),
        (35, ["00", "00 10", "00 10 20", "00 10 20 30", "00 10 20 30 40", "10 20 30 40 50", "20 30 40 50 60"]),
    ],
)
def test_the_checkpoints_that_rollbacks_may_need_outlive_newer_ones(
    tmp_path: Path, back: int | None, expected: list[str]
) -> None:
    assert run_ranks(saves_and_may_go_back, 1, tmp_path, back) == [expected]


def saves_without_memory(run_dir: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "free_bytes", lambda device, local_size: 10)
        store, engine = checkpoints(run_dir), StandIn(7, 7)
        store.save(engine, Progress(7), HeldOut(losses=[7.0]), in_background=True)
        for fragment in fragments_of(engine):
            fragment.tensors["master"].zero_()
        go_on_to_the_end(store)
    loads_step_7_values(run_dir)
    return len(store._writer._buffers)


def loads_step_7_values(run_dir: Path) -> None:
    assert resumed(run_dir)[1].values == StandIn(7, 7).values


def test_without_memory_for_buffers_a_save_is_not_in_the_background(tmp_path: Path) -> None:
    assert run_ranks(saves_without_memory, 2, tmp_path) == [0, 0]
