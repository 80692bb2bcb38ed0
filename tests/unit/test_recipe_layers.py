"""Recipes on top of recipes, shapes by name, and the three ways to say how long a run is."""

from pathlib import Path

import pytest
import yaml

from pipeline.config import ConfigError, ModelSettings, Settings
from pipeline.model.export import save_model
from pipeline.model.mtp import MTPModel, initialize_weights
from pipeline.model_sizes import MODEL_SIZES, departures
from pipeline.recipe import load_settings
from pipeline.run_length import resolution, with_steps
from pipeline.runtime.identity import changed_settings, flatten
from tests.data_sets import numbered_data

QUIET = ("training.k_percent=1", "data.path=data")


def recipe_of(folder, name="recipe.yaml", **content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder / name


def problems_of(recipe, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_settings(recipe, [*QUIET, *overrides])
    return caught.value.problems


def test_a_recipe_replaces_its_bases_settings_one_by_one_through_a_chain_from_folder_to_folder(tmp_path):
    recipe_of(tmp_path / "shared", "root.yaml", data={"seed": 1, "lanes": 8}, model={"dim": 64}, run={"name": "root"})
    recipe_of(tmp_path / "shared", "middle.yaml", base="root.yaml", data={"seed": 2}, training={"head_weights": [1, 2, 3, 4]})
    top = recipe_of(
        tmp_path / "mine", base="../shared/middle.yaml", run={"name": "top"}, training={"head_weights": [4, 3, 2, 1]}, data=None
    )
    settings = load_settings(top, [*QUIET, "model.dim=32"])
    assert (settings.data.seed, settings.data.lanes, settings.run.name) == (2, 8, "top")
    assert settings.training.head_weights == [4, 3, 2, 1], "a list is replaced as a whole"
    assert settings.model.dim == 32, "the command line is the last layer"

    # What is written of it is whole: it has no base, and means the same anywhere.
    whole = tmp_path / "elsewhere.yaml"
    whole.write_text(settings.to_yaml(), encoding="utf-8")
    assert "base" not in yaml.safe_load(settings.to_yaml())
    assert load_settings(whole) == settings


def test_a_circle_of_bases_is_refused_and_shown(tmp_path):
    one = recipe_of(tmp_path, "one.yaml", base="two.yaml")
    recipe_of(tmp_path, "two.yaml", base="./one.yaml")
    (problem,) = problems_of(one)
    assert problem.startswith(f"--config: {one}: base: {tmp_path / 'two.yaml'}: base: goes round in a circle")
    assert "goes round in a circle" in problems_of(recipe_of(tmp_path, "self.yaml", base="self.yaml"))[0]


def test_a_base_that_is_not_there_or_none_is_refused_with_the_way_to_it_and_what_was_meant(tmp_path):
    recipe_of(tmp_path, "rho1_1b.yaml")
    top = recipe_of(tmp_path, base="rho_1b.yaml")
    (problem,) = problems_of(top)
    assert problem == f"--config: {top}: base: no such file: {tmp_path / 'rho_1b.yaml'}; did you mean 'rho1_1b.yaml'?"
    for wrong in ([], 3, {"a": 1}, ""):
        (problem,) = problems_of(recipe_of(tmp_path, base=wrong))
        assert "expected the path of a recipe, from this one's folder" in problem
    assert "did you mean 'base'?" in problems_of(recipe_of(tmp_path, bass={"a": 1}))[0]


def test_a_wrong_setting_of_a_base_is_refused_unless_it_is_replaced(tmp_path):
    recipe_of(tmp_path, "base.yaml", training={"k_percnt": 1}, data={"seed": -1})
    first, second = sorted(problems_of(recipe_of(tmp_path, base="base.yaml")))
    assert first.startswith("data.seed: got -1")
    assert second.startswith("training.k_percnt: unknown setting")
    assert len(problems_of(recipe_of(tmp_path, base="base.yaml", data={"seed": 0}))) == 1


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_a_size_is_a_shape_of_about_so_many_parameters(size):
    from pipeline.runtime.parameters import num_parameters

    settings = load_settings(None, [*QUIET, f"model.size={size}", "model.num_prediction_heads=1", "model.vocab_size=32000"])
    number = num_parameters(settings.model)
    unit = {"m": 10**6, "b": 10**9}[size[-1]]
    assert 0.9 <= number / (int(size[:-1]) * unit) <= 1.3, f"{number:,}"


def test_what_is_set_beside_a_size_wins_and_a_later_size_replaces_the_shape_below_it(tmp_path):
    base = recipe_of(tmp_path, "base.yaml", model={"size": "1b", "dim": 1024})
    settings = load_settings(base, QUIET)
    assert (settings.model.dim, settings.model.num_layers, settings.model.ffn_dim) == (1024, 22, 5632)
    assert departures("1b", settings.model.model_dump()) == ["model.dim: 1024 as given, where size 1b has 2048"]
    assert resolution(settings)[1] == ["model.dim: 1024 as given, where size 1b has 2048"]

    larger = load_settings(base, [*QUIET, "model.size=7b", "model.num_layers=2"])
    assert (larger.model.dim, larger.model.num_layers, larger.model.ffn_dim) == (4096, 2, 14336)
    assert problems_of(base, "model.size=2b")[0].startswith("model.size: got '2b'; expected '125m', '350m', ")
    assert not departures(None, Settings().model.model_dump())


def test_the_name_of_a_size_is_no_part_of_a_runs_identity_and_its_shape_is():
    named = load_settings(None, [*QUIET, "model.size=125m"])
    shape = [f"model.{key}={'null' if value is None else value}" for key, value in MODEL_SIZES["125m"].items()]
    assert changed_settings(flatten(named), flatten(load_settings(None, [*QUIET, *shape]))) == []
    assert changed_settings(flatten(named), flatten(load_settings(None, [*QUIET, "model.size=350m"])))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("15B", 15 * 10**9), ("1.5T", 15 * 10**11), ("250m", 250 * 10**6), ("2 K", 2000), ("3_000", 3000), ("1e9", 10**9)],
)
def test_tokens_are_rounded_up_to_steps_and_the_numbers_are_shown(text, tokens):
    settings = load_settings(None, [*QUIET, f"training.tokens={text}", "data.global_batch=512", "data.sequence_length=2048"])
    assert settings.training.tokens == tokens
    resolved, note = with_steps(settings)
    assert resolved.training.steps == -(-tokens // (512 * 2048))
    assert (resolved.training.tokens, resolved.training.epochs) == (None, None)
    assert note == f"training.steps: {tokens:,} tokens / (512 rows × 2,048 tokens) = {resolved.training.steps:,} steps"


@pytest.mark.parametrize("text", ["15X", "-3", "0.5", "1.0005K", "'15 billion'", "true", "0", "1e99"])
def test_what_is_no_number_of_tokens_is_refused(text):
    (problem,) = problems_of(None, f"training.tokens={text}")
    assert problem.startswith("training.tokens: got ")


def test_epochs_are_those_of_the_rows_that_the_lanes_read(tmp_path):
    numbered_data(tmp_path, 50, sequence_length=8)
    more = [f"data.path={tmp_path}", "data.global_batch=4", "data.micro_batch=1", "data.lanes=4", "data.sequence_length=8"]
    resolved, note = with_steps(load_settings(None, ["training.k_percent=1", *more, "training.epochs=2.5"]))
    assert resolved.training.steps == 30, "two and a half times the 48 rows of 12 rounds of 4 lanes, four a step"
    assert note == "training.steps: 2.5 epochs × 48 rows / 4 rows = 30 steps"
    assert with_steps(resolved) == (resolved, None)


def test_exactly_one_setting_says_how_long_a_run_is_and_a_later_layer_replaces_it(tmp_path):
    recipe = recipe_of(tmp_path, training={"tokens": "15B"})
    assert with_steps(load_settings(recipe, [*QUIET, "training.steps=7"]))[0].training.steps == 7
    settings = load_settings(recipe, [*QUIET, "training.epochs=2", "training.steps=null"])
    assert (settings.training.tokens, settings.training.epochs) == (None, 2)
    (problem,) = problems_of(recipe, "training.epochs=1", "training.steps=7")
    assert problem.startswith("training.steps: training.steps and training.epochs are set; expected exactly one of them")

    for wrong in ("data.builtin=true", "data.mixture=[{path: a, weight: 1, name: a}]"):
        problems = problems_of(recipe, "training.epochs=1", "data.path=null", wrong)
        assert any("set training.steps or training.tokens" in problem for problem in problems)


def test_the_length_that_a_run_is_known_by_is_its_steps():
    in_tokens, _ = with_steps(load_settings(None, [*QUIET, "training.tokens=1B", "data.lanes=64"]))
    in_steps = load_settings(None, [*QUIET, f"training.steps={in_tokens.training.steps}", "data.lanes=64"])
    assert flatten(in_tokens) == flatten(in_steps)


def test_the_shape_that_a_recipe_does_not_give_is_that_of_the_pretrained_model(tmp_path: Path) -> None:
    shape = {"dim": 24, "num_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "ffn_dim": 40, "vocab_size": 50}
    settings = ModelSettings(**shape, num_prediction_heads=2, qk_norm=True, rope_theta=123.0, tied_embeddings=True)
    model = MTPModel(settings)
    initialize_weights(model)
    (tmp_path / "model").mkdir()
    save_model(model, tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{pretrained: {tmp_path / 'model'}, num_layers: 5, seed: 7}}\n")
    found = load_settings(recipe, [*QUIET, "model.rope_theta=9.0"]).model
    taken = settings.model_copy(update={"head_dim": found.head_dim})
    ours = {"num_layers": 5, "seed": 7, "rope_theta": 9.0, "pretrained": tmp_path / "model"}
    # The vocabulary is the data's or the model's, and the number of heads is the run's.
    assert found == taken.model_copy(update=ours | {"vocab_size": None, "num_prediction_heads": 4})
    # What cannot be read is left to the checks before the start.
    (tmp_path / "model" / "config.json").write_text("{")
    assert load_settings(recipe, QUIET).model.dim == 512
