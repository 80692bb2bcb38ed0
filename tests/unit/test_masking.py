"""Secrets in URLs and commands: masked wherever a location is formatted, written or compared, and used where data is read."""

import argparse
import copy
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ConfigError, Settings
from pipeline.options import path_argument
from pipeline.recipe import load_settings
from pipeline.runtime.identity import changed_settings, flatten
from pipeline.storage.location import Url, parse_location
from pipeline.storage.masking import masked, masked_answer, masked_text, masked_values

SECRETS = {
    "s3://KEY:sec/ret+x@bucket/dir": "s3://***@bucket/dir",
    "https://user:p@ss'word@host/a": "https://***@host/a",
    "https://token@host/a?X-Amz-Signature=abc&X-Amz-Date=1": "https://***@host/a?X-Amz-Signature=***&X-Amz-Date=***",
    "https://host/a?token": "https://host/a?***",
    "https://host/a?token&sv=b#access_token=c": "https://host/a?***&sv=***#access_token=***",
    "az://container/a?sig=AB%3D==&se=2": "az://container/a?sig=***&se=***",
    "zip://a.tar::https://user:word@host/b": "zip://***@host/b",
    "pipe:curl -H 'Authorization: Bearer abc' https://host/{}": "pipe:curl ***",
    "pipe:TOKEN=abc curl https://host/{}": "pipe:*** ***",
    # A key from a file, with its line break; a command of several lines.
    "s3://KEY:abc\n@bucket/dir": "s3://***@bucket/dir",
    "https://host/a?sig=abc\nabc&b": "https://host/a?sig=***&***",
    "pipe:curl \\\n  -H 'Bearer abc' \\\n  https://host/{}": "pipe:curl ***",
}
OPEN = [
    "pipe:cat",
    "got 'pipe:cat'",
    "https://host:8080/a/b.tar",
    "s3://bucket/a",
    "memory://a",
    "no URL, a@b.c: ok? yes=no",
    "authorization is no header here, nor is a bearer; hf_model, sk-learn, AKIA and training.key=3 are no keys",
    "data/mix",
    "",
]


@pytest.mark.parametrize(("location", "expected"), SECRETS.items())
def test_what_may_be_a_secret_is_masked_once_and_the_rest_remains(location: str, expected: str) -> None:
    assert masked(location) == expected
    assert masked(expected) == masked_text(expected) == expected
    assert masked(f"data.path={location}") == f"data.path={expected}"


@pytest.mark.parametrize("text", OPEN)
def test_what_holds_no_secret_remains(text: str) -> None:
    assert masked(text) == masked_text(text) == text


KEYS = {
    "hf_abcdefghijKLMNOP": "***",
    "the key AKIAIOSFODNN7EXAMPLE is unknown": "the key *** is unknown",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc_def-g": "***",
    "sent Authorization: Bearer abc.def-ghi/jk= twice": "sent Authorization: Bearer *** twice",
    "'authorization: Basic dXNlcjp3b3Jk'": "'authorization: Basic ***'",
    "AWS_SECRET_ACCESS_KEY=abc/def+ghi HF_TOKEN=x run": "AWS_SECRET_ACCESS_KEY=*** HF_TOKEN=*** run",
}


@pytest.mark.parametrize(("text", "expected"), KEYS.items())
def test_keys_and_tokens_of_known_form_are_masked_wherever_they_stand(text: str, expected: str) -> None:
    assert masked(text) == masked_text(text) == expected
    assert masked(expected) == masked_text(expected) == expected


def test_what_a_command_says_repeats_none_of_its_words_but_the_file_that_it_was_to_give() -> None:
    command = "curl -H Authorization: Bearer zq7word https://u:zq8word@host/data/a.tar -o '/tmp/zq9 word'"
    for said in ("Could not resolve host: zq7word", "curl: (3) https://u:zq8word@host/data/a.tar: bad", "no /tmp/zq9 here"):
        shown = masked_answer(said, command, "a.tar")
        assert "zq" not in shown
        assert "***" in shown
    assert masked_answer("cat: /data/a.tar: No such file or directory", "cat /data/a.tar", "a.tar").endswith(
        "/data/a.tar: No such file or directory"
    )


def test_urls_in_a_message_are_masked_and_the_message_remains() -> None:
    message = "rank 1: s3://K:S@b/a.tar, then 'https://h/x?sig=abc' failed; see https://h/y and write to me@host"
    expected = "rank 1: s3://***@b/a.tar, then 'https://h/x?sig=***' failed; see https://h/y and write to me@host"
    assert masked_text(message) == expected
    url = Url("https://user:word@host/a?sig=abc")
    assert masked_text(f"{url}: not there; mend it") == "https://***@host/a?sig=***: not there; mend it"
    pipe = Url("pipe:cat secret/{}")
    assert masked_text(f"{pipe}: not run; mend it") == "pipe:cat ***: not run; mend it"
    assert masked_text(f"{pipe / 'a.tar'}: not run; mend it") == "pipe:cat *** a.tar: not run; mend it"


