"""Samples taken while a model trains: the tokens of decoding, the rows of the run's fixed batch, and a file that is cut."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from pipeline.config import Settings
from pipeline.data.loading.mixture import DataSet
from pipeline.data.shards.manifest import read_manifest
from pipeline.data.tokenizer import load_tokenizer
from pipeline.generation.decoding import decode
from pipeline.model.mtp import MTPModel
from pipeline.runtime.logbook import Logbook
from pipeline.runtime.sample_log import SAMPLES_FILE, sample_line, samples_text
from pipeline.samples import Rows, RunTexts, prompts_of
from pipeline.storage.json_lines import read_json_lines
from tests.dense import HEADS, dense_model, settings_for
from tests.ranks import run_ranks
from tests.rows import batch_with

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
NUM_TOKENS = 21


def agreeing_model(num_heads: int = HEADS) -> MTPModel:
    """A model whose heads are almost the first one, so that it accepts some drafts and rejects others."""
    model = dense_model(settings_for(1, 4), num_prediction_heads=num_heads)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
        for head in model.heads[1:]:
            for own, first in zip(head.parameters(), model.heads[0].parameters(), strict=True):
                own.lerp_(first, 0.97)
    return model


def continued(prompts: list[list[int]] = PROMPTS) -> tuple[Any, Any]:
    """On a rank: both ways' tokens, and each row's counts."""
    rows = Rows(agreeing_model(), prompts, NUM_TOKENS, HEADS, torch.device("cpu"))
    with torch.no_grad():
        plain, (speculative, counts) = rows.continue_plainly(), rows.continue_speculatively()
    return plain, (speculative, [(each.steps, each.accepted) for each in counts])


def continued_by_rank(prompts_of_ranks: list[list[list[int]]]) -> tuple[Any, Any]:
    return continued(prompts_of_ranks[torch.distributed.get_rank()])


def decoded(num_drafts: int) -> tuple[list[list[int]], list[tuple[int, list[int]]]]:
    """Each prompt alone, by the decoder of launch/generate.py."""
    of_each = [decode(agreeing_model(), [prompt], [NUM_TOKENS], num_drafts=num_drafts) for prompt in PROMPTS]
    return [completions[0].token_ids for completions, _ in of_each], [(counts.steps, counts.accepted) for _, counts in of_each]


def test_samples_are_the_tokens_that_decoding_makes_and_count_the_same_drafts_on_two_ranks_with_unlike_texts() -> None:
    (plain, _), (speculative, counts) = decoded(0), decoded(HEADS - 1)
    assert any(sum(accepted) for _, accepted in counts)
    assert plain == speculative
    # Another text on the second rank needs another number of steps: both take those of the slower one.
    both = run_ranks(continued_by_rank, 2, [PROMPTS, [PROMPTS[1]]])
    assert both[0][0] == plain
    assert both[0][1][0] == speculative
    # The step in which `decode` reaches the limit counts here as well, but its first token came of the prompt.
    for (steps, accepted), (found_steps, found_accepted) in zip(counts, both[0][1][1], strict=True):
        assert 0 <= found_steps - steps <= 1
        assert all(0 <= found - known <= 1 for found, known in zip(found_accepted, accepted, strict=True))
    assert both[1][0] == plain[1:2]
    assert both[1][1][0] == speculative[1:2]


def test_prompts_are_the_first_halves_of_the_first_rows_documents() -> None:
    tokens = torch.arange(200).reshape(2, 100)
    batch = batch_with(tokens, [[7, 1, 40, 3, 2, 2], [50]])
    assert prompts_of(batch) == [[0, 1, 2], list(range(8, 24)), [48], [51]]
    assert prompts_of(batch_with(tokens, [[], [50]])) == []


SAMPLE = {
    "prompt": "a|<b>",
    "plain": "x\n`y`",
    "plain_ids": [1],
    "self_speculative": None,
    "self_speculative_ids": [7, 8],
    "accepted_per_step": 1.5,
}


def test_samples_of_steps_that_are_trained_again_are_dropped_and_the_others_stay(tmp_path) -> None:
    first = Logbook(tmp_path, 0, 4)
    first.write_samples(2, [SAMPLE | {"step": 2}])
    first.write_samples(4, [SAMPLE | {"step": 4}])
    first.close()
    with (tmp_path / SAMPLES_FILE).open("a") as file:
        file.write('{"step": 4, "torn')
    Logbook(tmp_path, 3, 4).close()
    assert [line.value["step"] for line in read_json_lines(tmp_path / SAMPLES_FILE)] == [2]
    Logbook(tmp_path, 0, 4).close()
    assert read_json_lines(tmp_path / SAMPLES_FILE) == []


def test_a_sample_is_shown_on_a_line_of_its_own_and_without_text_by_its_ids() -> None:
    assert samples_text([SAMPLE, {"prompt": "a", "plain": "b", "plain_ids": [1]}]).splitlines() == [
        "'a|<b>'",
        r"    plain             'x\n`y`'",
        "    self-speculative  7 8 (1.50 tokens a step)",
        "'a'",
        "    plain             'b'",
    ]
    assert sample_line(SAMPLE) == r"'a|<b>' -> 'x\n`y`' (1.50 tokens a step)"


def test_a_tokenizer_that_cannot_be_read_costs_the_texts_and_is_said_once(tmp_path: Path, tiny_data: Path) -> None:
    data = shutil.copytree(tiny_data / "train", tmp_path / "data")
    said: list[str] = []
    stream = SimpleNamespace(sets=[DataSet(data)], manifest=read_manifest(data))
    run: Any = SimpleNamespace(stream=stream, settings=Settings())
    ids = load_tokenizer(data).encode("the cat").ids
    texts = RunTexts(run, said.append)
    assert (texts.of(ids), said) == ("the cat", [])

    (data / "tokenizer.json").write_text('{"version": "9"}')
    texts = RunTexts(run, said.append)
    assert [texts.of(ids), texts.of(ids)] == [None, None]
    (data / "tokenizer.json").unlink()
    assert RunTexts(run, said.append).of(ids) is None
    assert len(said) == 2
    assert all(each.startswith("samples and passages have token ids and no text: ") for each in said)
    assert f"{data}/tokenizer.json cannot be read: " in said[0]
