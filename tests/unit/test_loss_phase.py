"""The loss phase against full logits and autograd written out, whatever was predicted; what it costs in rows and memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.weighting.loss_phase import HeadLosses, chunked_losses, dense_losses, score_tokens
from tests.selecting import Given
from tests.waits import CountWaits

B, T, H, D, V = 2, 20, 3, 4, 100
SCALE = torch.tensor([0.1, 0.7, 0.4])


class Case:
    """Pairs of which some are valid, some of those selected, and any predicted."""

    def __init__(self, seed: int, valid: float = 0.8, selected: float = 0.6, predicted: float = 0.6):
        generator = torch.Generator().manual_seed(seed)

        def some(share: float, *shape: int) -> torch.Tensor:
            return torch.rand(shape, generator=generator) < share

        self.hidden = torch.randn(B, T, H, D, generator=generator, requires_grad=True)
        self.weight = torch.randn(V, D, generator=generator, requires_grad=True)
        self.targets = torch.randint(V, (B, T, H), generator=generator)
        self.valid = some(valid, B, T, H)
        self.selected = some(selected, B, T, H - 1) & self.valid[..., 1:]
        self.predicted = some(predicted, B, T, H - 1)
        self.share = 1.0

    def selector(self, predicts: bool = True) -> Given:
        return Given(self.selected, self.predicted if predicts else None, self.share)

    @property
    def num_valid(self) -> list[int]:
        return self.valid.sum((0, 1)).tolist()

    def losses(self, form: Callable[..., HeadLosses], predicts: bool = True) -> tuple[HeadLosses, list[torch.Tensor]]:
        found = form(self.hidden, self.weight, self.targets, self.valid, self.selector(predicts), SCALE)
        return found, list(torch.autograd.grad(2 * found.loss, (self.hidden, self.weight)))

    def by_hand(self) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """(objective, losses, gradients of twice the objective), in float64."""
        hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (self.hidden, self.weight))
        losses = torch.zeros(B, T, H, dtype=torch.float64)
        objective = torch.zeros((), dtype=torch.float64) * hidden.sum() * weight.sum()
        for b, t, h in self.valid.nonzero().tolist():
            logits = weight @ hidden[b, t, h]
            loss = logits.exp().sum().log() - logits[self.targets[b, t, h]]
            losses[b, t, h] = loss.detach()
            if h == 0 or self.selected[b, t, h - 1]:
                objective = objective + SCALE[h].double() * loss
        return objective.detach(), losses, list(torch.autograd.grad(2 * objective, (hidden, weight)))


def relative_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    difference = sum((a.double() - b).pow(2).sum() for a, b in zip(found, expected, strict=True))
    norm = sum(b.pow(2).sum() for b in expected)
    return float((difference / norm).sqrt()) if norm else float(difference)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    valid=st.sampled_from([0.0, 0.3, 1.0]),
    selected=st.sampled_from([0.0, 0.05, 0.6, 1.0]),
    predicted=st.sampled_from([None, 0.0, 0.6, 1.0]),
    share=st.sampled_from([0.2, 0.6, 1.0]),
)
def test_loss_and_gradient_are_those_of_the_formula_whatever_was_predicted(
    seed: int, valid: float, selected: float, predicted: float | None, share: float
) -> None:
    case = Case(seed, valid, selected, predicted or 0.0)
    case.share = share
    objective, losses, gradients = case.by_hand()
    for form in (chunked_losses, dense_losses):
        found, found_gradients = case.losses(form, predicts=predicted is not None)
        assert found.loss.item() == pytest.approx(objective.item(), rel=1e-5)
        torch.testing.assert_close(found.policy_loss_BTH.double(), losses, rtol=1e-5, atol=1e-5)
        assert not found.policy_loss_BTH.requires_grad
        assert relative_error(found_gradients, gradients) < 1e-5


def test_the_predicted_pairs_are_returned_where_there_is_a_prediction() -> None:
    case = Case(0)
    predicted = case.losses(chunked_losses)[0].predicted_BTK
    assert predicted is not None
    assert torch.equal(predicted, case.predicted & case.valid[..., 1:])
    assert case.losses(chunked_losses, predicts=False)[0].predicted_BTK is None
    assert case.losses(dense_losses)[0].predicted_BTK is None


@pytest.mark.parametrize("predicts", [False, True])
def test_the_same_again_gives_the_same_bits(predicts: bool) -> None:
    case = Case(3)
    (first, first_gradients), (second, second_gradients) = (case.losses(chunked_losses, predicts) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.policy_loss_BTH, second.policy_loss_BTH)
    assert all(torch.equal(a, b) for a, b in zip(first_gradients, second_gradients, strict=True))


def test_what_is_predicted_changes_no_bit_of_a_loss_and_so_none_of_the_selection() -> None:
    case = Case(4)
    with_prediction, without = (case.losses(chunked_losses, predicts)[0] for predicts in (True, False))
    assert torch.equal(with_prediction.policy_loss_BTH, without.policy_loss_BTH)
    assert torch.equal(with_prediction.loss, without.loss)


class Watch(TorchDispatchMode):
    """Notes the shapes of all tensors that operations return, and the rows of every product with the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.product_rows = 0

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(torch.Size(shape).numel() for shape in self.shapes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.shapes.add(tuple(tensor.shape))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm_", "addmm"):
            m, k, n = *args[-2].shape, args[-1].shape[1]
            self.product_rows += m * k * n // (D * V) if {m, k, n} >= {D, V} else 0
        return result


def rows_of_products(case: Case, predicts: bool) -> int:
    with Watch() as watch:
        case.losses(chunked_losses, predicts)
    return watch.product_rows


def test_a_row_costs_one_product_to_score_two_where_there_is_room_for_its_gradient_and_three_to_mend() -> None:
    case = Case(5, valid=1.0)
    positions, selected = B * T, int(case.selected.sum())
    scored, first_head = H * positions, 2 * positions
    assert rows_of_products(case, predicts=False) == scored + first_head + 3 * selected
    case.predicted = case.selected.clone()
    others, chunk = (H - 1) * positions, positions // 4
    assert rows_of_products(case, predicts=True) == scored + first_head + 2 * others
    missed, wrong = case.selected[0, :, 0].nonzero()[0].item(), (~case.selected[1, :, 1]).nonzero()[0].item()
    case.predicted[0, missed, 0], case.predicted[1, wrong, 1] = False, True
    assert rows_of_products(case, predicts=True) == scored + first_head + 2 * others + 3 + 3
    case.share, case.predicted = 0.5, torch.ones_like(case.predicted)
    case.selected = case.predicted.clone()
    assert rows_of_products(case, predicts=True) == scored + first_head + 2 * others // 2 + 3 * others // 2
    assert others % chunk == 0


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("predicts", [False, True])
def test_what_the_host_knows_beforehand_changes_no_bit_and_leaves_one_wait_for_the_device(seed: int, predicts: bool) -> None:
    case = Case(seed, valid=0.7)
    case.share = 0.6
    arguments, num_valid = (case.hidden, case.weight, case.targets, case.valid), case.num_valid
    expected, expected_gradients = case.losses(chunked_losses, predicts)
    with CountWaits() as waits:
        found = chunked_losses(*arguments, case.selector(predicts), SCALE, num_valid)
        gradients = torch.autograd.grad(2 * found.loss, (case.hidden, case.weight))
    assert waits.number == 1
    assert torch.equal(found.policy_loss_BTH, expected.policy_loss_BTH)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients, strict=True))
    with CountWaits() as waits:
        scored = score_tokens(*arguments, num_valid)
    assert waits.number == 0
    assert torch.equal(scored, score_tokens(*arguments))


