"""Settings: every key known, every value checked, everything that is wrong said at once."""

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from pipeline.config import ConfigError, Settings, did_you_mean
from pipeline.other_names import ADVICE_ON, SETTING_OF
from pipeline.recipe import load_settings, read_settings
from pipeline.runtime.identity import FIXED_SETTINGS, RESUME_RULES, changed_settings, flatten
from pipeline.schedule import head_weights_at
from pipeline.setting_types import ResumeRule
from pipeline.storage.location import Url

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
# The two things without a default: where the data is and what the reference is.
SOURCES = ("data.path=data", "reference.path=reference")


def problems_of(*overrides, recipe=None):
    with pytest.raises(ConfigError) as caught:
        load_settings(recipe, overrides)
    return caught.value.problems


def written(tmp_path, text):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    return recipe


def all_settings():
    return [(section, key) for section in Settings.model_fields for key in section_class(section).model_fields]


def section_class(section) -> type[BaseModel]:
    return type(getattr(Settings(), section))


def test_a_recipe_gives_its_values_and_defaults_for_the_rest(tmp_path):
    recipe = written(
        tmp_path,
        "data: {path: some/where, micro_batch: 2}\nreference: {path: ref}\ntraining: {head_weights: [1, 0.5, 0.5, 0.25]}\n",
    )
    settings = load_settings(recipe)
    assert settings.data.path == Path("some/where")
    assert settings.data.micro_batch == 2
    assert settings.training.head_weights == [1.0, 0.5, 0.5, 0.25]
    assert (settings.training.k_percent, settings.model.num_prediction_heads) == (0.6, 4)
    assert (settings.training.selection_pool, settings.training.normalize_by) == ("global", "valid")


def test_an_override_replaces_the_recipes_value_and_the_last_of_two_wins(tmp_path):
    recipe = written(tmp_path, "data: {path: a, seed: 1}\nreference: {path: ref}\n")
    settings = load_settings(recipe, ["data.seed=2", "training.k_percent=1", "data.seed=3", "data.validation_path=null"])
    assert (settings.data.path, settings.data.seed, settings.data.validation_path) == (Path("a"), 3, None)
    assert settings.training.k_percent == 1.0


def test_an_override_may_hold_equals_signs_and_any_yaml():
    settings = load_settings(None, [*SOURCES, "data.path=runs/a=b", "training.head_weights=[1, 2, 3, 4]"])
    assert settings.data.path == Path("runs/a=b")
    assert head_weights_at(settings, 0) == [1.0, 2.0, 3.0, 4.0]


def test_held_out_folders_are_one_or_several_by_name_and_survive_being_written(tmp_path):
    assert load_settings(None, SOURCES).data.validation_sets == {}
    for text, expected in (
        ("some/where", {"": Path("some/where")}),
        ("{web: a, c-4.en: 's3://bucket/b'}", {"web": Path("a"), "c-4.en": Url("s3://bucket/b")}),
    ):
        settings = load_settings(None, [*SOURCES, f"data.validation_path={text}"])
        assert settings.data.validation_sets == expected
        assert load_settings(written(tmp_path, settings.to_yaml())) == settings
        assert settings.with_values(run={"name": "x"}).data == settings.data
        assert changed_settings(flatten(load_settings(None, SOURCES)), flatten(settings)) == []


@pytest.mark.parametrize("text", ["{}", "{a/b: x}", "{2024: x}", "{a b: x}", "{'': x}", "[a, b]", "{web: 3}", "{web: {x: y}}"])
def test_held_out_folders_without_a_name_or_a_path_are_refused_in_one_sentence(text):
    (problem,) = problems_of(*SOURCES, f"data.validation_path={text}")
    assert problem.startswith("data.validation_path: got ")


def test_head_weights_default_to_one_for_each_head():
    assert head_weights_at(load_settings(None, [*SOURCES, "model.num_prediction_heads=3"]), 0) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("text", "value"), [("2e-3", 0.002), ("2.0e-3", 0.002), ("1E-4", 1e-4), (".5", 0.5), ("1", 1.0)])
