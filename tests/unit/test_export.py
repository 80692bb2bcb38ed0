"""An export is the checkpoint's model, whole and verified, or there is none; transformers reads it as the model that it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, processors

from launch.export import main
from pipeline import export_model, model_card
from pipeline.data.shards.manifest import read_manifest
from pipeline.data.shards.output_folder import locked
from pipeline.data.special_tokens import special_tokens
from pipeline.data.tokenizer_files import tokenizer_files
from pipeline.model import export
from pipeline.model.block_losses import block_losses
from pipeline.model.export import write_model
from pipeline.model.huggingface import FolderWeights
from pipeline.model.layout import export_name
from pipeline.saved_model import find_model
from tests.dense import all_losses
from tests.forked import ROOT
from tests.rows import batch_with
from tests.saved_models import SEQUENCE_LENGTH, flip_a_bit, model_of, write_checkpoint

FAMILIES = {"llama": {}, "tied": {"tied_embeddings": True}, "qwen2": {"attention_bias": True}, "qwen3": {"qk_norm": True}}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def run(request, tmp_path_factory, tiny_data: Path) -> Path:
    """The directory of a run that two ranks have saved."""
    run_dir = tmp_path_factory.mktemp("run")
    write_checkpoint(run_dir, model_of(vocabulary(tiny_data), **FAMILIES[request.param]), 6, tiny_data / "train", ranks=2)
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 6, "split": "validation", "loss_head_0": 4.25}) + "\n")
    return run_dir


def vocabulary(tiny_data: Path) -> int:
    return read_manifest(tiny_data / "train").vocab_size


def exported(run: Path, directory: Path, *options: str) -> int:
    return main([str(run), str(directory), *options])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_the_checkpoints_cast_to_the_dtype(run, tmp_path, monkeypatch, dtype) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 6000)
    assert exported(run, tmp_path / "out", "--dtype", str(dtype).removeprefix("torch.")) == 0
    source = find_model(run)
    model = source.build(torch.device("cpu"), torch.float32)
    written = {name: tensor for file in (tmp_path / "out").glob("*.safetensors") for name, tensor in load_file(file).items()}
    expected = {export_name(name, source.settings): parameter.to(dtype) for name, parameter in model.named_parameters()}
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) and written[name].dtype == dtype for name, tensor in expected.items())

    # Heads 1, 2, 3 lie beside the ordinary model, which is in several files and has them not.
    heads = load_file(tmp_path / "out" / "mtp_heads.safetensors")
    assert {name.split(".")[1] for name in heads} == {"1", "2", "3"}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == written.keys() - heads.keys()
    assert index["metadata"]["total_size"] == sum(written[name].nbytes for name in index["weight_map"])
    assert len(set(index["weight_map"].values())) > 2


def test_an_export_can_be_exported_again(run, tmp_path) -> None:
    assert exported(run, tmp_path / "once") == 0
    assert exported(tmp_path / "once", tmp_path / "twice") == 0
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes(), name


def test_the_configuration_names_what_the_data_has(run, tmp_path, tiny_data) -> None:
    assert exported(run, tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    assert {key: config[key] for key in ids} == ids
    assert config["max_position_embeddings"] == SEQUENCE_LENGTH
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"do_sample": False} | ids
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert special_tokens(tokenizer, tmp_path / "out").end_of_document == "<|endoftext|>"
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "# out",
        str(tiny_data / "train"),
        "Step 6 of the run, 600 tokens",
        "| loss_head_0 | 4.2500 |",
        "AutoModelFor",
    ):
        assert part in card


EXPORT_TWICE = """
import sys
from launch.export import main
from pipeline.model import export
from tests.peak_memory import peak_memory

