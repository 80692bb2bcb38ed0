"""Preparing files with many workers, resumable: a kill at any moment costs only the work in progress.

`OUTPUT.partial` holds the finished work:

    request.json     the request; resuming with another request, or with changed input, is refused
    tokenizer.json   the tokenizer, so that a BPE is trained once
    work/            sorted runs of tokenised slices, records of finished slices and shards
    data/            finished shards; renamed to OUTPUT at the end

Files are written atomically, and a record after the files that it describes. Whatever has no record is made again, with the
same bytes. Memory is bounded whatever the size of the corpus: a worker holds one sorted run (`sorted_runs.TOKENS_PER_RUN`
tokens) or about three times a shard. The disk must have room for the ids twice.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline.data.corpus.contents import added, contents_of_slice
from pipeline.data.corpus.counts import Counts
from pipeline.data.corpus.display import Display
from pipeline.data.corpus.inputs import Input, input_files, source_names
from pipeline.data.corpus.prepare import PrepareSettings
from pipeline.data.corpus.prepare_stages import Prepared, PrepareJob, own_slices, run_stages
from pipeline.data.corpus.request import begin_or_continue, describe, request_sha256
from pipeline.data.corpus.workers import work_on
from pipeline.data.errors import DataError
from pipeline.data.shards.manifest import MANIFEST_FILE, read_manifest
from pipeline.data.shards.output_folder import (
    FAILED_FILE,
    LOCK_FILE,
    is_occupied,
    locked,
    make_partial,
    partial_folder,
    real_output,
    remove,
)
from pipeline.data.tokenizer import TOKENIZER_FILE


def prepare_files(
    inputs: Sequence[Input],
    output_dir: Path,
    tokenizer: Tokenizer | int,
    settings: PrepareSettings,
    *,
    processes: int = 1,
    display: Display | None = None,
) -> Prepared:
    """Tokenise, shuffle, pack and write the documents of files, or resume that after an interruption.

    Args:
        inputs: files, folders or globs, with the names of their sources.
        output_dir: must not exist, be empty, or be the output of the same request; if below an input, it is no part of that.
        tokenizer: a tokenizer, or the vocabulary size of a BPE to train on the input.
        settings: of the preparation.
        processes: the number of workers, one for each core; the result does not depend on it.
        display: shows the progress.

    Raises:
        DataError: the input or a setting cannot be used, the output exists, or it was begun with another request.
    """
    # The request.
    output_dir = Path(output_dir)
    target = real_output(output_dir)
    partial = partial_folder(target)
    names = source_names(inputs)
    settings.check(names)
    files = input_files(inputs, (target, partial))
    request = describe(files, tokenizer, settings, names)
    job = PrepareJob(files, names, target, partial, settings, processes, display or Display())

    # The output exists: it must be that of the same request.
    if is_occupied(target):
        prepared = _complete_already(job, output_dir, request)
        # Clean up after a process that was killed just before its end. One that still runs holds the lock, and does so itself.
        if (partial / LOCK_FILE).exists():
            with suppress(DataError), locked(partial):
                remove(partial)
        with suppress(OSError):  # missing, or not empty
            partial.rmdir()
        return prepared

    make_partial(partial)
    return _begin_or_resume(job, tokenizer, request, output_dir)


def _begin_or_resume(job: PrepareJob, tokenizer: Tokenizer | int, request: dict[str, Any], output_dir: Path) -> Prepared:
    partial = job.partial
    with locked(partial):
        if is_occupied(job.target):  # again: the previous holder of the lock may have finished
            prepared = _complete_already(job, output_dir, request)
            remove(partial)
            return prepared
        was_begun = begin_or_continue(partial, job.files, request)
        job.work.mkdir(exist_ok=True)
        if was_begun:
            job.display.say(f"continuing {partial}: {job.num_slices_done:,} slices of the input are tokenised already")
        try:
            return run_stages(job, tokenizer, request, output_dir)
        except DataError:
            # Without any finished work, leave no partial folder behind.
            has_trained = isinstance(tokenizer, int) and (partial / TOKENIZER_FILE).exists()
            if not (was_begun or has_trained or job.num_slices_done):
                remove(partial)
            elif partial.is_dir():
                (partial / FAILED_FILE).touch()
            raise


def _complete_already(job: PrepareJob, output_dir: Path, request: dict[str, Any]) -> Prepared:
    """Read an existing output; a DataError if it is not that of this request, or of this input."""
    taken, settings = DataError(f"the output {output_dir} exists already; remove it, or choose another one"), job.settings
    manifests = {}
    for folder in settings.splits.values():
        if not (output_dir / folder / MANIFEST_FILE).is_file():
            raise taken
        manifest = read_manifest(output_dir / folder, allow_empty=settings.part is not None)
        if manifest.preparation is None or manifest.preparation.request_sha256 != request_sha256(request):
            raise taken
        manifests[output_dir / folder] = manifest

    # Folders of older versions do not tell what the input held.
    contents = next(iter(manifests.values())).preparation.contents  # type: ignore[union-attr]
    if contents is not None and _contents_now(job) != contents:
        raise DataError(
            f"the output {output_dir} was made from files of these names and sizes that held something else; remove it, or "
            "choose another one"
        )
    counts = Counts(**next(iter(manifests.values())).preparation.input.model_dump())  # type: ignore[union-attr]
    return Prepared(manifests, counts, was_complete=True)


def _contents_now(job: PrepareJob) -> str:
    slices_ = own_slices(job)
    tasks = [(job.settings.rules, spans) for spans in slices_]
    job.display.begin("comparing the input with what was prepared", sum(span.size for spans in slices_ for span in spans))
    contents = added(work_on(contents_of_slice, tasks, min(job.processes, len(tasks)), job.display.advance))
    job.display.end()
    return contents
