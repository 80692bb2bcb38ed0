"""A micro-batch as tensors, and what each prediction head has to predict in it.

B rows, T tokens, H heads.

The pair (t, h) is valid when token j = t+1+h lies in the row, in the same document as t, and neither is padding. All losses
and thresholds of the project stand on `targets_and_valid`. The host counts the same pairs from the documents' lengths
(`Batch.num_valid`), so that it need not wait for the device to know a step's counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.data.shards.sample import Sample

_NO_DOCUMENT, _NO_SOURCE = np.array([-1], np.int32), np.array([0], np.uint8)


class Spans(NamedTuple):
    """Where the documents of a micro-batch lie in the flat list of its B * T tokens; a row's padding is one more.

    starts_S: int32 [S + 1], where each of the S begins, and where the last ends. longest: tokens of the longest.
    """

    starts_S: Tensor
    longest: int


class DocumentTable(NamedTuple):
    """The D documents of a micro-batch as the host knows them, int64 [D] each: in which row, how many tokens, and the index of
    the source."""

    rows_D: np.ndarray
    lengths_D: np.ndarray
    sources_D: np.ndarray


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
    spans: Spans
    documents: DocumentTable
    damage: tuple[str, ...] = ()
    failure: str | None = None
    reference_losses_BTC: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with its tensors on `device`."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch where a device can fetch it while the host goes on."""
        return self._with_each(Tensor.pin_memory)

    @property
    def tensors(self) -> list[Tensor]:
        """All that lie on the device."""
        found = [self.tokens_BT, self.document_ids_BT, self.sources_BT, self.spans.starts_S, self.reference_losses_BTC]
        return [tensor for tensor in found if tensor is not None]

    def num_valid(self, num_heads: int) -> Tensor:
        """int64 [B, H] on the host, how many pairs of each row `targets_and_valid` marks."""
        valid_DH = np.maximum(self.documents.lengths_D[:, None] - 1 - np.arange(num_heads), 0)
        valid_BH = np.zeros((len(self.keys), num_heads), np.int64)
        np.add.at(valid_BH, self.documents.rows_D, valid_DH)
        return torch.from_numpy(valid_BH)

    def _with_each(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            tokens_BT=function(self.tokens_BT),
            document_ids_BT=function(self.document_ids_BT),
            sources_BT=function(self.sources_BT),
            reference_losses_BTC=None if self.reference_losses_BTC is None else function(self.reference_losses_BTC),
            spans=self.spans._replace(starts_S=function(self.spans.starts_S)),
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
    lengths = lengths.astype(np.int64)
    document_ids_BT = np.repeat(document_ids, lengths).reshape(tokens_BT.shape)
    return Batch(
        tokens_BT=torch.from_numpy(tokens_BT.astype(np.int64)),
        document_ids_BT=torch.from_numpy(document_ids_BT),
        sources_BT=_sources(samples, lengths, tokens_BT.shape),
        keys=tuple(sample.key for sample in samples),
        spans=_spans(lengths),
        documents=_document_table(samples),
        damage=tuple(sample.damage for sample in samples if sample.damage is not None),
        reference_losses_BTC=_reference_losses(samples),
    )


def _spans(lengths: np.ndarray) -> Spans:
    ends = np.cumsum(lengths[lengths > 0])
    return Spans(torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)), int(lengths.max()))


def _document_table(samples: Sequence[Sample]) -> DocumentTable:
    counts = [len(sample.lengths) for sample in samples]
    sources = [np.zeros(len(sample.lengths), np.int64) if sample.sources is None else sample.sources for sample in samples]
    lengths_D, sources_D = (
        np.concatenate(parts).astype(np.int64) for parts in ([sample.lengths for sample in samples], sources)
    )
    return DocumentTable(np.repeat(np.arange(len(samples)), counts), lengths_D, sources_D)


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
    return Batch(
        zeros_BT,
        padding_BT,
        zeros_BT,
        ("(not read)",) * num_rows,
        _spans(np.full(num_rows, sequence_length)),
        DocumentTable(*np.zeros((3, 0), np.int64)),
        failure=failure,
    )


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
