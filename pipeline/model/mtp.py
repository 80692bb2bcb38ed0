"""The multi-token prediction policy (arXiv 2404.19737): a shared trunk, one block a head, one shared unembedding.

`num_layers` is the depth of the next-token path, so trunk + head 0 is an ordinary causal language model and, with one
head, the whole of it. One forward does everything that a micro-batch needs: hidden states of all heads, their losses,
the selection at that fixed point (through a `Selector`, so that the model knows nothing of ranks or references), and the loss
with gradient over the selected rows alone (`loss_phase`). All of it happens inside the one module that owns the
unembedding, because under ZeRO-3 the weight exists nowhere else.

Shapes: B rows, T tokens, H heads, D width, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from pipeline.config import ModelSettings
from pipeline.data.loading.batch import Spans
from pipeline.model.elementwise import EAGER, Elementwise
from pipeline.model.recompute import block_runner
from pipeline.model.transformer import Block, RMSNorm, document_mask, flash_serves, rotary_angles
from pipeline.weighting.loss_phase import HeadLosses, chunked_losses, dense_losses, score_tokens
from pipeline.weighting.selection import Selector

INIT_STD = 0.02

Gather = Callable[[nn.Parameter], AbstractContextManager[bool]]
"""Makes a parameter whole for the length of a `with`; yields whether this process's changes to it count."""


class Unembedding(nn.Module):
    """Final norm and unembedding, shared by all heads, and every loss made of them."""

    def __init__(self, settings: ModelSettings, embedding: Tensor):
        super().__init__()
        assert settings.vocab_size is not None
        self.norm = RMSNorm(settings.dim, settings.norm_eps)
        self.weight = embedding if settings.tied_embeddings else _matrix(settings.vocab_size, settings.dim)

    def forward(
        self,
        hidden_BTHD: Tensor,
        targets_BTH: Tensor,
        valid_BTH: Tensor,
        selector: Selector | None,
        scale_H: Tensor | None,
        loss_phase: str,
        num_valid_H: Sequence[int] | None,
    ) -> Tensor | HeadLosses:
        hidden_BTHD = self.norm(hidden_BTHD)
        if selector is None or scale_H is None:
            return score_tokens(hidden_BTHD, self.weight, targets_BTH, valid_BTH, num_valid_H)
        if loss_phase == "dense":
            return dense_losses(hidden_BTHD, self.weight, targets_BTH, valid_BTH, selector, scale_H)
        predict = loss_phase == "predicted"
        return chunked_losses(hidden_BTHD, self.weight, targets_BTH, valid_BTH, selector, scale_H, num_valid_H, predict)


class MTPModel(nn.Module):
    """Trunk, heads and unembedding for `settings`, whose vocab_size must be set; `activation_checkpointing` as `recompute`
    names it."""

    def __init__(self, settings: ModelSettings, activation_checkpointing: str = "none", elementwise: Elementwise = EAGER):
        super().__init__()
        assert settings.vocab_size is not None, "vocab_size is resolved from the data before a model is built"
        self.settings = settings
        self.embed = nn.Embedding(settings.vocab_size, settings.dim)
        self.trunk = nn.ModuleList(Block(settings, elementwise) for _ in range(settings.num_layers - 1))
        self.heads = nn.ModuleList(Block(settings, elementwise) for _ in range(settings.num_prediction_heads))
        self.unembed = Unembedding(settings, self.embed.weight)
        self.run_block = block_runner(activation_checkpointing)
        # For each backward since somebody cleared it bool [B], the rows whose gradient was not finite on its way to the end.
        self.bad_gradient_rows: list[Tensor] = []

    def forward(
        self,
        tokens_BT: Tensor,
        document_ids_BT: Tensor,
        targets_BTH: Tensor,
        valid_BTH: Tensor,
        selector: Selector | None = None,
        scale_H: Tensor | None = None,
        loss_phase: str = "predicted",
        spans: Spans | None = None,
        num_valid_H: Sequence[int] | None = None,
    ) -> Tensor | HeadLosses:
        """Compute the losses of all heads, and with a `selector` the objective over the pairs that it selects.

        Args:
            tokens_BT, targets_BTH: int64.
            document_ids_BT: int32, -1 on padding.
            valid_BTH: bool.
            scale_H: float32, the factor of a selected pair's loss.
            loss_phase: `predicted`, `two_pass` or `dense`, as `training.loss_phase`.
            spans: of the documents; num_valid_H: valid pairs of each head. Both spare the host a wait for the device.

        Returns:
            `HeadLosses`; without `selector` float32 [B, T, H] without gradient, 0 at invalid pairs.
        """
        hidden_BTHD = self.hidden_states(tokens_BT, document_ids_BT, spans)
        return self.unembed(hidden_BTHD, targets_BTH, valid_BTH, selector, scale_H, loss_phase, num_valid_H)

    def hidden_states(self, tokens_BT: Tensor, document_ids_BT: Tensor, spans: Spans | None = None) -> Tensor:
        """[B, T, H, D], each head's output before the final norm."""
        angles = rotary_angles(tokens_BT.shape[1], self.settings, tokens_BT.device)
        hidden_BTD = self.embed(tokens_BT)
        masks = spans is None or not flash_serves(hidden_BTD, self.settings)
        documents = document_mask(document_ids_BT) if masks else spans
        if hidden_BTD.requires_grad:
            hidden_BTD.register_hook(self._note_bad_rows)
        for block in self.trunk:
            hidden_BTD = self.run_block(block, hidden_BTD, angles, documents)
        return torch.stack([self.run_block(head, hidden_BTD, angles, documents) for head in self.heads], dim=2)

    def _note_bad_rows(self, gradient_BTD: Tensor) -> None:
        self.bad_gradient_rows.append(~torch.isfinite(gradient_BTD).all(dim=2).all(dim=1))


def whole(_: nn.Parameter) -> AbstractContextManager[bool]:
    """The `Gather` of a model that is not partitioned."""
    return nullcontext(True)


def initialize_weights(model: MTPModel, gather: Gather = whole) -> None:
    """Draw the initial weights: N(0, 0.02) for matrices, divided by sqrt(2 * num_layers) for the two that write into
    the residual stream of a block, ones for norms, zeros for biases.

    Each parameter has its own generator, seeded by `model.seed` and its name, so the values depend neither on the
    number of ranks nor on what else the model holds. No more than one parameter is whole at a time.
    """
    residual_std = INIT_STD / math.sqrt(2 * model.settings.num_layers)
    for name, parameter in model.named_parameters():
        with gather(parameter) as counts, torch.no_grad():
            if not counts:
                continue
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                std = residual_std if name.endswith(("attention.output.weight", "ffn.down.weight")) else INIT_STD
                seed = hashlib.sha256(f"{model.settings.seed}/{name}".encode()).digest()[:8]
                generator = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
                shape = tuple(parameter.shape)
                parameter.copy_(torch.randn(shape, generator=generator, dtype=torch.float32) * std)


def _matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns))
