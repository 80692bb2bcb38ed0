"""Settings of mixtures, damage and remote data, and what is said about wrong ones."""

import pytest

from pipeline.config import ConfigError
from pipeline.recipe import load_settings
from pipeline.runtime.identity import changed_settings, flatten
from pipeline.storage.location import Url

QUIET = ["training.k_percent=1"]
MIXTURE = "data.mixture=[{path: a, weight: 0.7, name: prose}, {path: 's3://b/c', weight: 0.3, name: code}]"


def problems(*overrides):
    with pytest.raises(ConfigError) as raised:
        load_settings(None, [*QUIET, *overrides])
    return raised.value.problems


def test_a_mixture_is_read_and_printed(tmp_path):
    settings = load_settings(None, [*QUIET, MIXTURE])
    assert [(str(each.path), each.weight, each.name) for each in settings.data.mixture] == [
        ("a", 0.7, "prose"),
        ("s3://b/c", 0.3, "code"),
    ]
    assert isinstance(settings.data.mixture[1].path, Url)
    (tmp_path / "printed.yaml").write_text(settings.to_yaml())
    assert load_settings(tmp_path / "printed.yaml") == settings
    assert settings.with_values(data={"seed": 1}).data.mixture == settings.data.mixture


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.mixture=[]", "data.mixture: got []"),
        ("data.mixture=[{path: a, weight: 0, name: x}]", "data.mixture.0.weight: got 0; "),
        ("data.mixture=[{path: a, name: x}]", "data.mixture.0.weight"),
        ("data.mixture=[{path: a, weight: 1, name: 'x/y'}]", "data.mixture.0.name: got 'x/y'"),
        ("data.mixture=[{path: a, wieght: 1, weight: 1, name: x}]", "data.mixture.0.wieght: unknown setting; did you mean 'w"),
        ("data.path=pipe:cat", "data.path: got 'pipe:cat'; expected {} in a pipe"),
        ("data.max_corrupt=-1", "data.max_corrupt: got -1"),
        ("data.on_corrupt=ignore", "data.on_corrupt: got 'ignore'"),
        ("data.cache_bytes=5", "data.cache_bytes: got 5"),
    ],
)
def test_a_wrong_setting_is_named(override, message):
    assert any(problem.startswith(message) for problem in problems(override)), problems(override)


def test_two_sources_of_training_data_are_one_too_many():
    assert "data.mixture: set, and so is data.path; only one of them can be meant" in problems(MIXTURE, "data.path=x")
    assert "data.mixture: set, and so is data.builtin; only one of them can be meant" in problems(MIXTURE, "data.builtin=true")
    twice = MIXTURE.replace("code", "prose")
    assert problems(twice) == ["data.mixture: two sets have the same name; expected different ones, got prose, prose"]


def test_how_data_is_reached_may_change_in_a_run_and_how_much_damage_is_passed_over_may_not():
    def changed(*overrides):
        runs = (load_settings(None, [*QUIET, "data.path=x", *more]) for more in ((), overrides))
        return list(map(str, changed_settings(*map(flatten, runs))))

    assert changed("data.on_corrupt=skip", "data.cache_dir=/tmp", "data.retry_seconds=5", "data.allow_pipe=true") == []
    assert changed("data.max_corrupt=7") == ["data.max_corrupt: was 100, is now 7"]
    assert changed("data.shuffle_block=7") == ["data.shuffle_block: was 1024, is now 7"]
