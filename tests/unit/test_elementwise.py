"""The functions between a block's products, eager and compiled."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline.config import ModelSettings
from pipeline.model.elementwise import EAGER, CompiledIfPossible, elementwise_for, gated, rotate
from pipeline.model.transformer import rotary_angles

ROWS, TOKENS, HEADS, WIDTH = 2, 9, 3, 8
SETTINGS = ModelSettings(dim=HEADS * WIDTH, num_layers=1, num_attention_heads=HEADS, vocab_size=4)
ANGLES = rotary_angles(TOKENS, SETTINGS, torch.device("cpu"))


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_rotating_multiplies_pairs_by_complex_numbers_of_length_one() -> None:
    x = drawn(ROWS, TOKENS, HEADS, WIDTH)
    frequencies = torch.tensor([SETTINGS.rope_theta ** (-2 * i / WIDTH) for i in range(WIDTH // 2)])
    turns = torch.polar(torch.ones(()), torch.arange(TOKENS)[:, None, None] * frequencies)
    turned = torch.complex(x[..., : WIDTH // 2], x[..., WIDTH // 2 :]) * turns
    torch.testing.assert_close(rotate(x, ANGLES), torch.cat([turned.real, turned.imag], dim=-1))


def test_half_precision_is_rounded_once() -> None:
    x = drawn(ROWS, TOKENS, HEADS, WIDTH).bfloat16()
    assert torch.equal(rotate(x, ANGLES), rotate(x.float(), ANGLES).bfloat16())


def test_they_are_compiled_on_cuda_alone_and_where_nobody_watches_operations() -> None:
    def compiled(*arguments: str) -> bool:
        return isinstance(elementwise_for(*arguments).rotate, CompiledIfPossible)

    assert compiled("auto", "none", "cuda")
    assert compiled("auto", "full", "cuda")
    assert not compiled("auto", "selective", "cuda")
    assert not compiled("auto", "none", "cpu")
    assert elementwise_for("off", "none", "cuda") is EAGER


@pytest.mark.slow
def test_compiled_they_give_the_same_values_and_gradients() -> None:
    for function, inputs in [
        (rotate, (drawn(ROWS, TOKENS, HEADS, WIDTH), ANGLES)),
        (gated, (drawn(ROWS, TOKENS, 16), drawn(TOKENS, 16))),
    ]:
        answers = []
        for way in (function, CompiledIfPossible(function)):
            leaf = inputs[0].clone().requires_grad_()
            found = way(leaf, *inputs[1:])
            (gradient,) = torch.autograd.grad(found.square().sum(), leaf)
            answers.append((found.detach(), gradient))
        torch.testing.assert_close(answers[1], answers[0])


def test_where_nothing_can_be_compiled_they_run_as_they_are_and_it_is_said_once() -> None:
    def no_compiler(*arguments: Any) -> Any:
        raise RuntimeError("Failed to find C compiler")

    run = CompiledIfPossible(gated, backend=no_compiler)
    gate, up = drawn(4, 16), drawn(4, 16)
    with pytest.warns(UserWarning, match="gated runs uncompiled, and slower: .*C compiler") as warned:
        found = run(gate, up)
    assert torch.equal(found, F.silu(gate) * up)
    assert len(warned) == 1
    assert torch.equal(run(gate, up), found)


def test_more_kinds_of_input_than_torchs_own_limit_are_compiled() -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    run = CompiledIfPossible(gated, backend=backend)
    for width in range(2, 14):
        run(drawn(3, width), drawn(3, width))
    assert len(compiled) == 12
