"""External scores: rows go out to be scored; what comes back is bound to the tokens that it scores, or refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.errors import DataError
from pipeline.data.shards.external_scores import export_rows, import_scores
from pipeline.data.shards.manifest import read_manifest
from pipeline.data.shards.reference_losses import (
    CachedLosses,
    ReferenceLosses,
    data_fingerprint,
    read_losses_manifest,
)
from tests.data_sets import numbered_data
from tests.forked import run_script

ROWS, TOKENS = 25, 4


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows of three tokens and one of padding, in three shards."""
    return numbered_data(tmp_path / "data", ROWS)


def scores_of(rows: list[dict[str, Any]]) -> np.ndarray:
    """A score that says of which token it is, and NaN of padding."""
    scores = np.array([row["tokens"] for row in rows], np.float32) / 8
    scores[:, TOKENS - 1] = np.nan
    return scores


def exported(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in export_rows(data)]


def kept(data: Path, cache: Path) -> np.ndarray:
    """What training reads, [rows, T], in the manifest's order."""
    manifest = read_manifest(data)
    losses = read_losses_manifest(cache, data_fingerprint((data / "manifest.json").read_bytes()), "data")
    reader = ReferenceLosses(CachedLosses(cache, losses), manifest)
    found = [reader.read(shard, row)[:, 0] for shard, of in enumerate(manifest.shards) for row in range(of.samples)]
    reader.close()
    return np.stack(found)


def lines(rows: list[dict[str, Any]], scores: np.ndarray) -> list[str]:
    values = [[None if np.isnan(each) else each for each in row] for row in scores.tolist()]
    return [json.dumps({"key": row["key"], "scores": value}) for row, value in zip(rows, values, strict=True)]


def test_exported_rows_are_the_tokens_in_the_manifests_order(data) -> None:
    rows = exported(data)
    assert [row["tokens"] for row in rows] == [[10 * number + token for token in range(TOKENS)] for number in range(ROWS)]
    assert all(row["documents"] == [TOKENS - 1] for row in rows)
    assert len({row["key"] for row in rows}) == ROWS


def test_both_forms_give_each_token_its_own_score_whatever_the_order_of_lines(data, tmp_path) -> None:
    rows = exported(data)
    scores = scores_of(rows)
    np.save(tmp_path / "scores.npy", scores)
    (tmp_path / "scores.jsonl").write_text("\n".join(reversed(lines(rows, scores))))
    expected = np.nan_to_num(scores)
    found = []
    for name in ("scores.npy", "scores.jsonl"):
        cache = tmp_path / f"cache of {name}"
        folder = import_scores(tmp_path / name, data, cache)
        assert import_scores(tmp_path / name, data, cache) == folder
        assert np.array_equal(kept(data, cache), expected)
        found.append(json.loads((folder / "manifest.json").read_text()) | {"reference": ""})
    assert found[0] == found[1]
    assert found[0]["horizon"] == "external"


def test_other_scores_have_another_identity_and_are_not_written_over_the_first(data, tmp_path) -> None:
    scores = np.nan_to_num(scores_of(exported(data)))
    np.save(tmp_path / "scores.npy", scores)
    folder = import_scores(tmp_path / "scores.npy", data, tmp_path / "cache")
    scores[7, 1] += 1
    np.save(tmp_path / "scores.npy", scores)
    with pytest.raises(DataError, match=r"was made with other settings \(reference_sha256\)"):
        import_scores(tmp_path / "scores.npy", data, tmp_path / "cache")
    content = (
        bytearray((folder / "shard-000000.tar.losses").read_bytes()) if (folder / "shard-000000.tar.losses").is_file() else None
    )
    assert content is None or len(content) == 11 * TOKENS * 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda scores: scores[1:], r"expected float32 \[25, 4\], .*got float32 \[24, 4\]"),
        (lambda scores: scores.astype(np.float64), "got float64"),
        (lambda scores: scores[:, :3], r"got float32 \[25, 3\]"),
        (lambda scores: np.where(scores == 170 / 8, np.inf, scores), r"that is not finite of sample .*, token 0: inf"),
    ],
)
def test_an_array_of_another_form_or_with_numbers_that_are_not_finite_is_refused(data, tmp_path, change, said) -> None:
    np.save(tmp_path / "scores.npy", change(scores_of(exported(data))).astype(None or change(np.ones((25, 4), "f4")).dtype))
    with pytest.raises(DataError, match=said):
        import_scores(tmp_path / "scores.npy", data, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: lines[:-2], "no scores of 2 of the 25 rows, the first of them shard"),
        (lambda lines: [*lines, lines[3]], "line 26: the row 'shard.*' was there before"),
        (lambda lines: [*lines, '{"key": "shard-9/1", "scores": [1, 2, 3, 4]}'], "line 26: the data has no row 'shard-9/1'"),
        (
            lambda lines: [lines[0].replace("null", "1, 2"), *lines[1:]],
            "line 1: expected 4 numbers as scores, .* got 5 entries",
        ),
        (lambda lines: [lines[0].replace("null", '"2"'), *lines[1:]], "line 1: expected 4 numbers as scores"),
        (lambda lines: [lines[0].replace("null", "true"), *lines[1:]], "line 1: expected 4 numbers as scores"),
        (lambda lines: [lines[0].replace("0.125", "1e39"), *lines[1:]], "not finite of sample .*, token 1: inf"),
        (lambda lines: [lines[0].replace("0.125", "null"), *lines[1:]], "not finite of sample .*, token 1: nan"),
        (lambda lines: ["[1, 2]", *lines], "line 1: expected {"),
    ],
)
def test_lines_that_do_not_give_each_row_its_numbers_are_refused(data, tmp_path, change, said) -> None:
    rows = exported(data)
    (tmp_path / "scores.jsonl").write_text("\n".join(change(lines(rows, scores_of(rows)))))
    with pytest.raises(DataError, match=said):
        import_scores(tmp_path / "scores.jsonl", data, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_commands_carry_rows_out_and_scores_in(data, tmp_path) -> None:
    out = run_script("shards.py", "export-rows", data, "--output", tmp_path / "rows.jsonl")
    assert (out.returncode, out.stdout) == (0, "")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    (tmp_path / "scores.jsonl").write_text("\n".join(lines(rows, scores_of(rows))))
    given = ("--import", tmp_path / "scores.jsonl", "--output", tmp_path / "cache")
    done = run_script("score.py", *given, "--data", data)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{data}: external scores in {tmp_path / 'cache'}")
    assert np.array_equal(kept(data, tmp_path / "cache"), np.nan_to_num(scores_of(rows)))

    nowhere = run_script("score.py", *given)
    assert nowhere.returncode == 2
    assert "--data: not set, and the recipe names no data.path" in nowhere.stderr
