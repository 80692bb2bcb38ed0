"""Preparing files: the same bytes whatever the processes and kills, and a naive account of every document."""

import gzip
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pipeline.data.corpus.display import Display
from pipeline.data.corpus.documents import Rules
from pipeline.data.corpus.inputs import Input
from pipeline.data.corpus.prepare import PrepareSettings, prepare, tokenization_settings
from pipeline.data.corpus.prepare_files import prepare_files
from pipeline.data.corpus.tokenization import shared_encoder
from pipeline.data.errors import DataError
from pipeline.data.shards.manifest import read_manifest
from pipeline.data.shards.merging import merge
from pipeline.data.shards.reader import ShardReader
from pipeline.data.shards.verification import verify
from pipeline.data.tokenizer import byte_tokenizer, load_tokenizer, train_bpe

ROOT = Path(__file__).resolve().parents[2]
T = 256
DRAW = random.Random(5)
WORDS = [f"word{DRAW.randrange(1000)}" for _ in range(500)]
PROSE = [f"{number} " + " ".join(DRAW.choices(WORDS, k=DRAW.randrange(1, 120))) for number in range(700)]
WEB = [f"web {number} " + " ".join(DRAW.choices(WORDS, k=DRAW.randrange(1, 30))) for number in range(300)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two sources: `prose` of two .jsonl, cut into slices, and `web` of a .jsonl.gz and some .txt."""
    directory = tmp_path_factory.mktemp("corpus")
    (directory / "prose").mkdir()
    (directory / "web").mkdir()
    write_lines(directory / "prose" / "a.jsonl", PROSE[:500])
    write_lines(directory / "prose" / "b.jsonl", [*PROSE[500:], "", " "])
    lines = "".join(json.dumps({"text": text}) + "\n" for text in WEB[:250])
    (directory / "web" / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode() + b"{broken\n", mtime=0))
    for number, text in enumerate(WEB[250:]):
        (directory / "web" / f"d{number:02d}.txt").write_text(text)
    return directory


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def inputs(corpus):
    return [Input("prose", str(corpus / "prose")), Input("web", str(corpus / "web"))]


def settings(**changes):
    return PrepareSettings(**{"sequence_length": T, "samples_per_shard": 25, "rules": Rules(on_undecodable="skip"), **changes})


def contents(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def documents_in(directory, tokenizer=None):
    """(source, text) of the documents, pieced together again by their tokens; only of data packed with concat."""
    tokenizer = tokenizer or load_tokenizer(directory)
    manifest = read_manifest(directory)
    reader, found, ids = ShardReader(directory, manifest), [], []
    for shard, entry in enumerate(manifest.shards):
        for sample in range(entry.samples):
            row = reader.read(shard, sample)
            ends = np.cumsum(row.lengths).tolist()
            for number, end in enumerate(ends):
                ids += row.tokens[end - int(row.lengths[number]) : end].tolist()
                if ids[-1] == manifest.end_of_document_id:
                    source = manifest.source_names[row.sources[number]] if row.sources is not None else ""
                    found.append((source, tokenizer.decode(ids[:-1])))
                    ids = []
    assert ids == []
    return found


EVERY = sorted([("prose", text) for text in PROSE] + [("web", text) for text in WEB])


def test_every_document_is_there_once_and_what_was_left_out_is_counted(corpus, tmp_path):
    prepared = prepare_files(inputs(corpus), tmp_path / "out", byte_tokenizer(), settings())
    assert sorted(documents_in(tmp_path / "out")) == EVERY
    assert documents_in(tmp_path / "out") != EVERY
    counts = prepared.counts
    assert (counts.documents, counts.empty, counts.undecodable, counts.oversized) == (1000, 2, 1, 0)
    assert counts.notes[0].split(": ")[0].endswith("c.jsonl.gz, line 251")
    manifest = read_manifest(tmp_path / "out")
    assert manifest == prepared.manifests[tmp_path / "out"]
    made = manifest.preparation
    assert (made.documents, made.input.documents, made.input.empty, made.input.undecodable) == (1000, 1000, 2, 1)
    assert [(source.name, source.documents) for source in manifest.sources] == [("prose", 700), ("web", 300)]
    assert [source.tokens for source in manifest.sources] == [sum(len(text) + 1 for text in texts) for texts in (PROSE, WEB)]
    starts = np.cumsum([0, *(len(text) + 1 for _, text in documents_in(tmp_path / "out"))])
    cut = sum(start // T != (end - 1) // T for start, end in itertools.pairwise(starts))
    assert made.documents_cut == cut
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_the_bytes_do_not_depend_on_the_number_of_processes(corpus, tmp_path, packing):
    for processes in (1, 2, 3):
        out = tmp_path / str(processes)
        prepare_files(
            inputs(corpus), out, byte_tokenizer(), settings(packing=packing, validation_fraction=0.1), processes=processes
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")
    assert len(read_manifest(tmp_path / "1" / "train").shards) > 20


def test_workers_that_come_at_once_share_one_encoder(tmp_path):
    tokenizer = train_bpe([*PROSE, *WEB], 1000)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenization = tokenization_settings(tmp_path, tmp_path / "tokenizer.json", tokenizer, settings(), [""])
    together = threading.Barrier(8)

    def encoder(_):
        together.wait()
        return shared_encoder(tokenization)

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(encoder, range(8)))) == 1


def test_another_seed_is_another_order_of_the_same_documents(corpus, tmp_path):
    for seed in (0, 1):
        prepare_files(inputs(corpus), tmp_path / str(seed), byte_tokenizer(), settings(seed=seed))
    zero, one = documents_in(tmp_path / "0"), documents_in(tmp_path / "1")
    assert zero != one
    assert sorted(zero) == sorted(one)


def test_the_order_is_a_shuffle_of_everything_and_not_of_neighbours(corpus, tmp_path):
    prepare_files(inputs(corpus), tmp_path / "out", byte_tokenizer(), settings())
    place = {text: number for number, text in enumerate(PROSE)}
    order = [place[text] for source, text in documents_in(tmp_path / "out") if source == "prose"]
    correlation = np.corrcoef(order, range(len(order)))[0, 1]
    assert abs(correlation) < 0.15  # four times the standard deviation of a random order


def test_best_fit_cuts_only_documents_longer_than_a_row_and_says_so(corpus, tmp_path):
    prepare_files(inputs(corpus), tmp_path / "out", byte_tokenizer(), settings(sequence_length=512, packing="best_fit"))
    manifest = read_manifest(tmp_path / "out")
    assert manifest.preparation.documents_cut == sum(len(text) + 1 > 512 for text in PROSE + WEB)
    assert manifest.num_tokens == sum(len(text) + 1 for text in PROSE + WEB)
    reader = ShardReader(tmp_path / "out", manifest)
    whole = []
    for shard, entry in enumerate(manifest.shards):
        for sample in range(entry.samples):
            row = reader.read(shard, sample)
            start = 0
            for length in row.lengths.tolist():
                whole.append(bytes(row.tokens[start : start + length].astype(np.uint16).tolist()[: length - 1]).decode())
                start += length
    for text in PROSE + WEB:
        if len(text) + 1 <= 512:
            assert text in whole
    assert len(whole) == sum(-(-(len(text) + 1) // 512) for text in PROSE + WEB)
    assert verify(tmp_path / "out") == []


def test_documents_longer_than_a_shard_are_packed_too(tmp_path):
    texts = ["x" * 5000, "short", "y" * 3000]
    write_lines(tmp_path / "a.jsonl", texts)
    for packing in ("concat", "best_fit"):
        out = tmp_path / packing
        prepare_files(
            [Input("", str(tmp_path / "a.jsonl"))], out, byte_tokenizer(), settings(packing=packing, samples_per_shard=4)
        )
        assert verify(out) == []
        assert read_manifest(out).num_tokens == 8008
        assert read_manifest(out).preparation.documents == 3
        assert read_manifest(out).preparation.documents_cut >= 2
    assert sorted(documents_in(tmp_path / "concat")) == sorted(("", text) for text in texts)


def test_the_held_out_split_is_by_text_and_together_they_are_everything(corpus, tmp_path):
    prepare_files(inputs(corpus), tmp_path / "out", byte_tokenizer(), settings(validation_fraction=0.2, seed=1))
    train, validation = documents_in(tmp_path / "out" / "train"), documents_in(tmp_path / "out" / "validation")
    assert sorted(train + validation) == EVERY
    assert 150 < len(validation) < 250

    def position(text):
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48

    assert sorted(validation) == sorted(entry for entry in EVERY if position(entry[1]) < 0.2)


def test_a_weight_says_how_often_documents_are_taken_and_nothing_of_validation(corpus, tmp_path):
    weights = {"prose": 0.5, "web": 2.25}
    for name in ("a", "b"):
        weighted = settings(weights=weights, validation_fraction=0.1)
        prepare_files(inputs(corpus), tmp_path / name, byte_tokenizer(), weighted)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    train = documents_in(tmp_path / "a" / "train")
    times = {entry: train.count(entry) for entry in EVERY}
    held_out = set(documents_in(tmp_path / "a" / "validation"))
    assert {count for entry, count in times.items() if entry in held_out} == {0}
    prose = [count for entry, count in times.items() if entry[0] == "prose" and entry not in held_out]
    web = [count for entry, count in times.items() if entry[0] == "web" and entry not in held_out]
    assert set(prose) == {0, 1}
    assert set(web) == {2, 3}
    assert np.mean(prose) == pytest.approx(0.5, abs=0.08)
    assert np.mean(web) == pytest.approx(2.25, abs=0.11)
    assert len(documents_in(tmp_path / "a" / "validation")) == len(held_out)
    manifest = read_manifest(tmp_path / "a" / "train")
    assert manifest.preparation.weights == weights
    assert [source.documents for source in manifest.sources] == [sum(prose), sum(web)]
    assert manifest.preparation.input.documents == 1000
    # Copies do not lie next to each other.
    neighbours = sum(first == second for first, second in itertools.pairwise(train))
    assert neighbours < 10


def test_a_bpe_is_trained_on_what_is_not_held_out(corpus, tmp_path):
    prepare_files(inputs(corpus), tmp_path / "out", 300, settings(validation_fraction=0.3))
    kept = [text for _, text in EVERY if int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48 >= 0.3]
    assert load_tokenizer(tmp_path / "out" / "train").get_vocab() == train_bpe(kept, 300).get_vocab()


def test_parts_merge_to_the_union_in_a_defined_order(corpus, tmp_path):
    parts = [tmp_path / f"part{number}" for number in (1, 2, 3)]
    for number, part in enumerate(parts, start=1):
        prepare_files(inputs(corpus), part, byte_tokenizer(), settings(part=(number, 3), validation_fraction=0.1))
    merge([parts[2], parts[0], parts[1]], tmp_path / "merged")
    union = []
    for split in ("train", "validation"):
        of_parts = [entry for part in parts for entry in documents_in_or_none(part / split)]
        assert documents_in(tmp_path / "merged" / split) == of_parts
        union += of_parts
        assert verify(tmp_path / "merged" / split) == []
        shards = [
            (part / split / f"{shard.name}.tar").read_bytes()
            for part in parts
            for shard in read_manifest(part / split, allow_empty=True).shards
        ]
        merged = read_manifest(tmp_path / "merged" / split)
        assert [(tmp_path / "merged" / split / f"{shard.name}.tar").read_bytes() for shard in merged.shards] == shards
        assert [shard.name for shard in merged.shards] == [f"shard-{number:05d}" for number in range(len(shards))]
    assert sorted(union) == EVERY
    made = read_manifest(tmp_path / "merged" / "train").preparation
    assert (made.input.documents, made.input.empty, made.input.undecodable) == (1000, 2, 1)
    assert (made.part, made.whole_sha256) == (None, None)


def test_a_whole_and_a_part_do_not_merge_and_the_message_says_how_many_parts_there_are(corpus, tmp_path):
    prepare_files(inputs(corpus), tmp_path / "whole", byte_tokenizer(), settings())
    prepare_files(inputs(corpus), tmp_path / "part", byte_tokenizer(), settings(part=(1, 2)))
    with pytest.raises(DataError, match=r"expected all 2 parts of one .* missing: 2/2; there twice or not of it: no part$"):
        merge([tmp_path / "whole", tmp_path / "part"], tmp_path / "merged")


def two_parts(corpus, directory, second_corpus=None, **changes):
    """Parts 1/2 and 2/2, of which the second was asked for with other settings or another corpus."""
    parts = [directory / "part1", directory / "part2"]
    prepare_files(inputs(corpus), parts[0], byte_tokenizer(), settings(part=(1, 2)))
    prepare_files(inputs(second_corpus or corpus), parts[1], byte_tokenizer(), settings(part=(2, 2), **changes))
    return parts


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed differs, 0 in one and 1 in the other"),
        ({"packing": "best_fit"}, "packing differs"),
        ({"weights": {"web": 2.0}}, "weights differs"),
        ({"rules": Rules(max_document_bytes=500, on_undecodable="skip")}, "the input or another setting differs"),
    ],
)
def test_parts_of_different_requests_are_not_merged(corpus, tmp_path, changes, named):
    parts = two_parts(corpus, tmp_path, **changes)
    with pytest.raises(DataError, match=f"part1 and .*part2 are parts of different requests: {named}"):
        merge(parts, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_parts_of_different_inputs_are_not_merged(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "other")
    write_lines(tmp_path / "other" / "prose" / "b.jsonl", PROSE[500:600])
    parts = two_parts(corpus, tmp_path, tmp_path / "other")
    with pytest.raises(DataError, match="parts of different requests: the input or another setting differs"):
        merge(parts, tmp_path / "merged")


def test_what_is_no_part_is_not_merged_with_itself(corpus, tmp_path):
    prepare_files(inputs(corpus), tmp_path / "whole", byte_tokenizer(), settings())
    shutil.copytree(tmp_path / "whole", tmp_path / "copy")
    for other in ("whole", "copy"):
        with pytest.raises(DataError, match=f"whole and .*{other} have a shard in common .*there twice"):
            merge([tmp_path / "whole", tmp_path / other], tmp_path / "merged")


def test_what_was_merged_is_not_taken_for_the_first_part(corpus, tmp_path):
    merge(two_parts(corpus, tmp_path), tmp_path / "merged")
    for number in (1, 2):
        with pytest.raises(DataError, match="exists already; remove it"):
            prepare_files(inputs(corpus), tmp_path / "merged", byte_tokenizer(), settings(part=(number, 2)))


def test_merging_leaves_a_preparation_that_is_not_finished_alone(corpus, tmp_path):
    parts = two_parts(corpus, tmp_path)
    interrupted(corpus, tmp_path / "out", 9)
    before = contents(tmp_path / "out.partial")
    assert len(before) > 10
    with pytest.raises(DataError, match=r"out\.partial is a preparation that is not finished; finish it"):
        merge(parts, tmp_path / "out")
    assert contents(tmp_path / "out.partial") == before


@pytest.mark.parametrize("output", [".", "..", "/"])
def test_an_output_without_a_name_is_refused(corpus, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="expected an output folder with a name of its own"):
        prepare_files(inputs(corpus), Path(output), byte_tokenizer(), settings())
    with pytest.raises(DataError, match="expected an output folder with a name of its own"):
        prepare([], Path(output), byte_tokenizer(), T, seed=0)
    assert list(tmp_path.iterdir()) == []


def documents_in_or_none(directory):
    return documents_in(directory) if read_manifest(directory, allow_empty=True).shards else []


def keys_in(directory):
    manifest = read_manifest(directory)
    reader = ShardReader(directory, manifest)
    for shard, entry in enumerate(manifest.shards):
        for sample in range(entry.samples):
            yield reader.read(shard, sample).key.partition("/")[2]


def test_keys_are_different_over_all_parts(corpus, tmp_path):
    parts = [tmp_path / f"part{number}" for number in (1, 2)]
    for number, part in enumerate(parts, start=1):
        prepare_files(inputs(corpus), part, byte_tokenizer(), settings(part=(number, 2), packing="best_fit"))
    merge(parts, tmp_path / "merged")
    keys = list(keys_in(tmp_path / "merged"))
    assert len(set(keys)) == len(keys) == read_manifest(tmp_path / "merged").num_samples
    assert keys == sorted(keys)


def test_a_part_without_a_held_out_document_is_a_part_all_the_same(tmp_path):
    write_lines(tmp_path / "a.jsonl", PROSE)
    source = [Input("", str(tmp_path / "a.jsonl"))]
    parts = [tmp_path / f"part{number}" for number in (1, 2)]
    for _ in range(2):  # the second time they are complete already
        for number, part in enumerate(parts, start=1):
            prepare_files(source, part, byte_tokenizer(), settings(part=(number, 2), validation_fraction=0.002))
    held_out = [len(documents_in_or_none(part / "validation")) for part in parts]
    assert sorted(held_out) == [0, 1]
    merge(parts, tmp_path / "merged")
    assert len(documents_in(tmp_path / "merged" / "validation")) == 1
    assert len(documents_in(tmp_path / "merged" / "train")) == 699


def test_more_parts_than_slices_are_an_error_that_says_how_many_there_can_be(corpus, tmp_path):
    with pytest.raises(DataError, match=r"part 1/99: the input can be cut into \d+ slices only"):
        prepare_files(inputs(corpus), tmp_path / "out", byte_tokenizer(), settings(part=(1, 99)))
    assert list(tmp_path.iterdir()) == []


# Interruptions.


class InterruptionError(Exception):
    pass


def interrupted(corpus, out, after, **changes):
    """Prepare, and stop it with an exception after so many reports of progress."""

    class Stopping(Display):
        reports = 0

        def advance(self, documents, tokens, size):
            Stopping.reports += 1
            if Stopping.reports > after:
                raise InterruptionError

    with pytest.raises(InterruptionError):
        prepare_files(inputs(corpus), out, byte_tokenizer(), settings(**changes), display=Stopping())


def test_what_is_done_is_not_made_again_and_the_bytes_are_the_same(corpus, tmp_path):
    prepare_files(inputs(corpus), tmp_path / "whole", byte_tokenizer(), settings())
    for after in (9, 20, 40):
        interrupted(corpus, tmp_path / "out", after)
        assert not (tmp_path / "out").exists()
    work = tmp_path / "out.partial" / "work"
    assert (tmp_path / "out.partial" / "data" / "shard-00000.tar").exists()
    before = {path: path.stat().st_mtime_ns for path in [*work.glob("slice-*.json"), *work.glob("train.records/*")]}
    assert len(before) > 10
    interrupted(corpus, tmp_path / "out", 45)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    prepare_files(inputs(corpus), tmp_path / "out", byte_tokenizer(), settings())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_further_names_of_files_are_counted_and_change_nothing(corpus, tmp_path):
    shown = StringIO()
    display = Display(Console(file=shown, highlight=False))
    prepare_files(inputs(corpus), tmp_path / "once", byte_tokenizer(), settings())
    prepare_files([*inputs(corpus), *inputs(corpus)], tmp_path / "twice", byte_tokenizer(), settings(), display=display)
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")
    assert shown.getvalue().startswith("53 further name(s) of files that the input holds already left out")


def test_work_and_parts_of_other_rules_of_slicing_are_not_gone_on_with(corpus, tmp_path, monkeypatch):
    interrupted(corpus, tmp_path / "out", 5)
    whole = prepare_files(inputs(corpus), tmp_path / "whole", byte_tokenizer(), settings()).manifests[tmp_path / "whole"]
    part = prepare_files(inputs(corpus), tmp_path / "1", byte_tokenizer(), settings(part=(1, 2))).manifests[tmp_path / "1"]
    monkeypatch.setattr("pipeline.data.corpus.request.SLICING", 99)
    with pytest.raises(DataError, match=r"begun with another request \(cut by rules of another version\)"):
        prepare_files(inputs(corpus), tmp_path / "out", byte_tokenizer(), settings())
    other = prepare_files(inputs(corpus), tmp_path / "2", byte_tokenizer(), settings(part=(2, 2))).manifests[tmp_path / "2"]
    assert part.preparation.whole_sha256 != other.preparation.whole_sha256
    again = prepare_files(inputs(corpus), tmp_path / "whole", byte_tokenizer(), settings())
    assert again.was_complete
    assert again.manifests[tmp_path / "whole"] == whole


@pytest.mark.parametrize("pattern", ["", "**"])
def test_an_output_below_its_input_never_feeds_on_itself_nor_on_what_a_kill_left(corpus, tmp_path, pattern):
    shutil.copytree(corpus, tmp_path / "in")
    source, out = [Input("", str(tmp_path / "in" / pattern))], tmp_path / "in" / "web" / "out"

    class Stopping(Display):
        def end(self):
            raise InterruptionError

    # Once with the remains of a run, once finished already.
    with pytest.raises(InterruptionError):
        prepare_files(source, out, byte_tokenizer(), settings(), display=Stopping())
    (out.with_name("out.partial") / "work" / "left.jsonl").write_text('{"text": "of the kill"}')
    prepare_files(source, out, byte_tokenizer(), settings())
    assert sorted(documents_in(out)) == sorted(("", text) for text in (*PROSE, *WEB))
    assert prepare_files(source, out, byte_tokenizer(), settings()).was_complete


def test_another_request_leaves_what_was_begun_as_it_was_though_no_slice_is_done(corpus, tmp_path):
    for tokenizer in (byte_tokenizer(), 300):
        interrupted(corpus, tmp_path / "out", 0)
        before = contents(tmp_path / "out.partial")
        assert "request.json" in before
        with pytest.raises(DataError, match="was begun with another request"):
            prepare_files(inputs(corpus), tmp_path / "out", tokenizer, settings(seed=1))
        assert contents(tmp_path / "out.partial") == before


def test_an_error_leaves_a_trained_bpe_and_it_is_not_trained_again(corpus, tmp_path):
    titles, wrong = [], settings(end_of_document="nowhere")

    class Titles(Display):
        def begin(self, title, total_bytes):
            titles.append(title)

    for _ in range(2):
        with pytest.raises(DataError, match="nowhere"):
            prepare_files(inputs(corpus), tmp_path / "out", 300, wrong, display=Titles())
        assert (tmp_path / "out.partial" / "tokenizer.json").exists()
    assert titles == ["reading text for a BPE", "training a BPE of 300 tokens"]


def test_an_error_leaves_what_was_begun_before_and_nothing_of_what_was_not(tmp_path):
    (tmp_path / "a.jsonl").write_text("{broken\n" + json.dumps({"text": "whole"}) + "\n")
    source, strict = [Input("", str(tmp_path / "a.jsonl"))], settings(rules=Rules(on_undecodable="error"))

    class Stopping(Display):
        def begin(self, title, total_bytes):
            raise InterruptionError

    for was_begun in (False, True):
        if was_begun:
            with pytest.raises(InterruptionError):
                prepare_files(source, tmp_path / "out", byte_tokenizer(), strict, display=Stopping())
        with pytest.raises(DataError, match="--on-undecodable skip"):
            prepare_files(source, tmp_path / "out", byte_tokenizer(), strict)
        assert (tmp_path / "out.partial" / "tokenizer.json").exists() == was_begun
        assert (tmp_path / "out.partial").exists() == was_begun


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"sequence_length": 32}, "sequence_length: 256 there, 32 now"),
        ({"packing": "best_fit"}, "packing: concat there, best_fit now"),
        ({"weights": {"web": 2.0}}, "weights: {} there, {'web': 2.0} now"),
        ({"rules": Rules("body", on_undecodable="skip")}, "text_field: text there, body now"),
    ],
)
def test_going_on_with_other_settings_is_refused_with_their_names(corpus, tmp_path, changes, named):
    interrupted(corpus, tmp_path / "out", 5)
    with pytest.raises(DataError, match="was begun with another request") as error:
        prepare_files(inputs(corpus), tmp_path / "out", byte_tokenizer(), settings(**changes))
    assert named in str(error.value)
    prepare_files(inputs(corpus), tmp_path / "out", byte_tokenizer(), settings())


def test_going_on_with_changed_input_or_another_tokenizer_is_refused(tmp_path):
    write_lines(tmp_path / "a.jsonl", PROSE * 2)
    source = [Input("", str(tmp_path / "a.jsonl"))]

    def interrupt():
        class Stopping(Display):
            def advance(self, documents, tokens, size):
                if list((tmp_path / "out.partial" / "work").glob("slice-*.json")):
                    raise InterruptionError

        with pytest.raises(InterruptionError):
            prepare_files(source, tmp_path / "out", byte_tokenizer(), settings(), display=Stopping())

    interrupt()
    with pytest.raises(DataError, match=r"another request \(another tokenizer\)"):
        prepare_files(source, tmp_path / "out", train_bpe(["x"], 300), settings())
    times = (tmp_path / "a.jsonl").stat()
    write_lines(tmp_path / "a.jsonl", [*PROSE, *PROSE[:-1], PROSE[-1][::-1]])
    os.utime(tmp_path / "a.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    with pytest.raises(DataError, match=r"another request \(.*input files that were changed since\)"):
        prepare_files(source, tmp_path / "out", byte_tokenizer(), settings())


def test_work_that_ended_with_an_error_is_not_in_the_way_of_the_mended_request(tmp_path, monkeypatch):
    """Whatever of it was done: here the first of two slices, before the second meets a document without the field."""
    monkeypatch.setattr("pipeline.data.corpus.prepare_stages.slice_size", lambda files, parts: 1)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text('{"text": "a", "body": "b"}\n')
    (tmp_path / "in/b.jsonl").write_text('{"text": "a"}\n')
    source = [Input("", str(tmp_path / "in"))]
    with pytest.raises(DataError, match="no field 'body'"):
        prepare_files(source, tmp_path / "out", byte_tokenizer(), settings(rules=Rules("body")), processes=1)
    assert list((tmp_path / "out.partial/work").glob("slice-*.json"))
    assert len(documents_in_prepared(source, tmp_path / "out")) == 2


def documents_in_prepared(source, output):
    prepare_files(source, output, byte_tokenizer(), settings())
    return documents_in(output)


@pytest.mark.parametrize("part", [None, (1, 1)])
def test_finished_data_is_known_by_what_its_input_held_not_by_names_and_sizes(corpus, tmp_path, part):
    copy = shutil.copytree(corpus, tmp_path / "copy")
    first = prepare_files(inputs(copy), tmp_path / "out", byte_tokenizer(), settings(part=part))
    (held,) = {manifest.preparation.contents for manifest in first.manifests.values()}
    # However it is cut, and copied anew.
    source = inputs(shutil.copytree(corpus, tmp_path / "again"))
    for processes in (1, 2):
        again = prepare_files(source, tmp_path / "out", byte_tokenizer(), settings(part=part), processes=processes)
        assert again.was_complete
        assert {manifest.preparation.contents for manifest in again.manifests.values()} == {held}

    # One letter of one document.
    edited = next(path for path in sorted(copy.rglob("*.jsonl")) if path.stat().st_size)
    times = edited.stat()
    before, mark, after = edited.read_text().partition('"text": "')
    letter = next(letter for letter in "etaoin" if letter in after)
    edited.write_text(before + mark + after.replace(letter, "q", 1))
    os.utime(edited, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert edited.stat().st_size == times.st_size
    with pytest.raises(DataError, match="files of these names and sizes that held something else; remove it"):
        prepare_files(inputs(copy), tmp_path / "out", byte_tokenizer(), settings(part=part))


def test_an_output_that_is_a_url_and_an_empty_input_are_refused_by_name(corpus, tmp_path):
    for url in ("s3://bucket/x", "https://host/x"):
        with pytest.raises(DataError, match="expected an output folder of this machine, got the URL"):
            prepare_files(inputs(corpus), Path(url), byte_tokenizer(), settings())
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"every input file is empty: .*empty\.jsonl"):
        prepare_files([Input("", str(tmp_path / "empty.jsonl"))], tmp_path / "out", byte_tokenizer(), settings())


def test_an_undecodable_document_may_be_left_out_after_all_without_beginning_anew(corpus, tmp_path):
    strict = settings(rules=Rules(on_undecodable="error"))
    with pytest.raises(DataError, match=r"c.jsonl.gz, line 251: .*--on-undecodable skip"):
        prepare_files(inputs(corpus), tmp_path / "out", byte_tokenizer(), strict)
    assert (tmp_path / "out.partial" / "work" / "slice-000000.json").exists()
    prepare_files(inputs(corpus), tmp_path / "out", byte_tokenizer(), settings())
    prepare_files(inputs(corpus), tmp_path / "whole", byte_tokenizer(), settings())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_complete_output_is_left_alone_and_the_same_request_is_done(corpus, tmp_path):
    prepare_files(inputs(corpus), tmp_path / "out", byte_tokenizer(), settings(validation_fraction=0.1))
    before = contents(tmp_path / "out")
    (tmp_path / "out.partial" / "work").mkdir(parents=True)  # killed after the rename, before it was removed
    (tmp_path / "out.partial" / "lock").touch()
    again = prepare_files(inputs(corpus), tmp_path / "out", byte_tokenizer(), settings(validation_fraction=0.1))
    assert again.was_complete
    assert (again.counts.documents, again.counts.empty) == (1000, 2)
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(DataError, match="exists already"):
        prepare_files(inputs(corpus), tmp_path / "out", byte_tokenizer(), settings(validation_fraction=0.1, seed=1))
    with pytest.raises(DataError, match="exists already"):
        prepare_files(inputs(corpus), tmp_path / "out", byte_tokenizer(), settings())
    assert contents(tmp_path / "out") == before


def small(tmp_path):
    write_lines(tmp_path / "a.jsonl", ["one", "two", "three"])
    return prepare_files([Input("", str(tmp_path / "a.jsonl"))], tmp_path / "out", byte_tokenizer(), PrepareSettings(4))


def test_who_comes_while_the_finished_work_of_another_is_removed_finds_it_complete_and_harms_nothing(tmp_path, monkeypatch):
    found = []

    def remove(path, *arguments, rmtree=shutil.rmtree, **options):
        if Path(path).name == "out.partial" and not found:
            found.append(None)
            found.append(small(tmp_path).was_complete)
        rmtree(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", remove)
    assert not small(tmp_path).was_complete
    assert found == [None, True]
    assert verify(tmp_path / "out") == []
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "out"}


def test_who_has_looked_just_before_another_was_done_does_nothing_again(tmp_path, monkeypatch):
    found = []

    def look(path, lexists=os.path.lexists):
        was_there = lexists(path)
        if Path(path) == tmp_path / "out" and not found:
            found.append(None)
            found.append(small(tmp_path).was_complete)
        return was_there

    monkeypatch.setattr(os.path, "lexists", look)
    assert small(tmp_path).was_complete
    assert found == [None, False]
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "out"}


def test_input_without_a_document_is_an_error_that_says_what_was_left_out_and_leaves_nothing(tmp_path):
    (tmp_path / "web.jsonl").write_text('{"text": 5}\n{"text": ""}\nno json\n')
    rules = Rules(on_undecodable="skip")
    with pytest.raises(DataError, match=r"left out: 1 empty, 2 undecodable; .*web.jsonl, line 1: expected text .* got int"):
        prepare_files(
            [Input("", str(tmp_path / "web.jsonl"))], tmp_path / "out", byte_tokenizer(), PrepareSettings(16, rules=rules)
        )
    assert {path.name for path in tmp_path.iterdir()} == {"web.jsonl"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"validation_fraction": 1e-9},
            "falls to the validation split with --validation 1e-09; give more input, another fraction",
        ),
        ({"validation_fraction": 1 - 1e-9}, "falls to the train split with --validation 1; give more input"),
        ({"weights": {"prose": 1e-9}}, "falls to the train split; give more input, another fraction or other weights"),
    ],
)
def test_a_split_without_a_document_is_refused_before_anything_is_packed_and_nothing_is_in_the_way(tmp_path, changes, named):
    write_lines(tmp_path / "a.jsonl", PROSE)
    source, titles = [Input("prose", str(tmp_path / "a.jsonl"))], []

    class Titles(Display):
        def begin(self, title, total_bytes):
            titles.append(title)

    with pytest.raises(DataError, match=f"none of the 700 documents {named}"):
        prepare_files(source, tmp_path / "out", byte_tokenizer(), settings(**changes), display=Titles())
    assert titles == ["tokenising"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    prepare_files(source, tmp_path / "out", byte_tokenizer(), settings(validation_fraction=0.1))


def test_a_split_without_a_document_leaves_nothing_of_a_run_that_was_killed_or_trained_a_bpe(corpus, tmp_path):
    interrupted(corpus, tmp_path / "out", 5, validation_fraction=1e-9)
    for tokenizer in (byte_tokenizer(), 300):
        with pytest.raises(DataError, match="falls to the validation split"):
            prepare_files(inputs(corpus), tmp_path / "out", tokenizer, settings(validation_fraction=1e-9))
        assert list(tmp_path.iterdir()) == []


def test_the_progress_of_a_bpe_is_the_text_read_and_then_its_training(tmp_path):
    write_lines(tmp_path / "a.jsonl", PROSE)
    output = StringIO()
    display = Display(Console(file=output, width=200))
    prepare_files([Input("", str(tmp_path / "a.jsonl"))], tmp_path / "out", 300, settings(), display=display)
    size = (tmp_path / "a.jsonl").stat().st_size
    lines = output.getvalue().splitlines()
    assert re.fullmatch(rf"reading text for a BPE: 700 documents, {size / 1e6:.1f} MB, [\d.]+ MB/s, [\d.]+ s", lines[0])
    assert lines[1] == "training a BPE of 300 tokens …"
    assert re.fullmatch(r"training a BPE of 300 tokens: [\d.]+ s", lines[2])
    tokens = read_manifest(tmp_path / "out").num_tokens
    assert re.fullmatch(rf"tokenising: 700 documents, {tokens:,} tokens, [\d.]+ MB, [\d.]+ MB/s, [\d.]+ s", lines[3])


def test_lost_work_is_noticed_and_not_packed_around(corpus, tmp_path):
    interrupted(corpus, tmp_path / "out", 10)
    (tmp_path / "out.partial" / "work" / "train" / "slice-000000-000.documents").unlink()
    with pytest.raises(DataError, match=r"out\.partial is damaged: [\d,]+ tokens were written to it and [\d,]+ found"):
        prepare_files(inputs(corpus), tmp_path / "out", byte_tokenizer(), settings())
    assert not (tmp_path / "out").exists()


def command_of(corpus, out, processes):
    return [
        *(sys.executable, str(ROOT / "launch" / "prepare.py"), "--processes", str(processes)),
        *("--input", f"prose={corpus / 'prose'}", "--input", f"web={corpus / 'web'}", "--output", str(out)),
        *("--tokenizer", "bytes", "--sequence-length", str(T), "--samples-per-shard", "25", "--validation", "0.1"),
    ]


def worker_processes_of(group):
    """How many processes of a group are workers, from the first moment on."""
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_worker = b"multiprocessing.spawn" in (process / "cmdline").read_bytes()
            found += is_worker and os.getpgid(int(process.name)) == group
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


def test_interrupted_while_workers_start_it_says_so_in_one_line_and_goes_on_the_next_time(corpus, tmp_path):
    """Ctrl-C reaches all processes of a terminal, and the thread that draws the bar in it."""
    piped = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "env": {**os.environ, "FORCE_COLOR": "1"}}
    prepare_files(inputs(corpus), tmp_path / "whole", byte_tokenizer(), settings(validation_fraction=0.1))
    command = command_of(corpus, tmp_path / "out", 5)
    for num_processes, delay in [(1, 0), (2, 0), (3, 0.1)]:
        with subprocess.Popen(command, start_new_session=True, **piped) as process:
            while worker_processes_of(process.pid) < num_processes:
                assert process.poll() is None
            time.sleep(delay)
            os.killpg(process.pid, signal.SIGINT)
            _, said = process.communicate(timeout=600)
        assert (process.returncode, said) == (130, b"interrupted; the same command goes on where it was\n")
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_ends_with_the_bytes_of_an_uninterrupted_run(corpus, tmp_path):
    start = time.monotonic()
    subprocess.run(command_of(corpus, tmp_path / "whole", 2), check=True, capture_output=True, timeout=600)
    duration = time.monotonic() - start
    whole = contents(tmp_path / "whole")
    draw, kills, runs = random.Random(7), 0, 0
    while kills < 20:
        runs += 1
        out = tmp_path / f"out{runs}"
        finished = False
        while not finished:
            command = command_of(corpus, out, draw.choice([1, 2, 3]))
            process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            try:
                # Most of a run is the start of Python; what is killed should be mostly work.
                process.communicate(timeout=duration * draw.uniform(0.2, 0.95) if kills < 20 else None)
                finished = True
                assert process.returncode == 0
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                kills += 1
                assert not out.exists() or contents(out) == whole
        assert contents(out) == whole
        assert not out.with_name(f"out{runs}.partial").exists()
