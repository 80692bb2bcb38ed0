"""REQUIRE_EXTRAS: where CI installs all extras, no test is silently left out for want of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import ROOT

ONE_TEST = "import pytest\ndef test_of_an_extra() -> None:\n    pytest.importorskip('a_library_that_is_nowhere')\n"
ONE_MODULE = "import pytest\nnowhere = pytest.importorskip('a_library_that_is_nowhere')\ndef test_of_it() -> None: ...\n"
TOO_OLD = "import pytest\ndef test_of_it() -> None:\n    pytest.importorskip('pytest', minversion='999')\n"
OTHERWISE = "import pytest\ndef test_of_a_gpu() -> None:\n    pytest.skip('needs a GPU')\n"


CASES = {
    "a test": (ONE_TEST, "1", 1),
    "a test elsewhere": (ONE_TEST, "", 0),
    "too old": (TOO_OLD, "1", 1),
    "a module": (ONE_MODULE, "1", 2),
    "a module elsewhere": (ONE_MODULE, "", 5),
    "another reason": (OTHERWISE, "1", 0),
}


@pytest.mark.parametrize(("content", "required", "code"), CASES.values(), ids=CASES)
def test_a_missing_library_fails_a_test_only_where_extras_are_required(
    tmp_path: Path, content: str, required: str, code: int
) -> None:
    (tmp_path / "test_it.py").write_text(content)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", "--rootdir", tmp_path]
    environment = os.environ | {"REQUIRE_EXTRAS": required, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, tmp_path], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == code, done.stdout
    assert ("a library that this test needs is not there" in done.stdout) == (code in (1, 2))
