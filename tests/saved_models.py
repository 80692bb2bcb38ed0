"""Run directories with checkpoints of a given model, written without an engine as ranks of a job would have left them."""

from pathlib import Path
from typing import Any

import torch

from pipeline.config import Settings
from pipeline.model.mtp import MTPModel, initialize_weights
from pipeline.progress import Progress
from pipeline.runtime.checkpoint.folders import step_name
from pipeline.runtime.checkpoint.fragment_file import write_tensors
from pipeline.runtime.checkpoint.state import STATE_FILE, HeldOut, SavedFile, SavedParameter, State, encode
from pipeline.runtime.identity import flatten

SEQUENCE_LENGTH = 16
KINDS: list[Any] = ["master", "exp_avg", "exp_avg_sq"]


def model_of(vocab_size: int, seed: int = 0, **changes: Any) -> MTPModel:
    """A model of two layers and four heads, whose weights are large enough that its choices are clear."""
    shape = {"dim": 16, "num_layers": 2, "num_attention_heads": 2, "ffn_dim": 24, "vocab_size": vocab_size, "seed": seed}
    model = MTPModel(Settings.model_validate({"model": shape | changes}).model)
    initialize_weights(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def write_checkpoint(run_dir: Path, model: MTPModel, step: int, data: Path, ranks: int = 1, bf16: bool = False) -> Path:
    """Write one checkpoint; every rank has a part of every parameter that has values enough."""
    folder = run_dir / "checkpoints" / step_name(step)
    folder.mkdir(parents=True)
    tensors: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
    saved = {}
    for name, parameter in model.named_parameters():
        fragments, start = [], 0
        for rank, part in enumerate(parameter.detach().flatten().tensor_split(ranks)):
            if len(part):
                tensors[rank] |= {f"{name}|{kind}": part * scale for scale, kind in enumerate(KINDS, 1)}
                fragments.append([rank, start, len(part)])
                start += len(part)
        saved[name] = SavedParameter(shape=list(parameter.shape), kinds=KINDS, fragments=fragments)

    names = [f"rank-{rank:05d}.safetensors" for rank in range(ranks)]
    written = [write_tensors(folder / name, of_rank) for name, of_rank in zip(names, tensors, strict=True)]
    of_data = {"path": data, "sequence_length": SEQUENCE_LENGTH}
    settings = Settings.model_validate({"data": of_data, "model": model.settings.model_dump()})
    state = State(
        format=1,
        world_size=ranks,
        progress=Progress(step, 8 * step, 100 * step, step, 0).to_json(),
        identity=flatten(settings) | {"data": "0" * 64, "deepspeed bf16": bf16},
        optimizer_step=step,
        held_out=HeldOut(),
        files=[SavedFile(name=name, bytes=size, sha256=digest) for name, (size, digest) in zip(names, written, strict=True)],
        parameters=saved,
    )
    (folder / STATE_FILE).write_bytes(encode(state))
    return folder


def flip_a_bit(file: Path) -> None:
    """Damage the last byte of a file."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