def test_a_number_without_a_dot_is_a_number_in_recipe_and_override(tmp_path, text, value):
    recipe = written(tmp_path, f"data: {{path: a}}\nreference: {{path: b}}\ntraining: {{learning_rate: {text}}}\n")
    for settings in (load_settings(recipe), load_settings(None, [*SOURCES, f"training.learning_rate={text}"])):
        assert settings.training.learning_rate == value
        assert isinstance(settings.training.learning_rate, float)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_shipped_recipe_loads_and_every_key_in_it_takes_effect(recipe):
    loaded = flatten(load_settings(recipe))
    written = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert not isinstance(written.pop("base", None), dict)
    for section, keys in written.items():
        for key, value in keys.items():
            assert loaded[f"{section}.{key}"] == {"15B": 15 * 10**9, "100B": 100 * 10**9}.get(str(value), value)


def test_there_is_a_recipe_to_ship():
    assert "demo.yaml" in [recipe.name for recipe in RECIPES]


@pytest.mark.parametrize(("section", "key"), all_settings())
def test_every_setting_has_a_description_and_a_default(section, key):
    field = section_class(section).model_fields[key]
    assert field.description, f"{section}.{key} has no docstring"
    assert len(field.description) > 5
    assert not field.is_required()


def test_settings_written_as_yaml_load_back_equal(tmp_path):
    overrides = [*SOURCES, "training.learning_rate=2e-3", "data.lanes=64", "training.head_weights=[1,0,0,0.5]"]
    settings = load_settings(None, overrides)
    again = load_settings(written(tmp_path, settings.to_yaml()))
    assert again == settings
    assert again.to_yaml() == settings.to_yaml()


def test_settings_cannot_be_changed_in_place_and_replaced_values_are_validated():
    settings = load_settings(None, SOURCES)
    with pytest.raises(ValueError, match="frozen"):
        settings.training.k_percent = 0.5
    assert settings.with_values(training={"k_percent": 0.5}).training.k_percent == 0.5
    assert settings.training.k_percent == 0.6
    with pytest.raises(ValueError, match=r"expected a fraction in \(0, 1\]"):
        settings.with_values(training={"k_percent": 5})


def test_an_unknown_setting_of_a_recipe_is_refused_with_a_suggestion(tmp_path):
    recipe = written(tmp_path, "data: {path: a, seqence_length: 64}\nreference: {path: b}\n")
    assert problems_of(recipe=recipe) == ["data.seqence_length: unknown setting; did you mean 'data.sequence_length'?"]


def test_an_unknown_section_of_a_recipe_is_refused_with_a_suggestion(tmp_path):
    recipe = written(tmp_path, "data: {path: a}\nreference: {path: b}\ntrainning: {steps: 3}\n")
    assert problems_of(recipe=recipe) == ["trainning: unknown section; did you mean 'training'?"]


def test_an_unknown_setting_of_an_override_is_refused_with_a_suggestion():
    assert problems_of(*SOURCES, "training.k_percnt=0.5") == [
        "training.k_percnt: unknown setting; did you mean 'training.k_percent'?"
    ]


def test_a_setting_in_the_wrong_section_is_refused_with_where_it_belongs():
    (problem,) = problems_of(*SOURCES, "checkpoint.micro_batch=4")
    assert problem == "checkpoint.micro_batch: unknown setting; did you mean 'data.micro_batch'?"
    # There are seeds of the data and of the model.
    (problem,) = problems_of(*SOURCES, "checkpoint.seed=4")
    assert problem == "checkpoint.seed: unknown setting; did you mean 'data.seed' or 'model.seed'?"


def test_a_setting_like_no_other_is_refused_with_what_is_known_there():
    (problem,) = problems_of(*SOURCES, "checkpoint.zzz=4")
    assert problem == "checkpoint.zzz: unknown setting; known are: every, every_minutes, keep, keep_every, max_failed_saves"


def test_a_key_that_comes_twice_is_refused_with_its_line(tmp_path):
    recipe = written(tmp_path, "data: {path: a}\nreference: {path: b}\ntraining:\n  steps: 3\n  k_percent: 1\n  steps: 4\n")
    with pytest.raises(ConfigError, match=r"steps given twice in one section\s+in .*, line 4"):
        load_settings(recipe)


