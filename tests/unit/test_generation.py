"""Decoding: plain is the model's own choice, self-speculative the same token for token, or the same distribution."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.generation.decoding import decode
from pipeline.generation.sampling import Sampling, verify
from pipeline.model.mtp import MTPModel
from tests.saved_models import model_of

VOCAB = 23
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9]]


def dense_logits(model: MTPModel, tokens: list[int]) -> Tensor:
    """Head 0's logits after these tokens, from a whole forward without a cache."""
    hidden = model.hidden_states(torch.tensor([tokens]), torch.zeros(1, len(tokens), dtype=torch.int32))[0, -1, 0]
    return model.unembed.norm(hidden) @ model.unembed.weight.T


def greedy_by_hand(model: MTPModel, prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            tokens.append(int(dense_logits(model, tokens).argmax()))
    return tokens[len(prompt) :]


def with_agreeing_heads(model: MTPModel) -> MTPModel:
    """Heads alike: now and then a draft is what head 0 chooses."""
    with torch.no_grad():
        for head in list(model.heads)[1:]:
            for parameter, first in zip(head.parameters(), model.heads[0].parameters(), strict=True):
                parameter.copy_(0.9 * first + 0.1 * parameter)
    return model


CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "grouped": {"num_key_value_heads": 1, "tied_embeddings": True},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 6},
    "one layer": {"num_layers": 1},
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_greedy_tokens_are_those_of_whole_forwards_whatever_drafts_them(name, num_drafts) -> None:
    model = with_agreeing_heads(model_of(VOCAB, seed=3, **CHANGES[name]))
    limits = [17, 9, 12]
    completions, counts = decode(model, PROMPTS, limits, num_drafts=num_drafts)
    expected = [greedy_by_hand(model, prompt, limit) for prompt, limit in zip(PROMPTS, limits, strict=True)]
    assert [completion.token_ids for completion in completions] == expected
    assert len(counts.accepted) == num_drafts


def test_drafts_that_are_right_are_accepted_and_counted() -> None:
    """A model whose every head says the same token: all drafts are right."""
    model = model_of(VOCAB, seed=1)
    with torch.no_grad():
        model.unembed.weight.zero_()
        model.unembed.weight[7] = 1.0
        model.unembed.norm.weight.fill_(1.0)
        for block in (*model.trunk, *model.heads):
            block.attention.output.weight.zero_()
            block.ffn.down.weight.zero_()
        model.embed.weight.fill_(1.0)
    (completion,), counts = decode(model, [[1]], [13], num_drafts=3)
    assert completion.token_ids == [7] * 13
    assert (counts.steps, counts.accepted, counts.accepted_per_step, counts.acceptance) == (3, [3, 3, 3], 4.0, [1.0, 1.0, 1.0])
    _, plain = decode(model, [[1]], [13])
    assert (plain.steps, plain.accepted_per_step) == (12, 1.0)


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_a_stop_token_ends_its_row_alone_and_is_its_last(num_drafts) -> None:
    model = with_agreeing_heads(model_of(VOCAB, seed=3))
    whole = [greedy_by_hand(model, prompt, 12) for prompt in PROMPTS]
    stop = whole[0][4]
    completions, _ = decode(model, PROMPTS, [12] * 3, frozenset([stop]), num_drafts=num_drafts)
    for completion, tokens in zip(completions, whole, strict=True):
        ends = tokens.index(stop) + 1 if stop in tokens else 12
        assert completion.token_ids == tokens[:ends]
        assert completion.finish == ("stop" if stop in tokens else "length")


def test_tokens_are_told_of_as_they_come() -> None:
    model, heard = model_of(VOCAB), {0: [], 1: [], 2: []}
    completions, _ = decode(model, PROMPTS, [6, 1, 4], num_drafts=2, listener=lambda row, ids: heard[row].extend(ids))
    assert [completion.token_ids for completion in completions] == list(heard.values())


