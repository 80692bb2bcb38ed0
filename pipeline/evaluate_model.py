"""Held-out figures of a model in files, by the code that validates during training, on any number of ranks.

Every rank holds the whole model and reads its share of the rows. Beside losses, perplexity and bits per byte it counts how many
drafts of heads 1, 2, … head 0 accepts when it decodes on its own, greedily, from the first halves of some documents.
"""

import argparse
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from pipeline.config import Settings
from pipeline.data.errors import DataError
from pipeline.data.loading.batch import Batch
from pipeline.data.loading.held_out import HeldOutRows, too_many_rows
from pipeline.data.loading.mixture import DataSet
from pipeline.data.shards.manifest import Manifest, read_manifest
from pipeline.data.shards.merging import prepared_folders
from pipeline.data.tokenizer import load_tokenizer, other_tokenizer
from pipeline.evaluate import evaluate
from pipeline.failures import failure_of_machine
from pipeline.generation.decoding import decode
from pipeline.generation.report import figures, table
from pipeline.micro_step import Models
from pipeline.model.model_config import ModelFilesError
from pipeline.model.mtp import MTPModel
from pipeline.model_options import dtype_of
from pipeline.runtime.distributed import World, device_of, find_world, gather_over_ranks, look_up_meeting_point, share_cores
from pipeline.runtime.network import choose_interface
from pipeline.saved_model import SavedModel, find_model
from pipeline.schedule import objective_at
from pipeline.time_left import TimeLeft

_KEPT = ("loss_head_", "perplexity_head_", "draft_agreement_head_", "valid_count_head_", "bits_per_byte", "corrupt_samples")
_DECODED_TOKENS = 32


T = TypeVar("T")


class EvaluationError(ValueError):
    """A model cannot be evaluated on some data; all ranks raise it, with the message of the first that cannot."""


def evaluate_model(options: argparse.Namespace) -> dict[str, Any] | None:
    """Evaluate a model on prepared folders, print the figures, and return them; None on all ranks but the first.

    options: of `launch/evaluate.py`.

    Raises:
        EvaluationError: on all ranks alike, if on one of them the model or the data cannot be used, or do not belong together.
        CheckpointError, DataError: they cannot be read any more.
    """
    world = find_world()
    device = device_of(world)
    share_cores(world)
    with _process_group(world, device):
        source, folders = _on_all(world, lambda: _found(options))
        dtype = dtype_of(options, source.dtype if device.type == "cuda" else torch.float32)
        model = _on_all(world, lambda: source.build(device, dtype))
        for note in source.notes if world.is_first else ():
            print(note, flush=True)
        found = {}
        for name, folder in folders.items():
            found[name] = _figures_of(model, folder, options, world, device)
            if world.is_first:
                print(f"{name}\n{table(_by_source(found[name]))}\n", flush=True)
    if not world.is_first:
        return None

    step = None if source.state is None else source.state.step
    flat = next(iter(found.values())) if len(found) == 1 else {}
    return {"model": str(source.directory), "step": step, **flat, "folders": found}


@contextmanager
def _process_group(world: World, device: torch.device) -> Iterator[None]:
    """Bring the ranks together, unless there is one alone or they are already."""
    makes_group = world.size > 1 and not dist.is_initialized()
    if makes_group:
        look_up_meeting_point()
        choose_interface(world.size, world.local_size)
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        yield
    finally:
        if makes_group:
            dist.destroy_process_group()


def _on_all(world: World, work: Callable[[], T]) -> T:
    """Do something on every rank; what one rank cannot do is an error of all, which the first one reports."""
    found, problem = None, None
    try:
        found = work()
    except (OSError, MemoryError) as error:
        problem = failure_of_machine(error)
    except ValueError as error:
        problem = str(error)
    where = "" if world.is_first else f"rank {world.rank} on {socket.gethostname()}: "
    problems = list(filter(None, gather_over_ranks(None if problem is None else where + problem)))
    if problems:
        raise EvaluationError(problems[0])
    return cast(T, found)


def _found(options: argparse.Namespace) -> tuple[SavedModel, dict[str, Path]]:
    """Find the model, and the prepared folders by name, which must belong to it."""
    folders = dict(_folders(options.data))
    source = find_model(options.model, options.step)
    for name, folder in folders.items():
        manifest = read_manifest(folder)
        _check(source, options.tokenizer, name, manifest)
        problem = too_many_rows(options.rows, manifest, DataSet(folder))
        if problem is not None:
            raise DataError(f"--rows: {problem}, or leave it out for all")
    return source, folders


