"""A micro-batch as tensors, and the targets of each prediction head in it.

B: rows, T: tokens, H: heads, C: columns of cached losses, D: documents, S: spans.

The pair (t, h) is valid when token t+1+h lies in the row, in the same document as token t, and neither is padding. All losses
and thresholds of the project are computed over the pairs that `targets_and_valid` marks. `Batch.num_valid` counts the same
pairs on the host, from the documents' lengths, so that the counts of a step are known without waiting for the device.
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
    """The documents of a micro-batch as spans of its B · T flattened tokens; the padding of a row counts as one more document.

    starts_S: int32 [S + 1], the start of each span and the end of the last one (cumulative sequence lengths).
    longest: tokens in the longest span.
    """

    starts_S: Tensor
    longest: int


class DocumentTable(NamedTuple):
    """The D documents of a micro-batch on the host, int64 [D] each: row, length in tokens, and index of the source."""

    rows_D: np.ndarray
    lengths_D: np.ndarray
    sources_D: np.ndarray


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    tokens_BT: int64 token ids.
    document_ids_BT: int32; 0, 1, 2 … within each row, −1 on padding.
    sources_BT: int64 index into the manifest's sources; 0 on padding and where sources have no names.
    keys: `SHARD/KEY` of each row.
    numbers_B: int64 on the host, the place of each row among all samples of the data; -1 where there is none.
    spans: the documents, for attention.
    documents: the documents, for counting on the host.
    damage: one message for each damaged row, which padding replaces.
    failure: the error because of which no rows could be read and all rows are padding; None otherwise.
    reference_losses_BTC: float32, cached losses of the frozen reference; None where they are computed.
    """

    tokens_BT: Tensor
    document_ids_BT: Tensor
    sources_BT: Tensor
    keys: tuple[str, ...]
    numbers_B: np.ndarray
    spans: Spans
    documents: DocumentTable
    damage: tuple[str, ...] = ()
    failure: str | None = None
    reference_losses_BTC: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Copy the tensors to `device`."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Copy the tensors to pinned memory, from which copies to a device can be asynchronous."""
        return self._with_each(Tensor.pin_memory)

    @property
    def tensors(self) -> list[Tensor]:
        """List all tensors that `to` moves."""
        found = [self.tokens_BT, self.document_ids_BT, self.sources_BT, self.spans.starts_S, self.reference_losses_BTC]
        return [tensor for tensor in found if tensor is not None]

    def num_valid(self, num_heads: int) -> Tensor:
        """Count the valid pairs of each row and head, int64 [B, H], on the host; as `targets_and_valid` marks them."""
        # A document of n tokens has max(n - 1 - h, 0) valid pairs of head h.
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
    """Stack samples of the same sequence length into a batch."""
    tokens_BT = np.stack([sample.tokens for sample in samples])
    sequence_length = tokens_BT.shape[1]

    # Lengths of all documents. Each row's padding, perhaps of length 0, follows its documents as one more document.
    parts = [(sample, sum(sample.lengths.tolist())) for sample in samples]
    lengths = np.concatenate([part for sample, used in parts for part in (sample.lengths, [sequence_length - used])])

    # Document ids, one for each length, repeated over the document's tokens.
    ids = np.arange(max(len(sample.lengths) for sample in samples), dtype=np.int32)
    document_ids = np.concatenate([part for sample in samples for part in (ids[: len(sample.lengths)], _NO_DOCUMENT)])
    lengths = lengths.astype(np.int64)
    document_ids_BT = np.repeat(document_ids, lengths).reshape(tokens_BT.shape)

    return Batch(
        tokens_BT=torch.from_numpy(tokens_BT.astype(np.int64)),
        document_ids_BT=torch.from_numpy(document_ids_BT),
        sources_BT=_sources(samples, lengths, tokens_BT.shape),
        keys=tuple(sample.key for sample in samples),
        numbers_B=np.array([sample.number for sample in samples], np.int64),
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
    """Make a batch of padding, to use when no rows can be read; `failure` is the error message."""
    zeros_BT = torch.zeros(num_rows, sequence_length, dtype=torch.int64)
    padding_BT = torch.full((num_rows, sequence_length), -1, dtype=torch.int32)
    return Batch(
        zeros_BT,
        padding_BT,
        zeros_BT,
        ("(not read)",) * num_rows,
        np.full(num_rows, -1, np.int64),
        _spans(np.full(num_rows, sequence_length)),
        DocumentTable(*np.zeros((3, 0), np.int64)),
        failure=failure,
    )


def targets_and_valid(tokens_BT: Tensor, document_ids_BT: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Compute the target of each head at each position, and which pairs (position, head) are valid.

        targets[b, t, h] = tokens[b, t+1+h]
        valid[b, t, h]   = t+1+h < T  and  document[b, t+1+h] = document[b, t] >= 0

    Args:
        tokens_BT: int64.
        document_ids_BT: integers; negative on padding.
        num_heads: H.

    Returns:
        targets_BTH: int64; 0 where the pair is not valid.
        valid_BTH: bool.
    """
    targets_BTH = _ahead(tokens_BT, num_heads, 0)
    same_document_BTH = _ahead(document_ids_BT, num_heads, -1) == document_ids_BT[:, :, None]
    valid_BTH = same_document_BTH & (document_ids_BT >= 0)[:, :, None]
    return targets_BTH.masked_fill(~valid_BTH, 0), valid_BTH


def _ahead(values_BT: Tensor, num_heads: int, fill: int) -> Tensor:
    """Shift by each head's horizon: [b, t, h] = values_BT[b, t+1+h], or `fill` after the end of the row."""
    return functional.pad(values_BT[:, 1:], (0, num_heads), value=fill).unfold(1, num_heads, 1)
