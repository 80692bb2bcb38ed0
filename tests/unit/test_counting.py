"""The counts of kernels and bytes, and the rehearsal that is made of them, on a CPU."""

import math

import pytest
import torch
from torch.profiler import record_function

from pipeline.config import Settings
from pipeline.weighting.cross_entropy import rows_per_chunk
from tests.counting import CountLaunches, Fused
from tests.gpu.rehearsal import HEADS, MISTAKES, counts_of, rehearse
from tests.rows import batch_of, random_lengths

ROWS, TOKENS, VOCAB = 4, 64, 96


def test_kernels_and_bytes_are_counted_by_the_innermost_phase() -> None:
    left, right = torch.ones(3, 4), torch.ones(4, 5)
    with CountLaunches() as counts:
        with record_function("outer"):
            product = left @ right
            with record_function("inner"):
                product.t().exp_()
            torch.empty(1000)
        torch.mm(left, right, out=product)
    assert dict(counts.launches) == {("outer", "aten::mm"): 1, ("inner", "aten::exp_"): 1, ("other", "aten::mm"): 1}
    assert counts.bytes["outer", "aten::mm"] == counts.bytes["other", "aten::mm"] == 4 * (12 + 20 + 15)
    assert counts.bytes["inner", "aten::exp_"] == 4 * 2 * 15
    assert counts.bytes_on == {"cpu": 4 * 3 * 15}


def test_of_what_is_gathered_or_scattered_only_the_rows_that_are_moved_count() -> None:
    table, rows, values = torch.ones(1000, 8), torch.tensor([1, 4]), torch.zeros(2, 8)
    with CountLaunches() as counts:
        table[rows]
        table.index_copy_(0, rows, values)
    assert counts.bytes["other", "aten::index"] == counts.bytes["other", "aten::index_copy_"] == 2 * 8 + 2 * 4 * 16


def test_a_fused_function_is_one_kernel_with_the_gradient_of_the_function() -> None:
    def squared_and_scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * x * factor

    x = torch.arange(6.0).requires_grad_()
    with CountLaunches() as counts:
        found = Fused(squared_and_scaled, counts, 1)(x, 3.0)
        found.sum().backward()
    assert torch.equal(found, 3 * x * x)
    assert x.grad is not None
    assert torch.equal(x.grad, 6 * x)
    assert counts.launches["other", "squared_and_scaled"] == counts.launches["other", "squared_and_scaled backward"] == 1
    assert counts.bytes["other", "squared_and_scaled"] == 2 * 4 * 6
    assert ("other", "aten::mul") not in counts.launches


def settings_for(**training: str) -> Settings:
    shape = {"dim": 32, "num_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCAB}
    data = {"global_batch": 2 * ROWS, "micro_batch": ROWS, "sequence_length": TOKENS}
    return Settings.model_validate({"data": data, "model": shape | {"num_prediction_heads": HEADS}, "training": training})


@pytest.mark.parametrize("loss_phase", ["predicted", "two_pass"])
def test_a_rehearsal_runs_a_whole_step_with_one_wait_and_the_products_that_its_chunks_need(loss_phase: str) -> None:
    settings = settings_for(loss_phase=loss_phase)
    found = rehearse(settings, "cpu", flash=False)
    assert found.waits == [2]
    phases = {phase for phase, _ in found.counts.launches}
    assert {"reference", "policy", "loss", "exchange", "metrics", "backward", "optimizer"} <= phases
    assert found.counts.launches["policy", "rotate"] == 2 * (1 + HEADS)
    assert found.counts.launches["backward", "rotate backward"] == 2 * (1 + HEADS)

    # A row costs a product to score and two for its gradient; what is repaired costs all three.
    counts, _ = counts_of(settings, batch_of(random_lengths(ROWS, TOKENS, 0), TOKENS, VOCAB))
    first, *others = counts.num_valid_AH[0]
    selected = sum(counts.num_selected_H[1:])
    repaired = selected if loss_phase == "two_pass" else round(MISTAKES * selected)
    chunk_rows = rows_per_chunk(ROWS * TOKENS, VOCAB)
    first, scored, repaired = (math.ceil(number / chunk_rows) for number in (first, sum(others), repaired))
    products = 3 * first + (1 if loss_phase == "two_pass" else 3) * scored + 3 * repaired
    assert found.counts.launches["loss", "aten::mm"] == products


def test_a_rehearsal_stops_where_the_host_would_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import DataDependentOutputException

    from pipeline.runtime.metrics import SelectionSums

    monkeypatch.setattr(SelectionSums, "add", lambda sums, losses, *_: float(losses.loss))
    with pytest.raises(DataDependentOutputException):
        rehearse(settings_for(), "cpu", flash=False)