def test_a_name_like_no_other_gets_the_list_of_known_ones():
    assert did_you_mean("zzz", ["beta", "alpha"]) == "known are: alpha, beta"
    assert did_you_mean("alhpa", ["beta", "alpha"]) == "did you mean 'alpha'?"


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("training.steps", "write training.steps=VALUE"),
        ("steps=5", "write training.steps=5"),
        (".steps=5", "write training.steps=5"),
        ("lr=1e-4", "write training.learning_rate=1e-4"),
        ("training.=5", "for example training.steps=1000"),
        ("nonsense", "for example training.steps=1000"),
        ("launch/recipes/demo.yaml", "a recipe is named by --config FILE"),
    ],
)
def test_an_override_that_is_none_is_refused_with_an_example(override, hint):
    assert problems_of(*SOURCES, override) == [f"'{override}': expected section.key=value; {hint}"]


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    recipe = written(tmp_path, "model: {dmi: 8, num_layers: 0}\ntraining: {temperature: 0.7, k_percent: 1.5}\nlogs: {}\n")
    problems = problems_of(
        *SOURCES, "data.sequence_length=4", "training.head_weights=[1,1]", "nonsense", "data.lanes=[", recipe=recipe
    )
    beginnings = [
        "'nonsense': expected section.key=value",
        "'data.lanes=[': the value is not valid YAML",
        "training.temperature: removed",
        "model.num_layers: got 0;",
        "model.dmi: unknown setting; did you mean 'model.dim'?",
        "training.k_percent: got 1.5; expected a fraction in (0, 1]",
        "logs: unknown section;",
        "data.sequence_length: 4 leaves head 3 nothing to predict",
        "training.head_weights: 2 weights for 4 heads",
    ]
    assert len(problems) == len(beginnings)
    for beginning in beginnings:
        assert any(problem.startswith(beginning) for problem in problems), (beginning, problems)


def test_the_message_counts_the_problems_and_gives_each_a_line():
    message = str(ConfigError(["first", "second"]))
    assert message == "2 problems with the settings:\n  - first\n  - second"
    assert str(ConfigError(["only"])).startswith("1 problem with the settings:\n")


def test_a_refused_value_brings_no_false_problems_after_it(tmp_path):
    # T = -1 is replaced by its default to look at the rest; with the default nothing else is wrong.
    assert problems_of(*SOURCES, "data.sequence_length=-1", "model.num_prediction_heads=x") == [
        "data.sequence_length: got -1; expected more than 0",
        "model.num_prediction_heads: got 'x'; expected a whole number",
    ]
    # Whether a reference is needed depends on k_percent, which is not known here.
    assert len(problems_of("data.path=data", "training.k_percent=100")) == 1


def test_settings_that_are_partly_wrong_are_understood_as_far_as_possible():
    settings, problems = read_settings(None, [*SOURCES, "training.k_percent=3", "training.steps=7", "data.no_such=1"])
    assert len(problems) == 2
    assert (settings.training.k_percent, settings.training.steps) == (0.6, 7)
    assert settings.data.path == Path("data")


def test_temperature_is_refused_and_the_message_names_what_replaced_it(tmp_path):
    recipe = written(tmp_path, "data: {path: a}\nreference: {path: b}\ntraining: {temperature: 1.0}\n")
    for problems in (problems_of(recipe=recipe), problems_of(*SOURCES, "training.temperature=0.5")):
        (problem,) = problems
        assert problem.startswith("training.temperature: removed")
        for words in ("Softmax", "top-k", "training.k_percent"):
            assert words in problem


@pytest.mark.parametrize("value", ["0", "-0.1", "1.0001", "1.5", "60", ".nan", ".inf"])
def test_k_percent_outside_zero_to_one_is_refused(value):
    (problem,) = problems_of(*SOURCES, f"training.k_percent={value}")
    assert problem.startswith("training.k_percent: got ")
    assert problem.endswith("; expected a fraction in (0, 1]")


@pytest.mark.parametrize("value", [0.0001, 0.6, 1])
def test_k_percent_inside_is_accepted(value):
    assert load_settings(None, [*SOURCES, f"training.k_percent={value}"]).training.k_percent == value