def test_the_same_seed_draws_the_same_tokens() -> None:
    model, sampling = model_of(VOCAB), Sampling(temperature=1.0)
    drawn = [decode(model, PROMPTS, [8] * 3, sampling=sampling, num_drafts=3, seed=seed)[0] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def chi_squared(counts: Tensor, expected: Tensor) -> float:
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("sampling", [Sampling(0.8), Sampling(1.3, top_p=0.7)])
@pytest.mark.parametrize("num_drafts", [0, 3])
def test_sampled_tokens_have_the_distribution_of_head_0_whatever_drafts_them(sampling, num_drafts) -> None:
    """Three tokens after a prompt, drawn many times at once, against their exact probabilities (chi-squared)."""
    vocab, rows, length, prompt = 4, 6000, 3, [2, 0]
    model = with_agreeing_heads(model_of(vocab, seed=5))
    exact = torch.zeros(vocab**length)
    with torch.no_grad():
        for number, tokens in enumerate(itertools.product(range(vocab), repeat=length)):
            probability = 1.0
            for place, token in enumerate(tokens):
                logits = dense_logits(model, [*prompt, *tokens[:place]])
                probability *= sampling.probabilities(logits)[token].item()
            exact[number] = probability
    assert exact.sum() == pytest.approx(1.0, abs=1e-5)

    completions, counts = decode(model, [prompt] * rows, [length] * rows, sampling=sampling, num_drafts=num_drafts, seed=11)
    drawn = torch.tensor([completion.token_ids for completion in completions])
    numbers = (drawn * torch.tensor([vocab**2, vocab, 1])).sum(1)
    found = numbers.bincount(minlength=vocab**length)
    possible = exact > 0
    assert found[~possible].sum() == 0
    # With up to 63 degrees of freedom one run in a million is above 125.
    assert chi_squared(found[possible].float(), exact[possible] * rows) < 125
    assert num_drafts == 0 or 0.2 < counts.acceptance[0] < 1


def test_a_draft_is_replaced_so_that_every_token_has_its_probability() -> None:
    """One draft, all distributions known: accepted as often as p and q overlap."""
    p, q, rows = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.1, 0.1, 0.2, 0.6]), 20_000
    generator = torch.Generator().manual_seed(2)
    drafts = torch.multinomial(q, rows, replacement=True, generator=generator)[:, None]
    after = torch.tensor([0.0, 0.0, 0.0, 1.0])
    accepted, following = verify(torch.stack([p, after]).repeat(rows, 1, 1), q.repeat(rows, 1, 1), drafts, generator)
    assert accepted.float().mean().item() == pytest.approx(torch.minimum(p, q).sum().item(), abs=0.02)
    assert (following[accepted == 1] == 3).all()
    chosen = torch.where(accepted == 1, drafts[:, 0], following)
    assert chi_squared(chosen.bincount(minlength=4)[:3].float(), p[:3] * rows) < 30
    assert (chosen != 3).all()


def test_the_nucleus_is_the_smallest_set_with_the_probability() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]).log()
    found = Sampling(1.0, top_p=0.7).probabilities(logits)
    torch.testing.assert_close(found, torch.tensor([[2 / 3, 1 / 3, 0, 0], [0, 0, 3 / 7, 4 / 7]]))
    assert torch.equal(Sampling(1.0, top_p=1e-9).probabilities(logits), Sampling(0.0).probabilities(logits))


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-6])
def test_at_the_least_temperature_the_likeliest_token_is_drawn(temperature) -> None:
    logits = torch.tensor([[3.0e4, -1.0e4, 2.9e4], [0.5, 0.7, 0.6]])
    assert torch.equal(Sampling(temperature).probabilities(logits), Sampling(0.0).probabilities(logits))
    assert torch.allclose(Sampling(1e308).probabilities(logits), torch.full((2, 3), 1 / 3))
