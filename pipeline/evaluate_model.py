"""Held-out figures of a model in files, by the code that validates during training, on any number of ranks.

Every rank holds the whole model and reads its share of the rows. Beside losses, perplexity and bits per byte it counts how many
drafts of heads 1, 2, … head 0 accepts when it decodes on its own, greedily, from the first halves of some documents.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import Settings
from pipeline.data.errors import DataError
from pipeline.data.loading.held_out import HeldOutRows
from pipeline.data.loading.mixture import DataSet
from pipeline.data.shards.manifest import Manifest, read_manifest
from pipeline.data.shards.merging import prepared_folders
from pipeline.data.tokenizer import fingerprint, load_tokenizer
from pipeline.evaluate import evaluate
from pipeline.generation.decoding import decode
from pipeline.generation.report import figures, table
from pipeline.micro_step import Models
from pipeline.model.model_config import ModelFilesError
from pipeline.model.mtp import MTPModel
from pipeline.model_options import dtype_of
from pipeline.runtime.distributed import World, device_of, find_world, share_cores
from pipeline.runtime.network import choose_interface
from pipeline.saved_model import SavedModel, find_model
from pipeline.schedule import objective_at

_KEPT = ("loss_head_", "perplexity_head_", "draft_agreement_head_", "valid_count_head_", "bits_per_byte", "corrupt_samples")
_DECODED_TOKENS = 32


def evaluate_model(options: argparse.Namespace) -> dict[str, Any] | None:
    """Evaluate a model on prepared folders, print the figures, and return them; None on all ranks but the first.

    options: of `launch/evaluate.py`.

    Raises:
        ModelFilesError, CheckpointError, DataError: the model or the data cannot be used, or do not belong together.
    """
    folders = dict(_folders(options.data))
    source = find_model(options.model, options.step)
    for name, folder in folders.items():
        _check(source, options.tokenizer, name, read_manifest(folder))

    world = find_world()
    device = device_of(world)
    share_cores(world)
    makes_group = world.size > 1 and not dist.is_initialized()
    if makes_group:
        choose_interface(world.size, world.local_size)
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        model = source.build(device, dtype_of(options, source.dtype if device.type == "cuda" else torch.float32))
        found = {name: _figures_of(model, folder, options, world, device) for name, folder in folders.items()}
    finally:
        if makes_group:
            dist.destroy_process_group()
    if not world.is_first:
        return None
    for note in source.notes:
        print(note)
    print(table(found), flush=True)
    step = None if source.state is None else source.state.step
    flat = next(iter(found.values())) if len(found) == 1 else {}
    return {"model": str(source.directory), "step": step, **flat, "folders": found}


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
    if fingerprint(load_tokenizer(file)) != manifest.tokenizer_sha256:
        raise DataError(f"{name}: was prepared with another tokenizer than that of {source.directory}, {file}")


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
        rows.batches(),
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
    return found


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
