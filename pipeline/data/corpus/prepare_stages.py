"""The stages of a preparation: tokenise the input, pack each split, publish the folder."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline.data.corpus.contents import added
from pipeline.data.corpus.counts import Counts
from pipeline.data.corpus.display import Display
from pipeline.data.corpus.documents import DocumentReader
from pipeline.data.corpus.inputs import InputFile, Span, slice_size, slices
from pipeline.data.corpus.prepare import PrepareSettings, pack_split, tokenization_settings
from pipeline.data.corpus.request import request_sha256, whole_sha256
from pipeline.data.corpus.tokenization import SliceRecord, is_held_out, read_record, tokenize_slice
from pipeline.data.corpus.workers import work_on
from pipeline.data.errors import DataError
from pipeline.data.shards.manifest import InputCounts, Manifest, Preparation, write_manifest
from pipeline.data.shards.output_folder import remove
from pipeline.data.shards.writer import token_dtype
from pipeline.data.tokenizer import TOKENIZER_FILE, load_tokenizer, train_bpe, vocab_size
from pipeline.storage.whole_file import publish, write_file

# A BPE is trained on slices evenly spread over the input, about so many bytes. More text would change it little.
_TRAINING_BYTES = 1 << 30


@dataclass(frozen=True)
class Prepared:
    """Result of a preparation: manifests by folder, counts of the input, and if the output existed already, complete."""

    manifests: dict[Path, Manifest]
    counts: Counts
    was_complete: bool


@dataclass(frozen=True)
class PrepareJob:
    """A preparation in progress: its input, settings and folders."""

    files: list[InputFile]
    names: list[str]
    target: Path
    partial: Path
    settings: PrepareSettings
    processes: int
    display: Display

    @property
    def work(self) -> Path:
        return self.partial / "work"

    @property
    def data(self) -> Path:
        return self.partial / "data"

    @property
    def num_slices_done(self) -> int:
        return len(list(self.work.glob("slice-*.json")))


def run_stages(job: PrepareJob, tokenizer: Tokenizer | int, request: dict[str, Any], output_dir: Path) -> Prepared:
    """Do what is left of a job, and publish its output.

    Args:
        job: its folders exist.
        tokenizer: a tokenizer, or the vocabulary size of a BPE to train, unless one is saved already.
        request: of the job, for the manifests.
        output_dir: as the user named it.

    Raises:
        DataError: the input cannot be used, or a split has no tokens.
    """
    # Tokenise.
    if other_names := sum(file.names - 1 for file in job.files):
        job.display.say(f"{other_names:,} further name(s) of files that the input holds already left out")
    slices_ = own_slices(job)
    trained = _tokenizer(job, tokenizer)
    records = _tokenize(job, trained, slices_)

    # Counts of the whole input; every split must have tokens.
    counts = Counts()
    for record in records:
        counts.add(record.counts)
    tokens = {
        "train": sum(record.train_tokens for record in records),
        "validation": sum(record.validation_tokens for record in records),
    }
    if job.settings.part is None and not all(tokens[split] for split in job.settings.splits):
        # Nothing to resume: the same request would fail again, and another request cannot use this work.
        remove(job.partial)
        raise DataError(_nothing_found(counts, tokens, job.settings))

    # Pack each split, and publish.
    known = [record.contents for record in records if record.contents is not None]
    contents = added(known) if len(known) == len(records) else None
    manifests = {}
    for split, folder in job.settings.splits.items():
        manifests[output_dir / folder] = _pack(job, trained, split, folder, tokens[split], counts, contents, request)
    for leftover in job.data.rglob("*.tmp"):
        leftover.unlink()
    publish(job.data, job.target)
    remove(job.partial)
    return Prepared(manifests, counts, was_complete=False)


def _nothing_found(counts: Counts, tokens: dict[str, int], settings: PrepareSettings) -> str:
    if counts.documents:
        empty = next(split for split in settings.splits if not tokens[split])
        fraction = f" with --validation {settings.validation_fraction:g}" if settings.validation_fraction else ""
        return (
            f"none of the {counts.documents:,} documents falls to the {empty} split{fraction}; give more input, another "
            "fraction or other weights"
        )
    kinds = {"empty": counts.empty, "undecodable": counts.undecodable, "oversized": counts.oversized}
    left_out = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count) or "none"
    return "; ".join([f"no documents with text; left out: {left_out}", *counts.notes[:1], "give other input"])


def own_slices(job: PrepareJob) -> list[list[Span]]:
    """List the slices of this part of the input: every N-th one."""
    number, count = job.settings.part or (1, 1)
    if not 1 <= number <= count:
        raise DataError(f"expected a part from 1/{count} to {count}/{count}, got {number}/{count}")
    all_slices = slices(job.files, slice_size(job.files, count))
    if not all_slices:
        raise DataError(f"every input file is empty: {', '.join(file.path for file in job.files[:3])}")
    if len(all_slices) < count:
        raise DataError(
            f"part {number}/{count}: the input can be cut into {len(all_slices)} slices only, so expected at most that many "
            "parts; compressed files and tars cannot be cut"
        )
    return all_slices[number - 1 :: count]


def _tokenizer(job: PrepareJob, tokenizer: Tokenizer | int) -> Tokenizer:
    """Load the tokenizer that was saved when the work began; save, or train, it if there is none yet."""
    path = job.partial / TOKENIZER_FILE
    if not path.exists():
        if isinstance(tokenizer, int):
            tokenizer = _train(job, tokenizer)
        write_file(path, tokenizer.to_str(pretty=True).encode())
    return load_tokenizer(path)


def _train(job: PrepareJob, vocab_size: int) -> Tokenizer:
    # Evenly spaced slices with about _TRAINING_BYTES together.
    all_slices = slices(job.files, slice_size(job.files))
    step = -(-sum(file.size for file in job.files) // _TRAINING_BYTES)
    chosen = all_slices[:: max(1, step)]
    reader = DocumentReader(job.settings.rules)
    job.display.begin("reading text for a BPE", sum(span.size for spans in chosen for span in spans))

    def texts() -> Iterator[str]:
        consumed = 0
        for document in reader.read(itertools.chain.from_iterable(chosen)):
            # Held-out documents are left out, so that the tokenizer has not seen the validation set.
            if not is_held_out(document.text, job.settings.validation_fraction):
                yield document.text
            job.display.advance(1, 0, reader.consumed - consumed)
            consumed = reader.consumed
        job.display.advance(0, 0, reader.consumed - consumed)
        job.display.end()
        job.display.begin(f"training a BPE of {vocab_size:,} tokens", 0)

    tokenizer = train_bpe(texts(), vocab_size)
    job.display.end()
    return tokenizer


def _tokenize(job: PrepareJob, tokenizer: Tokenizer, slices_: Sequence[Sequence[Span]]) -> list[SliceRecord]:
    settings = tokenization_settings(job.work, job.partial / TOKENIZER_FILE, tokenizer, job.settings, job.names)
    tasks = [(settings, number, spans) for number, spans in enumerate(slices_)]
    processes = min(job.processes, len(tasks))
    job.display.begin("tokenising", sum(span.size for spans in slices_ for span in spans))
    for _ in work_on(tokenize_slice, tasks, processes, job.display.advance):
        pass
    job.display.end()
    records = [read_record(job.work, number) for number in range(len(slices_))]
    return [record for record in records if record is not None]


def _pack(
    job: PrepareJob,
    tokenizer: Tokenizer,
    split: str,
    folder: str,
    expected: int,
    counts: Counts,
    contents: str | None,
    request: dict[str, Any],
) -> Manifest:
    """Pack one split, check its tokens against the `expected` number, and write the manifest."""
    settings = job.settings
    size = expected * token_dtype(vocab_size(tokenizer)).itemsize
    job.display.begin("packing" if folder == "." else f"packing {folder}", size)
    manifest, records = pack_split(
        job.work,
        split,
        job.data / folder,
        tokenizer,
        settings,
        job.names,
        processes=job.processes,
        report=job.display.advance,
    )
    job.display.end()
    if manifest.num_tokens != expected:
        raise DataError(
            f"{job.partial} is damaged: {expected:,} tokens were written to it and {manifest.num_tokens:,} found; remove it, "
            "and prepare again"
        )

    # Record how the folder was made, and write the manifest.
    found = {name: getattr(counts, name) for name in InputCounts.model_fields}
    preparation = Preparation(
        request_sha256=request_sha256(request),
        input=InputCounts(**found),
        seed=settings.seed,
        packing=settings.packing,
        samples_per_shard=settings.samples_per_shard,
        validation=settings.validation_fraction,
        weights=settings.weights,
        part=f"{settings.part[0]}/{settings.part[1]}" if settings.part else None,
        whole_sha256=whole_sha256(request),
        contents=contents,
        special=settings.special or None,
        documents=sum(record.num_documents for record in records),
        documents_cut=sum(record.documents_cut for record in records),
    )
    manifest = manifest.model_copy(update={"preparation": preparation})
    write_manifest(job.data / folder, manifest)
    return manifest
