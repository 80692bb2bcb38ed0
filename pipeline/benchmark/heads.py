"""The loss phase of all heads: hidden states to gradients, beside what a user would write instead.

    plain                 one matrix product and `F.cross_entropy` a head, all logits in memory
    linear_cross_entropy  `torch.nn.functional.linear_cross_entropy` a head, where torch has it
    liger                 Liger's fused linear cross-entropy a head, on CUDA where it is installed
    two_pass, predicted   the pipeline's own
    one_head              `predicted` with head 0 alone: what the memory of more heads is compared with

All but one_head make the same selection, the exact top k by excess loss over a reference, and the same gradient, which is
checked. A variant that fails, or whose gradient is another, is named and leaves the others, but for plain. Every round has
new hidden states, targets and reference losses, and the reference's losses rise by `DRIFT` a round beside the noise of the
sample, so that thresholds move and `predicted` has something to predict.

Shapes: B rows (1), T tokens, H heads, K = H - 1 the heads that select, D width, V vocabulary, N rows of a flat list.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.benchmark.attempts import describe_failures
from pipeline.benchmark.timing import Round, measured_in_processes, medians, timed
from pipeline.weighting.loss_phase import chunked_losses
from pipeline.weighting.prediction import Prediction
from pipeline.weighting.score import Comparison
from pipeline.weighting.selection import Selection, num_selected
from pipeline.weighting.selectors import EveryPair, TopOfPool

DRIFT = 0.02
"""Nats by which the reference's losses rise from round to round: what a policy learns in a step, early in training."""
CHECKED_ROUND = 1
"""The round whose gradients are compared: the first in which there is a prediction."""
WARM_UP_ROUNDS = 2
MOST_GRADIENT_ERROR = 1e-5
K_PERCENT = 0.6


class Inputs(NamedTuple):
    hidden_BTHD: Tensor
    weight_VD: Tensor
    targets_BTH: Tensor
    reference_loss_BTK: Tensor


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of each variant, and what they are of plain's.

    Raises:
        RuntimeError: plain fails, with which the others are compared.
    """
    shape = (options.tokens, options.dim, options.vocabulary, options.heads, options.threads)
    variants = [(name, *shape) for name in variants_here()]
    measured, failed = measured_in_processes(prepare, variants, WARM_UP_ROUNDS + options.rounds)
    return figures_of(measured, failed) | {
        "shape": dict(zip(("tokens", "dim", "vocabulary", "heads", "threads"), shape, strict=True)),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }


def figures_of(measured: dict[str, list[Any]], failed: dict[str, str]) -> dict[str, Any]:
    """Compare what the variants measured; None in the place of what cannot be said for want of a variant that failed."""
    # A variant that computes something else is no variant.
    errors = {
        name: _relative_error(rounds[CHECKED_ROUND]["gradients"], measured["plain"][CHECKED_ROUND]["gradients"])
        for name, rounds in measured.items()
        if name not in ("plain", "one_head")
    }
    different = {name: error for name, error in errors.items() if not error < MOST_GRADIENT_ERROR}
    failed = failed | {
        name: f"its gradient differs from that of plain by {error:.1e} of its norm" for name, error in different.items()
    }
    measured = {name: rounds for name, rounds in measured.items() if name not in failed}

    figures = {name: medians(rounds[WARM_UP_ROUNDS:], ("seconds", "peak_bytes")) for name, rounds in measured.items()}
    plain = figures["plain"]
    for own in figures.values():
        own |= {"time_ratio": own["seconds"] / plain["seconds"], "peak_ratio": own["peak_bytes"] / plain["peak_bytes"]}

    # With one head there is nothing to predict.
    predicted = measured.get("predicted", [])
    hit_rates = [rate for answer in predicted[WARM_UP_ROUNDS:] for rate in answer["hit_rates"]]
    hits = {"mean": statistics.mean(hit_rates), "least": min(hit_rates), "most": max(hit_rates)} if hit_rates else None
    both = all(name in figures for name in ("predicted", "one_head"))
    return {
        "variants": figures,
        "failed": failed,
        "peak_ratio_to_one_head": figures["predicted"]["peak_bytes"] / figures["one_head"]["peak_bytes"] if both else None,
        "hit_rate": hits,
        "gradient_error": errors,
    }


def table(figures: dict[str, Any]) -> str:
    shape, hits, peak_ratio = figures["shape"], figures["hit_rate"], figures["peak_ratio_to_one_head"]
    lines = [
        f"{shape['heads']} heads, N = {shape['tokens']}, D = {shape['dim']}, V = {shape['vocabulary']}, float32, "
        f"{figures['device']}, torch {figures['torch']}",
        f"{'':22}{'seconds':>10}{'peak MiB':>10}{'time':>8}{'peak':>8}{'gradient error':>16}",
    ]

    for name, own in figures["variants"].items():
        error = figures["gradient_error"].get(name)
        lines.append(
            f"{name:22}{own['seconds']:>10.3f}{own['peak_bytes'] / 2**20:>10.1f}{own['time_ratio']:>8.3f}"
            f"{own['peak_ratio']:>8.3f}{'' if error is None else f'{error:.1e}':>16}"
        )
    lines += describe_failures(figures["failed"])
    if hits is not None:
        lines.append(f"prediction hit rate {hits['mean']:.3f} ({hits['least']:.3f} to {hits['most']:.3f})")
    if peak_ratio is not None:
        lines.append(f"predicted needs {peak_ratio:.3f} of one head's peak memory")
    return "\n".join(lines)


def variants_here() -> list[str]:
    """The variants that this machine can run."""
    names = ["plain", "two_pass", "predicted", "one_head"]
    names += ["linear_cross_entropy"] if hasattr(F, "linear_cross_entropy") else []
    names += ["liger"] if torch.cuda.is_available() and _liger() is not None else []
    return names


def prepare(
    name: str, tokens: int, dim: int, vocabulary: int, heads: int, threads: int, dtype: torch.dtype = torch.float32
) -> Round:
    """A round of one variant: fresh inputs, then loss and gradients, measured. dtype: of hidden states and unembedding."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    weight_VD = torch.randn(vocabulary, dim, generator=torch.Generator().manual_seed(0)) / math.sqrt(dim)
    weight_VD = weight_VD.to(device, dtype).requires_grad_()
    num_heads = 1 if name == "one_head" else heads
    prediction = Prediction()

    def one_round(number: int) -> dict[str, Any]:
        nonlocal prediction
        inputs = _inputs(number, tokens, num_heads, weight_VD)
        predicts = name in ("predicted", "one_head")
        selector = _selector(inputs, prediction if predicts else Prediction())
        (selection, predicted_BTK), seconds, peak = timed(partial(_step, name, inputs, selector), device)

        answer: dict[str, Any] = {"seconds": seconds, "peak_bytes": peak, "hit_rates": []}
        if number == CHECKED_ROUND:
            gradients = (inputs.hidden_BTHD.grad, weight_VD.grad)
            answer["gradients"] = [gradient.float().cpu().numpy() for gradient in gradients if gradient is not None]
        if predicted_BTK is not None:
            both_K = (predicted_BTK & selection.selected_BTK).sum((0, 1))
            answer["hit_rates"] = (both_K / (predicted_BTK | selection.selected_BTK).sum((0, 1))).tolist()

        prediction = prediction.after([selection.threshold_K])
        weight_VD.grad = None
        return answer

    return one_round