@pytest.mark.parametrize(("length", "heads"), [(4, 4), (3, 4), (1, 1), (8, 9)])
def test_rows_no_longer_than_the_heads_reach_are_refused(length, heads):
    (problem,) = problems_of(*SOURCES, f"data.sequence_length={length}", f"model.num_prediction_heads={heads}")
    assert problem.startswith(f"data.sequence_length: {length} leaves head {heads - 1} nothing to predict")
    assert f"expected more than model.num_prediction_heads, {heads}" in problem


def test_rows_one_longer_than_the_heads_reach_are_accepted():
    assert load_settings(None, [*SOURCES, "data.sequence_length=5"]).data.sequence_length == 5


@pytest.mark.parametrize("count", [1, 3, 5])
def test_head_weights_must_be_as_many_as_heads(count):
    (problem,) = problems_of(*SOURCES, f"training.head_weights={[1.0] * count}")
    assert problem == f"training.head_weights: {count} weights for 4 heads; give one a head"


def test_an_empty_list_of_head_weights_is_not_taken_for_none():
    assert any("0 weights for 4 heads" in problem for problem in problems_of(*SOURCES, "training.head_weights=[]"))


def test_head_weights_below_zero_or_all_zero_are_refused():
    assert problems_of(*SOURCES, "training.head_weights=[1,-1,1,1]") == ["training.head_weights.1: got -1; expected at least 0"]
    (problem,) = problems_of(*SOURCES, "training.head_weights=[0,0,0,0]")
    assert "all are zero" in problem


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("head_weights=[[0, [1, 1]]]", "training.head_weights: 2 weights for 4 heads from step 0 on; give one a head"),
        (
            "head_weights=[[0, [1, 0, 0, 0]], [9, [0, 0, 0, 0]]]",
            "training.head_weights: all are zero from step 9 on, nothing would be trained",
        ),
        (
            "head_weights=[[1, [1, 1, 1, 1]]]",
            "training.head_weights: from the steps 1; expected ascending steps, the first of them 0",
        ),
        (
            "k_percent=[[0, 1], [5, 0.5], [5, 0.4]]",
            "training.k_percent: from the steps 0, 5, 5; expected ascending steps, the first of them 0",
        ),
        ("k_percent=[[0, 1.5]]", "training.k_percent.0.1: got 1.5; expected a fraction in (0, 1]"),
        ("k_percent=[[0]]", "training.k_percent.0.1: not set; it must be"),
        ("k_percent=[0.5]", "training.k_percent.0: got 0.5; expected a pair, [from_step, value]"),
        ("head_weights=[[0, [1, -1, 1, 1]]]", "training.head_weights.0.1.1: got -1; expected at least 0"),
        (
            "k_percent_change=linear",
            "training.k_percent_change: set, but training.k_percent does not change; list it as [[from_step, value], …], or "
            "leave this out",
        ),
    ],
)
def test_a_course_over_time_that_cannot_be_meant_is_refused(override, problem):
    assert problems_of(*SOURCES, f"training.{override}") == [problem]


def test_a_course_over_time_is_read_and_printed_as_it_is_written(tmp_path):
    course = "training: {head_weights: [[0, [1, 0, 0, 0]], [9, [1, 1, 0, 0]]], k_percent: [[0, 1.0], [9, 0.5]]}"
    settings = load_settings(written(tmp_path, course), SOURCES)
    again = load_settings(written(tmp_path, settings.to_yaml()))
    assert again == settings
    assert flatten(again)["training.k_percent"] == [[0, 1.0], [9, 0.5]]
    other = settings.with_values(training={"k_percent": [[0, 1.0], [8, 0.5]]})
    assert [change.key for change in changed_settings(flatten(settings), flatten(other))] == ["training.k_percent"]


def test_truth_values_are_no_numbers_within_a_course_either():
    (problem,) = problems_of(*SOURCES, "training.head_weights=[[0, [yes, 1, 1, 1]]]")
    assert "expected a value other than true and false" in problem


@pytest.mark.parametrize(
    ("overrides", "beginning"),
    [
        (["training.selection_score=external"], "training.external_scores: not set; name the directory that launch/score.py"),
        (["training.external_scores=x"], "training.external_scores: set, but training.selection_score is 'excess'"),
        (
            ["training.selection_score=external", "training.external_scores=x", "reference.cached=y"],
            "reference.cached: set, and so is training.external_scores",
        ),
        (["reference.horizon=own"], "reference.path: set, but reference.horizon 'own' takes the policy's head 0"),
    ],
)
def test_what_pairs_are_ranked_by_is_said_once(overrides, beginning):
    (problem,) = problems_of(*SOURCES, *overrides)
    assert problem.startswith(beginning)


