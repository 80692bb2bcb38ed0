"""A micro-batch as tensors, and what each prediction head has to predict in it.

B rows, T tokens, H heads.

The pair (t, h) is valid when token j = t+1+h lies in the row, in the same document as t, and neither is padding. All losses,
counts and thresholds of the project stand on `targets_and_valid`, so nothing else decides what is valid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.data.shard_reader import Sample


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    tokens_BT: int64.
    document_ids_BT: int32; 0, 1, 2 … within each row, −1 on padding.
    sources_BT: int64 index into the manifest's sources; 0 on padding and where sources have no names.
    keys: for each row `SHARD/KEY`.
    """

    tokens_BT: Tensor
    document_ids_BT: Tensor
    sources_BT: Tensor
    keys: tuple[str, ...]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with its tensors on `device`."""
        return Batch(
            self.tokens_BT.to(device, non_blocking=non_blocking),
            self.document_ids_BT.to(device, non_blocking=non_blocking),
            self.sources_BT.to(device, non_blocking=non_blocking),
            self.keys,
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of the same T into a batch."""
    tokens_BT = np.stack([sample.tokens for sample in samples])
    sequence_length = tokens_BT.shape[1]
    runs = [_with_padding(sample, sequence_length) for sample in samples]
    lengths = np.concatenate([lengths for lengths, _, _ in runs])
    document_ids = np.concatenate([document_ids for _, document_ids, _ in runs])
    sources = np.concatenate([sources for _, _, sources in runs])
    return Batch(
        tokens_BT=torch.from_numpy(tokens_BT.astype(np.int64)),
        document_ids_BT=torch.from_numpy(np.repeat(document_ids, lengths).reshape(tokens_BT.shape)),
        sources_BT=torch.from_numpy(np.repeat(sources, lengths).reshape(tokens_BT.shape)),
        keys=tuple(sample.key for sample in samples),
    )


def _with_padding(sample: Sample, sequence_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths, document ids and sources of a row's documents and, last, of its padding (which may have length 0)."""
    count = len(sample.lengths)
    lengths = np.append(sample.lengths.astype(np.int64), sequence_length - int(sample.lengths.sum()))
    document_ids = np.append(np.arange(count, dtype=np.int32), np.int32(-1))
    sources = np.zeros(count + 1, np.int64)
    if sample.sources is not None:
        sources[:count] = sample.sources
    return lengths, document_ids, sources


def targets_and_valid(tokens_BT: Tensor, document_ids_BT: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """What each head has to predict at each position, and which of these pairs count.

    Args:
        tokens_BT: int64.
        document_ids_BT: integers; negative on padding.
        num_heads: H.

    Returns:
        targets_BTH: int64; head h at t has token t+1+h; 0 where the pair is not valid.
        valid_BTH: bool.
    """
    targets_BTH = _ahead(tokens_BT, num_heads, 0)
    same_document_BTH = _ahead(document_ids_BT, num_heads, -1) == document_ids_BT[:, :, None]
    valid_BTH = same_document_BTH & (document_ids_BT >= 0)[:, :, None]
    return targets_BTH.masked_fill(~valid_BTH, 0), valid_BTH


def _ahead(values_BT: Tensor, num_heads: int, beyond: int) -> Tensor:
    """[b, t, h] = values_BT[b, t+1+h], `beyond` where the row has ended."""
    return functional.pad(values_BT[:, 1:], (0, num_heads), value=beyond).unfold(1, num_heads, 1)
