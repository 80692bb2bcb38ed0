"""The multi-token prediction model (arXiv 2404.19737): a shared trunk, one block per head, one shared unembedding.

`num_layers` is the depth of the next-token path, so trunk + head 0 is an ordinary causal language model, and with one head it
is the whole model.

One forward does everything that a micro-batch needs: the hidden states of all heads, their per-token losses, the selection,
and the loss with gradient over the selected pairs alone (`weighting.loss_phase`). The selection is passed in, so that the model
knows nothing of ranks or references. The losses are computed inside `Unembedding.forward`, because under ZeRO-3 the
unembedding's weight exists only during the forward of the module that owns it (elsewhere its size is 0).

Shapes: B rows, T tokens, H heads, D width, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from pipeline.config import ModelSettings
from pipeline.data.loading.batch import Spans
from pipeline.model.elementwise import EAGER, Elementwise
from pipeline.model.recompute import block_runner
from pipeline.model.transformer import Block, RMSNorm, can_use_flash, document_mask, rotary_angles
from pipeline.weighting.loss_phase import HeadLosses, chunked_losses, dense_losses, score_tokens
from pipeline.weighting.selection import Selector

INIT_STD = 0.02

Gather = Callable[[nn.Parameter], AbstractContextManager[bool]]
"""Gathers a partitioned parameter for the length of a `with`; yields True where this process's writes to it count."""


class Unembedding(nn.Module):
    """Final norm and unembedding, shared by all heads, and the losses computed from them."""

    def __init__(self, settings: ModelSettings, embedding: Tensor):
        super().__init__()
        assert settings.vocab_size is not None
        self.norm = RMSNorm(settings.dim, settings.norm_eps)
        self.weight = embedding if settings.tied_embeddings else _matrix(settings.vocab_size, settings.dim)
        self.is_frozen = False

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
        weight_VD = self.weight.detach() if self.is_frozen else self.weight
        if selector is None or scale_H is None:
            return score_tokens(hidden_BTHD, weight_VD, targets_BTH, valid_BTH, num_valid_H)
        if loss_phase == "dense":
            return dense_losses(hidden_BTHD, weight_VD, targets_BTH, valid_BTH, selector, scale_H)
        predict = loss_phase == "predicted"
        return chunked_losses(hidden_BTHD, weight_VD, targets_BTH, valid_BTH, selector, scale_H, num_valid_H, predict)


