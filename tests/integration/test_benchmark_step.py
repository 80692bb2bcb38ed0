"""`launch/benchmark.py step` at sizes that take seconds, and its FLOPs against torch's own counter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from pipeline.benchmark.options import VARIANTS
from pipeline.benchmark.step import HEADS, K_PERCENT, flops_a_token
from pipeline.config import ModelSettings
from pipeline.data.loading.batch import targets_and_valid
from pipeline.model.mtp import MTPModel, initialize_weights
from tests.forked import run_script
from tests.selecting import Given

ROWS, TOKENS = 2, 256
SHAPE = ModelSettings(dim=64, num_layers=3, num_attention_heads=4, num_key_value_heads=2, ffn_dim=160, vocab_size=512)


@pytest.mark.slow
def test_the_command_measures_every_way_beside_plain_training(tmp_path: Path) -> None:
    sizes = ["--layers", "2", "--dim", "32", "--attention-heads", "2", "--vocabulary", "128", "--sequence-length", "32"]
    command = ["step", *sizes, "--rows", "2", "--rounds", "1", "--json", tmp_path / "step.json"]
    done = run_script("benchmark.py", *command, with_its_processes=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "step.json").read_text())["variants"]
    assert list(figures) == list(VARIANTS)
    for name, own in figures.items():
        assert own["tokens_per_second"] == pytest.approx(64 / own["seconds"])
        assert own["time_over_flops"] == pytest.approx(own["time_ratio"] / own["flop_ratio"])
        assert f"{name:12}{own['seconds']:>10.3f}" in done.stdout
    assert figures["next_token"]["time_ratio"] == figures["next_token"]["flop_ratio"] == 1.0


def counted(heads: int, share: float, trains: bool = True) -> float:
    """FLOPs a token, by torch's counter, of a forward (and backward) in which the later heads select a share of all pairs."""
    settings = SHAPE.model_copy(update={"num_prediction_heads": heads})
    model = MTPModel(settings)
    initialize_weights(model)
    tokens = torch.randint(512, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    documents = torch.zeros(ROWS, TOKENS, dtype=torch.int32)
    targets, valid = targets_and_valid(tokens, documents, heads)
    chosen = valid[..., 1:] & (torch.arange(TOKENS)[:, None] % 10 < 10 * share)
    selector = Given(chosen, chosen, share)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION | IN_PLACE) as counter:
        if trains:
            model(tokens, documents, targets, valid, selector, torch.ones(heads)).loss.backward()
        else:
            with torch.inference_mode():
                model(tokens, documents, targets, valid)
    return counter.get_total_flops() / (ROWS * TOKENS)


def attention(query: Any, key: Any, value: Any, *others: Any, **more: Any) -> int:
    return sdpa_flop(query, key, value)


def attention_backward(gradient: Any, query: Any, key: Any, value: Any, *others: Any, **more: Any) -> int:
    # Two products for each of forward's; that kernels make the scores once more is nobody's model FLOP.
    return 2 * sdpa_flop(query, key, value)


def product_added(into: Any, left: Any, right: Any, *others: Any, **more: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}
IN_PLACE = {torch.ops.aten.addmm_: product_added}


def test_the_flops_of_a_step_are_those_that_torch_counts() -> None:
    reference = counted(1, 1.0, trains=False)
    found = {
        "next_token": counted(1, 1.0),
        "mtp": counted(HEADS, 1.0),
        "selective": counted(HEADS, K_PERCENT) + reference,
        "origin": counted(HEADS, 1.0) + counted(HEADS, 1.0, trains=False) + reference,
    }
    for name, flops in found.items():
        # The last positions of a row have nothing to predict for some heads: one or two in a hundred.
        assert flops == pytest.approx(flops_a_token(name, SHAPE, TOKENS), rel=0.02), name
