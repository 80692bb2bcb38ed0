"""Next-token losses of a model that lies in files, a block at a time: two copies of it are compared so, whatever their size.

Shapes: B rows, T tokens, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import ModelSettings
from pipeline.model.transformer import Block, RMSNorm, document_mask, rotary_angles
from pipeline.model.weight_files import Weights

_ROWS_A_CHUNK = 256


@torch.no_grad()
def block_losses(settings: ModelSettings, weights: Weights, tokens_BT: Tensor) -> Tensor:
    """Compute the losses of head 0 in float32, [B, T - 1]; each row is one document.

    weights: by the names in `MTPModel`, of any dtype. One block's, or one matrix of V × D, is in memory.
    """
    hidden_BTD = F.embedding(tokens_BT, weights.tensor("embed.weight").float())
    angles = rotary_angles(tokens_BT.shape[1], settings, tokens_BT.device)
    documents = document_mask(torch.zeros_like(tokens_BT, dtype=torch.int32))
    for prefix in [*(f"trunk.{layer}" for layer in range(settings.num_layers - 1)), "heads.0"]:
        hidden_BTD = _block(settings, weights, prefix)(hidden_BTD, angles, documents)

    norm = RMSNorm(settings.dim, settings.norm_eps)
    norm.weight.copy_(weights.tensor("unembed.norm.weight"))
    hidden_ND = norm(hidden_BTD[:, :-1]).flatten(0, 1)
    unembedding_VD = weights.tensor("embed.weight" if settings.tied_embeddings else "unembed.weight").float()
    chunks = zip(hidden_ND.split(_ROWS_A_CHUNK), tokens_BT[:, 1:].flatten().split(_ROWS_A_CHUNK), strict=True)
    losses = [F.cross_entropy(hidden @ unembedding_VD.T, targets, reduction="none") for hidden, targets in chunks]
    return torch.cat(losses).view(tokens_BT.shape[0], -1)


def _block(settings: ModelSettings, weights: Weights, prefix: str) -> Block:
    with torch.device("meta"):
        block = Block(settings)
    block = block.to_empty(device="cpu")
    for name, parameter in block.named_parameters():
        parameter.copy_(weights.tensor(f"{prefix}.{name}"))
    return block
