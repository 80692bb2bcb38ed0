"""Cross-entropy over a vocabulary in chunks of rows: no [rows, vocabulary] tensor beyond one chunk ever exists.

Two functions: `token_losses` scores rows without gradient; `weighted_cross_entropy` gives sum(row_weight * loss) with
gradients for the hidden rows and the unembedding. The latter makes its gradients while each chunk's logits are at hand
(so they are computed once) and scales both by the upstream gradient in backward, so that whatever multiplies the loss
later, as accumulation and world size do, stays exact. Losses are float32 whatever the dtype of the inputs; the
weight's gradient is accumulated in float32 over all chunks and cast once.

Shapes: N rows, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24
"""Most logits of one chunk: 64 MiB in float32."""


def rows_per_chunk(num_rows: int, vocab_size: int) -> int:
    """Rows of a chunk: at most `CHUNK_ELEMENTS` logits, and never more than a quarter of the rows, so that a chunk
    stays small beside [num_rows, vocab_size] in small models too."""
    return max(1, min(CHUNK_ELEMENTS // vocab_size, -(-num_rows // 4)))


def token_losses(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk_rows: int) -> Tensor:
    """Cross-entropy of each row, float32 [N], without gradient. `targets_N` is int64 in [0, V)."""
    loss_N = torch.empty(targets_N.shape, dtype=torch.float32, device=hidden_ND.device)
    with torch.no_grad():
        for rows in _chunks(len(targets_N), chunk_rows):
            loss_N[rows] = _chunk_losses(hidden_ND[rows], weight_VD, targets_N[rows])[0]
    return loss_N


def weighted_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, row_weight_N: Tensor, chunk_rows: int
) -> tuple[Tensor, Tensor]:
    """(sum of row_weight * loss as a float32 scalar with gradient, loss of each row as float32 [N] without).

    Rows whose loss is not finite count as zero in the sum (their gradient does not: it must be discarded, and is, by
    the step that sees them). With no rows at all the sum is zero and both gradients are zeros, so that every rank's
    graph has the same shape.
    """
    return _WeightedCrossEntropy.apply(hidden_ND, weight_VD, targets_N, row_weight_N, chunk_rows)


def _chunks(num_rows: int, chunk_rows: int) -> list[slice]:
    return [slice(start, start + chunk_rows) for start in range(0, num_rows, chunk_rows)]


def _chunk_losses(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits_NV = (hidden_ND @ weight_VD.T).float()
    log_normalizer_N = torch.logsumexp(logits_NV, dim=1)
    loss_N = log_normalizer_N - logits_NV.gather(1, targets_N[:, None])[:, 0]
    return loss_N, logits_NV, log_normalizer_N


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, row_weight_N: Tensor, chunk_rows: int
    ) -> tuple[Tensor, Tensor]:
        with_gradient = any(ctx.needs_input_grad[:2])
        loss_N = torch.empty(targets_N.shape, dtype=torch.float32, device=hidden_ND.device)
        if with_gradient:
            hidden_grad_ND = torch.zeros_like(hidden_ND)
            weight_grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for rows in _chunks(len(targets_N), chunk_rows):
            loss_N[rows], logits_NV, log_normalizer_N = _chunk_losses(hidden_ND[rows], weight_VD, targets_N[rows])
            if with_gradient:
                logit_grad_NV = logits_NV.sub_(log_normalizer_N[:, None]).exp_()
                logit_grad_NV.scatter_add_(1, targets_N[rows, None], -torch.ones_like(log_normalizer_N)[:, None])
                logit_grad_NV = logit_grad_NV.mul_(row_weight_N[rows, None]).to(hidden_ND.dtype)
                hidden_grad_ND[rows] = logit_grad_NV @ weight_VD
                weight_grad_VD += logit_grad_NV.T @ hidden_ND[rows]
        if with_gradient:
            ctx.save_for_backward(hidden_grad_ND, weight_grad_VD)
            ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(loss_N)
        counted_N = torch.where(torch.isfinite(loss_N), loss_N, 0.0)
        return (row_weight_N * counted_N).sum(), loss_N

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_grad_ND, weight_grad_VD = ctx.saved_tensors
        scale = upstream[0]
        weight_grad_VD = (weight_grad_VD * scale).to(ctx.weight_dtype)
        return (hidden_grad_ND * scale).to(hidden_grad_ND.dtype), weight_grad_VD, None, None, None