PART = st.text(st.characters(codec="ascii", exclude_characters="\n\r@"), min_size=6, max_size=12).map(lambda text: f"Zq{text}")


@given(user=PART, word=PART, value=PART)
def test_no_password_and_no_value_of_a_query_passes(user: str, word: str, value: str) -> None:
    shown = masked(f"s3://K{user.translate(str.maketrans('', '', '/?#:'))}:{word}@bucket/dir?sig={value}")
    assert word not in shown
    assert value not in shown


@pytest.mark.parametrize("location", SECRETS)
def test_a_location_shows_no_secret_and_keeps_it_for_reading(location: str) -> None:
    url = parse_location(location)
    assert isinstance(url, Url)
    for shown in (str(url), f"{url}", f"{url:>3}", repr([url]), str(FileNotFoundError(2, "gone", str(url)))):
        assert SECRETS[location].replace("'", "") in shown.replace("'", "")
        assert "abc" not in shown
    for same in (url, pickle.loads(pickle.dumps(url)), copy.deepcopy(url), parse_location(url)):
        assert (same.raw, type(same.raw)) == (location, str)
    joined = url / "x.tar"
    assert str(pickle.loads(pickle.dumps(joined))) == str(copy.copy(joined)) == str(joined)
    assert "x.tar" in str(joined)
    assert (url / "x.tar").raw != str(url / "x.tar")


def test_settings_are_written_and_compared_without_secrets_and_read_with_them(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"

    def settings(secret: str) -> Settings:
        recipe.write_text(
            f"data:\n  mixture:\n    - {{path: 's3://K:{secret}@b/a', weight: 1, name: a}}\n"
            f"    - {{path: 'pipe:T={secret} cat a/{{}}', weight: 1, name: b}}\n"
            f"  validation_path: {{web: 'https://h/a?sig={secret}'}}\n  allow_pipe: true\n"
            "training: {k_percent: 1}\n",
            encoding="utf-8",
        )
        return load_settings(recipe)

    one, other = settings("abcabc"), settings("defdef")
    assert one.data.mixture is not None
    assert isinstance(one.data.mixture[0].path, Url)
    assert one.data.mixture[0].path.raw == "s3://K:abcabc@b/a"
    assert one.with_values(training={"steps": 3}).data.validation_path == {"web": "https://h/a?sig=abcabc"}
    assert "abcabc" not in one.to_yaml() + repr(one) + json.dumps(flatten(one))
    assert changed_settings(flatten(one), flatten(other)) == []

    # An identity that an older program saved holds them, and is compared masked as well.
    older = flatten(one) | {"training.note": "s3://K:abcabc@b/a"}
    now = flatten(other) | {"training.note": "s3://K:defdef@b/a"}
    assert changed_settings(older, now) == []
    (change,) = changed_settings(older, now | {"training.note": "s3://K:defdef@c/a"})
    assert str(change) == "training.note: was 's3://***@b/a', is now 's3://***@c/a'"


@pytest.mark.parametrize(
    "override",
    [
        "data.path=pipe:curl -H abcabc",
        "data.validation_path={'a b': 's3://K:abcabc@b/c'}",
        "data.mixture=[{path: 's3://K:abcabc@b/c', weight: none, name: a}]",
        "data.pathh=https://u:abcabc@host/x",
        "data.path={'s3://K:abcabc@b",
        "datapath=s3://K:abcabc@b",
        # What must be a path on this machine would lose a slash, and no longer look like a URL.
        "model.pretrained=s3://K:abcabc@b",
        "data.cache_dir=https://h/x?sig=abcabc",
    ],
)
def test_a_setting_that_is_refused_shows_no_secret(override: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_settings(None, [override, "training.k_percent=1"])
    assert "abcabc" not in str(raised.value)


def test_an_option_that_must_be_a_path_refuses_a_url_and_does_not_show_it() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"^expected a path on this machine, got a URL \(s3://…\)$"):
        path_argument("s3://K:abcabc@b/c")
    assert path_argument("a:b/c") == Path("a:b/c")


def test_values_are_masked_wherever_they_lie_in_a_json_value() -> None:
    value = {"command": ["train.py", "data.path=s3://K:S@b"], "number": 3, "none": None, "deep": {"a": [{"b": "https://h?t"}]}}
    assert masked_values(value) == {
        "command": ["train.py", "data.path=s3://***@b"],
        "number": 3,
        "none": None,
        "deep": {"a": [{"b": "https://h?***"}]},
    }