class MTPModel(nn.Module):
    """Embedding, trunk, prediction heads and unembedding.

    settings: the shape; its vocab_size must be set.
    activation_checkpointing: `none`, `selective` or `full`, see `recompute`.
    elementwise: the eager or compiled elementwise functions of the blocks.
    detach_heads: as `training.detach_heads`.
    """

    def __init__(
        self,
        settings: ModelSettings,
        activation_checkpointing: str = "none",
        elementwise: Elementwise = EAGER,
        detach_heads: bool = False,
    ):
        super().__init__()
        assert settings.vocab_size is not None, "vocab_size is resolved from the data before a model is built"
        self.settings = settings
        self.detach_heads = detach_heads
        self.embed = nn.Embedding(settings.vocab_size, settings.dim)
        self.trunk = nn.ModuleList(Block(settings, elementwise) for _ in range(settings.num_layers - 1))
        self.heads = nn.ModuleList(Block(settings, elementwise) for _ in range(settings.num_prediction_heads))
        self.unembed = Unembedding(settings, self.embed.weight)
        self.run_block = block_runner(activation_checkpointing)
        # One bool [B] per backward since the caller last cleared the list: rows whose gradient at the embedding was not finite.
        self.bad_gradient_rows: list[Tensor] = []
        # Since the caller last cleared the list: a head, and the squared norm of the gradient that a backward sent from it into
        # the trunk, a float32 scalar.
        self.trunk_gradients: list[tuple[int, Tensor]] = []
        self.trunk_is_frozen = False

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
        """Compute the losses of a micro-batch.

        Args:
            tokens_BT: int64.
            document_ids_BT: int32, -1 on padding.
            targets_BTH: int64, the token that head h at position t predicts.
            valid_BTH: bool.
            selector: selects the pairs to train on from the per-token losses; None to score only.
            scale_H: float32, the factor of each head's summed loss; given together with `selector`.
            loss_phase: `predicted`, `two_pass` or `dense`, as `training.loss_phase`.
            spans: the documents' boundaries as the host knows them; saves a wait for the device.
            num_valid_H: valid pairs of each head as the host knows them; saves a wait for the device.

        Returns:
            Without `selector` the losses of all heads, float32 [B, T, H] without gradient, 0 at invalid pairs. With it
            `HeadLosses`, whose loss is the objective Σ_h scale_h · Σ selected losses of head h.
        """
        # A frozen model is marked by its caller.
        with record_function("policy") if self.trains else nullcontext():
            hidden_BTHD = self.hidden_states(tokens_BT, document_ids_BT, spans)
        with record_function("loss") if self.trains else nullcontext():
            return self.unembed(hidden_BTHD, targets_BTH, valid_BTH, selector, scale_H, loss_phase, num_valid_H)

    def hidden_states(self, tokens_BT: Tensor, document_ids_BT: Tensor, spans: Spans | None = None) -> Tensor:
        """Each head's output before the final norm, [B, T, H, D] in the model's dtype."""
        angles = rotary_angles(tokens_BT.shape[1], self.settings, tokens_BT.device)
        hidden_BTD = self.embed(tokens_BT)
        masks = spans is None or not can_use_flash(hidden_BTD, self.settings)
        documents = document_mask(document_ids_BT) if masks else spans

        # Backward ends here, so a row's gradient that became non-finite on the way arrives non-finite.
        if hidden_BTD.requires_grad and not self.trunk_is_frozen:
            hidden_BTD.register_hook(self._note_bad_rows)

        # Under ZeRO-3 a block whose input needs no gradient would train with gradients of zero (`runtime.engine` says why).
        assert hidden_BTD.requires_grad or not torch.is_grad_enabled() or not self.trains, "detach().requires_grad_()"
        for block in self.trunk:
            hidden_BTD = self.run_block(block, hidden_BTD, angles, documents)

        # A frozen trunk gets gradients of zero, since every parameter must be reached by backward.
        if hidden_BTD.requires_grad and self.trunk_is_frozen:
            hidden_BTD.register_hook(self._note_bad_rows)
            hidden_BTD.register_hook(torch.zeros_like)

        # Heads 1, 2, … may be cut off the trunk; what goes into their blocks must need a gradient all the same, as above.
        cut_BTD = hidden_BTD
        if self.detach_heads and hidden_BTD.requires_grad:
            cut_BTD = hidden_BTD.detach().requires_grad_()
        inputs = [hidden_BTD, *[cut_BTD] * (len(self.heads) - 1)]
        inputs = [self._watched(each_BTD, head) if each_BTD is hidden_BTD else each_BTD for head, each_BTD in enumerate(inputs)]
        return torch.stack(
            [self.run_block(head, each_BTD, angles, documents) for head, each_BTD in zip(self.heads, inputs, strict=True)],
            dim=2,
        )

    def freeze_trunk(self, is_frozen: bool) -> None:
        """Send gradients of zero into the trunk, or the true ones; an embedding that is also the unembedding is frozen with
        the trunk."""
        self.trunk_is_frozen = is_frozen
        self.unembed.is_frozen = is_frozen and self.settings.tied_embeddings

    @property
    def trains(self) -> bool:
        """True if any parameter is trained."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def _watched(self, hidden_BTD: Tensor, head: int) -> Tensor:
        """A head's own view of the trunk's output, whose gradient is that head's alone."""
        if not hidden_BTD.requires_grad:
            return hidden_BTD
        own_BTD = hidden_BTD.view_as(hidden_BTD)
        own_BTD.register_hook(_NoteNorm(self.trunk_gradients, head))
        return own_BTD

    def _note_bad_rows(self, gradient_BTD: Tensor) -> None:
        self.bad_gradient_rows.append(~torch.isfinite(gradient_BTD).all(dim=2).all(dim=1))


class _NoteNorm:
    """A hook that notes the squared norm of a head's gradient. Nothing in it waits for the device."""

    def __init__(self, found: list[tuple[int, Tensor]], head: int):
        self.found, self.head = found, head

    def __call__(self, gradient_BTD: Tensor) -> None:
        self.found.append((self.head, torch.linalg.vector_norm(gradient_BTD, dtype=torch.float32).square()))


def no_gather(_: nn.Parameter) -> AbstractContextManager[bool]:
    """The `Gather` of a model that is not partitioned: there is nothing to gather."""
    return nullcontext(True)


def initialize_weights(model: MTPModel, gather: Gather = no_gather) -> None:
    """Initialise the weights; collective if the model is partitioned.

    Matrices are drawn from N(0, 0.02²); the two of a block that write into the residual stream are scaled by
    1 / sqrt(2 · num_layers), as in GPT-2. Norms are ones, biases zeros.

    Each parameter has its own generator, seeded by `model.seed` and its name, so its values depend neither on the number of
    ranks nor on the rest of the model. At most one parameter is gathered at a time.
    """
    for name, parameter in model.named_parameters():
        with gather(parameter) as is_writer, torch.no_grad():
            if is_writer:
                initialize_parameter(model.settings, name, parameter)


def initialize_parameter(settings: ModelSettings, name: str, parameter: Tensor) -> None:
    """Initialise one parameter, which is whole; as `initialize_weights`."""
    if name.endswith("norm.weight"):
        parameter.fill_(1.0)
    elif name.endswith("bias"):
        parameter.zero_()
    else:
        writes_residual = name.endswith(("attention.output.weight", "ffn.down.weight"))
        std = INIT_STD / math.sqrt(2 * settings.num_layers) if writes_residual else INIT_STD
        seed = hashlib.sha256(f"{settings.seed}/{name}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
        # Drawn on the CPU in float32 and then cast, so that the values are the same on every device.
        shape = tuple(parameter.shape)
        parameter.copy_(torch.randn(shape, generator=generator, dtype=torch.float32) * std)


def _matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns))
