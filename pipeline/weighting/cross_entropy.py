"""Cross-entropy over a vocabulary in chunks of rows: no [rows, vocabulary] tensor larger than one chunk ever exists.

`token_losses` scores rows without gradient. `WeightedCrossEntropy` accumulates the gradients of sum(row_weight * loss) over
rows that become known in several passes: gradients are computed in place while a chunk's log-probabilities are in memory, and
a row can be subtracted again. Gradients that exist before autograd asks for them must be scaled by whatever multiplies the
loss later, such as accumulation and world size; `with_gradients` scales both, so that any factor stays exact.

Logits and losses are float32 whatever the dtype of the inputs: a product of bf16 matrices is summed in float32 and never
rounded to bf16, which would move 0.2 % of a selection. The weight's gradient is accumulated in float32 over all chunks and
cast once; in bf16 the logit gradients, and a chunk's part of the weight's gradient, are rounded to bf16. A row's weight
multiplies its hidden state rather than its V logit gradients, which saves a pass over the chunk.

    loss = logsumexp(z) - z[target],   d loss / d z = softmax(z) - onehot(target) = exp(log_softmax(z)) - onehot(target)

Softmax in place of log-softmax would spare the second exponential, but the loss then needs each row's maximum, a further pass:
on a CPU that took 1.04 to 1.2 times as long, and in bf16 the gradient is a pass of its own either way.

Shapes: N rows, C rows of a chunk, D width, V vocabulary.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}
"""Most logits of one chunk, by kind of device: 64 MiB in float32, 1 GiB on CUDA. Matrix products want a few hundred rows to
run at full speed; and each chunk adds to a whole [V, D] in float32, for which a GPU takes as long as for the products of
about a thousand rows. On an H200, V 128k, 16k tokens, chunks of 2^27, 2^28 and 2^29 logits took 287, 243 and 224 ms."""

MOVES = {"cpu": 64, "cuda": 16}
"""Steps in which the rows of a chunk are moved, by kind of device. A step needs its part of a chunk beside it; on CUDA each
is a few launches. All at once moves as many bytes in a quarter fewer launches of the loss phase, with the taken rows of a chunk
beside it, and takes 1.6 to 3 times as long on a CPU."""


class MarginPredictor(Protocol):
    """A guess at which rows will be wanted."""

    def predicted_margin(self, loss_C: Tensor, rows_C: Tensor, /) -> Tensor:
        """Predict how far above the threshold rows will lie (float32 [C]), from their losses (float32 [C]) and numbers
        (int64 [C]); 0 or more means that a row will probably be wanted."""
        ...


def rows_per_chunk(num_rows: int, vocab_size: int, device_type: str = "cpu") -> int:
    """Rows of a chunk: at most `CHUNK_ELEMENTS` logits, and never more than a quarter of the rows, so that a chunk
    stays small beside [num_rows, vocab_size] in small models too."""
    return max(1, min(CHUNK_ELEMENTS[device_type] // vocab_size, -(-num_rows // 4)))


def token_losses(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    rows: Tensor,
    chunk_rows: int,
    choices_N: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the rows numbered `rows` (int64) in float32 [N], 0 for all others, without gradient. `targets_N`
    is int64 in [0, V). choices_N: int64, takes the most likely token of each of these rows."""
    with torch.no_grad():
        loss_N = torch.zeros(targets_N.shape, dtype=torch.float32, device=hidden_ND.device)
        buffer_CV = _chunk_buffer(weight_VD, chunk_rows)
        for rows_C in _chunks(rows, chunk_rows):
            log_probability_CV = _log_probabilities(hidden_ND[rows_C], weight_VD, buffer_CV)
            loss_N[rows_C] = _losses(log_probability_CV, targets_N[rows_C])
            if choices_N is not None:
                choices_N[rows_C] = log_probability_CV.argmax(1)
        return loss_N