def test_the_policys_own_head_needs_no_reference():
    load_settings(None, ["data.path=data", "reference.horizon=own"])


@pytest.mark.parametrize(
    ("setting", "known"),
    [
        ("training.selection_pool", "'global', 'step', 'rank' or 'row'"),
        ("training.selection_exchange", "'all_gather', 'radix' or 'auto'"),
        ("training.selection_score", "'excess', 'policy_loss', 'random' or 'external'"),
        ("reference.horizon", "'shifted', 'matched' or 'own'"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(setting, known):
    (problem,) = problems_of(*SOURCES, f"{setting}=batch")
    assert problem == f"{setting}: got 'batch'; expected {known}"


def test_controls_that_compare_with_nothing_need_no_reference():
    for control in ("policy_loss", "random"):
        load_settings(None, ["data.path=data", f"training.selection_score={control}"])


def test_a_reference_trained_here_has_no_heads_to_match():
    (problem,) = problems_of("data.builtin=true", "reference.training_steps=5", "reference.horizon=matched")
    assert problem.startswith("reference.horizon: 'matched' needs a reference with all heads")


@pytest.mark.parametrize(
    ("overrides", "beginning"),
    [
        (["model.dim=10", "model.num_attention_heads=4"], "model.dim: 10 is not a multiple of num_attention_heads, 4"),
        (["model.dim=12", "model.num_attention_heads=4"], "model.head_dim: the width of an attention head is odd"),
        (["model.head_dim=7"], "model.head_dim: the width of an attention head is odd"),
        (["model.num_key_value_heads=3"], "model.num_key_value_heads: 3 does not divide num_attention_heads, 8"),
        (["data.builtin=true"], "data.builtin: true and data.path is set"),
        (["data.path=null"], "data.path: not set"),
        (["reference.path=null"], "reference.path: not set"),
        (
            ["reference.training_steps=5", "reference.training_data=x"],
            "reference.training_steps: set, and so is reference.path",
        ),
        (["reference.path=null", "reference.training_steps=5"], "reference.training_data: not set"),
        (["run.name=a/b"], "run.name: got 'a/b'; expected the name of a directory"),
        (["run.name=.."], "run.name: got '..'; expected the name of a directory"),
        (["training.learning_rate=.inf"], "training.learning_rate: got inf"),
        (["model.dim=1000000000000000000"], "model.dim: got 1000000000000000000; expected at most 1048576"),
        ([f"training.steps={10**30}"], f"training.steps: got {10**30}; expected at most 9007199254740992"),
        ([f"data.seed={2**53 + 1}"], f"data.seed: got {2**53 + 1}; expected at most 9007199254740992"),
        (["training.steps=0"], "training.steps: got 0"),
        (
            ["training.rollback_on_spike=6", "training.rollback_skip_steps=99"],
            "training.rollback_skip_steps: 99 steps do not reach the spike; expected at least training.rollback_steps, 100",
        ),
        (["training.steps=1.5"], "training.steps: got 1.5"),
        (["training.normalize_by=tokens"], "training.normalize_by: got 'tokens'; expected 'valid' or 'selected'"),
        (["training.schedule=linear"], "training.schedule: got 'linear'; expected 'cosine' or 'wsd'"),
    ],
)
def test_values_that_cannot_be_meant_are_refused_by_name(overrides, beginning):
    (problem,) = problems_of(*SOURCES, *overrides)
    assert problem.startswith(beginning)


def test_no_reference_is_needed_where_nothing_is_selected_by_it():
    assert load_settings(None, ["data.path=data", "training.k_percent=1"]).reference.path is None
    assert load_settings(None, ["data.path=data", "model.num_prediction_heads=1"]).reference.path is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is not valid YAML"),
        ("- 3", "expected sections of keys (run, data, model, reference, training, logging, checkpoint)"),
        ("data: 3", "expected sections of keys"),
        ("!!python/object/apply:os.system ['exit 1']", "is not valid YAML"),
    ],
)
def test_a_recipe_that_is_none_is_refused_and_named(tmp_path, text, said):
    recipe = written(tmp_path, text)
    (problem,) = problems_of(recipe=recipe)
    assert problem.startswith("--config: ")
    assert str(recipe) in problem
    assert said in problem


def test_a_missing_recipe_is_refused_and_named(tmp_path):
    assert problems_of(recipe=tmp_path / "none.yaml") == [f"--config: no such file: {tmp_path / 'none.yaml'}"]
    assert problems_of(recipe=tmp_path) == [f"--config: expected a recipe, a YAML file, and this is a folder: {tmp_path}"]


def test_an_empty_recipe_and_an_empty_section_mean_the_defaults(tmp_path):
    assert load_settings(written(tmp_path, ""), SOURCES) == load_settings(written(tmp_path, "training:\n"), SOURCES)


def test_keys_that_are_not_words_are_refused(tmp_path):
    recipe = written(tmp_path, "data: {path: a, 1: 3}\nreference: {path: b}\n")
    assert problems_of(recipe=recipe) == ["data.1: got 1; expected a word as the key"]


def test_every_setting_says_once_what_its_change_in_a_runs_life_means():
    for section, key in all_settings():
        said = [each for each in section_class(section).model_fields[key].metadata if isinstance(each, ResumeRule)]
        assert len(said) == 1, f"{section}.{key}: expected Free, ChangesResult or Fixed"
        assert RESUME_RULES[f"{section}.{key}"] is said[0]


@pytest.mark.parametrize(
    ("change", "setting", "before", "after"),
    [
        (ResumeRule.FREE, "data.cache_dir", None, "/tmp"),
        (ResumeRule.FREE, "training.activation_checkpointing", "none", "full"),
        (ResumeRule.FREE, "run.name", "a", "b"),
        (ResumeRule.CHANGES_RESULT, "training.k_percent", 0.6, 0.5),
        (ResumeRule.CHANGES_RESULT, "model.rope_theta", 1e4, 1e6),
        (ResumeRule.FIXED, "model.num_key_value_heads", None, 2),
        (ResumeRule.FIXED, "data.global_batch", 8, 16),
        (ResumeRule.FIXED, "data.lanes", 8, 4),
    ],
)
def test_of_what_is_free_no_difference_matters_and_of_the_rest_every_one(change, setting, before, after):
    assert RESUME_RULES[setting] is change
    assert changed_settings({setting: before}, {setting: before}) == []
    found = list(map(str, changed_settings({setting: before}, {setting: after})))
    assert found == ([] if change is ResumeRule.FREE else [f"{setting}: was {before!r}, is now {after!r}"])


def test_what_a_runs_position_is_counted_in_and_the_shape_of_its_weights_are_fixed():
    without_effect_on_the_shape = {"size", "rope_theta", "rope_scaling", "norm_eps", "pretrained"}
    shape = [f"model.{key}" for key in section_class("model").model_fields if key not in without_effect_on_the_shape]
    assert list(FIXED_SETTINGS) == ["data.global_batch", "data.lanes", *shape]


LLAMA3 = "factor: 8, low_freq_factor: 1, original_max_position_embeddings: 8192"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("llama3", "model.rope_scaling: got 'llama3'; expected {rope_type: linear, llama3 or yarn, factor: …}"),
        ("{rope_type: dynamic}", "model.rope_scaling: got {'rope_type': 'dynamic'}; expected {rope_type: linear, llama3 or"),
        ("{rope_type: linear}", "model.rope_scaling.linear.factor: not set; it must be"),
        ("{rope_type: linear, factor: 0}", "model.rope_scaling.linear.factor: got 0; expected more than 0"),
        ("{rope_type: yarn, facter: 2}", "model.rope_scaling.yarn.facter: unknown setting; did you mean 'factor'?"),
        (f"{{rope_type: llama3, {LLAMA3}, high_freq_factor: 1}}", "expected low_freq_factor below high_freq_factor, 1"),
    ],
)
def test_a_scaling_of_rotary_positions_has_the_keys_of_its_kind(value: str, problem: str) -> None:
    assert any(problem in each for each in problems_of(*SOURCES, f"model.rope_scaling={value}"))
    settings = load_settings(None, [*SOURCES, f"model.rope_scaling={{rope_type: llama3, {LLAMA3}, high_freq_factor: 4}}"])
    assert settings.model.rope_scaling.factor == 8


