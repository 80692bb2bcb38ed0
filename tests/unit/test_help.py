"""`--help` of every command: at once, because neither torch nor DeepSpeed is loaded for it, with usage lines that are whole."""

import subprocess
import sys

import pytest

from tests.forked import ROOT

SLOW = ("torch", "deepspeed", "webdataset", "matplotlib")
COMMANDS = [(path.stem,) for path in sorted((ROOT / "launch").glob("*.py"))]
COMMANDS += [("benchmark", command) for command in ("step", "heads", "selection", "data")]
COMMANDS += [("shards", command) for command in ("merge", "verify", "inspect", "index", "order")]
SHOW = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("loaded:", *(name for name in {slow} if name in sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_loads_nothing_slow_and_its_usage_lines_are_whole(command: tuple[str, ...]) -> None:
    script, *subcommand = command
    code = SHOW.format(slow=SLOW)
    arguments = [sys.executable, "-c", code, str(ROOT / "launch" / f"{script}.py"), *subcommand, "--help"]
    environment = {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert (done.returncode, done.stderr.split()) == (0, ["loaded:"])

    # Each line of the usage fits, and no option is parted from its value.
    usage = done.stdout.partition("\n\n")[0].splitlines()
    assert all(len(line) <= 80 for line in usage)
    assert not any(line.rstrip().endswith(("--input", "--output", "--tokenizer", "|", "=")) for line in usage)
    assert usage[0].startswith(f"usage: {script}.py")
