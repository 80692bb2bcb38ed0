"""Remote data: read over a real HTTP server that drops, truncates, delays and fails; cached within bounds; and pipes."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import http.server
import multiprocessing
import os
import re
import shlex
import shutil
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from pipeline import processes
from pipeline.data.errors import DataError
from pipeline.data.loading.mixture import DataSet
from pipeline.data.loading.stream import Stream
from pipeline.data.shards.manifest import read_manifest, write_manifest
from pipeline.data.shards.reader import ShardReader
from pipeline.data_settings import DataSettings
from pipeline.storage.disk_cache import PART, DiskCache
from pipeline.storage.files import Access, RemoteFile, StorageError, fetch, read_whole
from pipeline.storage.location import Url, parse_location
from tests.data_sets import numbered_data

SIZES = {"lanes": 6, "global_batch": 12, "micro_batch": 2, "rank": 0, "world_size": 1, "seed": 5, "shuffle_block": 16}

pytest.importorskip("aiohttp")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data/mix", Path("data/mix")),
        ("/data/mix", Path("/data/mix")),
        ("file:/data/mix", Path("/data/mix")),
        ("file:///data/my%20mix", Path("/data/my mix")),
        ("https://host/data", Url("https://host/data")),
        ("s3://bucket/data", Url("s3://bucket/data")),
        ("pipe:cat /data/{}", Url("pipe:cat /data/{}")),
    ],
)
def test_a_place_is_a_path_or_a_url_and_stays_as_it_was_written(text, expected):
    place = parse_location(text)
    assert (place, type(place)) == (expected, type(expected))
    assert DataSettings(path=text).path == expected
    assert yaml.safe_load(yaml.safe_dump(DataSettings(path=text).model_dump(mode="json")))["path"] == str(expected)


@pytest.mark.parametrize("text", ["", "pipe:cat data.tar", "file://host/data", "https:host/data"])
def test_what_is_no_place_is_refused(text):
    with pytest.raises(ValueError, match="expected"):
        parse_location(text)


def test_a_name_is_joined_to_a_url_before_its_query_and_quoted_in_a_pipe():
    assert Url("https://host/data/?key=1") / "a.tar" == "https://host/data/a.tar?key=1"
    assert Url("pipe:cat /x/{}") / "a; rm b" == "pipe:cat /x/'a; rm b'"


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder by ranges. `faults` are done to one request each: drop, truncate, login, a status, …; or `always`."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.always, self.requests, self.sent = folder, [], None, [], 0
        self.lock, self.gone = threading.Lock(), threading.Event()

    @property
    def url(self):
        return Url(f"http://127.0.0.1:{self.server_port}/data")

    def next_fault(self, path):
        with self.lock:
            self.requests.append(path)
            if self.always is not None:
                return self.always
            return self.faults.pop(0) if self.faults else None

    def handle_error(self, request, client_address):
        pass  # a connection that was dropped on purpose


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        fault = self.server.next_fault(self.path)
        if fault == "drop":
            self.hang_up()
            return
        if isinstance(fault, int):
            self.send_error(fault)
            return
        if fault == "silent":
            self.server.gone.wait(400)
            self.hang_up()
            return
        if fault == "delay":
            time.sleep(0.3)
        path = self.server.folder / self.path.partition("?")[0].rpartition("/")[2]
        if not path.is_file():
            self.send_error(404)
            return
        data = b"<html>Please log in</html>" if fault == "login" else path.read_bytes()
        wanted = None if fault in ("login", "no range") else re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(wanted[1]), min(int(wanted[2]) + 1, len(data))) if wanted else (0, len(data))
        if start >= len(data):
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        body = data[start:end]
        if fault == "lie":
            body = body[: len(body) // 2]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "truncate" else body)
        with self.server.lock:
            self.server.sent += len(body)
        if fault == "truncate":
            self.wfile.flush()
            self.hang_up()

    def hang_up(self):
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return numbered_data(tmp_path_factory.mktemp("remote") / "data", 60)


@pytest.fixture
def server(folder):
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def rows(data, start=0, end=60, **changes):
    batches = Stream(data, **SIZES | changes).iterate(start, end_sample=end)
    return [row for batch in batches for row in batch.tokens_BT[:, 0].tolist()]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_remote_folder_gives_the_rows_of_the_local_one(server, folder, num_workers):
    assert rows(server.url, num_workers=num_workers) == rows(folder)


def test_a_server_that_drops_truncates_delays_and_fails_changes_nothing(server, folder):
    server.faults = ["drop", "truncate", "delay", 500, "truncate", 503, "drop", 429, "lie", "delay"] * 3
    assert rows(server.url, end=120, access=Access(retry_seconds=30)) == rows(folder, end=120)
    assert server.faults == []


def test_resuming_asks_for_a_few_ranges_only(server, tmp_path):
    server.folder = numbered_data(tmp_path / "data", 2400, samples_per_shard=600)
    stream = Stream(server.url, **SIZES)
    sent, before = server.sent, time.process_time()
    batch = next(stream.iterate(1800))
    assert time.process_time() - before < 0.5
    assert batch.tokens_BT[:, 0].tolist() == rows(server.folder, 1800, 1812)[:2]
    assert server.sent - sent < sum(shard.bytes for shard in stream.manifest.shards) / 8


def test_an_epoch_without_a_cache_asks_for_its_bytes_about_once(server):
    stream = Stream(server.url, **SIZES)
    sent = server.sent
    assert sum(len(batch.keys) for batch in stream.iterate(0, end_sample=60)) == 60
    assert server.sent - sent <= 1.05 * sum(shard.bytes for shard in stream.manifest.shards)


def test_a_reader_that_was_abandoned_may_be_collected_in_any_thread(server):
    import fsspec.asyn

    batches = Stream(server.url, **SIZES).iterate(0)
    next(batches)
    server.always = "delay"

    async def collect(abandoned):
        abandoned.pop().close()

    holder = [batches]
    del batches
    fsspec.asyn.sync(fsspec.asyn.get_loop(), collect, holder, timeout=200)


def test_who_reads_no_more_waits_for_no_storage_that_stays_away(server, folder):
    # A process waits at its end for the threads that read.
    reader = ShardReader(server.url, read_manifest(folder), Access(retry_seconds=60))
    server.always = 503
    with ThreadPoolExecutor(1) as elsewhere:
        reading = elsewhere.submit(reader.read_many, [0, 1, 2], [0, 0, 0])
        while len(server.requests) < 3:
            time.sleep(0.01)
        reader.close()
        with pytest.raises(DataError, match=r"not read; its reader was closed meanwhile; .*503"):
            reading.result(timeout=200)
    server.always = None
    with pytest.raises(DataError, match="its reader was closed meanwhile"):
        reader.read_many([0, 1], [0, 0])


def test_a_server_that_stays_away_is_an_error_after_the_stated_time(server):
    stream = Stream(server.url, **SIZES, access=Access(retry_seconds=0.5))
    server.always = 503
    before = time.monotonic()
    with pytest.raises(DataError, match=r"not read in 0.5 s \(data.retry_seconds\), \d+ attempts; .*503"):
        next(stream.iterate(0))
    assert time.monotonic() - before < 150
    # Where ranks have to agree the batches say so, for ever.
    carried = Stream.__new__(Stream)
    carried.__dict__ |= stream.__dict__ | {"raises": False}
    first, second = (batch for batch, _ in zip(carried.iterate(0), range(2), strict=False))
    assert "not read in 0.5 s" in first.failure
    assert second.failure == first.failure
    assert (first.document_ids_BT == -1).all()


def test_a_server_that_says_nothing_is_given_a_part_of_the_stated_time_and_no_five_minutes(server):
    stream = Stream(server.url, **SIZES, access=Access(retry_seconds=2))
    server.always = "silent"
    before = time.monotonic()
    with pytest.raises(DataError, match=r"not read in 2 s .*, \d+ attempts; .*Timeout"):
        next(stream.iterate(0))
    server.gone.set()
    assert time.monotonic() - before < 150


def test_what_no_repetition_can_mend_is_said_at_once(server):
    for status, kind in ((404, FileNotFoundError), (403, StorageError)):
        server.always, count = status, len(server.requests)
        with pytest.raises(kind):
            fetch(server.url / "manifest.json", 0, 10, Access(retry_seconds=60))
        assert len(server.requests) == count + 1
    server.always = None
    with pytest.raises(OSError, match="ends before"):
        fetch(server.url / "manifest.json", 10**6, 10, Access())
    server.always = "lie"
    with pytest.raises(OSError, match=r"had 5, 4 times; the file is cut"):
        fetch(server.url / "manifest.json", 0, 10, Access())
    server.always = 404
    with pytest.raises(DataError, match=r"manifest.json cannot be read: No such file"):
        read_manifest(server.url)


def test_a_remote_shard_that_is_cut_or_missing_is_damage_that_names_it(tmp_path, folder):
    copy = shutil.copytree(folder, tmp_path / "data")
    (copy / "shard-00001.tar").unlink()
    os.truncate(copy / "shard-00002.tar", 3 * 2048)
    with Server(copy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        batches = list(Stream(server.url, **SIZES, raises=False).iterate(0, end_sample=60))
        server.shutdown()
    damage = [message for batch in batches for message in batch.damage]
    assert sum("shard shard-00001, sample" in message and "No such file" in message for message in damage) == 11
    assert all("shard-00001" in message or "shard-00002" in message for message in damage)
    assert 11 + 6 <= len(damage) <= 22
    assert all(batch.failure is None for batch in batches)


def test_a_remote_folder_that_is_gone_is_no_damage(server):
    stream = Stream(server.url, **SIZES, raises=False)
    server.always, count = 404, len(server.requests)
    batch = next(stream.iterate(0))
    assert re.search(
        r"manifest.json was read before and cannot be read now: No such file; .* says nothing about the data", batch.failure
    )
    assert batch.damage == ()
    assert len(server.requests) - count < 30


@pytest.mark.parametrize("fault", ["no range", "login"])
@pytest.mark.parametrize("size", [1, 10, 100])
def test_an_answer_that_is_no_range_says_nothing_about_the_data(server, fault, size):
    server.always, count = fault, len(server.requests)
    with pytest.raises(StorageError, match=rf"request for {size} bytes had \d+, 4 times; .* ignores ranges"):
        fetch(server.url / "manifest.json", 3, size, Access(retry_seconds=60))
    assert len(server.requests) - count <= 8
    server.always, server.faults = None, ["no range", "login"]
    right = (server.folder / "manifest.json").read_bytes()[3 : 3 + size]
    assert fetch(server.url / "manifest.json", 3, size, Access()) == right


def test_an_unknown_scheme_and_a_missing_package_are_named(monkeypatch):
    with pytest.raises(DataError, match=r"nosuch://host/data.*expected a folder, https://, http:// or s3://"):
        read_manifest(Url("nosuch://host/data"))
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(DataError, match=r"s3://bucket/data.*pip install 'selective-mtp\[remote\]'"):
        read_manifest(Url("s3://bucket/data"))


def test_any_file_system_that_fsspec_knows_will_do(folder):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/bucket/data/{path.name}", path.read_bytes())
    assert rows(Url("memory://bucket/data")) == rows(folder)


def test_shards_are_closed_while_other_threads_read_them_and_nobody_is_the_worse(tmp_path):
    import fsspec

    folder, memory = numbered_data(tmp_path, 400, samples_per_shard=10), fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/many/{path.name}", path.read_bytes())
    reader = ShardReader(Url("memory://many"), read_manifest(folder), max_open_shards=1)
    shards, samples = [number % 40 for number in range(200)], [number * 7 % 10 for number in range(200)]
    switches = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(25):
            read = reader.read_many(shards, samples)
            assert [sample.damage for sample in read] == [None] * 200
    finally:
        sys.setswitchinterval(switches)
        reader.close()
    expected = [10 * (10 * shard + sample) for shard, sample in zip(shards, samples, strict=True)]
    assert [int(sample.tokens[0]) for sample in read] == expected


# The cache.


def test_what_is_in_the_cache_is_not_asked_for_again(server, folder, tmp_path):
    access = Access(cache_dir=tmp_path / "cache", cache_bytes=64 * 2**20)
    assert rows(server.url, access=access) == rows(folder)
    sent = server.sent
    assert rows(server.url, access=access, num_workers=2) == rows(folder)
    assert server.sent - sent == (folder / "manifest.json").stat().st_size


def test_a_damaged_copy_in_the_cache_is_fetched_again(server, folder, tmp_path):
    access = Access(cache_dir=tmp_path / "cache", cache_bytes=64 * 2**20)
    rows(server.url, access=access)
    for copy in (tmp_path / "cache").glob("*-000000"):
        if copy.stat().st_size > 10_000:  # a tar
            data = bytearray(copy.read_bytes())
            data[len(data) // 3] ^= 1
            copy.write_bytes(data)
    assert rows(server.url, access=access) == rows(folder)


@pytest.mark.parametrize("suffix", ["tar.idx", "tar.crc32"])
@pytest.mark.parametrize("has_crc32", [True, False])
def test_a_damaged_copy_of_an_index_is_fetched_again_and_then_decided_upon(server, tmp_path, suffix, has_crc32):
    server.folder = numbered_data(tmp_path / "data", 60)
    manifest = read_manifest(server.folder)
    if not has_crc32:
        shards = tuple(shard.model_copy(update={"crc32": None}) for shard in manifest.shards)
        write_manifest(server.folder, manifest.model_copy(update={"shards": shards}))
    right = rows(server.folder)
    access = Access(cache_dir=tmp_path / "cache", retry_seconds=5)
    assert rows(server.url, access=access) == right
    (copy,) = copies_of(tmp_path / "cache", server.url / f"shard-00001.{suffix}")
    whole = copy.read_bytes()
    for damaged in (whole[:9] + bytes([whole[9] ^ 1]) + whole[10:], whole[:20], b""):
        copy.write_bytes(damaged)
        assert rows(server.url, access=access) == right
        assert copy.read_bytes() == whole


@pytest.mark.parametrize("suffix", ["tar.idx", "tar.crc32"])
def test_a_damaged_copy_of_an_index_is_no_damage_of_any_of_its_pieces(server, tmp_path, suffix):
    server.folder = numbered_data(tmp_path / "data", 1100, samples_per_shard=1100)  # pieces of 1,024 and 76
    access, wanted = Access(cache_dir=tmp_path / "cache", retry_seconds=5), [0, 1023, 1024, 1099]
    for _ in range(2):
        reader = ShardReader(server.url, read_manifest(server.folder), access)
        assert [sample.damage for sample in reader.read_many([0] * 4, wanted)] == [None] * 4
        reader.close()
        (copy,) = copies_of(tmp_path / "cache", server.url / f"shard-00000.{suffix}")
        copy.write_bytes(bytes(byte ^ 1 for byte in copy.read_bytes()))


def test_a_copy_that_another_reader_has_dropped_meanwhile_is_worth_reading_again_too(server, folder, tmp_path):
    whole = (folder / "shard-00001.tar").read_bytes()
    name, access = server.url / "shard-00001.tar", Access(cache_dir=tmp_path / "cache", retry_seconds=5)
    files = [RemoteFile(name, len(whole), access) for _ in range(2)]
    assert files[0].read(0, 9) == whole[:9]
    (copy,) = copies_of(tmp_path / "cache", name)
    copy.write_bytes(bytes(len(whole)))
    assert [file.read(0, 9) for file in files] == [bytes(9)] * 2
    assert [file.invalidate(0, 9) for file in files] == [True, True]
    assert [file.read(0, 9) for file in files] == [whole[:9]] * 2
    assert not RemoteFile(name, len(whole), Access()).invalidate(0, 9)


def test_an_index_that_is_damaged_where_it_lies_is_fetched_twice_and_no_more(server, tmp_path):
    server.folder = numbered_data(tmp_path / "data", 60)
    manifest = read_manifest(server.folder)
    path = server.folder / "shard-00001.tar.idx"
    path.write_bytes(path.read_bytes()[:8] + bytes(8) + path.read_bytes()[16:])
    reader = ShardReader(server.url, manifest, Access(cache_dir=tmp_path / "cache", retry_seconds=5))
    samples = reader.read_many([1] * 11, list(range(11)))
    assert [number for number, sample in enumerate(samples) if sample.damage] == [0, 1]
    assert sum(request.endswith("shard-00001.tar.idx") for request in server.requests) == 2


def copies_of(cache, url):
    return list(cache.glob(f"{hashlib.sha256(url.encode()).hexdigest()[:32]}-*"))


def test_copies_in_the_cache_of_what_lay_at_an_address_before_are_fetched_again(server, folder, tmp_path):
    access = Access(cache_dir=tmp_path / "cache", cache_bytes=64 * 2**20)
    before = rows(server.url, access=access)
    server.folder = numbered_data(tmp_path / "data", 60, first=100, sources=())
    after = rows(server.url, access=access)
    assert after == rows(server.folder)
    assert after != before


def test_a_cache_on_a_file_system_without_locks_is_a_cache_all_the_same(server, folder, tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    access = Access(cache_dir=tmp_path / "cache", retry_seconds=5)
    assert rows(server.url, access=access, raises=False) == rows(folder)
    sent = server.sent
    assert rows(server.url, access=access, raises=False) == rows(folder)
    assert server.sent - sent == (folder / "manifest.json").stat().st_size


def test_threads_that_want_one_part_fetch_it_once_even_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: os.stat(tmp_path / "nothing"))
    caches, asked = [DiskCache(tmp_path / "cache", 10 * PART) for _ in range(8)], []

    def fetched(start, size):
        asked.append(start)
        time.sleep(0.05)
        return bytes(size)

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(lambda cache: cache.read("url", 3, 4, 10, fetched), caches)) == {bytes(4)}
    assert asked == [0]


def test_a_part_that_goes_while_room_is_made_is_no_obstacle(tmp_path, monkeypatch):
    cache = DiskCache(tmp_path, 2 * PART)
    read = functools.partial(cache.read, start=0, size=1, file_size=PART, fetch=lambda start, size: bytes(size))
    for url in "ab":
        read(url)
    listed = os.scandir

    def forgotten_meanwhile(directory):
        entries = list(listed(directory))
        cache.invalidate("a", 0, 1)
        return contextlib.nullcontext(entries)

    monkeypatch.setattr(os, "scandir", forgotten_meanwhile)
    read("c")
    asked = []
    for url in "bc":
        read(url, fetch=lambda start, size: asked.append(start) or bytes(size))
    assert asked == []


def test_a_cache_whose_folder_goes_away_costs_only_the_copies(tmp_path):
    cache = DiskCache(tmp_path / "cache", 10 * PART)
    shutil.rmtree(tmp_path / "cache")
    assert cache.read("url", 3, 4, 10, lambda start, size: b"0123456789"[start : start + size]) == b"3456"


def size_of(directory):
    return sum(size_if_there(path) for path in directory.glob("*-*") if not path.name.startswith("lock"))


def size_if_there(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:  # removed by another process since it was listed
        return 0


def test_the_cache_keeps_what_was_used_last_within_its_bound(tmp_path):
    cache, asked = DiskCache(tmp_path, 4 * PART), []

    def fetched(start, size):
        asked.append(start // PART)
        return bytes([start // PART]) * size

    def read(part):
        data = cache.read("u", part * PART + 5, 10, 100 * PART, fetched)
        assert data == bytes([part]) * 10
        assert size_of(tmp_path) <= 4 * PART

    for part in (0, 1, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0):
        read(part)
        time.sleep(0.01)
    assert asked == [0, 1, 2, 3, 4, 5, 6]
    read(1)
    assert asked[-1] == 1
    across = cache.read("u", 7 * PART - 3, 6, 100 * PART, fetched)
    assert across == bytes([6]) * 3 + bytes([7]) * 3
    # The end of a file: a part that is shorter.
    assert cache.read("v", 3, 4, 7, lambda start, size: b"0123456"[start : start + size]) == b"3456"


def hammer(directory, seed, answers):
    import random

    draw, cache = random.Random(seed), DiskCache(directory, 6 * PART)
    try:
        for _ in range(25):
            part = draw.randrange(12)
            data = cache.read("u", part * PART, PART, 12 * PART, lambda start, size: bytes([start // PART]) * size)
            answers.put(data == bytes([part]) * PART and size_of(directory) <= 6 * PART)
    except BaseException:
        answers.put(False)
        raise


def test_several_processes_share_a_cache_and_its_bound(tmp_path):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=hammer, args=(tmp_path, seed, answers)) for seed in range(2)]
    for process in processes:
        process.start()
    assert all(answers.get(timeout=600) for _ in range(50))
    for process in processes:
        process.join()


# Pipes.


def test_a_pipe_runs_only_if_it_is_allowed_and_gives_the_same_rows(folder, tmp_path):
    marker = tmp_path / "ran"
    pipe = Url(f"pipe:touch {marker}; cat {folder}/{{}}")
    with pytest.raises(DataError, match=r"data.allow_pipe=true"):
        Stream(pipe, **SIZES)
    assert not marker.exists()
    assert rows(pipe, 12, 60, access=Access(allow_pipe=True)) == rows(folder, 12, 60)
    assert marker.exists()


def test_a_pipe_that_fails_is_damage_with_what_it_said(folder):
    pipe = Url(f"pipe:case {{}} in *1.tar) echo no way >&2; exit 3;; *) cat {folder}/{{}};; esac")
    batches = Stream(pipe, **SIZES, access=Access(allow_pipe=True), raises=False).iterate(0, end_sample=60)
    damage = [message for batch in batches for message in batch.damage]
    assert len(damage) == 11
    assert all("shard-00001" in message and "ended with code 3: no way" in message for message in damage)


def test_what_a_pipe_says_of_its_own_words_is_not_shown(folder):
    # A header without quotation marks: the program takes the token for a place.
    pipe = Url(f"pipe:cat Bearer zq7token {folder}/{{}} nowhere-{{}}")
    with pytest.raises(DataError) as raised:
        Stream(pipe, **SIZES, access=Access(allow_pipe=True))
    assert "nowhere-manifest.json: No such file" in str(raised.value)
    with pytest.raises(DataError) as raised:
        Stream(Url("pipe:cat {} zq7token"), **SIZES, access=Access(allow_pipe=True))
    assert "***: No such file" in str(raised.value)
    assert "zq7token" not in str(raised.value)


@pytest.mark.parametrize("name", ["shard-00001.tar", "manifest.json"])
def test_a_pipe_that_fails_once_and_not_again_is_no_damage(folder, tmp_path, name):
    # What it printed before it failed is not what is read.
    once = f"mkdir {tmp_path}/failed 2>/dev/null && head -c 99999 /dev/zero && exit 7"
    pipe = Url(f"pipe:case {{}} in {name}) {once};; esac; cat {folder}/{{}}")
    assert rows(pipe, 12, 60, access=Access(allow_pipe=True)) == rows(folder, 12, 60)
    assert (tmp_path / "failed").exists()


def test_a_pipe_that_fails_is_run_twice_and_no_more(folder, tmp_path):
    pipe = Url(f"pipe:case {{}} in *1.tar) echo >> {tmp_path}/runs; exit 2;; *) cat {folder}/{{}};; esac")
    reader = ShardReader(pipe, read_manifest(folder), Access(allow_pipe=True))
    (sample,) = reader.read_many([1], [0])
    assert "shard-00001, sample 0" in sample.damage
    assert (tmp_path / "runs").read_text() == "\n\n"


@pytest.mark.parametrize("command", ["nosuchcommand {}", "kill -9 $$ {}", "exit 255 {}"])
def test_a_pipe_whose_command_cannot_be_run_is_the_machines_fault_and_no_damage(folder, command):
    pipe = Url(f"pipe:case {{}} in *1.tar) {command};; *) cat {folder}/{{}};; esac")
    reader = ShardReader(pipe, read_manifest(folder), Access(allow_pipe=True))
    with pytest.raises(
        DataError, match=r"could not be run to its end, code (127|-9|255): .*; the machine is at fault"
    ) as raised:
        reader.read(1, 0)
    assert raised.type is DataError  # and not a damaged sample
    reader.close()


def test_a_pipe_whose_command_gives_nothing_any_more_is_ended_with_all_that_it_started(folder, tmp_path):
    hanging = f"(echo $BASHPID > {tmp_path}/pid; sleep 1000); true"
    pipe = Url(f"pipe:case {{}} in *1.tar) bash -c {shlex.quote(hanging)};; *) cat {folder}/{{}};; esac")
    reader = ShardReader(pipe, read_manifest(folder), Access(allow_pipe=True, retry_seconds=1.0))
    with pytest.raises(DataError, match=r"gave nothing for 1 s \(data.retry_seconds\), and was ended") as raised:
        reader.read(1, 0)
    assert raised.type is DataError  # and not a damaged sample
    reader.close()
    left = int((tmp_path / "pid").read_text())
    for _ in range(600):  # A killed process takes a moment to be gone.
        if not processes.find(left).started:
            return
        time.sleep(0.1)
    pytest.fail("what the command has started is still there")


def test_a_pipe_may_take_as_long_as_it_gives_something_and_no_longer_than_its_reader(folder, tmp_path):
    drops = "for i in 1 2 3 4 5 6 7 8; do sleep 0.5; printf %s $i; done"
    assert read_whole(Url(f"pipe:{drops}"), Access(allow_pipe=True, retry_seconds=2.5)) == b"12345678"

    cancelled = threading.Event()
    threading.Timer(0.5, cancelled.set).start()
    with pytest.raises(StorageError):
        read_whole(Url("pipe:sleep 1000"), Access(allow_pipe=True, retry_seconds=1000.0, cancelled=cancelled))


def test_pipes_that_fail_for_the_manifest_too_are_no_damage(folder, tmp_path):
    (tmp_path / "connection").touch()
    pipe = Url(f"pipe:test -e {tmp_path}/connection && cat {folder}/{{}}")
    stream = Stream(pipe, **SIZES, access=Access(allow_pipe=True), raises=False)
    (tmp_path / "connection").unlink()
    batch = next(stream.iterate(0))
    assert "manifest.json was read before and cannot be read now: the command ended with code 1" in batch.failure
    assert batch.damage == ()


def test_sets_of_a_mixture_may_lie_anywhere(server, folder):
    remote = [DataSet(server.url, 1, "far"), DataSet(folder, 1, "near")]
    local = [DataSet(folder, 1, "far"), DataSet(folder, 1, "near")]
    assert rows(remote, end=120) == rows(local, end=120)
    assert read_whole(server.url / "manifest.json", Access()) == (folder / "manifest.json").read_bytes()