def test_pretrained_weights_may_go_in_a_runs_life_but_others_never_come():
    (gone,) = changed_settings({"pretrained model": "a"}, {"pretrained model": None})
    (other,) = changed_settings({"pretrained model": None}, {"pretrained model": "a"})
    assert (gone.is_fixed, other.is_fixed) == (False, True)


def test_what_differs_in_a_changed_model_is_said_where_both_are_remembered():
    files, config = {"a.safetensors": "1", "config.json": "2"}, {"dim": "16", "theta": "1.0"}
    before = {"reference model": "a", "reference model, parts": {"files": files, "config": config}}

    def said(files, config):
        after = {"reference model": "b", "reference model, parts": {"files": files, "config": config}}
        (change,) = changed_settings(before, after)
        return str(change).removeprefix("reference model: was 'a', is now 'b'")

    assert said(files | {"config.json": "3"}, {"dim": "16", "theta": "2.0"}) == " (config.json theta: 1.0 → 2.0)"
    assert said({"b.safetensors": "1", "config.json": "3"}, config) == (
        " (a.safetensors is gone; config.json has other bytes; b.safetensors is new)"
    )
    many = said({f"{number}.safetensors": "1" for number in range(9)}, config)
    assert many.endswith("; 1.safetensors is new; and 7 more)")
    # Of an older checkpoint the fingerprint alone is known; and the parts by themselves are no change.
    (change,) = changed_settings({"reference model": "a"}, before | {"reference model": "b"})
    assert str(change) == "reference model: was 'a', is now 'b'"
    assert changed_settings({"reference model": "a"}, before) == []


