"""Chunked cross-entropy against torch's own on full logits."""

import math

import pytest
import torch
import torch.nn.functional as F

from pipeline.weighting.cross_entropy import WeightedCrossEntropy, rows_per_chunk, token_losses

N, D, V = 23, 8, 31
EVERY_ROW = torch.arange(N)


class Margins:
    """Predicts these margins, a number a row."""

    def __init__(self, margin: torch.Tensor):
        self.margin_N = margin

    def predicted_margin(self, loss_C: torch.Tensor, rows_C: torch.Tensor) -> torch.Tensor:
        return self.margin_N[rows_C]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    return hidden, weight, targets, torch.rand(N, generator=generator)


def full_logits(taken: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(losses, the gradients of the weighted sum over the rows in `taken`)."""
    hidden, weight, targets, row_weight = inputs()
    losses = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    return losses.detach(), *torch.autograd.grad((row_weight * losses)[taken].sum(), (hidden, weight))


def gathered(taken: torch.Tensor, chunk_rows: int) -> WeightedCrossEntropy:
    sums = WeightedCrossEntropy(*inputs(), chunk_rows)
    sums.score(EVERY_ROW, 1, Margins(taken.float() - 0.5))
    return sums


def some_rows(seed: int) -> torch.Tensor:
    return torch.rand(N, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize("chunk_rows", [1, 5, 20, 23, 100])
def test_losses_and_the_gradients_of_the_rows_taken_equal_full_logits(chunk_rows: int) -> None:
    taken = some_rows(1)
    expected, expected_hidden, expected_weight = full_logits(taken)
    sums = gathered(taken, chunk_rows)
    torch.testing.assert_close(sums.loss_N, expected)
    assert torch.equal(sums.taken_N, taken)
    torch.testing.assert_close(sums.hidden_grad_ND, expected_hidden)
    torch.testing.assert_close(sums.weight_grad_VD, expected_weight)


@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
@pytest.mark.parametrize("wanted", ["others", "all", "none", "the same"])
def test_a_repair_adds_what_was_missed_and_takes_back_what_was_wrong(chunk_rows: int, wanted: str) -> None:
    taken = some_rows(1)
    rows = {"others": some_rows(2), "all": EVERY_ROW >= 0, "none": EVERY_ROW < 0, "the same": taken}[wanted]
    sums = gathered(taken, chunk_rows)
    sums.repair(rows)
    _, expected_hidden, expected_weight = full_logits(rows)
    torch.testing.assert_close(sums.hidden_grad_ND, expected_hidden)
    torch.testing.assert_close(sums.weight_grad_VD, expected_weight, rtol=1e-5, atol=1e-6)
    assert not sums.hidden_grad_ND[~rows].any()


def test_a_repair_of_more_than_there_is_leaves_no_rounding_behind() -> None:
    nothing = EVERY_ROW < 0
    sums = gathered(EVERY_ROW >= 0, 5)
    sums.repair(nothing)
    assert not sums.weight_grad_VD.any()
    assert not sums.hidden_grad_ND.any()


def test_rows_that_are_not_scored_have_no_loss_and_no_gradient() -> None:
    hidden, weight, targets, row_weight = inputs()
    rows = torch.tensor([1, 4, 22])
    sums = WeightedCrossEntropy(hidden, weight, targets, row_weight, 2)
    sums.score(rows, 1, Margins(EVERY_ROW - 2))
    assert sums.loss_N.nonzero().flatten().tolist() == [1, 4, 22]
    assert sums.taken_N.nonzero().flatten().tolist() == [4, 22]
    assert sums.hidden_grad_ND.any(1).nonzero().flatten().tolist() == [4, 22]
    assert token_losses(hidden, weight, targets, rows, 2).tolist() == sums.loss_N.tolist()


@pytest.mark.parametrize("take", [1, 0])
def test_all_rows_or_none_are_taken_without_asking(take: int) -> None:
    sums = WeightedCrossEntropy(*inputs(), 5)
    sums.score(EVERY_ROW, take)
    losses, hidden_grad, weight_grad = full_logits(EVERY_ROW >= 0 if take else EVERY_ROW < 0)
    torch.testing.assert_close(sums.loss_N, losses)
    torch.testing.assert_close(sums.hidden_grad_ND, hidden_grad)
    torch.testing.assert_close(sums.weight_grad_VD, weight_grad)
    assert sums.taken_N.tolist() == [bool(take)] * N


@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("chunk_rows", [5, 23])
def test_of_each_chunk_the_surest_rows_are_taken_as_far_as_there_is_room(share: float, chunk_rows: int) -> None:
    margin = torch.randn(N, generator=torch.Generator().manual_seed(4))
    sums = WeightedCrossEntropy(*inputs(), chunk_rows)
    sums.score(EVERY_ROW, share, Margins(margin))
    num_chunks = math.ceil(N / chunk_rows)
    expected = torch.zeros(N, dtype=torch.bool)
    for first in range(num_chunks):
        rows = range(first, N, num_chunks)
        surest = sorted((row for row in rows if margin[row] >= 0), key=lambda row: -margin[row])
        expected[surest[: math.ceil(share * len(rows))]] = True
    assert torch.equal(sums.taken_N, expected)
    losses, hidden_grad, weight_grad = full_logits(expected)
    torch.testing.assert_close(sums.loss_N, losses)
    torch.testing.assert_close(sums.hidden_grad_ND, hidden_grad)
    torch.testing.assert_close(sums.weight_grad_VD, weight_grad)


def test_whatever_multiplies_the_loss_later_multiplies_both_gradients() -> None:
    taken = some_rows(1)
    hidden, weight, _, _ = inputs()
    _, expected_hidden, expected_weight = full_logits(taken)
    loss = gathered(taken, 5).with_gradients(torch.tensor(2.5), hidden, weight)
    assert loss.item() == 2.5
    hidden_grad, weight_grad = torch.autograd.grad(loss * 3.0, (hidden, weight))
    torch.testing.assert_close(hidden_grad, 3 * expected_hidden)
    torch.testing.assert_close(weight_grad, 3 * expected_weight)


def test_a_second_backward_is_refused_and_not_scaled_twice() -> None:
    hidden, weight, _, _ = inputs()
    loss = gathered(some_rows(1), 5).with_gradients(torch.tensor(2.5), hidden, weight)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward only; compute it again"):
        loss.backward()


def test_half_precision_inputs_give_float32_losses_and_a_weight_gradient_summed_in_float32() -> None:
    hidden, weight, targets, row_weight = inputs(torch.bfloat16)
    sums = WeightedCrossEntropy(hidden, weight, targets, row_weight, 5)
    sums.score(EVERY_ROW, take=1)
    losses = sums.loss_N
    logits = hidden.float() @ weight.float().T
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"))
    assert losses.dtype == sums.weight_grad_VD.dtype == torch.float32
    loss = sums.with_gradients(losses.sum(), hidden, weight)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    logit_grad = row_weight[:, None] * (logits.softmax(-1) - F.one_hot(targets, V))
    torch.testing.assert_close(hidden.grad.float(), logit_grad @ weight.float(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(weight.grad.float(), logit_grad.T @ hidden.float(), rtol=0.02, atol=0.02)


def test_a_chunk_is_at_most_a_quarter_of_the_rows() -> None:
    assert rows_per_chunk(1024, 32) == 256
    assert rows_per_chunk(2, 32) == 1
    assert rows_per_chunk(10**6, 32_000) * 32_000 <= 2**24
    assert 2**27 < rows_per_chunk(10**6, 32_000, "cuda") * 32_000 <= 2**28
