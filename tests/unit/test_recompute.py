"""Activation checkpointing: the same gradient to the bit, for the work that each kind says."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.data.loading.batch import Spans
from pipeline.model.mtp import MTPModel, initialize_weights
from pipeline.model.recompute import block_runner
from pipeline.model.transformer import flash_attention
from tests.unit.test_model import rows, small

PRODUCTS = {"mm", "addmm", "bmm", "_varlen_attn"}


class Products(TorchDispatchMode):
    """Counts matrix products and attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[1]
        self.count += name in PRODUCTS or (name.startswith("_scaled_dot_product") and "backward" not in name)
        return function(*args, **(kwargs or {}))


def gradients_and_products(kind: str) -> tuple[dict[str, torch.Tensor], int, int]:
    """Gradients of a sum over all heads' hidden states, and the products that forward and backward ran."""
    model = MTPModel(small(num_layers=3), kind)
    initialize_weights(model)
    with Products() as forward:
        total = model.hidden_states(*rows()).square().sum()
    with Products() as backward:
        total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return gradients, forward.count, backward.count


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_the_gradient_is_the_same_to_the_bit(kind: str) -> None:
    expected, *_ = gradients_and_products("none")
    found, *_ = gradients_and_products(kind)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_selective_runs_no_product_twice_and_full_runs_all_but_the_last_of_each_block() -> None:
    _, forward, backward = gradients_and_products("none")
    assert gradients_and_products("selective")[1:] == (forward, backward)
    blocks = 2 + 4  # Two of the trunk, four heads; what a block's last product gives is needed by nobody.
    assert gradients_and_products("full")[1:] == (forward, backward + forward - blocks)


@pytest.mark.parametrize(("kind", "again"), [("none", 0), ("selective", 0), ("full", 1)])
def test_flash_attention_over_spans_is_kept_as_a_product_is(kind: str, again: int) -> None:
    """On meta tensors, for which torch's operation knows shapes on any machine."""
    query, key, value = (torch.empty(1, 8, 4, 8, device="meta", requires_grad=True) for _ in range(3))
    spans = Spans(torch.empty(3, dtype=torch.int32, device="meta"), 5)

    def block(*inputs: torch.Tensor) -> torch.Tensor:
        return flash_attention(*inputs, spans).square()

    with Products() as forward:
        attended = block_runner(kind)(block, query, key, value)
    with Products() as backward:
        attended.sum().backward()
    assert (forward.count, backward.count) == (1, again)


class Gathering(torch.nn.Module):
    """A block that on the way, and more often each time it runs, does what gathering a partitioned weight takes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)
        self.times = 0

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        self.times += 1
        with torch.no_grad():
            for _ in range(self.times):
                torch.cat([self.inner.weight, self.inner.weight]).mul_(2)
        return self.inner(x_BD.tanh()).exp()


def test_a_second_forward_may_gather_weights_in_other_portions_than_the_first() -> None:
    torch.manual_seed(0)
    block, x_BD = Gathering(), torch.randn(4, 8)
    expected = torch.autograd.grad(block(x_BD).sum(), block.inner.weight)[0]
    block.times = 0
    found = torch.autograd.grad(block_runner("selective")(block, x_BD).sum(), block.inner.weight)[0]
    assert block.times == 2
    assert torch.equal(found, expected)
