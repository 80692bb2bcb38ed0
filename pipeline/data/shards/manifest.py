"""The manifest of a prepared folder: `manifest.json`, which lists its shards and how they were made.

A tar reader cannot tell a complete shard from one that was cut between two members. Every count, size and hash is therefore
recorded when the shards are made. `read_manifest` makes the checks that cost only one `stat` for each file. The CRC-32 of a
sample is checked when the sample is read (`reader`), the sha256 of a shard by `verification`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    PlainSerializer,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from pipeline.data.errors import DataError
from pipeline.data.shards.shard_files import MANIFEST_FILE, raise_machine_fault_as_data_error, size_problems
from pipeline.data.shards.table import Count, FileName, Positive, Record, Sha256, Shard, ShardTable, parse_with_table
from pipeline.storage.files import DIRECT, Access, StorageError, read_whole
from pipeline.storage.lfs_pointer import pointer_problem
from pipeline.storage.location import Location, Url
from pipeline.storage.whole_file import write_file

FORMAT_VERSION = 1
_MAX_SHARDS_CHECKED = 4096
_HEAD = 512


class Source(Record):
    """A named input: the number of its documents, and of their tokens, end-of-document tokens included."""

    name: str
    documents: Count
    tokens: Count


def _as_table(shards: Any, validate: ValidatorFunctionWrapHandler) -> ShardTable:
    return shards if isinstance(shards, ShardTable) else ShardTable.of(validate(shards))


class InputCounts(Record):
    """Counts over the whole input, all splits together: documents used, and documents left out, by reason.

    special_text, without_token: documents used, with the string of a special token in their text, and with characters without
        a token.
    """

    documents: Count = 0
    empty: Count = 0
    undecodable: Count = 0
    oversized: Count = 0
    ignored: Count = 0
    special_text: Count = 0
    without_token: Count = 0


class Preparation(Record):
    """Record of how `launch/prepare.py` made the folder, and of what packing did.

    request_sha256: hash of all settings and of the input files' names and sizes.
    input: counts over the whole input.
    weights: how often the documents of a named source were taken; 1 for a source that is not listed.
    part: "2/8" for the second of eight parts of the input; None for all of it.
    whole_sha256: `request_sha256` without the part, equal for all parts of one request; None in folders of older versions.
    contents: of all documents of the input (`corpus.contents`), by which finished data is known to be that of its input; None
        in folders of older versions, and where parts were merged.
    special: tokens that were special beside those of the tokenizer (`data.declared_tokens`); None if there were none.
    documents: documents in this folder, copies included.
    documents_cut: documents that lie in more than one row.
    """

    request_sha256: Sha256
    input: InputCounts
    seed: int
    packing: str
    samples_per_shard: Positive
    validation: float
    weights: dict[str, float]
    part: str | None = None
    whole_sha256: Sha256 | None = None
    contents: str | None = None
    special: tuple[str, ...] | None = None
    documents: Count
    documents_cut: Count


class Bos(Record):
    """The token before each document: its id, None if there is none, and the rule that was asked for (auto, never, always)."""

    rule: str
    id: Count | None = None


class Manifest(Record):
    """The contents of `manifest.json`; the keys of the JSON are the names of the fields.

    tokenizer_sha256, tokenizer_identity: what an id means, and all that decides which ids a text becomes (`data.tokenizer`);
        the latter is None in folders of older versions.
    bos: the token before each document; None if that is not known, in folders of older versions and adopted ones.
    sources: indexed by a document's source index; empty where the inputs had no names.
    shards: in order; held as a `ShardTable`.
    preparation: None if the folder was not made by `launch/prepare.py`.
    """

    format_version: int = FORMAT_VERSION
    sequence_length: Positive
    vocab_size: Positive
    end_of_document_id: Count
    tokenizer_file: FileName
    tokenizer_sha256: Sha256
    sources: tuple[Source, ...]
    shards: Annotated[Sequence[Shard], WrapValidator(_as_table), PlainSerializer(list)]
    preparation: Preparation | None = None
    tokenizer_identity: Sha256 | None = None
    bos: Bos | None = None

    @property
    def num_samples(self) -> int:
        """The number of rows in all shards."""
        return int(ShardTable.of(self.shards).samples.sum())

    @property
    def num_tokens(self) -> int:
        """The number of tokens in all shards, without padding."""
        return int(ShardTable.of(self.shards).tokens.sum())

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources, in the order of their indices; empty where the inputs had no names."""
        return tuple(source.name for source in self.sources)

    @model_validator(mode="after")
    def _is_consistent(self) -> "Manifest":
        if self.end_of_document_id >= self.vocab_size:
            raise ValueError(f"end_of_document_id {self.end_of_document_id} is not below vocab_size {self.vocab_size}")
        if len(set(self.source_names)) != len(self.source_names):
            raise ValueError("two sources have the same name")
        if not ShardTable.of(self.shards).has_unique_names():
            raise ValueError("two shards have the same name")
        return self


