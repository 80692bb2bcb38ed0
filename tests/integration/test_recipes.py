"""Every recipe but the demo's trains: a dry run of each, with its shapes shrunk and tiny data in the place of its own."""

import pytest

from pipeline.recipe import load_settings
from pipeline.schedule import objective_at
from tests.forked import ROOT, run_script
from tests.integration.test_command_line import ENVIRONMENT, ZERO3

ALL = (ROOT / "launch" / "recipes").glob("*.yaml")
CLUSTER = [path for path in sorted(ALL) if load_settings(path).model.size is not None]
SHRUNK = (
    "data.sequence_length=16",
    "data.global_batch=8",
    "data.micro_batch=2",
    "data.num_workers=0",
    "logging.validation_samples=4",
    "model.dim=16",
    "model.num_layers=2",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=null",
    "model.ffn_dim=null",
)


CURRICULUM = ROOT / "launch" / "recipes" / "forward_curriculum.yaml"


def of_tiny_models(settings, tiny_reference):
    """Put a tiny model in the place of each that the recipe names."""
    named = {"model.pretrained": settings.model.pretrained, "reference.path": settings.reference.path}
    return [f"{key}={tiny_reference}" for key, path in named.items() if path is not None]


def dry_run(recipe, tiny_data, tiny_reference, tmp_path, *more):
    """Run two steps of a shrunk recipe; returns what was printed."""
    data = [f"data.path={tiny_data}/train", f"data.validation_path={tiny_data}/validation"]
    options = ["--deepspeed", ZERO3, "--config", recipe, "--run-dir", tmp_path / "run", "--dry-run"]
    models = of_tiny_models(load_settings(recipe), tiny_reference)
    finished = run_script("train.py", *map(str, options), *data, *SHRUNK, *models, *more, environment=ENVIRONMENT)
    assert finished.returncode == 0, finished.stderr
    assert "dry run: two steps on 1 rank(s), loss " in finished.stdout
    assert not (tmp_path / "run").exists()
    return finished.stdout


@pytest.mark.parametrize("recipe", CLUSTER, ids=lambda recipe: recipe.name)
def test_a_recipe_for_a_cluster_trains_at_a_shrunk_shape(recipe, tiny_data, tiny_reference, tmp_path):
    printed = dry_run(recipe, tiny_data, tiny_reference, tmp_path)
    assert "model.dim: 16 as given, where size " in printed
    assert "training.steps: " in printed


def test_the_curriculum_begins_with_the_next_token_alone_and_has_all_heads_at_its_end(tiny_data, tiny_reference, tmp_path):
    dry_run(CURRICULUM, tiny_data, tiny_reference, tmp_path, "data.builtin=false")
    settings = load_settings(CURRICULUM)
    # Steps are numbered from 0, and each part is a quarter.
    assert settings.training.steps == 400
    weights = [objective_at(settings, step).head_weights for step in (0, 99, 100, 200, 300, 399)]
    assert [sum(of_step) for of_step in weights] == [1, 1, 2, 3, 4, 4]
