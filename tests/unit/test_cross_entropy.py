"""Chunked cross-entropy against torch's own on full logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.weighting.cross_entropy import rows_per_chunk, token_losses, weighted_cross_entropy

N, D, V = 23, 8, 31


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, requires_grad=True)
    targets = torch.randint(V, (N,), generator=generator)
    return hidden, weight, targets, torch.rand(N, generator=generator)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


@pytest.mark.parametrize("chunk_rows", [1, 5, 23, 100])
def test_losses_and_gradients_equal_full_logits(chunk_rows: int) -> None:
    hidden, weight, targets, row_weight = inputs()
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    (expected_hidden, expected_weight) = torch.autograd.grad((row_weight * expected).sum(), (hidden, weight))

    total, losses = weighted_cross_entropy(hidden, weight, targets, row_weight, chunk_rows)
    (found_hidden, found_weight) = torch.autograd.grad(total, (hidden, weight))

    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(total, (row_weight * expected).sum())
    torch.testing.assert_close(found_hidden, expected_hidden)
    torch.testing.assert_close(found_weight, expected_weight)
    torch.testing.assert_close(token_losses(hidden, weight, targets, chunk_rows), expected)


def test_whatever_multiplies_the_loss_later_multiplies_both_gradients() -> None:
    hidden, weight, targets, row_weight = inputs()
    once = torch.autograd.grad(weighted_cross_entropy(hidden, weight, targets, row_weight, 5)[0], (hidden, weight))
    total, _ = weighted_cross_entropy(hidden, weight, targets, row_weight, 5)
    thrice = torch.autograd.grad(total * 3.0, (hidden, weight))
    torch.testing.assert_close(thrice[0], 3 * once[0])
    torch.testing.assert_close(thrice[1], 3 * once[1])


def test_no_rows_give_a_loss_of_zero_and_gradients_of_zeros() -> None:
    hidden, weight, targets, row_weight = inputs()
    total, losses = weighted_cross_entropy(hidden[:0], weight, targets[:0], row_weight[:0], 5)
    hidden_grad, weight_grad = torch.autograd.grad(total, (hidden, weight))
    assert total.item() == 0.0
    assert losses.shape == (0,)
    assert not hidden_grad.any()
    assert weight_grad.shape == weight.shape
    assert not weight_grad.any()


def test_half_precision_inputs_give_float32_losses() -> None:
    hidden, weight, targets, row_weight = inputs()
    total, losses = weighted_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets, row_weight, 5)
    expected = F.cross_entropy((hidden.bfloat16() @ weight.bfloat16().T).float(), targets, reduction="none")
    assert losses.dtype == total.dtype == torch.float32
    torch.testing.assert_close(losses, expected)


def test_a_loss_that_is_not_finite_counts_as_zero_in_the_sum() -> None:
    hidden, weight, targets, row_weight = inputs()
    with torch.no_grad():
        hidden[3] = torch.nan
        total, losses = weighted_cross_entropy(hidden, weight, targets, row_weight, 5)
    assert losses.isnan().nonzero().flatten().tolist() == [3]
    torch.testing.assert_close(total, (row_weight * losses)[losses.isfinite()].sum())


def test_no_tensor_is_larger_than_a_chunk_of_logits() -> None:
    hidden, weight, targets, row_weight = inputs()
    with LargestTensor() as largest:
        total, _ = weighted_cross_entropy(hidden, weight, targets, row_weight, 9)
        total.backward()
        token_losses(hidden, weight, targets, 9)
    assert largest.num_elements == 9 * V


def test_a_chunk_is_at_most_a_quarter_of_the_rows() -> None:
    assert rows_per_chunk(1024, 32) == 256
    assert rows_per_chunk(2, 32) == 1
    assert rows_per_chunk(10**6, 32_000) * 32_000 <= 2**24
