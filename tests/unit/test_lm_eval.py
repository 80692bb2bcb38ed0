"""lm-eval on an export, by README's command: its bits per byte on a local task are those of the checkpoint's own losses."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import processors

from launch.export import main as export
from pipeline.data.shards.manifest import read_manifest
from pipeline.data.tokenizer import load_tokenizer
from pipeline.model.block_losses import block_losses
from pipeline.saved_model import find_model
from tests.forked import ROOT
from tests.saved_models import model_of, write_checkpoint

TEXTS = ("the cat sees the dog.", "the bird likes the fish.", "17: the child hears the cat.")
BOS = 1


def test_bits_per_byte_of_a_local_task_are_those_of_the_models_losses(tmp_path: Path, tiny_data: Path) -> None:
    pytest.importorskip("lm_eval")
    model = model_of(read_manifest(tiny_data / "train").vocab_size, seed=3)
    write_checkpoint(tmp_path / "run", model, 6, tiny_data / "train")
    # Its documents begin with a BOS token, which lm-eval 0.4.13 sets before a text once more unless it is told not to.
    tokenizer = load_tokenizer(tiny_data / "tokenizer.json")
    bos = tokenizer.id_to_token(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS)])
    tokenizer.save(str(tmp_path / "run" / "tokenizer.json"))
    assert export([str(tmp_path / "run"), str(tmp_path / "models" / "mine")]) == 0
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    # README's task and its command.
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (task,) = re.findall(r"```yaml\n# tasks/ours\.yaml\n(.*?)```", readme, re.DOTALL)
    (command,) = re.findall(r"^lm-eval (run .*--tasks ours .*)$", readme, re.MULTILINE)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "ours.yaml").write_text(task)
    assert yaml.safe_load(task)["task"] == "ours"
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [sys.executable, "-m", "lm_eval", *shlex.split(command)]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = [json.loads(path.read_text())["results"] for path in tmp_path.glob("results*.json")]

    # By hand: every token of a text after one BOS token.
    source, nats = find_model(tmp_path / "run"), 0.0
    for text in TEXTS:
        tokens = torch.tensor([[BOS, *tokenizer.encode(text, add_special_tokens=False).ids]])
        nats += block_losses(source.settings, source.weights, tokens).sum().item()
    expected = nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert results["ours"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)