def test_only_differences_that_change_the_result_matter():
    before = load_settings(None, SOURCES)
    harmless = before.with_values(
        run={"name": "other"},
        logging={"metrics_every": 3},
        checkpoint={"every": 7, "keep": None},
        data={"num_workers": 0, "path": "elsewhere", "validation_path": "held-out", "micro_batch": 4},
        reference={"path": "moved", "sharding": "replicate"},
    )
    assert changed_settings(flatten(before), flatten(harmless)) == []
    other = harmless.with_values(training={"k_percent": 0.5, "steps": 2000}, model={"seed": 1})
    assert list(map(str, changed_settings(flatten(before), flatten(other)))) == [
        "model.seed: was 0, is now 1",
        "training.steps: was 1000, is now 2000",
        "training.k_percent: was 0.6, is now 0.5",
    ]


def test_something_known_to_only_one_of_two_runs_is_a_difference():
    assert list(map(str, changed_settings({"data": "abc"}, {"data": "abd", "deepspeed stage": 3}))) == [
        "data: was 'abc', is now 'abd'",
        "deepspeed stage: was None, is now 3",
    ]


def test_a_run_of_an_older_program_ran_with_the_defaults_of_settings_that_it_did_not_know() -> None:
    now = flatten(Settings())
    before = {key: value for key, value in now.items() if key != "training.compile"}
    assert changed_settings(before, now) == []
    (change,) = changed_settings(before, now | {"training.compile": "off"})
    assert str(change) == "training.compile: was 'auto', is now 'off'"


def test_a_setting_that_is_gone_is_a_difference_where_it_changed_results() -> None:
    now = flatten(Settings())
    assert changed_settings(now | {"logging.old": 3}, now) == []
    (change,) = changed_settings(now | {"training.temperature": 2.0}, now)
    assert str(change) == "training.temperature: was 2.0, is now None"


JUNK = ("[1, {a: 2}]", "{a: 1}", "x", "-1.5", "true", ".nan", "[]", "[[1]]", "1e999", "2026-01-01", "'\\0'")


TEXT = {"x", "1e999", "'\\0'"}


def test_every_setting_refuses_by_its_name_what_it_cannot_mean_and_never_in_the_validating_librarys_words():
    for section, key in all_settings():
        accepted = set()
        for value in JUNK:
            _, problems = read_settings(None, [*SOURCES, f"{section}.{key}={value}"])
            if not any(problem.startswith(f"{section}.{key}") for problem in problems):
                accepted.add(value)
            for problem in problems:
                assert "Input should" not in problem, problem
                assert "Value error" not in problem, problem
        # Text may be a name or a path; nothing else of these is a value of any setting.
        assert accepted in (set(), {"true"}, TEXT), f"{section}.{key} takes {accepted}"


