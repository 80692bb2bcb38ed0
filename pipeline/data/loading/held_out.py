"""Held-out rows: every row of a prepared folder, or a fixed subset of them, the same ones whatever the sizes of the job.

A validation reads rows in the order of the manifest. Neither the seed nor lanes, global batch or epoch enter, so that losses of
two runs are losses of the same rows. Micro-step a has the rows [a·R·B, (a+1)·R·B), of which rank r has a·R·B + r·B + [0, B), as
in training. After the last row comes padding, which has no valid pairs: the last micro-step is as large as the others, and all
ranks have equally many.

Of N rows out of S, row n is floor(n·S/N). They are spread evenly, because neighbours in a folder may come from one source or
from one part of the input.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from tokenizers import Tokenizer

from pipeline.data.errors import DataError
from pipeline.data.loading.batch import Batch
from pipeline.data.loading.lane_reader import PADDING, LaneRounds
from pipeline.data.loading.mixture import DataSet
from pipeline.data.loading.stream import micro_batches, rounds_here
from pipeline.data.shards.manifest import Manifest, read_manifest
from pipeline.data.shards.table import ShardTable
from pipeline.data.token_bytes import TokenBytes, bytes_of_tokens, unknown_bytes
from pipeline.data.tokenizer import fingerprint
from pipeline.storage.files import DIRECT, Access, read_whole


class ManifestOrder:
    """Rows of one folder in the manifest's order, dealt to the lanes in turn, then padding without end.

    Args:
        shard_samples: samples of each shard.
        num_rows: N, at most all S.
        lanes: the rows of a round.
    """

    def __init__(self, shard_samples: Sequence[int] | np.ndarray, num_rows: int, lanes: int) -> None:
        self._ends = np.cumsum(np.asarray(shard_samples, np.int64))
        assert 0 < num_rows <= self._ends[-1]
        self.num_rows = num_rows
        self.lanes = lanes

    def locate_lane(self, lane: int, first_round: int, num_rounds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Locate the rows of one lane in consecutive rounds: set (0 or PADDING), shard and sample, int64 [num_rounds] each."""
        rows = lane + self.lanes * np.arange(first_round, first_round + num_rounds, dtype=np.int64)
        sets = np.where(rows < self.num_rows, 0, PADDING)

        # floor(n·S/N) in parts, whose products stay within int64.
        stride, rest = divmod(int(self._ends[-1]), self.num_rows)
        rows = np.minimum(rows, self.num_rows - 1)
        positions = rows * stride + rows * rest // self.num_rows

        shards = np.searchsorted(self._ends, positions, side="right")
        return sets, shards, positions - (self._ends - np.diff(self._ends, prepend=0))[shards]


class HeldOutRows:
    """One rank's held-out rows of one folder, as micro-batches, from the first row each time.

    Args:
        data: the folder; its name is "" for the only one.
        num_rows: rows to read, over all ranks; None for all.
        micro_batch: B, rows of a rank in a micro-step.
        rank: of this process.
        world_size: R, the number of ranks.
        access: to data that is not on this machine.

    Raises:
        DataError: the folder is not a prepared one, or has fewer rows.
    """

    def __init__(
        self,
        data: DataSet,
        *,
        num_rows: int | None = None,
        micro_batch: int,
        rank: int,
        world_size: int,
        access: Access = DIRECT,
    ) -> None:
        self.data = data
        self.manifest = read_manifest(data.location, access)
        problem = too_many_rows(num_rows, self.manifest, data)
        if problem is not None:
            raise DataError(f"rows: {problem}")
        self.num_rows = num_rows or self.manifest.num_samples
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size
        self.access = access
        self.token_bytes = _token_bytes(data, self.manifest, access)

    @property
    def name(self) -> str:
        """Name of the folder in metrics and messages; "" for the only one."""
        return self.data.name

    @property
    def why_no_bytes(self) -> str:
        """The reason why a validation of these rows has no bits per byte."""
        return self.token_bytes.unknown or "its rows have tokens whose text is not known, or none with text"

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of every rank, the last ones with padding."""
        return -(-self.num_rows // (self.micro_batch * self.world_size))

    def batches(self) -> Iterator[Batch]:
        """Iterate over this rank's micro-batches. Damage is in `Batch.damage` and `Batch.failure`, as in training."""
        lanes = self.micro_batch * self.world_size
        first_lane = self.rank * self.micro_batch
        rounds = LaneRounds(
            [self.data],
            [self.manifest],
            [None],
            ManifestOrder(ShardTable.of(self.manifest.shards).samples, self.num_rows, lanes),
            self.access,
            lanes=range(first_lane, first_lane + self.micro_batch),
            start_round=0,
            end_round=self.num_micro_batches,
        )
        batches = micro_batches(rounds_here(rounds), self.micro_batch, self.manifest.sequence_length, raises=False)
        return itertools.islice(batches, self.num_micro_batches)


def too_many_rows(num_rows: int | None, manifest: Manifest, data: DataSet) -> str | None:
    """Say that the folder has fewer rows than are asked for, to follow the name of a setting; None if it has as many."""
    if num_rows is None or num_rows <= manifest.num_samples:
        return None
    return f"{num_rows}, but {data.location} holds {manifest.num_samples} rows; set at most {manifest.num_samples}"


def _token_bytes(data: DataSet, manifest: Manifest, access: Access) -> TokenBytes:
    """Measure the tokens of the folder's own tokenizer. Losses need no tokenizer, so that one that is of no use is no error."""
    file = data.location / manifest.tokenizer_file
    try:
        identity, measured = _measured(read_whole(file, access), manifest.end_of_document_id, manifest.vocab_size)
    except Exception as error:  # the tokenizers library raises bare Exception
        return unknown_bytes(manifest.vocab_size, f"{file} cannot be read: {error}")
    if identity != manifest.tokenizer_sha256:
        return unknown_bytes(manifest.vocab_size, f"{file} is not the tokenizer that the data was prepared with")
    return measured


# A large vocabulary takes a second or two, and held-out folders have the same one.
@lru_cache(maxsize=1)
def _measured(content: bytes, end_of_document_id: int, vocab_size: int) -> tuple[str, TokenBytes]:
    """(fingerprint, bytes of every token) of a tokenizer.json."""
    tokenizer = Tokenizer.from_buffer(content)
    return fingerprint(tokenizer), bytes_of_tokens(tokenizer, end_of_document_id, vocab_size)