def read_manifest(
    directory: Location, access: Access = DIRECT, *, allow_empty: bool = False, check_files: bool = True
) -> Manifest:
    """Read the manifest of a folder, and check that its files exist and have their sizes.

    Files are checked only where that is quick: in a folder of this machine, and there at most the files of a few thousand
    evenly spaced shards. Other files that are missing or cut are found when they are read, because every sample is used only
    with the right checksum.

    Args:
        directory: the prepared folder.
        access: to a folder that is not on this machine.
        allow_empty: accept a manifest without samples. One part of a data set may have no held-out document.
        check_files: false to leave the files unchecked.

    Raises:
        DataError: the folder or manifest is missing, empty, malformed, of an unknown version or without samples, or the
            tokenizer, a shard or one of its index files is missing or has the wrong size.
    """
    manifest = _parse(_manifest_text(directory, access), str(directory / MANIFEST_FILE))
    if manifest.num_samples == 0 and not allow_empty:
        raise DataError(f"{directory / MANIFEST_FILE} lists no samples; prepare the data again with more documents")
    if check_files and isinstance(directory, Path):
        if not (directory / manifest.tokenizer_file).is_file():
            raise DataError(
                f"{directory / manifest.tokenizer_file} cannot be found, but {MANIFEST_FILE} names it as the data's tokenizer; "
                "copy it again from where the data was prepared"
            )
        for number in range(0, len(manifest.shards), 1 + len(manifest.shards) // _MAX_SHARDS_CHECKED):
            for problem in size_problems(directory, manifest.shards[number]):
                raise DataError(problem)
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `directory/manifest.json` atomically."""
    write_file(Path(directory) / MANIFEST_FILE, (manifest.model_dump_json(indent=2, exclude_none=True) + "\n").encode())


def tokenizer_difference(first: Manifest, second: Manifest) -> str | None:
    """Say how the tokenizers of two folders differ, as far as both manifests tell; None if they do not.

    Two folders have the same tokenizer if their ids mean the same, a text becomes the same ids, and documents begin and end
    alike.
    """
    if first.tokenizer_sha256 != second.tokenizer_sha256:
        return f"tokenizer_sha256 is {first.tokenizer_sha256} in one and {second.tokenizer_sha256} in the other"
    identities = (first.tokenizer_identity, second.tokenizer_identity)
    if None not in identities and identities[0] != identities[1]:
        return (
            f"tokenizer_identity is {identities[0]} in one and {identities[1]} in the other: the ids mean the same, but a text "
            "becomes other ids (normaliser, pre-tokeniser, merges or added tokens)"
        )
    if first.end_of_document_id != second.end_of_document_id:
        return f"documents end with id {first.end_of_document_id} in one and {second.end_of_document_id} in the other"
    if first.bos is not None and second.bos is not None and first.bos.id != second.bos.id:
        return f"the BOS token's id is {first.bos.id} in one and {second.bos.id} in the other"
    if first.preparation is None or second.preparation is None:
        return None
    if tokens := {*(first.preparation.special or ())} ^ {*(second.preparation.special or ())}:
        return (
            f"{', '.join(map(repr, sorted(tokens)))}: declared special beside the tokenizer of one, where no text becomes such "
            "a token, and not beside that of the other"
        )
    return None


def _manifest_text(directory: Location, access: Access) -> str:
    # Returns text, so that the bytes are freed before parsing: with a million shards they are 300 MB.
    try:
        return _manifest_bytes(directory, access).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{directory / MANIFEST_FILE} is not a valid manifest: {error}; copy it again") from None


def _manifest_bytes(directory: Location, access: Access) -> bytes:
    remedy = "make it with `python launch/prepare.py --input PATH --output DIR …`"

    # Remote.
    if isinstance(directory, Url):
        try:
            return read_whole(directory / MANIFEST_FILE, access)
        except StorageError as error:
            raise DataError(str(error)) from None
        except OSError as error:
            raise DataError(f"{directory / MANIFEST_FILE} cannot be read: {error.strerror or error}; {remedy}") from None

    # Local; the error tells a missing folder, an empty folder and a folder of prepared folders apart.
    if not directory.is_dir():
        raise DataError(f"expected a folder of prepared shards at {directory}, but there is no such folder; {remedy}")
    try:
        return (directory / MANIFEST_FILE).read_bytes()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise_machine_fault_as_data_error(error, directory)
    if not any(directory.iterdir()):
        raise DataError(f"expected prepared shards in {directory}, but the folder is empty; {remedy}")
    hint = _prepared_subfolders(directory)
    raise DataError(f"expected {MANIFEST_FILE} in {directory}, but it has none; {hint or remedy}")


def _prepared_subfolders(directory: Path) -> str:
    prepared = sorted(str(path.parent) for path in directory.glob(f"*/{MANIFEST_FILE}"))
    return f"did you mean {' or '.join(prepared[:4])}?" if prepared else ""


def _parse(text: str, path: str) -> Manifest:
    try:
        # The fast path: shards become columns while they are parsed. None if anything about them is irregular.
        parsed = parse_with_table(text)
        if parsed is not None and parsed[0].get("format_version") == FORMAT_VERSION:
            content, shards = parsed
            checked = Manifest.model_validate_json(json.dumps(content | {"shards": []}))
            return Manifest.model_validate(dict(checked) | {"shards": shards})

        # The slow path, whose error messages name the field.
        version = _Version.model_validate_json(text).format_version
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {version}, but this program reads version {FORMAT_VERSION}; "
                "prepare the data again, or use the program that made it"
            )
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        if (problem := pointer_problem(path, text[:_HEAD].encode())) is not None:
            raise DataError(problem) from None
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(
            f"{path} is not a valid manifest: {where}: {first['msg']} ({error.error_count()} problem(s) in all); "
            "copy it again from where the data was prepared, or prepare again"
        ) from None


class _Version(BaseModel):
    # Validated first and alone, because another version may have other fields.
    format_version: int
