"""A micro-batch as tensors, and what each prediction head has to predict in it.

B rows, T tokens, H heads.

The pair (t, h) is valid when token j = t+1+h lies in the row, in the same document as t, and neither is padding. All losses,
counts and thresholds of the project stand on `targets_and_valid`, so nothing else decides what is valid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.data.sample import Sample

_NO_DOCUMENT, _NO_SOURCE = np.array([-1], np.int32), np.array([0], np.uint8)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    tokens_BT: int64.
    document_ids_BT: int32; 0, 1, 2 … within each row, −1 on padding.
    sources_BT: int64 index into the manifest's sources; 0 on padding and where sources have no names.
    keys: for each row `SHARD/KEY`.
    reference_losses_BTC: float32, cached losses of the frozen reference; None where they are computed.
    damage: what was wrong with rows that are here replaced by padding, one message a row.
    failure: why no rows came and all of these are padding; None if they did.
    """

    tokens_BT: Tensor
    document_ids_BT: Tensor
    sources_BT: Tensor
    keys: tuple[str, ...]
    damage: tuple[str, ...] = ()
    failure: str | None = None
    reference_losses_BTC: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            tokens_BT=self.tokens_BT.to(device, non_blocking=non_blocking),
            document_ids_BT=self.document_ids_BT.to(device, non_blocking=non_blocking),
            sources_BT=self.sources_BT.to(device, non_blocking=non_blocking),
            reference_losses_BTC=None
            if self.reference_losses_BTC is None
            else self.reference_losses_BTC.to(device, non_blocking=non_blocking),
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of the same T into a batch."""
    tokens_BT = np.stack([sample.tokens for sample in samples])
    sequence_length = tokens_BT.shape[1]
    # Each row's padding, which may have length 0, follows its documents as one more of them.
    parts = [(sample, sum(sample.lengths.tolist())) for sample in samples]
    lengths = np.concatenate([part for sample, used in parts for part in (sample.lengths, [sequence_length - used])])
    counting = np.arange(max(len(sample.lengths) for sample in samples), dtype=np.int32)
    document_ids = np.concatenate([part for sample in samples for part in (counting[: len(sample.lengths)], _NO_DOCUMENT)])
    document_ids_BT = np.repeat(document_ids, lengths.astype(np.int64)).reshape(tokens_BT.shape)
    return Batch(
        tokens_BT=torch.from_numpy(tokens_BT.astype(np.int64)),
        document_ids_BT=torch.from_numpy(document_ids_BT),
        sources_BT=_sources(samples, lengths.astype(np.int64), tokens_BT.shape),
        keys=tuple(sample.key for sample in samples),
        damage=tuple(sample.damage for sample in samples if sample.damage is not None),
        reference_losses_BTC=_reference_losses(samples),
    )


def _reference_losses(samples: Sequence[Sample]) -> Tensor | None:
    losses = [sample.reference_losses for sample in samples if sample.reference_losses is not None]
    return torch.from_numpy(np.stack(losses)) if losses else None


def _sources(samples: Sequence[Sample], lengths: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    if all(sample.sources is None for sample in samples):
        return torch.zeros(shape, dtype=torch.int64)
    sources = [part for sample in samples if sample.sources is not None for part in (sample.sources, _NO_SOURCE)]
    return torch.from_numpy(np.repeat(np.concatenate(sources).astype(np.int64), lengths).reshape(shape))


def blank_batch(num_rows: int, sequence_length: int, failure: str) -> Batch:
    """Rows of padding in the place of rows that do not come."""
    zeros_BT = torch.zeros(num_rows, sequence_length, dtype=torch.int64)
    padding_BT = torch.full((num_rows, sequence_length), -1, dtype=torch.int32)
    return Batch(zeros_BT, padding_BT, zeros_BT, ("(not read)",) * num_rows, failure=failure)


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
