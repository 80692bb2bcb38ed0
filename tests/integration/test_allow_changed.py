"""`--allow-changed` means what it says: every setting takes effect after a resume, or is refused.

All settings that may change a run's result are walked through, from the settings' own model: a run is continued by one step
with each of them changed alone, and the step must differ from that of the run that changes nothing.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.config import ModelSettings, Settings
from pipeline.data.corpus.documents import Document
from pipeline.data.corpus.prepare import prepare
from pipeline.data.shards.manifest import read_manifest
from pipeline.data.tokenizer import TOKENIZER_FILE, load_tokenizer
from pipeline.job import describe_changes
from pipeline.model.export import save_model
from pipeline.model.mtp import MTPModel, initialize_weights
from pipeline.progress import Progress
from pipeline.recipe import load_settings
from pipeline.runtime.checkpoint.checkpoints import Checkpoints
from pipeline.runtime.checkpoint.state import HeldOut
from pipeline.runtime.distributed import World
from pipeline.runtime.identity import RESUME_RULES, flatten
from pipeline.setting_types import ResumeRule
from tests.checkpointing import write_state
from tests.ranks import run_ranks

ZERO = Path(__file__).parents[2] / "ds_configs"
BASE = (
    "data.sequence_length=16",
    "data.global_batch=8",
    "data.micro_batch=4",
    "data.shuffle_block=32",
    "data.num_workers=0",
    "model.dim=16",
    "model.num_layers=2",
    "model.num_attention_heads=2",
    "training.steps=40",
    "training.learning_rate=5e-3",
    "training.warmup_steps=4",
    "training.gradient_clipping=0.5",
    "training.loss_phase=two_pass",
)
# Another value of every setting, and what must be set beside it, in both runs, for it to matter at all.
OTHER: dict[str, tuple[str, tuple[str, ...]]] = {
    "data.sequence_length": ("8", ()),
    "data.seed": ("1", ()),
    "data.shuffle_block": ("8", ()),
    "model.rope_theta": ("100", ()),
    "model.rope_scaling": ("{rope_type: linear, factor: 2}", ()),
    "model.norm_eps": ("0.1", ()),
    "reference.horizon": ("matched", ()),
    "training.steps": ("80", ("training.warmup_steps=0",)),
    "training.learning_rate": ("1e-3", ()),
    "training.warmup_steps": ("20", ()),
    "training.schedule": ("wsd", ("training.warmup_steps=0",)),
    "training.decay_fraction": ("1", ("training.warmup_steps=0", "training.schedule=wsd")),
    "training.final_learning_rate_fraction": ("0.9", ("training.warmup_steps=0",)),
    "training.weight_decay": ("0.5", ()),
    "training.beta1": ("0.5", ()),
    "training.beta2": ("0.5", ()),
    "training.adam_eps": ("0.01", ()),
    "training.gradient_clipping": ("0.001", ()),
    "training.k_percent": ("0.3", ()),
    "training.k_percent_change": ("linear", ("training.k_percent=[[0, 1.0], [4, 0.2]]",)),
    "training.selection_warmup_steps": ("9", ()),
    "training.selection_pool": ("row", ()),
    "training.selection_score": ("policy_loss", ()),
    "training.selection_seed": ("1", ("training.selection_score=random",)),
    "training.normalize_by": ("selected", ()),
    "training.loss_phase": ("dense", ()),
    "training.head_weights": ("[1, 2, 1, 1]", ()),
    "training.freeze_trunk_steps": ("9", ()),
    "training.head_weights_change": ("linear", ("training.head_weights=[[0, [1, 1, 1, 1]], [4, [1, 5, 1, 1]]]",)),
    "training.detach_heads": ("true", ()),
}
# Read from the settings in each step; without effect where no sample is damaged, on a CPU, and where no loss spikes.
WITHOUT_EFFECT_HERE = {
    "data.max_corrupt",
    "training.compile",
    "training.deterministic",
    "training.rollback_on_spike",
    "training.rollback_steps",
    "training.rollback_skip_steps",
}


def settings_of(data: Path, reference: Path, overrides: Sequence[str]) -> Settings:
    settings = load_settings(None, [f"data.path={data}", f"reference.path={reference}", *BASE, *overrides])
    if settings.data.sequence_length == 8:
        settings = settings.with_values(data={"path": data.parent / "short"})
    return settings


def job_of(settings: Settings, run_dir: Path, json_name: str) -> Any:
    from pipeline.assembly import Job
    from pipeline.checks import check_before_start
    from pipeline.runtime.distributed import World
    from pipeline.runtime.engine import initialize_distributed

    content = check_before_start(settings, ZERO / json_name, run_dir, World(0, 1, 0, 1))
    if not dist.is_initialized():
        initialize_distributed(torch.device("cpu"), "error")
    return Job(settings, content, run_dir, World(0, 1, 0, 1), torch.device("cpu"), allow_changed=True)


def one_step(settings: Settings, run_dir: Path, json_name: str, save: bool = False) -> dict[str, Any]:
    """Resume if there is a checkpoint, and make one step; returns what it came to, and what the optimizer works with."""
    from pipeline.assembly import build_run
    from pipeline.runtime.engine import gathered, release
    from pipeline.train import advance, fetch_step, train_step

    job = job_of(settings, run_dir, json_name)
    run = build_run(job, settings, run_dir)
    progress = run.checkpoints.resume(run.engine, allow_changed=True)
    batches = run.stream.iterate(progress.samples)
    result = train_step(run, fetch_step(run, batches, progress.step, progress.samples), progress)
    advance(progress, result, settings)
    if save:
        run.checkpoints.save(run.engine, progress, HeldOut(), in_background=False)

    parameters = []
    for parameter in run.engine.module.parameters():
        with gathered(parameter):
            parameters.append(parameter.detach().numpy().tobytes())
    optimizer: Any = run.engine.optimizer
    names = ("weight_decay", "betas", "eps", "lr")
    came_to = {
        "parameters": parameters,
        "groups": [{name: group[name] for name in names} for group in optimizer.param_groups],
        "clipping": optimizer.clip_grad,
    }
    release(run.engine)
    return came_to


def continue_with_each(data: Path, reference: Path, folder: Path, names: list[str]) -> dict[str, bool]:
    """True for each setting whose change makes another step than the same run without it."""
    unchanged: dict[tuple[str, ...], Any] = {}
    found = {}
    for name in names:
        value, beside = OTHER[name]
        run_dir = folder / "-".join(["run", *beside])
        settings = settings_of(data, reference, beside)
        if beside not in unchanged:
            one_step(settings, run_dir, "zero3.json", save=True)
            unchanged[beside] = one_step(settings, run_dir, "zero3.json")
        changed = one_step(settings_of(data, reference, [*beside, f"{name}={value}"]), run_dir, "zero3.json")
        found[name] = changed["parameters"] != unchanged[beside]["parameters"]
    return found


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    """The training data; beside it `short`, other rows, of 8 tokens, by the same tokenizer."""
    shutil.copytree(tiny_data / "train", tmp_path / "train")
    documents = [Document(f"{number}: the cat sees the dog.", "text") for number in range(100)]
    prepare(documents, tmp_path / "short", load_tokenizer(tiny_data), 8, seed=0, source_names=["text"])
    return tmp_path / "train"


@pytest.fixture
def reference(data: Path, tmp_path: Path) -> Path:
    """A reference with all heads, which can be compared in either way."""
    shape = ModelSettings(dim=16, num_layers=2, num_attention_heads=2, vocab_size=read_manifest(data).vocab_size, seed=1)
    model = MTPModel(shape)
    initialize_weights(model)
    (tmp_path / "reference").mkdir()
    save_model(model, tmp_path / "reference")
    shutil.copyfile(data / TOKENIZER_FILE, tmp_path / "reference" / TOKENIZER_FILE)
    return tmp_path / "reference"


@pytest.mark.slow
def test_every_setting_takes_effect_after_a_resume(data, reference, tmp_path) -> None:
    settable = [key for key, rule in RESUME_RULES.items() if rule is ResumeRule.CHANGES_RESULT]
    assert set(settable) == set(OTHER) | WITHOUT_EFFECT_HERE, "give each new setting another value here"
    (found,) = run_ranks(continue_with_each, 1, data, reference, tmp_path, list(OTHER))
    assert [name for name, took_effect in found.items() if not took_effect] == []


OPTIMIZER = ("training.weight_decay=0.5", "training.beta1=0.5", "training.beta2=0.6", "training.adam_eps=0.01")


def resume_with_another_optimizer(data: Path, reference: Path, run_dir: Path, json_name: str) -> list[dict[str, Any]]:
    """What the optimizer works with in a run that begins so, and in one that is continued so."""
    changed = settings_of(data, reference, [*OPTIMIZER, "training.gradient_clipping=0.001"])
    one_step(settings_of(data, reference, []), run_dir / "changed", json_name, save=True)
    found = [one_step(changed, run_dir / name, json_name) for name in ("new", "changed")]
    return [{"groups": [group | {"lr": None} for group in each["groups"]], "clipping": each["clipping"]} for each in found]


@pytest.mark.parametrize("json_name", ["zero1.json", "zero3.json"])
def test_the_optimizer_of_a_resumed_run_has_the_recipes_values(data, reference, tmp_path, json_name) -> None:
    ((new, resumed),) = run_ranks(resume_with_another_optimizer, 1, data, reference, tmp_path, json_name)
    assert resumed == new
    assert resumed["clipping"] == 0.001
    assert {group["weight_decay"] for group in resumed["groups"]} == {0.5, 0.0}
    assert all((group["betas"], group["eps"]) == ((0.5, 0.6), 0.01) for group in resumed["groups"])


def run_again_with_changes(data: Path, run_dir: Path) -> tuple[list[str], list[str], str]:
    """Train reference and policy, then start again with changed settings; (the problems, those with them allowed, what that
    start printed)."""
    import contextlib
    import io

    from pipeline.config import ConfigError
    from pipeline.job import run_job
    from pipeline.runtime.preemption import StopRequest

    more = ["training.steps=1", "reference.training_steps=1", f"reference.training_data={data}", "reference.path=null"]
    stop = StopRequest()
    assert run_job(job_of(settings_of(data, data, more), run_dir, "zero3.json"), stop) == 0
    before = (run_dir / "config.yaml").read_bytes()

    changes = ["training.beta1=0.8", "training.k_percent=0.5"]
    problems, printed = [], io.StringIO()
    for allow_changed, changed in ((False, changes), (True, ["model.dim=32"])):
        job = replace(job_of(settings_of(data, data, [*more, *changed]), run_dir, "zero3.json"), allow_changed=allow_changed)
        with pytest.raises(ConfigError) as caught, contextlib.redirect_stdout(printed):
            run_job(job, stop)
        problems.append(caught.value.problems)
    assert (run_dir / "config.yaml").read_bytes() == before, "nothing may be written before everything is checked"
    return problems[0], problems[1], printed.getvalue()


@pytest.mark.slow
def test_changes_of_reference_and_policy_are_refused_at_once_and_a_changed_shape_always(data, tmp_path) -> None:
    run_dir = tmp_path / "run"
    ((changed, fixed, printed),) = run_ranks(run_again_with_changes, 1, data, run_dir)
    assert changed == [
        f"reference in {run_dir / 'reference'}: training.beta1: was 0.9, is now 0.8",
        "training.beta1: was 0.9, is now 0.8",
        "training.k_percent: was 0.6, is now 0.5",
    ]
    assert fixed == ["model.dim: was 16, is now 32; it is fixed for the life of a run"]
    kept = f"reference in {run_dir / 'reference'}: model.dim: was 16, is now 32"
    assert f"the reference is used as it was trained before\n  {kept}\n" in printed


def test_what_has_changed_is_said_and_the_leap_of_the_learning_rate(data, reference, tmp_path) -> None:
    settings = settings_of(data, reference, ["training.warmup_steps=0"])
    write_state(tmp_path / "run", Progress(step=20), flatten(settings))

    def said(**training: Any) -> list[str]:
        now = settings.with_values(training=training)
        checkpoints = Checkpoints(tmp_path / "run", World(0, 1, 0, 1), flatten(now), now.checkpoint)
        return describe_changes(SimpleNamespace(settings=now, checkpoints=checkpoints)).split("\n  ")  # type: ignore[arg-type]

    assert said(k_percent=0.5) == ["continuing with changed settings", "training.k_percent: was 0.6, is now 0.5"]
    assert said(steps=80)[1:] == [
        "training.steps: was 40, is now 80",
        "the learning rate of the next step would have been 0.00275, and is 0.00434",
    ]
    assert said() == ["--allow-changed: nothing has changed"]
