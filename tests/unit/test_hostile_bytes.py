"""Bytes that nobody vouches for, at every door by which a file comes in: nothing in them is executed, no file outside is opened
or made, no memory is taken because a header asks for it, and what is refused is refused in the words of the program.

What a door has to refuse besides, its own tests have: members of tars (test_data_sample, test_data_adoption,
test_data_documents), an index of weights and names of checkpoint files that lead outside (test_huggingface, test_checkpoint),
bombs of YAML and of compression (test_config, test_data_documents).
"""

import io
import json
import os
import pickle
import resource
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import ConfigError, ModelSettings, Settings
from pipeline.data.corpus.builtin import CORPUS_FILE, prepare_builtin
from pipeline.data.corpus.request import REQUEST_FILE, begin_or_continue
from pipeline.data.corpus.shard_assembly import _read_record
from pipeline.data.corpus.tokenization import _record_file, read_record
from pipeline.data.errors import DataError
from pipeline.data.shards.external_scores import import_scores
from pipeline.data.shards.losses_writer import LossesWriter
from pipeline.data.shards.manifest import read_manifest
from pipeline.data.shards.reader import ShardReader
from pipeline.data.shards.reference_losses import LossesManifest, losses_folder, read_losses_manifest
from pipeline.data.special_tokens import declared_bos_id
from pipeline.data.tokenizer import byte_tokenizer, load_tokenizer
from pipeline.experiment.conduct import _add_hours
from pipeline.experiment.plan import read_plan
from pipeline.model.drafter import drafter_verifier
from pipeline.model.export import save_model
from pipeline.model.huggingface import load_weights, read_model_settings
from pipeline.model.meta import PARAMS_FILE
from pipeline.model.model_config import ModelFilesError
from pipeline.model.mtp import MTPModel, initialize_weights
from pipeline.model.weight_files import weight_files
from pipeline.recipe import load_settings
from pipeline.runtime.checkpoint.folders import read_state_of, saved_steps
from pipeline.runtime.checkpoint.fragment_file import FileError, read_header, write_tensors
from pipeline.runtime.deepspeed_json import read_deepspeed_json
from pipeline.runtime.events import EventLog, last_event
from pipeline.runtime.logbook import Logbook, read_records
from tests.data_sets import numbered_data

MEMORY = 2**29


class Canary:
    """Unpickled, or called by YAML, it leaves a file in the current folder."""

    def __reduce__(self) -> Any:
        return open, ("canary", "w")


def torch_save() -> bytes:
    saved = io.BytesIO()
    torch.save({"a": Canary()}, saved)
    return saved.getvalue()


def npy(array: Any) -> bytes:
    saved = io.BytesIO()
    np.save(saved, array, allow_pickle=True)
    return saved.getvalue()


def zip_with(name: str) -> bytes:
    saved = io.BytesIO()
    with zipfile.ZipFile(saved, "w") as archive:
        archive.writestr(name, "outside")
    return saved.getvalue()


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data


