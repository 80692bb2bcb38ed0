"""A run whose data lies behind secrets: they are in nothing that it writes or prints, whether it trains or fails."""

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forked import run_script
from tests.integration.test_command_line import ENVIRONMENT, ZERO3
from tests.unit.test_storage import Server

SECRET = "Zq7secretW4"


@pytest.fixture
def server(tiny_data: Path) -> Iterator[Server]:
    with Server(tiny_data / "validation") as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(tmp_path: Path, recipe: str, *more: str) -> tuple[int, str]:
    """The exit code, and all that was printed; the recipe holds secrets, and so does the command line."""
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe, encoding="utf-8")
    arguments = ["--deepspeed", ZERO3, "--config", path, "--run-dir", tmp_path / "run", *more]
    done = run_script("train.py", *arguments, environment=ENVIRONMENT)
    return done.returncode, done.stdout + done.stderr


def files_with_the_secret(run_dir: Path) -> list[str]:
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if re.search(rb"Zq7.?secretW4", path.read_bytes(), re.DOTALL)]


def test_a_run_writes_and_prints_no_secret_of_its_data_and_goes_on_with_another(
    tiny_data: Path, tmp_path: Path, server: Server
) -> None:
    def recipe(secret: str, steps: int) -> str:
        held_out = server.url.raw.replace("//", f"//user:{secret}@")
        return (
            f"data: {{path: 'pipe:TOKEN={secret} cat {tiny_data}/train/{{}}', allow_pipe: true, sequence_length: 16,\n"
            f"  validation_path: {{web: '{held_out}?X-Amz-Signature={secret}'}},\n"
            "  global_batch: 4, micro_batch: 2, num_workers: 0}\n"
            "model: {dim: 16, num_layers: 2, num_attention_heads: 2}\n"
            f"training: {{steps: {steps}, warmup_steps: 2, k_percent: 1, schedule: wsd}}\n"
            "checkpoint: {every: 2}\n"
            "logging: {metrics_every: 1, progress_every: 1, validation_samples: 4, validation_every: 2}\n"
        )

    code, shown = run(tmp_path, recipe(SECRET, 4), f"data.path=pipe:T={SECRET} cat {tiny_data}/train/{{}}")
    assert code == 0, shown
    assert SECRET not in shown
    assert files_with_the_secret(tmp_path / "run") == []
    config = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert "path: pipe:*** ***\n" in config
    assert f"web: http://***@127.0.0.1:{server.server_port}/data?X-Amz-Signature=***\n" in config

    # Another secret is no other data; a server that refuses, and a pipe that fails, tell none.
    code, shown = run(tmp_path, recipe(f"{SECRET}New", 4))
    assert code == 0, shown
    assert "already at step 4" in shown
    server.always = 403
    code, refused = run(tmp_path, recipe(SECRET, 4))
    assert code == 2
    assert "403" in refused
    server.always = None
    code, failed = run(tmp_path, recipe(SECRET, 4), f"data.path=pipe:echo {SECRET}; exit 1; {{}}")
    assert code == 2
    assert "the command ended with code 1" in failed
    code, misspelt = run(tmp_path, recipe(SECRET, 4), f"--data.pth=s3://KEY:{SECRET}@bucket/x", f"data.path=pipe:cat {SECRET}")
    assert code == 2
    assert "expected {} in a pipe" in misspelt
    assert SECRET not in shown + refused + failed + misspelt
    assert files_with_the_secret(tmp_path / "run") == []
