"""Attention over the spans of documents against attention under a mask, with torch's kernel for CUDA written out as a loop."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline.config import ModelSettings
from pipeline.data.loading.batch import Batch
from pipeline.model import mtp, transformer
from pipeline.model.transformer import can_use_flash, document_mask, flash_attention, masked_attention
from tests.forked import ROOT
from tests.rows import batch_of, random_lengths

B, T, N, K = 3, 24, 4, 8


def kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest: int,
    longest_key: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` computes, [tokens, attention heads, width]."""
    assert query.is_contiguous()
    assert starts.dtype == key_starts.dtype == torch.int32
    assert window_size == (-1, 0)
    assert key.shape[1] == query.shape[1] or enable_gqa
    attended = torch.full_like(query, torch.nan)
    for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        assert 0 < end - start <= longest == longest_key
        parts = [tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value)]
        attended[start:end] = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=enable_gqa)[0].transpose(0, 1)
    return attended


@pytest.fixture
def batch() -> Batch:
    return batch_of(random_lengths(B, T, seed=1), T, vocab_size=50)


def kernel_without_groups(*tensors: Any, window_size: tuple[int, int]) -> torch.Tensor:
    """torch 2.11's."""
    return kernel(*tensors, window_size=window_size)


@pytest.fixture(params=[kernel, kernel_without_groups])
def _loop(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, "flash_kernel", lambda: (request.param, request.param is kernel))


@pytest.mark.usefixtures("_loop")
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_spans_confine_attention_as_the_mask_does(batch: Batch, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(B, T, N, K, generator=generator)
    key, value = (torch.randn(B, T, groups, K, generator=generator) for _ in range(2))
    assert batch.spans is not None
    found = flash_attention(query, key, value, batch.spans)
    expected = masked_attention(query, key, value, document_mask(batch.document_ids_BT))
    present = batch.document_ids_BT >= 0
    torch.testing.assert_close(found[present], expected[present])
    assert found.isfinite().all()


@pytest.mark.usefixtures("_loop")
def test_a_model_that_is_served_by_flash_attention_gives_the_same_hidden_states(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = mtp.ModelSettings(dim=32, num_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50)
    model = mtp.MTPModel(settings)
    mtp.initialize_weights(model)
    with torch.no_grad():
        expected = model.hidden_states(batch.tokens_BT, batch.document_ids_BT, batch.spans)
        monkeypatch.setattr(mtp, "can_use_flash", lambda hidden, settings: True)
        monkeypatch.setattr(mtp, "document_mask", None)  # Nothing of T x T is made.
        found = model.hidden_states(batch.tokens_BT, batch.document_ids_BT, batch.spans)
    present = batch.document_ids_BT >= 0
    torch.testing.assert_close(found[present], expected[present])


def test_a_model_on_a_cpu_does_not_wait_for_flash_attention_to_be_imported() -> None:
    """It takes more than a second of every start."""
    code = "import sys; import pipeline.model.mtp; print('torch.nn.attention.varlen' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"
    kernel_of_torch, takes_groups = transformer.flash_kernel()
    assert kernel_of_torch.__name__ == "varlen_attn"
    assert isinstance(takes_groups, bool)


@pytest.mark.parametrize("groups", [2, 1])
def test_attention_under_a_mask_is_the_same_with_a_copy_of_keys_and_values_for_each_query_head(
    batch: Batch, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(B, T, heads, K, generator=generator).requires_grad_() for heads in (N, groups, groups))
    mask = document_mask(batch.document_ids_BT)
    given: list[int] = []
    attend = F.scaled_dot_product_attention

    def noting(query: torch.Tensor, key: torch.Tensor, *others: Any, **more: Any) -> torch.Tensor:
        given.append(key.shape[1])
        return attend(query, key, *others, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    found = []
    for takes_groups in (True, False):
        monkeypatch.setattr(transformer, "mask_takes_groups", lambda query, takes=takes_groups: takes)
        attended = masked_attention(query, key, value, mask)
        found.append([attended, *torch.autograd.grad(attended.square().sum(), (query, key, value))])
    assert given == [groups, N]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("capability", "width", "expected"),
    [
        ((7, 5), 64, False),
        ((8, 0), 256, True),
        ((8, 6), 256, False),
        ((8, 7), 256, False),
        ((12, 0), 256, False),
        ((12, 1), 200, False),
        ((12, 0), 128, True),
        ((10, 0), 256, True),
        ((8, 9), 200, False),
        ((8, 9), 192, True),
        ((9, 0), 256, True),
    ],
)
def test_flash_attention_is_left_where_its_backward_would_refuse(
    capability: tuple[int, int], width: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    hidden: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device="cuda")
    assert can_use_flash(hidden, ModelSettings(head_dim=width)) is expected