def _folders(directories: list[Path]) -> Iterator[tuple[str, Path]]:
    """The prepared folders at the paths, by name: a path as it was given, and below it the folder's own name."""
    for directory in directories:
        for name in prepared_folders(directory):
            yield str(directory / name), directory / name


def _check(source: SavedModel, tokenizer: Path | None, name: str, manifest: Manifest) -> None:
    """Compare the data with the model."""
    known, length = source.settings.vocab_size or 0, source.context_length
    if manifest.vocab_size > known:
        raise DataError(f"{name}: has {manifest.vocab_size} ids, and {source.directory} knows {known}")
    if length is not None and manifest.sequence_length > length:
        raise DataError(
            f"{name}: has rows of {manifest.sequence_length} tokens, and {source.directory} was trained on rows of {length}; "
            "prepare shorter rows"
        )
    try:
        file, _ = source.tokenizer(tokenizer)
    except ModelFilesError:
        return  # Losses need no tokenizer; without the model's own there is nothing to compare.
    other = other_tokenizer(load_tokenizer(file), manifest.tokenizer_sha256, manifest.tokenizer_identity)
    if other is not None:
        raise DataError(f"{name}: was prepared with another tokenizer than that of {source.directory}, {file}, which {other}")


def _figures_of(
    model: MTPModel, folder: Path, options: argparse.Namespace, world: World, device: torch.device
) -> dict[str, Any]:
    """Evaluate one folder; collective."""
    rows = HeldOutRows(
        DataSet(folder),
        num_rows=options.rows,
        micro_batch=options.micro_batch,
        rank=world.rank,
        world_size=world.size,
    )
    settings = Settings.model_validate({"model": model.settings.model_dump()})
    group = dist.group.WORLD if world.size > 1 else None
    record, _ = evaluate(
        Models(model, None, "shifted", group),
        _with_time_left(rows, world),
        settings,
        objective_at(settings, 0),
        rows.manifest.source_names or ("",),
        rows.token_bytes,
        world,
        device,
    )
    found = {"rows": rows.num_rows} | {key: value for key, value in record.items() if key.startswith(_KEPT)}
    if options.drafts and model.settings.num_prediction_heads > 1 and world.is_first:
        found |= _acceptance(model, folder, min(options.drafts, rows.num_rows), device)
    if "bits_per_byte" not in found and world.is_first:
        print(f"{folder}: no bits per byte: {rows.why_no_bytes}", flush=True)
    return found


def _with_time_left(rows: HeldOutRows, world: World) -> Iterator[Batch]:
    """Yield a rank's micro-batches; the first rank says now and then how many rows are done over all ranks."""
    time_left = TimeLeft(rows.num_rows, "rows evaluated")
    for number, batch in enumerate(rows.batches(), start=1):
        yield batch
        line = time_left.line(number * rows.micro_batch * world.size)
        if line is not None and world.is_first:
            print(f"{rows.data.location}: {line}", flush=True)


def _by_source(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sort a folder's figures by what they are of, which have a column each: all rows, then each source."""
    columns: dict[str, dict[str, Any]] = {"all": {}}
    for key, value in figures.items():
        name, _, source = key.partition("_source_")
        columns.setdefault(f"source {source}" if source else "all", {})[name] = value
    return columns


def _acceptance(model: MTPModel, folder: Path, num_rows: int, device: torch.device) -> dict[str, Any]:
    """Continue the first halves of some rows' first documents, greedily, and count the drafts that are accepted."""
    held_out = HeldOutRows(DataSet(folder), num_rows=num_rows, micro_batch=num_rows, rank=0, world_size=1)
    (batch,) = held_out.batches()
    lengths = dict(zip(batch.documents.rows_D[::-1].tolist(), batch.documents.lengths_D[::-1].tolist(), strict=True))
    prompts = [batch.tokens_BT[row, : max(1, length // 2)].tolist() for row, length in sorted(lengths.items()) if length]
    if not prompts:
        return {}
    room = held_out.manifest.sequence_length
    limits = [max(1, min(_DECODED_TOKENS, room - len(prompt))) for prompt in prompts]
    ends = frozenset([held_out.manifest.end_of_document_id])
    counted = figures(*decode(model, prompts, limits, ends, num_drafts=len(model.heads) - 1))
    return {key: value for key, value in counted.items() if key.startswith("accept")}