class WeightedCrossEntropy:
    """The losses of rows, and the gradients of sum(row_weight * loss) over those of them that were taken.

    `row_weight_N` is float32. The gradients are of the detached inputs; `with_gradients` gives them to autograd.
    loss_N: float32, 0 for rows that were not scored; taken_N: bool.
    """

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, row_weight_N: Tensor, chunk_rows: int):
        self.hidden_ND, self.weight_VD = hidden_ND.detach(), weight_VD.detach()
        self.targets_N, self.row_weight_N, self.chunk_rows = targets_N, row_weight_N, chunk_rows
        self.loss_N = torch.zeros(targets_N.shape, dtype=torch.float32, device=hidden_ND.device)
        self.taken_N = torch.zeros(targets_N.shape, dtype=torch.bool, device=hidden_ND.device)
        self.hidden_grad_ND = torch.zeros_like(self.hidden_ND)
        self.weight_grad_VD = torch.zeros_like(self.weight_VD, dtype=torch.float32)
        self._buffer_CV = _chunk_buffer(weight_VD, chunk_rows)

    def score(self, rows: Tensor, take: float, predictor: MarginPredictor | None = None) -> None:
        """Compute the losses of `rows` (int64), and at once the gradients of a part of them: of all (`take` 1), of none (0),
        or of that share with the largest predicted margins.

        The number of rows taken from a chunk is fixed beforehand, so that the host never waits for the device; a row that is
        taken but will probably not be wanted enters with weight 0.
        """
        for rows_C in _chunks(rows, self.chunk_rows):
            log_probability_CV = _log_probabilities(self.hidden_ND[rows_C], self.weight_VD, self._buffer_CV)
            self.loss_N[rows_C] = loss_C = _losses(log_probability_CV, self.targets_N[rows_C])

            num_taken = math.ceil(take * len(rows_C))
            if num_taken == 0:
                continue

            # The taken rows of the chunk, in ascending order, and which of them will be wanted.
            taken_C, wanted_C = None, torch.ones_like(rows_C, dtype=torch.bool)
            if predictor is not None:
                margin_C = predictor.predicted_margin(loss_C, rows_C)
                taken_C = margin_C.sort(descending=True, stable=True).indices[:num_taken].sort().values
                rows_C, wanted_C = rows_C[taken_C], margin_C[taken_C] >= 0

            self.taken_N[rows_C] = wanted_C
            weight_C = self.row_weight_N[rows_C] * wanted_C
            self._add(log_probability_CV, taken_C, rows_C, weight_C, weight_C)

    def repair(self, wanted_N: Tensor) -> None:
        """Correct the sums to those of the rows in `wanted_N`, all of which were scored.

        Rows missed are added; rows taken wrongly are subtracted from the weight's gradient and zeroed in the hidden one.
        Where these are more than the wanted rows, which would leave more rounding than gradient, everything starts from zero.
        The host waits for the device once, to learn how many rows there are.
        """
        differs_N = self.taken_N != wanted_N
        num_different, num_wanted = torch.stack([differs_N.sum(), wanted_N.sum()]).tolist()
        from_zero = num_different > num_wanted
        if from_zero:
            self.hidden_grad_ND.zero_()
            self.weight_grad_VD.zero_()

        rows = indices_of(wanted_N, num_wanted) if from_zero else indices_of(differs_N, num_different)
        for rows_C in _chunks(rows, self.chunk_rows):
            log_probability_CV = _log_probabilities(self.hidden_ND[rows_C], self.weight_VD, self._buffer_CV)
            weight_C, wanted_C = self.row_weight_N[rows_C], wanted_N[rows_C]
            self._add(log_probability_CV, None, rows_C, weight_C * wanted_C, torch.where(wanted_C, weight_C, -weight_C))

    def with_gradients(self, loss: Tensor, hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        """The scalar `loss` as a function of the two, with these gradients; this object is used up. With no rows at all
        both are zeros, so that every rank's graph has the same shape."""
        loss = _WithGradients.apply(hidden_ND, weight_VD, loss, self.hidden_grad_ND, self.weight_grad_VD)
        del self.hidden_grad_ND, self.weight_grad_VD, self._buffer_CV
        return loss

    def _add(
        self,
        log_probability_CV: Tensor,
        taken_C: Tensor | None,
        rows_C: Tensor,
        hidden_weight_C: Tensor,
        weight_C: Tensor,
    ) -> None:
        """Set the hidden gradient of some rows and add to the weight's; uses up the chunk's log-probabilities.

        taken_C: the rows' indices within the chunk, None for all of it; rows_C: their numbers, with their weights in the
        two gradients.
        """
        # d loss / d logits = softmax - onehot(target). At the target p - 1 = exp(-loss) - 1, in float32: p itself, rounded
        # to bf16, is 1 from 0.998 on.
        logit_grad_CV = _probabilities(log_probability_CV, taken_C, self.hidden_ND.dtype)
        target_grad_C = torch.expm1(-self.loss_N[rows_C]).to(logit_grad_CV.dtype)
        logit_grad_CV.scatter_(1, self.targets_N[rows_C, None], target_grad_C[:, None])

        # d / d hidden = logit_grad @ weight, row by row.
        hidden_grad_CD = (logit_grad_CV @ self.weight_VD).mul_(hidden_weight_C[:, None])
        self.hidden_grad_ND.index_copy_(0, rows_C, hidden_grad_CD)

        # d / d weight = logit_grad.T @ hidden, summed over all chunks in float32.
        weighted_CD = (self.hidden_ND[rows_C] * weight_C[:, None]).to(logit_grad_CV.dtype)
        if logit_grad_CV.dtype == torch.float32:
            self.weight_grad_VD.addmm_(logit_grad_CV.T, weighted_CD)
        else:
            self.weight_grad_VD += logit_grad_CV.T @ weighted_CD


def indices_of(mask: Tensor, number: int | None = None) -> Tensor:
    """Return the indices (int64) at which a flattened mask is set. Waits for the device, unless told how many they are."""
    mask_N = mask.flatten()
    return (mask_N.nonzero() if number is None else torch.nonzero_static(mask_N, size=number))[:, 0]


def _chunks(rows: Tensor, chunk_rows: int) -> list[Tensor]:
    """Split rows into strided chunks, so that each holds about the same share of selected rows."""
    num_chunks = -(-len(rows) // chunk_rows)
    return [rows[first::num_chunks] for first in range(num_chunks)]


def _chunk_buffer(weight_VD: Tensor, chunk_rows: int) -> Tensor:
    return torch.empty(chunk_rows, len(weight_VD), dtype=torch.float32, device=weight_VD.device)


def _probabilities(log_probability_CV: Tensor, taken_C: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Exponentiate the rows at the indices `taken_C`, which ascend, or all; float32 ones into the first rows in place."""
    num_rows = len(log_probability_CV) if taken_C is None else len(taken_C)
    first_CV = log_probability_CV[:num_rows]
    probability_CV = first_CV if first_CV.dtype == dtype else torch.empty_like(first_CV, dtype=dtype)

    # A few rows at a time: no row is overwritten that a later step still reads, and where the dtypes differ a CPU exponentiates
    # by way of a float32 copy.
    step = -(-len(log_probability_CV) // MOVES[log_probability_CV.device.type])
    for start in range(0, num_rows, step):
        part = slice(start, min(start + step, num_rows))
        rows_CV = log_probability_CV[part] if taken_C is None else log_probability_CV.index_select(0, taken_C[part])
        torch.exp(rows_CV, out=probability_CV[part])
    return probability_CV


def _log_probabilities(hidden_CD: Tensor, weight_VD: Tensor, buffer_CV: Tensor) -> Tensor:
    """float32 [C, V], in the buffer."""
    logits_CV = buffer_CV[: len(hidden_CD)]
    product(hidden_CD, weight_VD.T, out=logits_CV)
    return torch.log_softmax(logits_CV, dim=1, out=logits_CV)


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """The matrix product in float32, into `out`, without rounding to the dtype of the factors on the way."""
    if left.dtype == torch.float32:
        return torch.mm(left, right, out=out)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.mm(left.float(), right.float(), out=out)  # A CPU has no kernel for it.


def _losses(log_probability_CV: Tensor, targets_C: Tensor) -> Tensor:
    return -log_probability_CV.gather(1, targets_C[:, None])[:, 0]


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, loss: Tensor, *gradients: Tensor) -> Tensor:
        ctx.gradients, ctx.weight_dtype = gradients, weight_VD.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("this loss keeps its gradients for one backward only; compute it again for another")
        hidden_grad_ND, weight_grad_VD = ctx.gradients
        ctx.gradients = None  # They are scaled in place: a copy of the weight's would be a second [V, D] in float32.
        return hidden_grad_ND.mul_(upstream[0]), weight_grad_VD.mul_(upstream[0]).to(ctx.weight_dtype), None, None, None