export.SHARD_BYTES = 16_000_000
small, large, output = sys.argv[1:]
# What is imported and allocated once does not count.
assert main([small, output + "/small"]) == 0
before = peak_memory()
assert main([large, output + "/large"]) == 0
print(peak_memory() - before)
"""


def test_an_export_holds_a_shard_and_not_the_model(tmp_path, tiny_data) -> None:
    shapes = {"small": {}, "large": {"dim": 512, "ffn_dim": 2048, "num_layers": 12}}
    for name, shape in shapes.items():
        model = model_of(vocabulary(tiny_data), **shape)
        write_checkpoint(tmp_path / name, model, 6, tiny_data / "train", ranks=2)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    done = subprocess.run(
        [sys.executable, "-c", EXPORT_TWICE, *(tmp_path / name for name in shapes), tmp_path / "out"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert whole > 240e6
    # A shard is 16 MB, a block 17 MB; both sides of a comparison, and the pages of the files that are read.
    assert int(done.stdout.splitlines()[-1]) < whole / 3


def test_values_that_the_dtype_makes_infinite_are_refused(tmp_path, tiny_data, capsys) -> None:
    run_dir, model = tmp_path / "run", model_of(vocabulary(tiny_data))
    with torch.no_grad():
        model.embed.weight[5, 3] = 3.4e38
    write_checkpoint(run_dir, model, 6, tiny_data / "train", ranks=2)
    assert exported(run_dir, tmp_path / "bf16", "--dtype", "bf16") == 2
    assert "embed.weight: values that are not finite" in capsys.readouterr().err


def test_the_card_has_the_course_of_a_setting_over_steps() -> None:
    identity = {"k_percent": [[0, 1.0], [20, 0.5]], "k_percent_change": "linear", "head_weights": [1.0, 0.1], "pool": "row"}
    assert [model_card._course(identity, key) for key in ("k_percent", "head_weights", "pool")] == [", linear", "", ""]


def test_losses_block_by_block_are_the_models(run) -> None:
    source = find_model(run)
    model = source.build(torch.device("cpu"), torch.float32)
    tokens = torch.randint(source.settings.vocab_size, (3, 9), generator=torch.Generator().manual_seed(1))
    expected = all_losses(model, batch_with(tokens, [[9]] * 3))[:, :-1, 0]
    torch.testing.assert_close(block_losses(source.settings, source.weights, tokens), expected)


def test_a_folder_with_anything_in_it_is_left_alone(run, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for place, message in ((tmp_path, "is not empty"), (tmp_path / "file", "is a file"), (tmp_path / "link", "is a link")):
        assert exported(run, place) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "notes.txt"]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert exported(run, Path(".")) == 0
    assert (tmp_path / "empty" / "config.json").is_file()


def fill_the_disk(*arguments) -> None:
    write_model(*arguments)
    raise OSError(28, "No space left on device", "model.safetensors")


def write_a_wrong_bit(directory: Path, *arguments) -> None:
    write_model(directory, *arguments)
    flip_a_bit(directory / "mtp_heads.safetensors")


def write_another_theta(directory: Path, settings, *arguments) -> None:
    write_model(directory, settings.model_copy(update={"rope_theta": 50.0}), *arguments)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (fill_the_disk, "model.safetensors: No space left on device; free some of the disk"),
        (write_a_wrong_bit, "heads.3.ffn.down.weight was not written as it is; is the disk sound?"),
        (write_another_theta, "expected at most 1e-05: config.json does not describe the model that was trained"),
    ],
)
def test_nothing_is_left_of_an_export_that_fails(run, tmp_path, monkeypatch, capsys, write, message) -> None:
    monkeypatch.setattr(export_model, "write_model", write)
    assert exported(run, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_second_export_into_a_folder_leaves_the_first_ones_files_alone(run, tmp_path, capsys) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    with locked(partial):
        (partial / "model.safetensors").write_bytes(b"the first's")
        assert exported(run, tmp_path / "out") != 0
    assert f"another process is writing to {partial}" in capsys.readouterr().err
    assert (partial / "model.safetensors").read_bytes() == b"the first's"

    # What a killed export left is written over.
    assert exported(run, tmp_path / "out") == 0
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "lock").exists()


def test_a_tokenizer_encodes_as_the_data_whatever_it_did_by_itself(tiny_data) -> None:
    plain = Tokenizer.from_file(str(tiny_data / "tokenizer.json"))
    plain.add_special_tokens(["<s>", "<pad>"])
    bos, text = plain.token_to_id("<s>"), "the cat sees the dog"
    ids = plain.encode(text).ids
    adds_both = Tokenizer.from_str(plain.to_str())
    adds_both.post_processor = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=[("<s>", bos), ("<|endoftext|>", 0)]
    )
    adds_both.enable_truncation(4)
    for tokenizer in (plain, adds_both):
        for bos_id, expected in ((None, ids), (bos, [bos, *ids])):
            files, pad_id = tokenizer_files(tokenizer.to_str().encode(), 0, True, bos_id, 64)
            made = Tokenizer.from_buffer(files["tokenizer.json"])
            assert made.encode(text).ids == expected
            assert made.get_vocab() == plain.get_vocab()
            assert pad_id == plain.token_to_id("<pad>")


def test_transformers_reads_the_export_as_the_model_and_tokenizer_of_the_run(run, tmp_path, tiny_data) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    assert exported(run, tmp_path / "out") == 0
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert theirs.dtype == torch.float32

    # Losses, limits, ids.
    source = find_model(run)
    tokens = torch.randint(source.settings.vocab_size, (2, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = theirs(tokens).logits[:, :-1].flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none").view(2, -1)
    torch.testing.assert_close(losses, block_losses(source.settings, source.weights, tokens), rtol=1e-5, atol=1e-5)
    for config in (theirs.config, theirs.generation_config):
        assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (0, None, 0)
    assert theirs.config.max_position_embeddings == SEQUENCE_LENGTH

    # The tokenizer gives the data's ids, adds nothing, and knows its end, its padding and the longest text.
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the cat sees the dog. 17"
    assert tokenizer(text)["input_ids"] == Tokenizer.from_file(str(tiny_data / "tokenizer.json")).encode(text).ids
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, None, 0)
    assert tokenizer.model_max_length == SEQUENCE_LENGTH


def test_transformers_begins_a_text_with_bos_where_the_data_does(tmp_path, tiny_data) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    tokenizer = Tokenizer.from_file(str(tiny_data / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>"])
    bos = tokenizer.token_to_id("<s>")
    ids = tokenizer.encode("the cat").ids
    for bos_id, expected in ((None, ids), (bos, [bos, *ids])):
        folder = tmp_path / str(bos_id)
        folder.mkdir()
        for name, content in tokenizer_files(tokenizer.to_str().encode(), 0, True, bos_id, 64)[0].items():
            (folder / name).write_bytes(content)
        assert transformers.AutoTokenizer.from_pretrained(folder)("the cat")["input_ids"] == expected


def test_a_written_folder_is_read_as_the_shape_that_it_has(tmp_path) -> None:
    model = model_of(31, num_prediction_heads=2)
    write_model(tmp_path, model.settings, torch.float32, model.named_parameters())
    found = FolderWeights(tmp_path)
    assert found.settings.num_prediction_heads == 2
    assert torch.equal(found.tensor("heads.1.ffn.up.weight"), model.heads[1].ffn.up.weight)


def test_heads_of_an_export_draft_in_generate_of_transformers(run, tmp_path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    transformers.utils.logging.disable_progress_bar()
    from pipeline.generation import self_speculative

    assert exported(run, tmp_path / "out") == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    drafting = self_speculative(tmp_path / "out")

    # Two rows, one padded on the left.
    ids, mask = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    assert torch.equal(theirs.generate(ids, custom_generate=drafting, **options), theirs.generate(ids, **options))

    assert drafting.counts is not None
    assert drafting.counts.steps + sum(drafting.counts.accepted) >= 16

    # Drawn tokens by temperature and top_p; what is not computed is refused.
    drawn = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    assert theirs.generate(ids, custom_generate=drafting, top_k=0, **drawn).shape == (2, 8)
    with pytest.raises(ValueError, match="does not compute TopKLogitsWarper; pass top_k=0"):
        theirs.generate(ids, custom_generate=drafting, top_k=5, **drawn)
    for name, value in (("num_beams", 2), ("return_dict_in_generate", True), ("num_return_sequences", 2)):
        with pytest.raises(ValueError, match=f"does not compute {name}={value}"):
            theirs.generate(ids, custom_generate=drafting, top_k=0, **drawn, **{name: value})

    # A model that was trained on is not what the folder holds.
    with torch.no_grad():
        theirs.model.norm.weight[0] += 1
    with pytest.raises(ValueError, match=r"differs from .*out in model\.norm\.weight"):
        theirs.generate(ids, custom_generate=self_speculative(tmp_path / "out"), **options)
