"""Every recipe for a cluster trains: a dry run of each, with its shapes shrunk and tiny data in the place of its own."""

from pathlib import Path

import pytest

from pipeline.recipe import load_settings
from tests.forked import run_script
from tests.integration.test_command_line import ENVIRONMENT, ZERO3

ALL = (Path(__file__).resolve().parents[2] / "launch" / "recipes").glob("*.yaml")
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


def of_tiny_models(settings, tiny_reference):
    """Put a tiny model in the place of each that the recipe names."""
    named = {"model.pretrained": settings.model.pretrained, "reference.path": settings.reference.path}
    return [f"{key}={tiny_reference}" for key, path in named.items() if path is not None]


@pytest.mark.parametrize("recipe", CLUSTER, ids=lambda recipe: recipe.name)
def test_a_recipe_for_a_cluster_trains_at_a_shrunk_shape(recipe, tiny_data, tiny_reference, tmp_path):
    data = [f"data.path={tiny_data}/train", f"data.validation_path={tiny_data}/validation"]
    options = ["--deepspeed", ZERO3, "--config", recipe, "--run-dir", tmp_path / "run", "--dry-run"]
    models = of_tiny_models(load_settings(recipe), tiny_reference)
    finished = run_script("train.py", *map(str, options), *data, *SHRUNK, *models, environment=ENVIRONMENT)
    assert finished.returncode == 0, finished.stderr
    assert "dry run: two steps on 1 rank(s), loss " in finished.stdout
    assert "model.dim: 16 as given, where size " in finished.stdout
    assert "training.steps: " in finished.stdout
    assert not (tmp_path / "run").exists()
