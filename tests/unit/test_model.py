"""The model against plain loops: attention, document boundaries, alignment of heads and labels, initial weights."""

import math

import pytest
import torch
import torch.nn.functional as F

from pipeline.config import ModelSettings
from pipeline.data.loading.batch import targets_and_valid
from pipeline.model.mtp import MTPModel, initialize_weights
from pipeline.model.reference import losses_by_head, reference_columns
from pipeline.model.transformer import document_mask
from pipeline.weighting.selectors import EveryPair
from tests.unit.test_loss_phase import Watch

VOCAB = 29


def small(**changes) -> ModelSettings:
    values = {"dim": 16, "num_layers": 2, "num_attention_heads": 4, "ffn_dim": 24, "vocab_size": VOCAB}
    return ModelSettings(**(values | changes))


def initialized(settings: ModelSettings) -> MTPModel:
    model = MTPModel(settings)
    initialize_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():  # Norms and biases off their neutral values, so that they show.
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Row 0: documents of 5, 1 and 4 tokens, 2 of padding. Row 1: one document. Row 2: padding alone."""
    tokens = torch.randint(VOCAB, (3, 12), generator=torch.Generator().manual_seed(7))
    documents = torch.tensor([[0] * 5 + [1] + [2] * 4 + [-1] * 2, [0] * 12, [-1] * 12], dtype=torch.int32)
    return tokens, documents


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotated(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    half = len(x) // 2
    angles = torch.tensor([position * theta ** (-2 * i / len(x)) for i in range(half)])
    first, second = x[:half], x[half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()])


def block_by_hand(block, x: torch.Tensor, settings: ModelSettings) -> torch.Tensor:
    """One block over one document [tokens, D], position by position and attention head by attention head."""
    attention, eps = block.attention, settings.norm_eps
    heads = settings.num_attention_heads
    kv_heads = settings.num_key_value_heads or heads
    width = settings.dim // heads
    normed = norm(x, block.attention_norm.weight, eps)
    query, key, value = (layer(normed) for layer in (attention.query, attention.key, attention.value))
    attended = torch.zeros(len(x), heads, width)
    for head in range(heads):
        group = head // (heads // kv_heads)
        for t in range(len(x)):
            scores = []
            q = query[t].view(heads, width)[head]
            q = norm(q, attention.query_norm.weight, eps) if settings.qk_norm else q
            for s in range(t + 1):
                k = key[s].view(kv_heads, width)[group]
                k = norm(k, attention.key_norm.weight, eps) if settings.qk_norm else k
                scores.append(rotated(q, t, settings.rope_theta) @ rotated(k, s, settings.rope_theta) / math.sqrt(width))
            shares = torch.stack(scores).softmax(0)
            attended[t, head] = sum(share * value[s].view(kv_heads, width)[group] for s, share in enumerate(shares))
    x = x + attention.output(attended.flatten(1))
    normed = norm(x, block.ffn_norm.weight, eps)
    return x + block.ffn.down(F.silu(block.ffn.gate(normed)) * block.ffn.up(normed))


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 2}, {"attention_bias": True}, {"qk_norm": True}],
    ids=["llama", "grouped", "qwen2", "qwen3"],
)
def test_hidden_states_equal_a_loop_over_each_document_by_itself(changes: dict) -> None:
    settings = small(**changes)
    model = initialized(settings)
    tokens, documents = rows()
    with torch.no_grad():
        hidden = model.hidden_states(tokens, documents)
        for b in range(2):
            for document in range(int(documents[b].max()) + 1):
                places = (documents[b] == document).nonzero().flatten()
                x = block_by_hand(model.trunk[0], model.embed.weight[tokens[b, places]], settings)
                for h in range(4):
                    expected = block_by_hand(model.heads[h], x, settings)
                    torch.testing.assert_close(hidden[b, places, h], expected, rtol=1e-4, atol=1e-5)
    assert hidden.isfinite().all()


def test_a_query_sees_its_document_up_to_itself_and_padding_sees_only_itself() -> None:
    _, documents = rows()
    mask = document_mask(documents)
    for b in range(3):
        for t in range(12):
            for s in range(12):
                same = documents[b, t] == documents[b, s] and documents[b, t] >= 0 and s <= t
                assert mask[b, 0, t, s] == bool(same or s == t)


def losses_by_hand(model: MTPModel, tokens: torch.Tensor, documents: torch.Tensor) -> dict[tuple[int, int, int], torch.Tensor]:
    """(row, position, head) -> cross-entropy of head h at t against token t + 1 + h, valid pairs only."""
    hidden = model.hidden_states(tokens, documents)
    found = {}
    for b in range(tokens.shape[0]):
        for t in range(tokens.shape[1]):
            for h in range(model.settings.num_prediction_heads):
                j = t + 1 + h
                if j >= tokens.shape[1] or documents[b, t] < 0 or documents[b, j] != documents[b, t]:
                    continue
                normed = norm(hidden[b, t, h], model.unembed.norm.weight, model.settings.norm_eps)
                found[b, t, h] = -(model.unembed.weight @ normed).log_softmax(-1)[tokens[b, j]]
    return found


def test_each_head_is_scored_against_the_token_it_predicts() -> None:
    model = initialized(small())
    tokens, documents = rows()
    targets, valid = targets_and_valid(tokens, documents, 4)
    losses = model(tokens, documents, targets, valid)
    expected = losses_by_hand(model, tokens, documents)
    assert {tuple(place) for place in valid.nonzero().tolist()} == set(expected)
    for place, loss in expected.items():
        assert losses[place].item() == pytest.approx(loss.item(), rel=1e-4)
    assert not losses[~valid].any()


@pytest.mark.parametrize("tied", [False, True])
def test_the_objective_and_its_gradient_equal_a_sum_over_pairs_written_by_hand(tied: bool) -> None:
    model = initialized(small(tied_embeddings=tied))
    tokens, documents = rows()
    targets, valid = targets_and_valid(tokens, documents, 4)
    scale = torch.tensor([0.1, 0.7, 0.0, 0.4])

    even = valid[..., 1:] & (torch.arange(12) % 2 == 0)[None, :, None]
    found = model(tokens, documents, targets, valid, EveryPair(even), scale)
    found.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    pairs = losses_by_hand(model, tokens, documents)
    expected = sum(scale[h] * loss for (_, t, h), loss in pairs.items() if h == 0 or t % 2 == 0)
    expected.backward()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
    assert ("unembed.weight" in gradients) != tied
    for place, loss in pairs.items():
        assert found.policy_loss_BTH[place].item() == pytest.approx(loss.item(), rel=1e-4)


def test_nothing_selected_still_reaches_every_parameter() -> None:
    model = initialized(small())
    tokens, documents = rows()
    documents = torch.full_like(documents, -1)
    targets, valid = targets_and_valid(tokens, documents, 4)
    losses = model(tokens, documents, targets, valid, EveryPair(valid[..., 1:]), torch.ones(4))
    losses.loss.backward()
    assert losses.loss.item() == 0.0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_the_reference_is_compared_at_the_token_each_head_predicts() -> None:
    reference = initialized(small(num_prediction_heads=1))
    tokens, documents = rows()
    targets, valid = targets_and_valid(tokens, documents, 4)
    columns = reference_columns(reference, "shifted", tokens, documents, targets, valid)
    found = losses_by_head(columns, "shifted", 4)
    by_hand = losses_by_hand(reference, tokens, documents)
    for b, t, h in valid.nonzero().tolist():
        assert found[b, t, h].item() == pytest.approx(by_hand[b, t + h, 0].item(), rel=1e-4)


def test_no_tensor_as_large_as_all_logits_of_one_head_is_ever_made() -> None:
    settings = small(vocab_size=5000)
    model = initialized(settings)
    tokens, documents = rows()
    targets, valid = targets_and_valid(tokens, documents, 4)
    with Watch() as watch:
        model(tokens, documents, targets, valid, EveryPair(valid[..., 1:]), torch.ones(4)).loss.backward()
        model(tokens, documents, targets, valid)
    assert watch.largest == 5000 * settings.dim < tokens.numel() * 5000


def test_initial_weights_have_the_stated_distribution() -> None:
    settings = ModelSettings(dim=128, num_layers=8, num_attention_heads=4, vocab_size=1000, attention_bias=True)
    model = MTPModel(settings)
    initialize_weights(model)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            residual = name.endswith(("attention.output.weight", "ffn.down.weight"))
            std = 0.02 / math.sqrt(16) if residual else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05)
            assert abs(parameter.mean().item()) < 0.05 * std


def test_initial_weights_depend_on_name_and_seed_alone() -> None:
    deep, shallow, other = (MTPModel(small(**change)) for change in ({"num_layers": 2}, {"num_layers": 3}, {"seed": 1}))
    for model in (deep, shallow, other):
        initialize_weights(model)
    assert torch.equal(deep.embed.weight, shallow.embed.weight)
    assert torch.equal(deep.trunk[0].attention.query.weight, shallow.trunk[0].attention.query.weight)
    assert not torch.equal(deep.embed.weight, other.embed.weight)
    assert not torch.equal(deep.heads[0].ffn.up.weight, deep.heads[1].ffn.up.weight)


def test_one_head_is_an_ordinary_next_token_model() -> None:
    one, four = MTPModel(small(num_prediction_heads=1)), MTPModel(small())
    for model in (one, four):
        initialize_weights(model)
    tokens, documents = rows()
    assert torch.equal(one.hidden_states(tokens, documents)[:, :, 0], four.hidden_states(tokens, documents)[:, :, 0])


def test_a_block_that_trains_on_an_input_without_gradient_is_refused() -> None:
    """Under ZeRO-3 it would train with gradients of zero, in silence."""
    model = initialized(small())
    model.embed.weight.requires_grad_(False)
    tokens, documents = rows()
    with pytest.raises(AssertionError, match="requires_grad_"):
        model.hidden_states(tokens, documents)
    with torch.no_grad():
        model.hidden_states(tokens, documents)
    model.requires_grad_(False)
    model.hidden_states(tokens, documents)