BOMB = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdef", "bcdefg", strict=True))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: &a [*a]\n", "its aliases make more than 100000 values of it"),
        (f"a: &a [1, 1]\n{BOMB}", "its aliases make more than 100000 values of it"),
        ("a: " + "[" * 5000 + "]" * 5000, "it is nested too deeply"),
        ("data: {path: 2026-13-45}", "month must be in 1..12"),
        ("data: {? [1, 2] : 3}", "unhashable"),
        ("data: {path: !!timestamp x}", "group"),
        ("data: {path: !!python/object:os.system x}", "could not determine a constructor"),
        ("data: \x00", "special characters are not allowed"),
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_yaml_that_no_recipe_is_made_of_is_one_problem_with_the_file(tmp_path, text, problem):
    recipe = written(tmp_path, text)
    (found,) = problems_of(*SOURCES, recipe=recipe)
    assert found.startswith(f"--config: {recipe} is not valid YAML: ")
    assert problem in found
    if text.startswith("data: {path"):
        (found,) = problems_of(*SOURCES, f"run.name={text[13:-1]}")
        assert "the value is not valid YAML" in found


def test_a_recipe_that_is_not_utf_8_or_no_file_is_one_problem_beside_the_others(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"data: {path: \xff}\n")
    first, second = problems_of("training.k_percent=7", recipe=tmp_path / "recipe.yaml")
    assert "is not valid YAML: 'utf-8' codec" in first
    assert second.startswith("training.k_percent: got 7")
    assert len(problems_of("training.k_percent=7", recipe=tmp_path / "none.yaml")) == 2


def test_an_alias_that_is_used_as_it_is_meant_is_read(tmp_path):
    recipe = written(tmp_path, "data: &base {path: a, seed: 3}\nreference: {path: b}\nmodel: {seed: 3}\nrun: {name: &n x}\n")
    assert load_settings(recipe).data.seed == 3


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("training.lr=1", "training.lr: unknown setting; did you mean 'training.learning_rate'?"),
        ("data.batch_size=1", "data.batch_size: unknown setting; did you mean 'data.global_batch'?"),
        ("training.num_epochs=1", "training.num_epochs: unknown setting; did you mean 'training.epochs'?"),
        ("optimizer.lr=1", "optimizer: unknown section; did you mean 'training.learning_rate'?"),
        ("trainer.max_steps=1", "trainer: unknown section; did you mean 'training'?"),
        ("training.seqence_length=1", "training.seqence_length: unknown setting; known are:"),
    ],
)
def test_a_key_by_which_other_trainers_name_a_setting_is_refused_with_ours(override, hint):
    (problem,) = problems_of(*SOURCES, override)
    assert problem.startswith(hint)


def test_what_other_trainers_call_our_settings_leads_to_settings_that_exist():
    known = {f"{section}.{key}" for section, key in all_settings()}
    assert set(SETTING_OF.values()) <= known
    assert not set(SETTING_OF) & set(ADVICE_ON)
    assert not (set(SETTING_OF) | set(ADVICE_ON)) & {name.partition(".")[2] for name in known}, "our own name is found anyway"


def test_a_tilde_is_the_home_folder_in_every_setting_that_is_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    paths = ["data.path", "data.validation_path", "data.cache_dir", "model.pretrained"]
    paths += ["reference.path", "reference.cached", "reference.training_data"]
    settings, _ = read_settings(None, [f"{path}=~/x" for path in paths])
    for path in paths:
        section, key = path.split(".")
        assert getattr(getattr(settings, section), key) == Path("/home/somebody/x")
    values = {(section, key) for section, keys in settings for key, value in keys if isinstance(value, Path)}
    assert values == {tuple(path.split(".")) for path in paths}, "name each setting that is a path above"
    assert read_settings(None, ["data.path=file:~/x"])[0].data.path == Path("/home/somebody/x")
    (problem,) = problems_of("data.path=a", "reference.path=~nobody-at-all/x")
    assert "no home folder is known" in problem
