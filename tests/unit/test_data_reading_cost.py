"""What reading costs: each byte of an input is read about once, to train a BPE twice, whatever it holds, by the kernel."""

import gzip
import io
import json
import tarfile
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.data.corpus.display import Display
from pipeline.data.corpus.documents import DocumentReader, Rules
from pipeline.data.corpus.inputs import Input, input_files, slice_size, slices
from pipeline.data.corpus.prepare import PrepareSettings
from pipeline.data.corpus.prepare_files import prepare_files
from pipeline.data.errors import DataError
from pipeline.data.tokenizer import byte_tokenizer

SIZE = 1_000_000
pytestmark = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel counts no bytes here")

LINES = {
    "good": lambda n: json.dumps({"text": f"{n} " * (n % 200)}).encode(),
    "bad": lambda n: b"{broken %d" % n + b"." * (n % 200),
    "no field": lambda n: b'{"text": "a"}' if n == 0 else b'{"body": "' + b"a" * (n % 200) + b'"}',
    "empty": lambda n: b" " * (n % 200),
    "not UTF-8": lambda n: b"\xff" * (1 + n % 100),
    "oversized": lambda n: b'{"text": "' + b"x" * (20_000 + n) + b'"}',
    "long": lambda n: json.dumps({"text": "x" * 9_000}).encode(),
    "of a slice": lambda n: json.dumps({"text": "x" * ((1 << 16) - 13)}).encode(),
    "giant": lambda n: json.dumps({"text": "x" * SIZE}).encode(),
    "giant and bad": lambda n: b"x" * SIZE,
}


def lines_of(kind, size=SIZE):
    """Lines of a kind, about `size` bytes together."""
    lines, total = [], 0
    while total < size:
        lines.append(LINES[kind](len(lines)) + b"\n")
        total += len(lines[-1])
    return b"".join(lines)


@contextmanager
def bytes_read():
    """A list of the bytes that this process read in the block."""
    found = []

    def now():
        return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])

    before = now()
    yield found
    found.append(now() - before)


def read_all(path, limit=10_000_000):
    """Read as workers do, a reader to a slice; returns the bytes read and the counts of all slices."""
    with bytes_read() as found:
        files = input_files([Input("", str(path))])
        readers = [(DocumentReader(Rules("text", limit, "skip")), spans) for spans in slices(files, slice_size(files))]
        texts = sum(len(list(reader.read(spans))) for reader, spans in readers)
    counts = readers[0][0].counts
    for reader, _ in readers[1:]:
        counts.add(reader.counts)
    assert texts == counts.documents
    return found[0], counts


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        *((kind, ".jsonl") for kind in LINES),
        *((kind, f".jsonl.{suffix}") for kind in ("bad", "oversized") for suffix in ("gz", "zst")),
    ],
)
def test_a_byte_of_lines_is_read_once_whatever_they_are(tmp_path, kind, suffix):
    data, path = lines_of(kind), tmp_path / f"a{suffix}"
    number = data.count(b"\n")
    if suffix == ".jsonl.gz":
        data = gzip.compress(data, 0)
    elif suffix == ".jsonl.zst":
        data = pytest.importorskip("zstandard").ZstdCompressor(level=1).compress(data)
    path.write_bytes(data)
    read_all(path)  # what is imported meanwhile
    found, counts = read_all(path, 10_000 if kind == "oversized" else 10_000_000)
    assert found <= 1.1 * len(data) + 10_000
    assert counts.documents + counts.empty + counts.undecodable + counts.oversized == (0 if kind == "empty" else number)