def _inputs(number: int, tokens: int, num_heads: int, weight_VD: Tensor) -> Inputs:
    vocabulary, dim = weight_VD.shape
    generator = torch.Generator().manual_seed(1 + number)
    hidden_BTHD = torch.randn(1, tokens, num_heads, dim, generator=generator)
    targets_BTH = torch.randint(vocabulary, (1, tokens, num_heads), generator=generator)
    reference_loss_BTK = math.log(vocabulary) + torch.randn(1, tokens, num_heads - 1, generator=generator) + DRIFT * number
    hidden_BTHD, targets_BTH, reference_loss_BTK = (
        tensor.to(weight_VD.device) for tensor in (hidden_BTHD, targets_BTH, reference_loss_BTK)
    )
    return Inputs(hidden_BTHD.to(weight_VD.dtype).requires_grad_(), weight_VD, targets_BTH, reference_loss_BTK)


def _selector(inputs: Inputs, prediction: Prediction) -> TopOfPool | EveryPair:
    """The training's own selection, on one process."""
    valid_BTK = torch.ones_like(inputs.reference_loss_BTK, dtype=torch.bool)
    num_positions, num_selecting = valid_BTK[..., 0:1].numel(), valid_BTK.shape[-1]
    if num_selecting == 0:
        return EveryPair(valid_BTK)
    return TopOfPool(
        compared=Comparison("excess", valid_BTK, inputs.reference_loss_BTK, None),
        pool="global",
        k_percent=K_PERCENT,
        num_valid_K=[num_positions] * num_selecting,
        num_selected_K=[num_selected(K_PERCENT, num_positions)] * num_selecting,
        exchange="radix",
        group=None,
        predicted_threshold_K=prediction.thresholds(valid_BTK.device),
    )


def _step(name: str, inputs: Inputs, selector: TopOfPool | EveryPair) -> tuple[Selection, Tensor | None]:
    """Compute loss and gradients by one variant; returns the selection, and the pairs that were predicted."""
    hidden_BTHD, weight_VD, targets_BTH, _ = inputs
    valid_BTH = torch.ones_like(targets_BTH, dtype=torch.bool)
    scale_H = torch.full(targets_BTH.shape[-1:], 1 / targets_BTH.numel(), device=weight_VD.device)

    if name in ("two_pass", "predicted", "one_head"):
        num_valid_H = [targets_BTH[..., 0].numel()] * targets_BTH.shape[-1]
        losses = chunked_losses(hidden_BTHD, weight_VD, targets_BTH, valid_BTH, selector, scale_H, num_valid_H)
        losses.loss.backward()
        return losses.selection, losses.predicted_BTK

    token_loss = {"plain": _plain, "linear_cross_entropy": _linear_cross_entropy, "liger": _liger()}[name]
    assert token_loss is not None
    by_head = zip(hidden_BTHD.unbind(2), targets_BTH.unbind(2), strict=True)
    loss_BTH = torch.stack([token_loss(hidden_BTD[0], weight_VD, targets_BT[0]) for hidden_BTD, targets_BT in by_head], -1)[
        None
    ]

    selection = selector.select(loss_BTH.detach()[..., 1:])
    selected_BTH = torch.cat([valid_BTH[..., :1], selection.selected_BTK], dim=-1)
    (loss_BTH * selected_BTH * scale_H).sum().backward()
    return selection, None


def _plain(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy((hidden_ND @ weight_VD.T).float(), targets_N, reduction="none")


def _linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    losses: Tensor = F.linear_cross_entropy(hidden_ND, weight_VD, targets_N, reduction="none")
    return losses


def _liger() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    fused = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return lambda hidden_ND, weight_VD, targets_N: fused(weight_VD, hidden_ND, targets_N)


def _relative_error(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Return the relative error of all gradients together, in the L2 norm."""
    squares = [
        (np.square(a.astype(np.float64) - b).sum(), np.square(b.astype(np.float64)).sum())
        for a, b in zip(found, expected, strict=True)
    ]
    return math.sqrt(sum(difference for difference, _ in squares) / sum(norm for _, norm in squares))
