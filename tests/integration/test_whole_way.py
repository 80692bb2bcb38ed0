"""The whole way of README, by its own commands at a small size: pretrained model, data, training, export, figures, text."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.forked import ROOT, run_script

ONE_THREAD = os.environ | {"SLURM_CPUS_ON_NODE": "1", "OMP_NUM_THREADS": "1"}
# Those of the fixture's tiny model take the place of the demo's reference, of which README's example starts.
SHRUNK = {
    '{"text": x}': '{"text": x[:300]}',
    "--sequence-length 128": "--sequence-length 16",
    "sequence_length: 128": "sequence_length: 16",
    "steps: 150, learning_rate: 1.0e-3, warmup_steps: 10": "steps: 24, learning_rate: 2.0e-2, warmup_steps: 2",
    "--max-tokens 64": "--max-tokens 9",
}


def readme_example() -> tuple[str, list[str]]:
    """(the recipe, the commands one by one) of README's section, shrunk."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("### The whole way")[2].partition("\n## ")[0]
    for given, small in SHRUNK.items():
        assert given in section
        section = section.replace(given, small)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    (commands,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    return recipe, commands.replace("\\\n", " ").strip().splitlines()


def run(command: str, folder: Path, *more: object) -> str:
    """Run one of README's commands in a folder; returns what it prints."""
    launcher, *words = shlex.split(command)
    if words[0] == "-c":
        subprocess.run(command.replace("python", sys.executable, 1), shell=True, cwd=folder, check=True)
        return ""
    assert launcher in ("python", "deepspeed")
    script, *arguments = (str(ROOT / word) if word.startswith("ds_configs/") else word for word in words)
    done = run_script(script.removeprefix("launch/"), *arguments, *more, cwd=folder, environment=ONE_THREAD)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_readmes_whole_way_ends_with_text_and_measured_acceptance(tmp_path: Path, tiny_reference: Path) -> None:
    shutil.copytree(tiny_reference, tmp_path / "runs" / "demo" / "reference")
    recipe, commands = readme_example()
    (tmp_path / "topics.yaml").write_text(recipe)
    steps = "-c launch/prepare.py launch/train.py launch/export.py launch/evaluate.py launch/evaluate.py launch/generate.py"
    assert [shlex.split(command)[1] for command in commands] == steps.split()

    figures: list[dict[str, Any]] = []
    for command in commands:
        figures_too = ["--json", "figures.json"] if re.search(r"evaluate\.py|generate\.py", command) else []
        quick = ["data.num_workers=0", "logging.validation_samples=8"] if "train.py" in command else []
        printed = run(command, tmp_path, *figures_too, *quick)
        if figures_too:
            figures.append(json.loads((tmp_path / "figures.json").read_text()))
    before, after, generated = figures

    # Head 0 has learnt something of the text that the pretrained model did not know, and the others were made.
    assert after["loss_head_0"] < before["loss_head_0"] - 0.1
    assert "loss_head_1" not in before
    assert after["loss_head_3"] > 0

    # Acceptance, of documents of the data and of the prompt; the text is that of plain decoding.
    assert after["accepted_per_step"] >= 1
    assert generated["speculative"]["tokens"] == generated["plain"]["tokens"] > 0
    assert 1 == generated["plain"]["accepted_per_step"] <= generated["speculative"]["accepted_per_step"] <= 4
    assert "accepted per step" in printed
