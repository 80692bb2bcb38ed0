"""A model is found by a run directory, a checkpoint folder or an export, read exactly, or refused in one sentence."""

import json
from pathlib import Path

import pytest
import torch

from launch.evaluate import main as evaluate
from launch.export import main as export
from launch.generate import main as generate
from pipeline.data.shards.manifest import read_manifest
from pipeline.model.export import save_model
from pipeline.runtime.checkpoint.weights import CheckpointError
from pipeline.saved_model import ModelFilesError, find_model
from tests.saved_models import flip_a_bit, model_of, write_checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize("ranks", [1, 3, 7])
@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": True}, {"attention_bias": True}, {"qk_norm": True, "head_dim": 6}])
def test_a_checkpoint_of_any_number_of_ranks_is_the_model_that_was_saved(tmp_path, ranks, changes) -> None:
    model = model_of(29, **changes)
    write_checkpoint(tmp_path, model, 5, tmp_path, ranks)
    built = find_model(tmp_path).build(CPU, torch.float32)
    assert dict(built.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(parameter, built.get_parameter(name)) for name, parameter in model.named_parameters())


def test_run_directory_checkpoint_and_export_are_told_apart(tmp_path) -> None:
    run, export = tmp_path / "run", tmp_path / "export"
    folders = {step: write_checkpoint(run, model_of(29, seed=step), step, tmp_path, ranks=2) for step in (3, 12)}
    export.mkdir()
    save_model(model_of(29, seed=1), export)
    for path, step, seed in (
        (run, None, 12),
        (run, 3, 3),
        (run / "checkpoints", None, 12),
        (folders[3], None, 3),
        (folders[3], 3, 3),
        (export, None, 1),
    ):
        found = find_model(path, step)
        assert torch.equal(found.weights.tensor("unembed.weight"), model_of(29, seed=seed).unembed.weight), (path, step)


def test_a_damaged_checkpoint_is_passed_over_unless_it_was_asked_for(tmp_path) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path, model_of(29, seed=step), step, tmp_path, ranks=2)
    damaged = tmp_path / "checkpoints" / "step-00000002"
    flip_a_bit(damaged / "rank-00001.safetensors")
    found = find_model(tmp_path)
    assert found.directory.name == "step-00000001"
    assert found.notes == [
        "checkpoint not used: step-00000002: rank-00001.safetensors: its bytes are not those that were written (SHA-256)"
    ]
    for path, step in ((tmp_path, 2), (damaged, None)):
        with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors: its bytes are not those"):
            find_model(path, step)


def test_what_holds_no_model_is_refused_by_name(tmp_path) -> None:
    run, export, empty = tmp_path / "run", tmp_path / "export", tmp_path / "empty"
    folder = write_checkpoint(run, model_of(29), 4, tmp_path)
    export.mkdir()
    empty.mkdir()
    save_model(model_of(29), export)
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    for path, step, message in (
        (tmp_path / "nowhere", None, "nowhere: no such folder; expected a run directory, a checkpoint folder"),
        (export / "config.json", None, "config.json: is a file; expected a run directory"),
        (empty, None, "empty: holds no model; expected a run directory"),
        (tmp_path / "begun", None, "begun: a run directory that has no checkpoint yet"),
        (run, 7, "--step 7: .*run has no checkpoint of that step; there are: 4"),
        (folder, 7, "--step 7: .* is the checkpoint of step 4; name the run directory"),
        (export, 7, "--step 7: .*export is a model folder, which has no steps"),
    ):
        with pytest.raises(ModelFilesError, match=message):
            find_model(path, step)


def test_weights_that_are_not_finite_are_refused_by_name_whatever_is_to_be_done_with_them(tmp_path, tiny_data, capsys) -> None:
    data = tiny_data / "train"
    model = model_of(read_manifest(data).vocab_size)
    model.heads[2].ffn.up.weight[3, 1] = torch.inf
    write_checkpoint(tmp_path / "run", model, 1, data)
    for command, options in (
        (generate, ["--prompt", "the cat"]),
        (evaluate, ["--data", str(data), "--rows", "2"]),
        (export, [str(tmp_path / "export")]),
    ):
        assert command([str(tmp_path / "run"), *options]) == 2
        assert "step-00000001: heads.2.ffn.up.weight: values that are not finite (NaN or infinite)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_tokenizer_is_the_runs_own_else_its_datas_else_one_that_is_given(tmp_path, tiny_data) -> None:
    vocab_size, data = read_manifest(tiny_data / "train").vocab_size, tiny_data / "train"
    write_checkpoint(tmp_path / "run", model_of(vocab_size), 1, data)
    found = find_model(tmp_path / "run")
    file, special = found.tokenizer()
    assert (file, special.end_of_document_id, special.bos_id) == (data / "tokenizer.json", 0, None)

    own = tmp_path / "run" / "tokenizer.json"
    own.write_bytes(file.read_bytes())
    assert found.tokenizer()[0] == own
    assert found.tokenizer(tiny_data)[0] == tiny_data / "tokenizer.json"


def test_a_tokenizer_that_is_missing_or_of_another_model_is_refused(tmp_path, tiny_data) -> None:
    write_checkpoint(tmp_path / "run", model_of(29), 1, tmp_path)
    found = find_model(tmp_path / "run")
    with pytest.raises(ModelFilesError, match=r"no tokenizer\.json in .*run or .*; name it with --tokenizer"):
        found.tokenizer()
    with pytest.raises(ModelFilesError, match="knows 29 ids; it is another model's tokenizer"):
        found.tokenizer(Path(tiny_data))


def test_another_tokenizer_of_the_same_size_is_refused_where_the_models_own_is_known(tmp_path, tiny_data) -> None:
    vocab_size = read_manifest(tiny_data / "train").vocab_size
    write_checkpoint(tmp_path / "run", model_of(vocab_size), 1, tiny_data / "train")
    other = tmp_path / "tokenizer.json"
    content = json.loads((tiny_data / "tokenizer.json").read_text())
    content["model"]["merges"].reverse()
    other.write_text(json.dumps(content))
    with pytest.raises(ModelFilesError, match=r"another tokenizer than the model's own, .*train; leave --tokenizer out"):
        find_model(tmp_path / "run").tokenizer(other)