@pytest.mark.parametrize("kind", ["bad", "giant"])
def test_preparing_and_going_on_read_no_more_than_there_is(tmp_path, kind):
    """Whole: with workers, with what they write and read again, and with what was done before an interruption."""
    (tmp_path / "a.jsonl").write_bytes(lines_of(kind) + b'{"text": "the last one"}\n')
    source, size = [Input("", str(tmp_path / "a.jsonl"))], (tmp_path / "a.jsonl").stat().st_size
    rules = Rules("text", 10_000, "skip")

    class Stopping(Display):
        reports = 0

        def advance(self, documents, tokens, size):
            self.reports += 1
            if self.reports > 8:
                raise InterruptedError

    def prepare(name, display):
        settings = PrepareSettings(sequence_length=64, rules=rules)
        prepare_files(source, tmp_path / name, byte_tokenizer(), settings, display=display)

    quiet = Console(file=StringIO())
    prepare("first", Display(quiet))
    with bytes_read() as whole:
        prepare("second", Display(quiet))
    with bytes_read() as resumed:
        with pytest.raises(InterruptedError):
            prepare("third", Stopping(quiet))
        prepare("third", Display(quiet))
    written = sum(file.stat().st_size for file in (tmp_path / "second").rglob("*.tar"))
    assert whole[0] <= 1.1 * size + 2 * written + 200_000
    assert resumed[0] <= 1.15 * size + 2 * written + 300_000  # a slice was read twice


def prepare_quietly(source, folder, tokenizer=None, **changes):
    settings = PrepareSettings(sequence_length=64, rules=Rules(**changes))
    display = Display(Console(file=StringIO()))
    return prepare_files([Input("", str(source))], folder, tokenizer or byte_tokenizer(), settings, display=display)


def test_an_error_reads_nothing_again_and_has_its_lines_number(tmp_path):
    data = lines_of("good")
    (tmp_path / "a.jsonl").write_bytes(data + b"{broken\n")
    expected = rf"a\.jsonl, line {data.count(10) + 1}: expected one JSON object"
    for name in ("first", "second"):
        with bytes_read() as found, pytest.raises(DataError, match=expected):
            prepare_quietly(tmp_path / "a.jsonl", tmp_path / name)
    assert found[0] <= 1.1 * len(data) + 100_000


def test_training_a_bpe_reads_the_input_twice(tmp_path):
    data = lines_of("good")
    (tmp_path / "a.jsonl").write_bytes(data)
    for name in ("first", "second"):
        with bytes_read() as found:
            prepare_quietly(tmp_path / "a.jsonl", tmp_path / name, 300)
    written = sum(file.stat().st_size for file in (tmp_path / "second").rglob("*.tar"))
    assert found[0] <= 2.1 * len(data) + 2 * written + 200_000


def test_the_parts_of_an_input_read_it_once_together(tmp_path):
    data = lines_of("empty") + b'{broken\n{"text": "a"}\n' * (SIZE // 100)
    (tmp_path / "a.jsonl").write_bytes(data)
    source, quiet = [Input("", str(tmp_path / "a.jsonl"))], Display(Console(file=StringIO()))

    def prepare(name):
        """Prepare one part after the other; returns the notes on the lines left out, and the bytes of all shards."""
        notes, written = [], 0
        for number in range(1, 4):
            settings = PrepareSettings(sequence_length=64, part=(number, 3), rules=Rules(on_undecodable="skip"))
            folder = tmp_path / f"{name}{number}"
            notes += prepare_files(source, folder, byte_tokenizer(), settings, display=quiet).counts.notes
            written += sum(file.stat().st_size for file in folder.rglob("*.tar"))
        return notes, written

    prepare("first")
    with bytes_read() as found:
        notes, written = prepare("second")
    assert found[0] <= 1.1 * len(data) + 2 * written + 300_000
    assert len(notes) == 15
    assert all("a.jsonl, the line at byte" in note for note in notes)


@pytest.mark.parametrize("size", [100, 3_000, 100_000])
def test_a_byte_of_a_tar_is_read_once(tmp_path, size):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(SIZE // (size + 1000)):
            for suffix in ("json", "txt"):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = size
                tar.addfile(info, io.BytesIO(b"x" * size))
    found, counts = read_all(tmp_path / "a.tar")
    assert counts.documents == SIZE // (size + 1000)
    assert found <= 1.1 * (tmp_path / "a.tar").stat().st_size


def test_the_footer_of_a_parquet_is_not_read_for_every_span(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"{number} " * 60 for number in range(4000)]
    columns = {"text": texts, **{f"column{number}": list(range(4000)) for number in range(20)}}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet", row_group_size=10, compression="none")
    size = (tmp_path / "a.parquet").stat().st_size
    found, counts = read_all(tmp_path / "a.parquet")
    assert counts.documents == 4000
    assert found <= 1.1 * size