def tensor(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BYTES = {
    "empty": b"",
    "zeros": bytes(4096),
    "no text": b"\xff\xfe{}",
    "a pickle": pickle.dumps(Canary()),
    "a file of torch.save": torch_save(),
    "an array of objects": npy(np.array([Canary()], dtype=object)),
    "an archive that leads outside": zip_with("../outside"),
    "a YAML tag": b'!!python/object/apply:builtins.open ["canary", "w"]\n',
    "deep JSON": b"[" * 200_000,
    "a deep object": b'{"a":' * 200_000,
    "a list": b"[]",
    "a number": b"7",
    "a number of many digits": b'{"format": 1' + b"0" * 10_000 + b', "format_version": 1' + b"0" * 10_000 + b"}",
    "numbers that are none": b'{"format": NaN, "format_version": Infinity, "step": 1e999}',
    "an integer that no float holds": b'{"key": "000000", "scores": [1, 2, 3, 1' + b"0" * 400 + b"]}",
    "keys that a class has": b'{"__class__": "x", "__reduce__": ["os.system"], "format_version": {}, "format": []}',
    "a header of 2^63 bytes": safetensors(b"{}", length=2**63),
    "a header of 100 MB": safetensors(b"{}", length=10**8),
    "a tensor of 2^60 values": safetensors({"a": tensor("F32", [2**60], 0, 2**62)}),
    "a tensor of fewer than no values": safetensors({"a": tensor("F32", [-8], 32, 0)}, bytes(64)),
    "a tensor before the file": safetensors({"a": tensor("F32", [4], -16, 0)}, bytes(16)),
    "a tensor of an unknown dtype": safetensors({"a": tensor("PICKLE", [4], 0, 16)}, bytes(16)),
}


# The doors. Each plants the bytes where a file belongs, opens it as the program does, and returns what was refused.


def door_manifest(folder: Path, content: bytes) -> str:
    numbered_data(folder, 22)
    (folder / "manifest.json").write_bytes(content)
    return refused(DataError, read_manifest, folder)


def read_samples(folder: Path, suffix: str, content: bytes) -> str:
    """A file of a shard, padded or cut to the size that the manifest says, so that it is looked into."""
    numbered_data(folder, 22)
    file = folder / f"shard-00000.{suffix}"
    size = file.stat().st_size
    file.write_bytes((content * (1 + size // max(1, len(content))))[:size].ljust(size, b"\0"))
    reader = ShardReader(folder, read_manifest(folder))
    found = reader.read_many([0, 0, 1], [0, 10, 0])
    reader.close()
    assert found[2].damage is None
    assert found[0].damage is not None
    assert found[1].damage is not None
    return found[0].damage


def door_tar(folder: Path, content: bytes) -> str:
    return read_samples(folder, "tar", content)


def door_offsets(folder: Path, content: bytes) -> str:
    return read_samples(folder, "tar.idx", content or b"\xff")


def door_checksums(folder: Path, content: bytes) -> str:
    return read_samples(folder, "tar.crc32", content or b"\xff")


LOSSES = LossesManifest(
    data_sha256="d" * 64,
    reference_sha256="r" * 64,
    reference="reference",
    precision="float32",
    horizon="shifted",
    dtype="float32",
    sequence_length=4,
    columns=1,
)


def door_losses(folder: Path, content: bytes) -> str:
    of_data = losses_folder(folder, LOSSES.data_sha256)
    of_data.mkdir(parents=True)
    (of_data / "manifest.json").write_bytes(content)
    return refused(DataError, read_losses_manifest, folder, LOSSES.data_sha256, "data")


def door_losses_begun(folder: Path, content: bytes) -> str:
    writer = LossesWriter(folder / "cache", LOSSES, read_manifest(numbered_data(folder / "data", 22)))
    writer.partial.mkdir(parents=True)
    (writer.partial / "manifest.json").write_bytes(content)
    return refused(DataError, writer.begin)


def door_tokenizer(folder: Path, content: bytes) -> str:
    (folder / "tokenizer.json").write_bytes(content)
    return refused(DataError, load_tokenizer, folder / "tokenizer.json")


def door_tokenizer_config(folder: Path, content: bytes) -> str:
    (folder / "tokenizer_config.json").write_bytes(content)
    return refused_or_unused(DataError, declared_bos_id, byte_tokenizer(), folder)


def saved_model(folder: Path) -> MTPModel:
    model = MTPModel(ModelSettings(dim=8, num_layers=1, num_attention_heads=2, num_prediction_heads=1, vocab_size=16))
    initialize_weights(model)
    save_model(model, folder)
    return model


def door_model_config(folder: Path, content: bytes) -> str:
    saved_model(folder)
    (folder / "config.json").write_bytes(content)
    return refused(ModelFilesError, read_model_settings, folder)


def door_weights(folder: Path, content: bytes) -> str:
    model = saved_model(folder)
    (folder / "model.safetensors").write_bytes(content)
    return refused(ModelFilesError, load_weights, model, folder)


def door_weights_index(folder: Path, content: bytes) -> str:
    saved_model(folder)
    (folder / "model.safetensors.index.json").write_bytes(content)
    return refused(ModelFilesError, weight_files, folder)


def door_checkpoint_state(folder: Path, content: bytes) -> str:
    (folder / "step-00000001").mkdir()
    (folder / "step-00000001" / "state.json").write_bytes(content)
    assert saved_steps(folder) == [1]
    state, problem = read_state_of(folder / "step-00000001")
    assert state is None
    return problem


def door_checkpoint_file(folder: Path, content: bytes) -> str:
    (folder / "rank-00000.safetensors").write_bytes(content)
    return refused(FileError, read_header, folder / "rank-00000.safetensors")


def door_recipe(folder: Path, content: bytes) -> str:
    (folder / "recipe.yaml").write_bytes(content)
    return refused_or_unused(ConfigError, load_settings, folder / "recipe.yaml", [])


def door_override(folder: Path, content: bytes) -> str:
    return refused(ConfigError, load_settings, None, [f"run.name={content.decode('latin-1') or '['}"])


def door_deepspeed_json(folder: Path, content: bytes) -> str:
    (folder / "zero.json").write_bytes(content)
    _, problems = read_deepspeed_json(folder / "zero.json", Settings())
    return problems[0]


def door_base_of_a_recipe(folder: Path, content: bytes) -> str:
    (folder / "recipe.yaml").write_text("base: below.yaml\n")
    (folder / "below.yaml").write_bytes(content)
    return refused_or_unused(ConfigError, load_settings, folder / "recipe.yaml", [])


def door_experiment_plan(folder: Path, content: bytes) -> str:
    for name in ("plan", "arms", "base"):
        (folder / f"{name}.yaml").write_bytes(content)
    return refused(ConfigError, read_plan, folder / "plan.yaml")


def door_experiment_hours(folder: Path, content: bytes) -> str:
    (folder / "hours.json").write_bytes(content)
    return f"{_add_hours(folder, 1.0)} hours"


def import_of(folder: Path, suffix: str, content: bytes) -> str:
    (folder / f"scores{suffix}").write_bytes(content)
    return refused(DataError, import_scores, folder / f"scores{suffix}", numbered_data(folder / "data", 22), folder / "cache")


def door_scores_as_an_array(folder: Path, content: bytes) -> str:
    return import_of(folder, ".npy", content)


def door_scores_as_lines(folder: Path, content: bytes) -> str:
    return import_of(folder, ".jsonl", content)


def door_params_of_meta(folder: Path, content: bytes) -> str:
    (folder / PARAMS_FILE).write_bytes(content)
    return refused(ModelFilesError, read_model_settings, folder)


def weights_of_meta(folder: Path, name: str, content: bytes) -> str:
    """The vocabulary's size is left to the weights, as Meta leaves it to the tokenizer."""
    (folder / PARAMS_FILE).write_text('{"dim": 8, "n_layers": 2, "n_heads": 2}')
    (folder / name).write_bytes(content)
    return refused(ModelFilesError, read_model_settings, folder)


def door_weights_of_meta(folder: Path, content: bytes) -> str:
    return weights_of_meta(folder, "consolidated.safetensors", content)


def door_pickle_of_meta(folder: Path, content: bytes) -> str:
    return weights_of_meta(folder, "consolidated.00.pth", content)


def door_drafter(folder: Path, content: bytes) -> str:
    (folder / "config.json").write_bytes(content)
    return f"no drafter: {drafter_verifier(folder)}"


def door_events(folder: Path, content: bytes) -> str:
    (folder / "events.jsonl").write_bytes(content)
    EventLog(folder).write("start", ranks=1)
    found = last_event(folder, "start")
    assert found is not None
    return f"{found['ranks']} rank"


def door_builtin_corpus(folder: Path, content: bytes) -> str:
    (folder / CORPUS_FILE).write_bytes(content)
    return refused(DataError, prepare_builtin, folder, 16, 0)


def door_preparing_begun(folder: Path, content: bytes) -> str:
    (folder / REQUEST_FILE).write_bytes(content)
    return refused(DataError, begin_or_continue, folder, [], {"seed": 1})


def door_records_of_preparing(folder: Path, content: bytes) -> str:
    _record_file(folder, 3).write_bytes(content)
    (folder / "shard.json").write_bytes(content)
    assert read_record(folder, 3) is None
    assert _read_record(folder / "shard.json") is None
    return "made again"


def door_metrics(folder: Path, content: bytes) -> str:
    (folder / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n' + content + b"\n" + b'{"step": 2, "loss": 2.0}\n')
    Logbook(folder, 1, num_heads=1).close()
    assert [record["step"] for record in read_records(folder)] == [1]
    return "left out"


def door_event_files(folder: Path, content: bytes) -> str:
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / "events.out.tfevents.1.host.1.0").write_bytes(content)
    logbook = Logbook(folder, 0, num_heads=1)
    logbook.write({"step": 1, "loss": 2.0})
    logbook.sync()
    logbook.close()
    return "never read"


DOORS: dict[str, Callable[[Path, bytes], str]] = {
    name.removeprefix("door_"): door for name, door in globals().items() if name.startswith("door_")
}


def refused(error: type[Exception], function: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(error) as found:
        function(*arguments)
    assert type(found.value) is error
    return str(found.value)


def refused_or_unused(error: type[Exception], function: Callable[..., Any], *arguments: Any) -> str:
    """As `refused`; or the bytes say nothing of what is looked for, and the default is taken."""
    try:
        return f"unused: {function(*arguments)}"
    except error as found:
        return str(found)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Let this process take little more memory than it has: what allocates by a header's word fails."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("door", DOORS)
def test_no_bytes_at_any_door_do_anything_but_be_refused(
    door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, little_memory: None
) -> None:
    inside = tmp_path / "inside"
    for kind, content in BYTES.items():
        shutil.rmtree(inside, ignore_errors=True)
        (inside / "current").mkdir(parents=True)
        (inside / "folder").mkdir()
        monkeypatch.chdir(inside / "current")
        said = DOORS[door](inside / "folder", content)
        assert said, kind
        assert len(said) < 4000, kind
        assert not list((inside / "current").iterdir()), (kind, said)
        assert {path.name for path in inside.iterdir()} == {"current", "folder"}, (kind, said)
        assert [path.name for path in tmp_path.iterdir()] == ["inside"], (kind, said)


def test_names_that_lead_outside_are_refused_before_anything_is_opened(tmp_path: Path) -> None:
    folder = numbered_data(tmp_path / "data", 22)
    content = json.loads((folder / "manifest.json").read_text())
    for name in ("../../etc/passwd", "/etc/passwd", "a/b", ".."):
        for change in ({"tokenizer_file": name}, {"shards": [content["shards"][0] | {"name": name}]}):
            (folder / "manifest.json").write_text(json.dumps(content | change))
            assert "is not a valid manifest" in refused(DataError, read_manifest, folder)


def test_offsets_that_claim_the_whole_address_space_are_damage_and_take_no_memory(tmp_path: Path, little_memory: None) -> None:
    folder = numbered_data(tmp_path / "data", 22)
    offsets = np.fromfile(folder / "shard-00000.tar.idx", "<u8")
    for change in ({1: 2**63}, {1: 2**64 - 2, 2: 2**64 - 2}, {0: 2**62, 1: 2**62 + 2**40}, {0: offsets[1], 1: offsets[0]}):
        changed = offsets.copy()
        for place, value in change.items():
            changed[place] = value
        changed.tofile(folder / "shard-00000.tar.idx")
        reader = ShardReader(folder, read_manifest(folder))
        (found,) = reader.read_many([0], [0])
        assert found.damage is not None
        reader.close()


def test_a_configuration_that_asks_for_more_than_there_is_is_refused_before_it_is_built(
    tmp_path: Path, little_memory: None
) -> None:
    saved_model(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    from pipeline.model.huggingface import weight_problems

    for change in ({"vocab_size": 10**15}, {"hidden_size": 2**40}, {"intermediate_size": 10**15}, {"head_dim": 2**40}):
        (tmp_path / "config.json").write_text(json.dumps(content | change))
        try:
            problems = list(weight_problems(read_model_settings(tmp_path), tmp_path))
        except ModelFilesError as error:
            problems = [str(error)]
        assert problems, change


def test_a_fragment_beyond_its_file_or_before_it_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "whole", {"a|master": torch.arange(8.0)})
    whole = (tmp_path / "whole").read_bytes()
    for begin, end, shape in ((0, 64, [16]), (-32, 0, [8]), (32, 0, [-8]), (0, 32, [2, 4]), (0, 32, [True]), (0, 32, [8.0])):
        header = json.dumps({"a|master": tensor("F32", shape, begin, end)}).encode()
        (tmp_path / "changed").write_bytes(len(header).to_bytes(8, "little") + header + whole[-32:])
        refused(FileError, read_header, tmp_path / "changed")


def test_what_stands_behind_a_link_in_a_checkpoint_is_held_against_its_hash_like_any_file(tmp_path: Path) -> None:
    """A link is followed, as shared file systems have them, and trusted no more than what it stands for."""
    (tmp_path / "step-00000001").mkdir()
    os.symlink("/etc/passwd", tmp_path / "step-00000001" / "state.json")
    state, problem = read_state_of(tmp_path / "step-00000001")
    assert state is None
    assert "root:" not in problem