def test_no_tensor_is_larger_than_a_chunk_of_logits() -> None:
    chunk = B * T // 4 * V
    for predicts in (False, True):
        with Watch() as watch:
            case = Case(7, valid=1.0)
            case.losses(chunked_losses, predicts)
            score_tokens(case.hidden, case.weight, case.targets, case.valid)
        assert watch.largest == chunk


def test_where_autograd_records_nothing_no_gradient_is_made() -> None:
    case = Case(11)
    expected = case.losses(chunked_losses)[0]
    with torch.no_grad(), Watch() as watch:
        found = chunked_losses(case.hidden, case.weight, case.targets, case.valid, case.selector(), SCALE)
    assert watch.product_rows == case.valid.sum()
    assert (V, D) not in watch.shapes
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    torch.testing.assert_close(found.policy_loss_BTH, expected.policy_loss_BTH)
    assert found.predicted_BTK is None


@pytest.mark.parametrize("form", [chunked_losses, dense_losses])
def test_a_loss_that_is_not_finite_is_seen_and_counts_as_zero_in_the_sum(form: Callable[..., HeadLosses]) -> None:
    case = Case(13, valid=1.0)
    case.selected[0, 5, 0] = case.selected[1, 2, 1] = True
    with torch.no_grad():
        case.hidden[0, 5, 1] = torch.nan
        case.hidden[1, 2, 2] = torch.inf
        case.hidden[0, 0, 0] = torch.nan
    found, _ = case.losses(form)
    bad = (~found.policy_loss_BTH.isfinite()).nonzero().tolist()
    assert bad == [[0, 0, 0], [0, 5, 1], [1, 2, 2]]
    taken = torch.cat([case.valid[..., :1], case.selected], dim=-1) & found.policy_loss_BTH.isfinite()
    assert found.loss.item() == pytest.approx((found.policy_loss_BTH * SCALE)[taken].sum().item())


def test_two_passes_ignore_the_prediction() -> None:
    case = Case(5)
    arguments = (case.hidden, case.weight, case.targets, case.valid)
    found = chunked_losses(*arguments, case.selector(), SCALE, predict=False)
    assert found.predicted_BTK is None
    assert torch.equal(found.loss, case.losses(chunked_losses, predicts=False)[0].loss)
