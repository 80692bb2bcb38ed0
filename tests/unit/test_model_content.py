"""A model's identity is every byte of its weights and its config.json, read once a node by all its ranks together."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

import pipeline.runtime.model_content as model_content
from pipeline.model.export import save_model
from pipeline.model.huggingface import ModelFilesError
from pipeline.runtime.distributed import World
from pipeline.runtime.model_content import ModelFingerprints, read_model_content
from tests.ranks import run_ranks
from tests.unit.test_model import initialized, small

ALONE = World(0, 1, 0, 1)


@pytest.fixture(name="model")
def a_saved_model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    save_model(initialized(small(vocab_size=40_000)), directory)  # More than the first and the last MiB.
    return directory


def flip(file: Path, position: int) -> None:
    """Change one byte and nothing that the file system says of the file."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_one_byte_anywhere_or_one_setting_makes_another_model(model: Path, tmp_path: Path) -> None:
    fingerprint = read_model_content(model, ALONE).sha256
    assert read_model_content(shutil.copytree(model, tmp_path / "moved"), ALONE).sha256 == fingerprint
    weights = model / "model.safetensors"
    found = {fingerprint}
    for position in (weights.stat().st_size // 2, -1):
        flip(weights, position)
        found.add(read_model_content(model, ALONE).sha256)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 10_001.0}))
    assert len(found | {read_model_content(model, ALONE).sha256}) == 4


def test_a_fingerprint_is_remembered_for_one_start_alone(model: Path) -> None:
    one_start = ModelFingerprints(ALONE)
    before = one_start.of(model)
    flip(model / "model.safetensors", -1)
    assert one_start.of(model) == before
    assert ModelFingerprints(ALONE).of(model) != before
    assert one_start.of(None) is None


def fingerprint_on_ranks(directories: list[Path], local_size: int) -> tuple[str, int]:
    """(fingerprint or error, bytes that this rank hashed) with so many ranks a node, each of which has its directory."""
    model_content.PIECE_BYTES = 100_000
    rank, size = dist.get_rank(), dist.get_world_size()
    world, directory = World(rank, size, rank % local_size, local_size), directories[rank // local_size]
    _, hashed, _ = model_content._hash_share(directory, world)
    try:
        answer = read_model_content(directory, world).sha256
    except ModelFilesError as error:
        answer = f"{error}, agreed: {error.agreed}"
    return answer, sum(size for _, _, size in hashed)


def test_the_ranks_of_a_node_share_the_reading_and_nodes_compare_what_they_read(model: Path, tmp_path: Path) -> None:
    size = sum((model / name).stat().st_size for name in ("model.safetensors", "mtp_heads.safetensors", "config.json"))
    same = shutil.copytree(model, tmp_path / "same")
    (alone,) = run_ranks(fingerprint_on_ranks, 1, [model], 1)
    two_nodes = run_ranks(fingerprint_on_ranks, 4, [model, same], 2)
    assert {answer for answer, _ in two_nodes} == {alone[0]}
    for node in (two_nodes[:2], two_nodes[2:]):
        assert sum(hashed for _, hashed in node) == size
        assert min(hashed for _, hashed in node) > 0.4 * size

    flip(same / "model.safetensors", size // 2)
    for answer, _ in run_ranks(fingerprint_on_ranks, 2, [model, same], 1):
        assert "model.safetensors is another file for rank 1 than for those before it" in answer
        assert answer.endswith("agreed: True")
    (same / "model.safetensors").unlink()
    for answer, _ in run_ranks(fingerprint_on_ranks, 2, [model, same], 1):
        assert answer.startswith(f"{same}: missing model.safetensors")
