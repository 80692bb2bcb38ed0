"""Section `data` of the settings: the data sets, the batch sizes, and how data is read."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.setting_types import (
    SET_NAME,
    ChangesResult,
    Fixed,
    Free,
    NonNegative,
    OneOrNamedLocations,
    Positive,
    PositiveFloat,
    Section,
    UserPath,
)
from pipeline.storage.files import Access
from pipeline.storage.location import Location, LocationSetting


class MixtureSet(Section):
    """One data set of `data.mixture`."""

    path: LocationSetting
    """Folder or URL of prepared shards."""
    weight: PositiveFloat
    """Share of the rows, relative to the weights of the other sets; the decimals are taken exactly as written."""
    name: Annotated[str, Field(pattern=SET_NAME)]
    """Name in metrics and messages; also the name of its source if its inputs were not named."""


class DataSettings(Section):
    """Section `data`: the data sets, the batch sizes, and how they are read."""

    path: Free[LocationSetting | None] = None
    """Folder of prepared shards (launch/prepare.py makes it): a path, https://HOST/FOLDER, s3://BUCKET/FOLDER, or, with
    `allow_pipe`, pipe:COMMAND in which {} is the name of a file."""
    mixture: Free[Annotated[list[MixtureSet], Field(min_length=1)] | None] = None
    """Several data sets instead of `path`, each with `path`, `weight` and `name`, mixed by weight."""
    validation_path: Free[OneOrNamedLocations | None] = None
    """Folder of held-out prepared shards, or several by name (`{web: FOLDER, books: FOLDER}`), each with metrics of its own;
    null: no validation."""
    builtin: Free[bool] = False
    """Prepare the embedded corpus (Python's own documentation and source, and noise) under the run directory and train on
    it, as the demo does. `path` must be null."""
    sequence_length: ChangesResult[Positive] = 2048
    """T, tokens per row."""
    global_batch: Fixed[Positive] = 256
    """G, rows per optimizer step, over all ranks."""
    micro_batch: Free[Positive | Literal["auto"]] = 8
    """B, rows per rank and micro-step; `auto`: the largest that divides a rank's lanes and fits the device's memory by the
    plan, so that any number of ranks that divides `lanes` trains on the same samples. It may change with the number of ranks;
    the selection's pool does too where it is the micro-step (`training.selection_pool`), which is said when the run is
    resumed."""
    lanes: Fixed[Positive | None] = None
    """L, independent reading positions of the job; null: the largest divisor of `global_batch` up to 256."""
    seed: ChangesResult[NonNegative] = 0
    """Seed of the order of samples."""
    shuffle_block: ChangesResult[Positive] = 1024
    """Size of the fixed blocks of a shard in which samples are shuffled, in samples."""
    num_workers: Free[NonNegative] = 2
    """Loader processes per rank; 0 reads in the training process."""
    on_corrupt: Free[Literal["error", "skip"]] = "error"
    """Reaction to a damaged sample: end the job on all ranks, or replace the sample by a row of padding."""
    max_corrupt: ChangesResult[NonNegative] = 100
    """Largest number of damaged samples that `skip` tolerates, over all ranks and the whole run."""
    retry_seconds: Free[PositiveFloat] = 120.0
    """Seconds for which a failed read of remote data is retried, with growing pauses, before the job ends; and for which the
    command of a `pipe:` may give nothing."""
    cache_dir: Free[UserPath | None] = None
    """Local folder that caches remote data, shared by all ranks of the machine; null: no cache."""
    cache_bytes: Free[Annotated[int, Field(ge=2**20)]] = 64 * 2**30
    """Largest size of `cache_dir` in bytes; the least recently used files are removed first."""
    allow_pipe: Free[bool] = False
    """Allow `pipe:` paths, which run a shell command."""

    @property
    def validation_sets(self) -> dict[str, Location]:
        """The held-out folders by name; an only one has the name ""."""
        if self.validation_path is None:
            return {}
        return self.validation_path if isinstance(self.validation_path, dict) else {"": self.validation_path}

    @property
    def rows_per_rank(self) -> int:
        """B, once `micro_batch: auto` is resolved (`planning.micro_batch`)."""
        assert self.micro_batch != "auto", "data.micro_batch: auto is resolved before it is used"
        return self.micro_batch

    @property
    def access(self) -> Access:
        """The settings for reading remote data, as storage takes them."""
        return Access(self.retry_seconds, self.cache_dir, self.cache_bytes, self.allow_pipe)
