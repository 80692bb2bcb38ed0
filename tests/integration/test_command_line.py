"""launch/train.py as its users meet it: exit codes, what it prints, what it leaves behind.

Every kind of bad input is tried by calling `main` in this process, where only the start of Python and the imports differ
from the real thing; some of each, and all that trains, are processes of their own, of which a few, and those that are
signalled, start as a user's do.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from pipeline.data.shards.manifest import read_manifest, write_manifest
from pipeline.data.shards.reader import ShardReader
from pipeline.data.shards.writer import Row, write_shards
from pipeline.data.tokenizer import TOKENIZER_FILE, train_bpe
from pipeline.recipe import load_settings
from pipeline.runtime.logbook import read_records
from pipeline.runtime.run_lock import RunLock
from tests.forked import run_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, ZERO3 = ROOT / "launch" / "train.py", ROOT / "ds_configs" / "zero3.json"
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
# SLURM_CPUS_ON_NODE: one thread; the model is so small that a second one only waits.
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES and not name.startswith("SLURM_")
} | {"SLURM_CPUS_ON_NODE": "1"}
GREETING = "selective multi-token prediction: loading torch and DeepSpeed\n"


@pytest.fixture
def arguments(tiny_data, tmp_path):
    """The command line of a tiny job that needs no reference; its run directory is `tmp_path / "run"`."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"data: {{path: {tiny_data}/train, validation_path: {tiny_data}/validation, sequence_length: 16, "
        "global_batch: 4, micro_batch: 2, num_workers: 0}\n"
        "model: {dim: 16, num_layers: 2, num_attention_heads: 2}\n"
        "training: {steps: 40, warmup_steps: 2, k_percent: 1}\n"
        "logging: {metrics_every: 1, progress_every: 1, validation_samples: 4}\n",
        encoding="utf-8",
    )
    return ["--deepspeed", str(ZERO3), "--config", str(recipe), "--run-dir", str(tmp_path / "run")]


def run(*arguments, start_afresh=False):
    return run_script("train.py", *arguments, environment=ENVIRONMENT, start_afresh=start_afresh)


@pytest.fixture
def refused(arguments, tmp_path, capsys, monkeypatch):
    """Call `main` with further arguments that must be refused; returns the problems named on standard error."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.setenv(name, "")  # so that what is set in the test is undone after it
        monkeypatch.delenv(name)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    listening = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    spec = importlib.util.spec_from_file_location("launch_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*more):
        exit_code = module.main([*arguments, *map(str, more)])
        shown = capsys.readouterr()
        assert exit_code == 2
        assert shown.out == GREETING
        assert not (tmp_path / "run").exists(), "nothing may be made before everything is checked"
        return problems_in(shown.err)

    yield call
    for number, handler in listening.items():
        signal.signal(number, handler)


def problems_in(stderr, script="train.py"):
    """The sentences of one error message; nothing else may be there."""
    head, *problems = stderr.rstrip("\n").split("\n  - ")
    assert head == f"{script}: error: {len(problems)} problem{'s' if len(problems) != 1 else ''} with the settings:"
    return problems


def assert_one_clear_message(finished):
    assert finished.returncode == 2
    assert "Traceback" not in finished.stdout + finished.stderr
    return problems_in(finished.stderr)


def edited(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def another_tokenizer():
    return train_bpe(["quite other words, zoological gardens, xylophones; quite other words"] * 9, 300)


# Bad input, as a process of its own.


def test_problems_in_different_places_are_in_one_message_and_nothing_is_made(arguments, tmp_path):
    deepspeed = tmp_path / "deepspeed.json"
    deepspeed.write_text('{"zero_optimization": {"stage": 3, "overlap_com": true}, "train_batch_size": 64}', encoding="utf-8")
    recipe = Path(arguments[3])
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("model: {", "model: {num_layer: 3, "), encoding="utf-8")
    wrong = ["--deepspeed", deepspeed, "--dry-rum", "training.k_percent=1.5", f"data.validation_path={tmp_path / 'none'}"]
    problems = assert_one_clear_message(run(*arguments, *wrong, start_afresh=True))
    beginnings = [
        "--dry-rum: unknown option; did you mean '--dry-run'?",
        "model.num_layer: unknown setting; did you mean 'model.num_layers'?",
        "training.k_percent: got 1.5; expected a fraction in (0, 1]",
        "deepspeed train_batch_size: 64 there, data.global_batch = 4 in the recipe",
        "deepspeed zero_optimization.overlap_com: unknown key; did you mean 'overlap_comm'?",
        f"data.validation_path: expected a folder of prepared shards at {tmp_path / 'none'}",
    ]
    assert len(problems) == len(beginnings)
    for problem, beginning in zip(problems, beginnings, strict=True):
        assert problem.startswith(beginning)
    assert not (tmp_path / "run").exists()


def test_rows_too_short_for_the_heads_are_refused(arguments):
    (problem,) = assert_one_clear_message(run(*arguments, "model.num_prediction_heads=16"))
    assert problem.startswith("data.sequence_length: 16 leaves head 15 nothing to predict")


def test_sizes_that_do_not_fit_are_refused_with_ranks_and_micro_batches_that_would(arguments):
    (problem,) = assert_one_clear_message(run(*arguments, "data.global_batch=8", "data.micro_batch=3"))
    assert "data.lanes = 8 is not a multiple of ranks × data.micro_batch = 1 × 3" in problem
    assert "micro-batches that fit: 1, 2, 4, 8" in problem


def test_the_tokenizer_of_another_reference_is_refused(arguments, tiny_reference, tmp_path):
    reference = shutil.copytree(tiny_reference, tmp_path / "reference")
    another_tokenizer().save(str(reference / TOKENIZER_FILE))
    (problem,) = assert_one_clear_message(run(*arguments, f"reference.path={reference}", "training.k_percent=0.6"))
    assert problem.startswith(f"reference.path: the tokenizer of {reference} differs from the one the data was prepared with")
    assert read_manifest(arguments_data(arguments)).tokenizer_sha256[:12] in problem


def arguments_data(arguments):
    return load_settings(Path(arguments[3])).data.path


def test_print_config_prints_yaml_that_loads_back_and_nothing_else(arguments, tmp_path):
    changed = ["training.learning_rate=2e-3", "data.lanes=4"]
    finished = run(*arguments, "--print-config", *changed, start_afresh=True)
    assert (finished.returncode, finished.stderr) == (0, "")
    printed = tmp_path / "printed.yaml"
    printed.write_text(finished.stdout, encoding="utf-8")
    expected = load_settings(Path(arguments[3]), changed)
    assert load_settings(printed) == expected
    assert expected.training.learning_rate == 0.002
    assert not (tmp_path / "run").exists()


def test_print_config_without_a_recipe_is_the_demo():
    finished = run("--deepspeed", ZERO3, "--print-config")
    assert finished.returncode == 0
    assert finished.stdout == load_settings(ROOT / "launch" / "recipes" / "demo.yaml").to_yaml()


def test_print_run_dir_prints_its_name_alone(arguments, tmp_path):
    """A batch script asks for it, before there are ranks."""
    finished = run(*arguments, "--print-run-dir")
    assert (finished.returncode, finished.stdout) == (0, f"{tmp_path / 'run'}\n")
    finished = run("--deepspeed", ZERO3, "--print-run-dir", "run.name=mine")
    assert (finished.returncode, finished.stdout) == (0, "runs/mine\n")
    (problem,) = assert_one_clear_message(run("--deepspeed", ZERO3, "--print-run-dir", "run.nam=mine"))
    assert problem.startswith("run.nam: unknown setting")


def test_without_a_deepspeed_json_it_is_asked_for():
    (problem,) = assert_one_clear_message(run("--print-config"))
    assert problem == "the following arguments are required: --deepspeed; train.py --help says more"


@pytest.mark.parametrize(
    ("script", "wrong", "own", "data"),
    [
        (
            "train.py",
            ["--from-step", "x"],
            ["--from-step: expected a whole number"],
            ["data.path: expected a folder"],
        ),
        (
            "score.py",
            ["--dtype", "int8", "--output", __file__],
            [
                "--dtype: invalid choice: 'int8'",
                "reference.path: not set; name the directory",
                f"--output: {__file__} is a file",
            ],
            ["data.path: expected a folder"],
        ),
        ("plan.py", ["--gpus", "x"], ["--gpus: expected a whole number of at least 1, got 'x'"], []),
    ],
)
def test_mistakes_in_options_join_those_of_recipe_json_and_data(arguments, tmp_path, script, wrong, own, data):
    """By each command that takes a recipe; `plan.py` asks the data for nothing that the recipe says."""
    (tmp_path / "deepspeed.json").write_text('{"train_batch_size": 64, "zero_optimization": {"stage": 3}}', encoding="utf-8")
    given = ["--deepspeed", tmp_path / "deepspeed.json", *arguments[2:4], "training.beta1=2", "model.vocab_size=300"]
    finished = run_script(script, *given, f"data.path={tmp_path / 'none'}", *wrong, environment=ENVIRONMENT)
    assert finished.returncode == 2
    problems = problems_in(finished.stderr, script)
    expected = [*own, "training.beta1: got 2", "deepspeed train_batch_size: 64 there", *data]
    assert len(problems) == len(expected)
    for beginning in expected:
        assert any(problem.startswith(beginning) for problem in problems), (beginning, problems)


# Bad input, each kind, in this process.


def test_a_missing_data_directory_is_refused_by_name(refused, tmp_path):
    (problem,) = refused(f"data.path={tmp_path / 'none'}")
    assert problem.startswith(f"data.path: expected a folder of prepared shards at {tmp_path / 'none'}")
    assert "launch/prepare.py" in problem


def test_an_empty_data_directory_is_refused_by_name(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (problem,) = refused(f"data.path={tmp_path / 'empty'}")
    assert problem.startswith(f"data.path: expected prepared shards in {tmp_path / 'empty'}, but the folder is empty")


def test_a_folder_above_the_prepared_ones_is_refused_with_their_names(refused, tiny_data):
    (problem,) = refused(f"data.path={tiny_data}")
    assert f"did you mean {tiny_data / 'train'} or {tiny_data / 'validation'}?" in problem


def test_a_shard_that_is_not_there_is_refused_by_name(refused, tiny_data, tmp_path):
    data = shutil.copytree(tiny_data / "train", tmp_path / "data")
    (data / "shard-00001.tar").unlink()
    (problem,) = refused(f"data.path={data}")
    assert problem.startswith(f"data.path: shard shard-00001: {data / 'shard-00001.tar'} cannot be found")


def test_data_of_another_sequence_length_is_refused_with_both_lengths(refused, tiny_data):
    problems = refused("data.sequence_length=32")
    assert [problem.split(";")[0] for problem in problems] == [
        f"data.sequence_length: 32, but {tiny_data / name} holds rows of 16 tokens" for name in ("train", "validation")
    ]


def test_data_prepared_with_two_tokenizers_is_refused(refused, tiny_data, tmp_path):
    data = shutil.copytree(tiny_data / "validation", tmp_path / "data")
    edited(data / "manifest.json", tokenizer_sha256="0" * 64)
    (problem,) = refused(f"data.validation_path={data}")
    assert problem.startswith(f"{data}: prepared with another tokenizer than the other data of this run")


def test_a_vocabulary_that_does_not_fit_the_model_is_refused_with_both_sizes(refused):
    assert refused("model.vocab_size=299") == ["model.vocab_size: 299 is too small for the data's 300 ids; leave it unset"]


def test_a_vocabulary_that_does_not_fit_the_reference_is_refused_with_both_sizes(refused, tiny_reference, tmp_path):
    reference = shutil.copytree(tiny_reference, tmp_path / "reference")
    edited(reference / "config.json", vocab_size=299)
    embedding, _, problem = refused(f"reference.path={reference}")
    assert problem == f"reference.path: {reference} knows 299 ids, the data has 300"
    assert embedding == f"reference.path: {reference}: 'model.embed_tokens.weight' is [300, 16], expected [299, 16]"


def test_a_reference_that_lacks_a_tensor_is_refused_by_its_name(refused, tiny_reference, tmp_path):
    reference = shutil.copytree(tiny_reference, tmp_path / "reference")
    tensors = load_file(reference / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, reference / "model.safetensors")
    lacking = f"{reference}: no tensor 'model.layers.1.mlp.up_proj.weight' for the model's 'heads.0.ffn.up.weight'"
    assert refused(f"reference.path={reference}") == [f"reference.path: {lacking}"]
    pretrained = refused(f"model.pretrained={reference}")
    assert pretrained[0] == f"model.pretrained: {lacking}"


def test_data_without_its_tokenizer_is_refused_by_its_name(refused, tiny_data, tmp_path):
    data = shutil.copytree(tiny_data / "train", tmp_path / "data")
    (data / TOKENIZER_FILE).unlink()
    (problem,) = refused(f"data.path={data}")
    assert problem.startswith(f"data.path: {data / TOKENIZER_FILE} cannot be found")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_reference_without_an_expected_file_is_refused_by_its_name(refused, tiny_reference, tmp_path, missing):
    reference = shutil.copytree(tiny_reference, tmp_path / "reference")
    (reference / missing).unlink()
    (problem,) = refused(f"reference.path={reference}")
    assert problem.startswith("reference.path: ")
    assert missing in problem
    assert str(reference) in problem


def test_a_reference_directory_that_is_missing_or_empty_is_refused_by_name(refused, tmp_path):
    (problem,) = refused(f"reference.path={tmp_path / 'none'}")
    assert problem.startswith(f"reference.path: {tmp_path / 'none'}: no such directory")
    (tmp_path / "empty").mkdir()
    (problem,) = refused(f"reference.path={tmp_path / 'empty'}")
    assert problem.startswith(f"reference.path: {tmp_path / 'empty'}: missing config.json, model.safetensors")


def test_a_pretrained_model_of_another_shape_is_refused_with_both_values(refused, tiny_reference):
    (problem,) = refused(f"model.pretrained={tiny_reference}", "model.num_layers=5")
    assert problem == f"model.num_layers: 5, but {tiny_reference} has 2; they must be equal"


@pytest.mark.parametrize(
    "switches",
    [["attention_output_bias"], ["attention_bias", "mlp_bias"], ["attention_bias", "qk_norm"], ["mlp_bias", "qk_norm"]],
)
def test_a_model_that_could_never_be_exported_is_refused_before_it_is_trained(refused, switches):
    (problem,) = refused("--dry-run", *(f"model.{switch}=true" for switch in switches), "training.k_percent=1")
    assert problem.startswith(f"model: {' and '.join(switches)} alone are those of no family that a model could be exported as")


@pytest.mark.parametrize("value", ["1.5", "0"])
def test_k_percent_outside_its_range_is_refused(refused, value):
    assert refused(f"training.k_percent={value}") == [f"training.k_percent: got {value}; expected a fraction in (0, 1]"]


def test_temperature_is_refused_with_what_replaced_it(refused):
    (problem,) = refused("training.temperature=0.5")
    assert problem.startswith("training.temperature: removed")
    assert "training.k_percent" in problem


def test_selection_without_a_reference_is_refused(refused):
    (problem,) = refused("training.k_percent=0.6")
    assert problem.startswith("reference.path: not set; name the directory of a reference model")


def test_a_number_of_ranks_that_does_not_fit_is_refused_with_those_that_would(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "5")
    (problem,) = refused("data.global_batch=24")
    assert "data.lanes = 24 is not a multiple of ranks × data.micro_batch = 5 × 2" in problem
    assert "numbers of ranks that fit: 1, 2, 3, 4, 6, 12" in problem


def test_more_lanes_than_the_training_data_has_rows_are_refused_before_anything_is_built(refused, tiny_data):
    rows = read_manifest(tiny_data / "validation").num_samples
    (problem,) = refused("data.global_batch=128", "data.lanes=128", f"data.path={tiny_data / 'validation'}")
    assert problem.startswith(f"{tiny_data / 'validation'}: the data set has {rows} samples, fewer than data.lanes = 128")


def test_held_out_data_may_have_fewer_rows_than_lanes_but_not_than_it_is_to_read(refused, tiny_data):
    rows = read_manifest(tiny_data / "validation").num_samples
    assert refused("data.global_batch=128", "data.lanes=128", "logging.validation_samples=500") == [
        f"logging.validation_samples: 500, but {tiny_data}/validation holds {rows} rows; set at most {rows}, or null for all"
    ]


def test_each_of_several_held_out_folders_is_checked_under_its_name(refused, tiny_data, tmp_path):
    (problem,) = refused(f"data.validation_path={{near: {tiny_data / 'validation'}, far: {tmp_path / 'none'}}}")
    assert problem.startswith(f"data.validation_path far: expected a folder of prepared shards at {tmp_path / 'none'}")


@pytest.mark.parametrize(
    ("key", "owner"),
    [("train_batch_size", "data.global_batch = 4"), ("train_micro_batch_size_per_gpu", "data.micro_batch = 2")],
)
def test_a_batch_size_in_both_files_is_refused_with_both_values(refused, tmp_path, key, owner):
    (tmp_path / "deepspeed.json").write_text(json.dumps({key: 32, "zero_optimization": {"stage": 3}}), encoding="utf-8")
    (problem,) = refused("--deepspeed", tmp_path / "deepspeed.json")
    assert problem.startswith(f"deepspeed {key}: 32 there, {owner} in the recipe")


def test_a_run_directory_that_is_a_file_is_refused_by_name(refused, tmp_path):
    (tmp_path / "file").write_text("somebody's")
    (problem,) = refused("--run-dir", tmp_path / "file" / "run")
    assert problem.startswith(f"--run-dir: {tmp_path / 'file'} is a file")


@pytest.mark.parametrize("folder", ["checkpoints", "tensorboard"])
def test_a_file_in_the_place_of_a_runs_folder_is_refused_before_anything_is_trained(refused, tmp_path, folder):
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / folder).touch()
    (problem,) = refused("--run-dir", tmp_path / "another")
    assert problem == f"--run-dir: {tmp_path / 'another' / folder} is a file; expected a directory, or none yet"


def test_a_missing_deepspeed_json_is_refused_by_name(refused, tmp_path):
    assert refused("--deepspeed", tmp_path / "none.json") == [f"--deepspeed: no such file: {tmp_path / 'none.json'}"]


@pytest.mark.parametrize(
    ("option", "suggested"),
    [
        ("--dry", "--dry-run"),
        ("--rundir=runs/a/very/long/path/that/hides/the/name", "--run-dir"),
        ("--alow-changed", "--allow-changed"),
    ],
)
def test_an_unknown_option_is_refused_with_a_suggestion(refused, option, suggested):
    assert refused(option) == [f"{option}: unknown option; did you mean '{suggested}'?"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--micro-batch", "settings have no dashes: write data.micro_batch=VALUE"),
        ("--training.steps=5", "settings have no dashes: write training.steps=5"),
        ("--seed", "settings have no dashes: write data.seed=VALUE or model.seed=VALUE"),
        ("--lr 1e-4", "settings have no dashes: write training.learning_rate=1e-4"),
        ("--max_steps 100", "settings have no dashes: write training.steps=100"),
        ("--batch-size 8", "settings have no dashes: write data.global_batch=8"),
        ("--resume", "a run continues by itself when it is started again with the same --run-dir"),
        ("--resume_from_checkpoint runs/a", "a run continues by itself when it is started again with the same --run-dir"),
        ("--output_dir out", "the folder of a run is --run-dir DIR"),
        ("--num_train_epochs 3", "settings have no dashes: write training.epochs=3"),
        ("--lr -1e-4", "settings have no dashes: write training.learning_rate=-1e-4"),
    ],
)
def test_words_that_other_trainers_use_are_refused_with_what_does_it_here(refused, given, meant):
    (problem,) = refused(*given.split())
    assert problem.startswith(f"{given.replace(' ', '=')}: unknown option; {meant}")


def test_an_unknown_option_that_comes_twice_has_its_own_value_each_time(refused):
    assert [problem.partition(":")[0] for problem in refused("--lr", "3", "--lr", "4", "--lr")] == ["--lr=3", "--lr=4", "--lr"]


def test_folders_are_looked_at_beside_wrong_settings_and_compared_with_none_of_them(refused, tiny_reference, tmp_path):
    shutil.copytree(tiny_reference, tmp_path / "short")
    edited(tmp_path / "short" / "config.json", max_position_embeddings=64)
    wrong = ["data.sequence_length=none", f"reference.path={tmp_path / 'short'}"]
    problems = refused(*wrong, f"reference.cached={tmp_path / 'cache'}", f"model.pretrained={tmp_path / 'model'}")
    assert problems == [
        "data.sequence_length: got 'none'; expected a whole number",
        f"reference.cached: {tmp_path / 'cache'}: no such folder; make it with launch/score.py",
        f"model.pretrained: {tmp_path / 'model'}: no such directory; expected a model (config.json, model.safetensors)",
    ]


def test_a_cache_that_is_not_there_is_named_beside_other_problems(refused, tmp_path):
    data, cache = refused(f"data.path={tmp_path / 'none'}", f"reference.cached={tmp_path / 'cache'}")
    assert data.startswith("data.path: ")
    assert cache == f"reference.cached: {tmp_path / 'cache'}: no such folder; make it with launch/score.py"


def test_scoring_does_not_ask_for_the_cache_that_it_is_to_write(arguments, tmp_path):
    cache = ["--output", tmp_path / "cache", f"reference.cached={tmp_path / 'cache'}"]
    finished = run_script("score.py", *arguments, *cache, "training.steps=0", environment=ENVIRONMENT)
    steps, reference = problems_in(finished.stderr, "score.py")
    assert steps == "training.steps: got 0; expected more than 0"
    assert reference.startswith("reference.path: not set; name the directory of the reference that is to score the data")


def test_scoring_does_not_miss_a_setting_of_a_recipe_that_was_not_read(arguments, tmp_path):
    finished = run_script("score.py", *arguments, "--config", tmp_path / "none.yaml", environment=ENVIRONMENT)
    assert problems_in(finished.stderr, "score.py") == [
        "the following arguments are required: --output; score.py --help says more",
        f"--config: no such file: {tmp_path / 'none.yaml'}; did you mean 'tiny.yaml'?",
    ]


def test_sizes_that_do_not_fit_are_refused_beside_other_problems_unless_one_is_about_a_size(refused):
    lr, sizes = refused("--lr", "1e-4", "data.global_batch=8", "data.micro_batch=3")
    assert lr.endswith("write training.learning_rate=1e-4")
    assert sizes.startswith("data.lanes = 8 is not a multiple of ranks × data.micro_batch = 1 × 3; write data.micro_batch=2;")
    (batch_size,) = refused("--batch_size", "6", "data.micro_batch=3")
    assert batch_size.endswith("write data.global_batch=6")


def test_settings_behind_an_unknown_option_are_still_settings(refused):
    assert refused("training.steps=3", "--alow-changed", "training.k_percent=1.5", "modl.dim=3") == [
        "--alow-changed: unknown option; did you mean '--allow-changed'?",
        "training.k_percent: got 1.5; expected a fraction in (0, 1]",
        "modl: unknown section; did you mean 'model'?",
    ]


def test_a_reference_that_would_not_be_trained_on_its_data_is_refused(refused, tiny_data, tiny_reference):
    (problem,) = refused(f"reference.path={tiny_reference}", f"reference.training_data={tiny_data / 'train'}")
    assert problem.startswith("reference.training_data: set, but no reference is trained")


@pytest.mark.parametrize("override", ["run.name=yes", "training.head_weights=[true, 1, 1, 1]"])
def test_a_truth_value_is_no_name_and_no_number(refused, override):
    (problem,) = refused(override)
    assert "expected a value other than true and false" in problem


# Runs.


def test_a_second_job_in_the_same_run_directory_is_refused_and_says_who_is_there(arguments, tmp_path):
    lock = RunLock(tmp_path / "run")
    assert lock.take() is None
    (problem,) = assert_one_clear_message(run(*arguments))
    lock.release()
    assert problem.startswith(f"--run-dir: {tmp_path / 'run'} is in use by process {os.getpid()} on {socket.gethostname()}")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock"]


def test_a_port_that_is_in_use_is_one_message_with_the_remedy(arguments, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        finished = run_script("train.py", *arguments, environment=ENVIRONMENT | {"MASTER_PORT": port})
    assert finished.returncode == 2
    assert finished.stderr.startswith(f"train.py: error: the ranks cannot meet at MASTER_ADDR 127.0.0.1, MASTER_PORT {port}: ")
    assert "choose another one (deepspeed --master_port N, or MASTER_PORT=N)" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "run").exists()


def test_a_name_of_the_first_machine_that_is_unknown_is_one_message_at_once(arguments, tmp_path):
    """torch would try again for half an hour."""
    of_two = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "no-such-node.invalid", "MASTER_PORT": "29500"}
    finished = run_script("train.py", *arguments, "data.micro_batch=1", environment=ENVIRONMENT | of_two, timeout=600)
    assert finished.returncode == 2, finished.stderr
    assert "train.py: error: the ranks cannot meet: MASTER_ADDR is no-such-node.invalid, and " in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "run").exists()


def test_without_a_launcher_one_rank_trains_also_within_a_job_of_slurms(arguments, tmp_path):
    """In a batch script, and in the shell that salloc opens on a node."""
    batch = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    shell = batch | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    for name, variables in (("batch", batch), ("shell", shell)):
        given = [*arguments, "--run-dir", tmp_path / name, "training.steps=1"]
        finished = run_script("train.py", *given, environment=ENVIRONMENT | variables)
        assert finished.returncode == 0, finished.stderr
        assert f"run directory {tmp_path / name}; 1 rank on " in finished.stdout


def test_one_head_is_trained_without_a_reference_though_one_could_be_trained(arguments, tiny_data, tmp_path):
    more = ["model.num_prediction_heads=1", "reference.training_steps=2", f"reference.training_data={tiny_data / 'train'}"]
    finished = run(*arguments, *more, "training.steps=1", start_afresh=True)
    assert finished.returncode == 0, finished.stderr
    assert "training a next-token reference" not in finished.stdout
    assert not (tmp_path / "run" / "reference").exists()


def test_a_token_id_outside_the_vocabulary_is_refused_with_shard_and_sample(arguments, tiny_data, tmp_path):
    data = shutil.copytree(tiny_data / "train", tmp_path / "data")
    put_a_bad_id_everywhere(data)
    finished = run(*arguments, f"data.path={data}", "data.validation_path=null")
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr
    message = finished.stderr.strip()
    assert re.fullmatch(r"train.py: error: shard shard-0000[01], sample \d+, in .*", message), message
    assert f"in {data} is damaged: token id 300 is not below the manifest's vocab_size 300" in message
    assert "step 1/" not in finished.stdout
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def put_a_bad_id_everywhere(directory):
    """Rewrite the shards with one id of 300 in every row, with indices and sums that fit, as a faulty tokenizer would."""
    manifest = read_manifest(directory)
    reader, rows = ShardReader(directory, manifest), []
    for shard, entry in enumerate(manifest.shards):
        for index in range(entry.samples):
            sample = reader.read(shard, index)
            tokens = sample.tokens.astype(np.uint32)
            tokens[3] = 300
            rows.append(Row(tokens, sample.lengths, sample.sources))
    shards = write_shards(rows, directory, vocab_size=301, samples_per_shard=128, named_sources=True)
    write_manifest(directory, manifest.model_copy(update={"shards": tuple(shards)}))
    assert read_manifest(directory).vocab_size == 300


def test_a_dry_run_reports_memory_and_token_budget_and_leaves_nothing(arguments, tiny_data, tiny_reference, tmp_path):
    # With a reference, and a JSON that says nothing but what it must.
    arguments[arguments.index("--deepspeed") + 1] = str(tmp_path / "bare.json")
    (tmp_path / "bare.json").write_text('{"zero_optimization": {"stage": 3}}', encoding="utf-8")
    finished = run(*arguments, "training.k_percent=0.6", f"reference.path={tiny_reference}", "--dry-run")
    assert finished.returncode == 0, finished.stderr
    assert re.search(r"time +\d+\.\d s a step, \d+\.\d s for the first", finished.stdout)
    assert re.search(r"memory plan +\d+\.\d MiB a rank, highest in ", finished.stdout)
    assert re.search(r"parameters +[\d,]+ of the policy", finished.stdout)
    assert re.search(rf"reference +[\d,]+ parameters, {tiny_reference}\n", finished.stdout)
    assert re.search(r"a step +4 rows = 2 micro-step\(s\) × 1 rank\(s\) × 2 rows", finished.stdout)
    # Both without what Python and libraries take: hundreds of MiB, of which 70 are loaded by the first step.
    peak, plan = (float(re.search(rf"{what} +([\d.]+) MiB", finished.stdout)[1]) for what in ("peak memory of a step", "plan"))
    assert plan < peak < plan + 40
    tokens = int(re.search(r"40 steps × ([\d,]+) tokens", finished.stdout)[1].replace(",", ""))
    in_epoch = read_manifest(tiny_data / "train").num_tokens
    assert 0 < tokens <= 4 * 16
    assert f"= {40 * tokens:,} tokens, {40 * tokens / in_epoch:.2f} epochs of {in_epoch:,}" in finished.stdout
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_that_a_reference_yet_to_be_trained_has_random_weights(arguments, tiny_data):
    training = ["training.k_percent=0.6", "reference.training_steps=2", f"reference.training_data={tiny_data / 'train'}"]
    finished = run(*arguments, *training, "--dry-run")
    assert finished.returncode == 0, finished.stderr
    assert re.search(
        r"reference +[\d,]+ parameters of random weights, a stand-in: the reference is yet to be trained", finished.stdout
    )


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_saves_and_the_same_command_finishes_it(arguments, tmp_path):
    run_dir = tmp_path / "run"
    # A file STOP: obeyed at the end of the first step, and gone.
    run_dir.mkdir()
    (run_dir / "STOP").touch()
    stopped = run(*arguments)
    assert stopped.returncode == 75, stopped.stderr
    assert "stopped on request after step 1; run the same command again to continue" in stopped.stdout
    assert not (run_dir / "STOP").exists()
    assert checkpoints(run_dir) == ["step-00000001"]
    assert (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8").strip() == "step-00000001"

    # SIGTERM to every process of the job, loader workers among them, once it has made a step: the step is finished and saved.
    exit_code, printed = run_until_then_signal_all(r"step +\d+/40 ", signal.SIGTERM, [*arguments, "data.num_workers=2"])
    assert exit_code == 75, printed
    assert "continuing from step 1" in printed
    last = int(re.search(r"stopped on request after step (\d+)", printed)[1])
    assert 2 <= last < 40
    assert checkpoints(run_dir)[-1] == f"step-{last:08d}"

    # SIGUSR1 while torch and DeepSpeed are still being loaded: nothing is to be saved.
    loading = "selective multi-token prediction: loading"
    exit_code, printed = run_until_then_signal_all(loading, signal.SIGUSR1, arguments)
    assert exit_code == 75, printed
    assert printed == f"{GREETING}stopped on request before anything was begun; run the same command again\n"
    assert checkpoints(run_dir)[-1] == f"step-{last:08d}"

    finished = run(*arguments)
    assert finished.returncode == 0, finished.stderr
    assert f"continuing from step {last}" in finished.stdout
    assert "held-out loss, end (step 40)" in finished.stdout
    assert checkpoints(run_dir)[-1] == "step-00000040"
    trained = [record for record in read_records(run_dir) if "split" not in record]
    assert [record["step"] for record in trained] == list(range(1, 41))
    assert [record["samples"] for record in trained] == [4 * step for step in range(1, 41)]


def checkpoints(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))


def run_until_then_signal_all(line_begins, number, arguments):
    """Exit code and output of a job whose whole process group gets a signal at the first line that begins so."""
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, str(SCRIPT), *arguments], env=ENVIRONMENT, **piped) as process:
        printed, signalled = [], False
        for line in process.stdout:
            printed.append(line)
            if re.match(line_begins, line) and not signalled:
                os.killpg(process.pid, number)
                signalled = True
    return process.returncode, "".join(printed)
