"""Corpora of every source, and what is wrong with some of them."""

import gzip
import json
import math
import os
import resource
import subprocess
import sys
from datetime import date, datetime, timedelta
from decimal import Decimal
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from search_r1.search.engines import bm25
from search_r1.search.engines.bm25 import BM25Retriever
from search_r1.search.errors import CorpusError
from search_r1.search.index.corpus import Corpus, line_offsets, save_whole
from search_r1.search.index.documents import encoded
from search_r1.search.index.files import building
from search_r1.search.index.manifest import read_manifest
from search_r1.search.index.reader import CorpusReader
from search_r1.search.index_builder import main as build_index
from tests.retrieval import write_corpus, write_lines

ROWS = [
    {"id": "0", "contents": '"Torvel"\nTorvel lies in Marna. It has a harbour.'},
    {"id": "1", "contents": '"Ada Marin"\nAda Marin was born in Torvel.'},
    {"id": "2", "contents": '"Bo Keld"\nBo Keld sails. Bo Keld was born at sea.'},
]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2: not JSON"),
        ('{"id": 1}', "line 2: expected an object"),
        ('{"contents": "x"}', "line 2: expected an object"),
        (json.dumps(ROWS[0]), "line 2: id '0'"),
        ('{"id": "9", "contents": "x \\ud83d y"}', "line 2: half of a surrogate pair"),
        ('{"id": "9", "contents": "x", "more": ["\\uDE00"]}', "line 2: half of a surrogate pair"),
    ],
)
def test_bad_lines_are_named_or_skipped_and_counted(tmp_path, line, message, capsys):
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n" + json.dumps(ROWS[1]) + "\n")
    with pytest.raises(CorpusError, match=message):
        bm25.build(path, tmp_path / "bm25")
    assert [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]
    assert build_index(["--corpus_path", str(path), "--save_dir", str(tmp_path), "--skip-bad"]) == 0
    assert "2 documents, 1 bad lines left out" in capsys.readouterr().out
    (hits,) = BM25Retriever(tmp_path / "bm25", path).search(["Ada"], 1)
    assert hits[0][0] == ROWS[1]


def write_source(folder, kind):
    if kind == "jsonl.gz":
        path = folder / "c.jsonl.gz"
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    else:
        path = folder / "c.parquet"
        titles = [row["contents"].split("\n") for row in ROWS]
        table = [
            {"id": row["id"], "title": t, "text": x}
            for row, (t, x) in zip(ROWS, titles, strict=True)
        ]
        pq.write_table(pa.Table.from_pylist(table), path)
    return path


def test_a_row_with_half_a_surrogate_pair_is_left_out_of_a_copied_corpus_and_a_whole_pair_is_not(
    tmp_path,
):
    path = tmp_path / "c.jsonl.gz"
    lines = [r'{"id": 0, "contents": "a \ud83d\ude00"}', r'{"id": 1, "contents": "a \ude00\ud83d"}']
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    reader = CorpusReader(path, skip_bad=True)
    assert (
        list(reader.store(tmp_path)) == [{"id": 0, "contents": "a \U0001f600"}] and reader.bad == 1
    )
    plain = tmp_path / "c.jsonl"
    plain.write_bytes(
        b'{"id": 0, "contents": "\xed\xa0\xbd"}\n{"id": 1, "contents": "\xed\x95\x9c"}\n'
    )
    reader = CorpusReader(plain, skip_bad=True)
    assert list(reader.store(tmp_path)) == [{"id": 1, "contents": "\ud55c"}] and reader.bad == 1


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet"])
def test_other_sources_are_copied_into_the_index(tmp_path, kind):
    source = write_source(tmp_path, kind)
    assert bm25.build(CorpusReader(source), tmp_path / "bm25") == 3
    for corpus in (source, None):
        (hits,) = BM25Retriever(tmp_path / "bm25", corpus).search(["Ada"], 1)
        assert hits[0][0]["contents"] == ROWS[1]["contents"]


def test_an_index_of_another_corpus_is_refused(tmp_path):
    path = write_corpus(tmp_path, ROWS)
    path.write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(CorpusError, match=r"not the corpus.*--overwrite"):
        BM25Retriever(tmp_path / "bm25", path)


def test_a_change_in_the_middle_of_a_large_corpus_is_seen(tmp_path):
    rows = [{"id": str(i), "contents": f'"T{i}"\n{"word " * 20}'} for i in range(20000)]
    path = write_corpus(tmp_path, rows)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 - 5000 : len(data) // 2 + 5000] = b"x" * 10000
    path.write_bytes(bytes(data))
    with pytest.raises(CorpusError, match="not the corpus"):
        BM25Retriever(tmp_path / "bm25", path)


@pytest.mark.parametrize("name", ["posting_codes.npy", "vocabulary.bin", "offsets.npy"])
def test_a_damaged_index_is_refused(tmp_path, name):
    path = write_corpus(tmp_path, ROWS)
    file = tmp_path / "bm25" / name
    os.truncate(file, file.stat().st_size - 3)
    with pytest.raises(CorpusError, match=rf"{name} has \d+ bytes.*build it again"):
        BM25Retriever(tmp_path / "bm25", path)
    file.unlink()
    with pytest.raises(CorpusError, match=f"{name} is missing"):
        BM25Retriever(tmp_path / "bm25", path)


def test_a_full_disk_leaves_the_old_index_and_nothing_else(tmp_path):
    """A limit on the size of files stands for the full disk: writing beyond it fails in the same
    place."""
    path = write_corpus(tmp_path, ROWS)
    write_lines(
        path, [{"id": str(i), "contents": f'"T{i}"\nw{i} ' + "word " * 50} for i in range(2000)]
    )
    command = [sys.executable, "-m", "search_r1.search.index_builder", "--corpus_path", str(path)]
    done = subprocess.run(
        [*command, "--save_dir", str(tmp_path)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000)),
    )
    assert (
        done.returncode == 1
        and "the disk is full" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bm25", "corpus.jsonl"]
    assert json.loads((tmp_path / "bm25" / "manifest.json").read_text())["documents"] == 3


def test_line_offsets_of_a_plain_file_are_kept_beside_it(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", ROWS)
    assert line_offsets(path, block=7).tolist() == line_offsets(path).tolist()
    corpus = Corpus.of_lines(path)
    assert [corpus[i] for i in range(len(corpus))] == ROWS
    kept = tmp_path / "c.jsonl.offsets.npy"
    stamp = kept.stat().st_mtime_ns
    Corpus.of_lines(path)
    assert kept.stat().st_mtime_ns == stamp
    path.write_text(path.read_text().rstrip("\n"))
    os.utime(path)
    assert Corpus.of_lines(path)[2] == ROWS[2]


def test_builder_is_idempotent(tmp_path, capsys):
    path = write_lines(tmp_path / "c.jsonl", ROWS)
    flags = ["--corpus_path", str(path), "--save_dir", str(tmp_path)]
    assert [build_index(flags), build_index(flags)] == [0, 0]
    output = capsys.readouterr().out
    assert "3 documents" in output and "already built" in output


def test_line_offsets_are_kept_whole_or_not_at_all(tmp_path):
    """A limit on the size of files stands for the full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError):
            save_whole(tmp_path / "offsets.npy", np.arange(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_what_servers_that_start_together_read_is_whole(tmp_path, monkeypatch):
    """At no time is there a file of offsets that is still being written."""
    path = write_lines(tmp_path / "c.jsonl", ROWS)
    seen = []
    save = np.save

    def watched(file, values):
        save(file, values[:1])
        seen.extend(p.name for p in tmp_path.glob("*.offsets.npy"))
        file.seek(0)
        save(file, values)

    monkeypatch.setattr(np, "save", watched)
    assert Corpus.of_lines(path)[2] == ROWS[2] and seen == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "c.jsonl.offsets.npy"]


def test_a_second_build_of_the_same_index_is_refused_and_the_first_undisturbed(tmp_path):
    index = tmp_path / "bm25"
    (tmp_path / "bm25.lock").touch()  # left by a killed build: locks nothing
    with building(index) as folder:
        (folder / "file").write_text("first")
        with pytest.raises(CorpusError, match="another build of it is running"), building(index):
            raise AssertionError("two at once")
    assert (index / "file").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["bm25"]


@pytest.mark.parametrize("left", ["folder", "file"])
def test_what_a_build_killed_at_its_end_left_is_removed(tmp_path, left):
    path = write_corpus(tmp_path, ROWS)
    old = tmp_path / "bm25.old"
    if left == "folder":
        old.mkdir()
    (old / "postings" if left == "folder" else old).write_text("old")
    with building(tmp_path / "bm25") as folder:
        (folder / "file").write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bm25", path.name]
    assert [p.name for p in (tmp_path / "bm25").iterdir()] == ["file"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_index_of_others_is_only_replaced_when_told_to(tmp_path, kind):
    path = write_lines(tmp_path / "c.jsonl", ROWS)
    index = tmp_path / "bm25"
    precious = index / "segments_2" if kind == "folder" else index
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("precious")
    flags = ["--corpus_path", str(path), "--save_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"bm25 is there already.*--overwrite"):
        build_index(flags)
    assert precious.read_text() == "precious"
    assert build_index([*flags, "--overwrite"]) == 0 and read_manifest(index)["documents"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bm25", "c.jsonl"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\x00\x00"])
def test_a_garbled_manifest_is_said_with_its_cure_and_built_again(tmp_path, text):
    path = write_corpus(tmp_path, ROWS)
    (tmp_path / "bm25" / "manifest.json").write_text(text)
    with pytest.raises(CorpusError, match=r"manifest.json (is not JSON|has no).*build it again"):
        BM25Retriever(tmp_path / "bm25", path)
    assert build_index(["--corpus_path", str(path), "--save_dir", str(tmp_path)]) == 0
    assert read_manifest(tmp_path / "bm25")["documents"] == 3


def test_builder_errors_have_no_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"error: .*none.jsonl: no such file"):
        build_index(["--corpus_path", str(tmp_path / "none.jsonl"), "--save_dir", str(tmp_path)])


def test_a_data_set_of_the_hub_is_read(tmp_path, monkeypatch):
    """A local folder stands for the hub's name: the library reads both the same way."""
    pytest.importorskip("datasets", reason="the extra `hub` is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "train.jsonl", ROWS)
    source = f"hf:{tmp_path / 'data'}:train"
    assert bm25.build(CorpusReader(source), tmp_path / "bm25") == 3
    (hits,) = BM25Retriever(tmp_path / "bm25", None).search(["Ada"], 1)
    assert hits[0][0] == ROWS[1]


def test_blank_lines_are_no_documents(tmp_path):
    """Neither where an index is built nor where lines are only counted, and offsets point at
    documents."""
    path = tmp_path / "c.jsonl"
    lines = [
        "",
        json.dumps(ROWS[0]),
        " \t",
        "\r",
        json.dumps(ROWS[1]),
        " " + json.dumps(ROWS[2]),
        "",
        " ",
    ]
    path.write_text("\n".join(lines), newline="")
    assert bm25.build(CorpusReader(path), tmp_path / "bm25") == 3
    manifest = read_manifest(tmp_path / "bm25")
    for corpus in (Corpus.of_index(tmp_path / "bm25", manifest, path), Corpus.of_lines(path)):
        assert [corpus[i] for i in range(len(corpus))] == ROWS
    copied = tmp_path / "c.jsonl.gz"
    copied.write_bytes(gzip.compress(path.read_bytes()))
    assert bm25.build(CorpusReader(copied), tmp_path / "copy") == 3
    corpus = Corpus.of_index(tmp_path / "copy", read_manifest(tmp_path / "copy"), copied)
    assert [corpus[i] for i in range(len(corpus))] == ROWS


@pytest.mark.parametrize("name", ["c.json", "c.jsonl", "c.json.gz"])
def test_a_json_array_is_a_corpus(tmp_path, name):
    path = tmp_path / name
    text = "\ufeff\n" + json.dumps(ROWS, indent=1)
    path.write_bytes(
        gzip.compress(text.removeprefix("\ufeff").encode())
        if name.endswith("gz")
        else text.encode()
    )
    assert bm25.build(CorpusReader(path), tmp_path / "bm25") == 3
    for corpus in (path, None):
        (hits,) = BM25Retriever(tmp_path / "bm25", corpus).search(["Ada"], 1)
        assert hits[0][0] == ROWS[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": "0", "contents": "x"}, {"id": "1"}]', "c.json, entry 1: expected an object"),
        ('[{"id": "0", "contents": "x"}, 3]', "c.json, entry 1: expected an object"),
        ('[{"id": "0", "contents": "x \\ud83d"}]', "c.json, entry 0: half of a surrogate pair"),
        ('[{"id": "0", "contents": "x"}', "c.json: begins like a JSON array, and is none"),
    ],
)
def test_bad_entries_of_an_array_are_named(tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(CorpusError, match=message):
        bm25.build(CorpusReader(tmp_path / "c.json"), tmp_path / "bm25")
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]


def test_columns_of_dates_and_numbers_that_are_none_are_copied_in_a_form_that_json_has(tmp_path):
    day = date(2024, 5, 17)
    number = UUID(int=7)
    rows = [
        {
            **row,
            "day": day,
            "at": datetime(2024, 5, 17, 12, 30),
            "for": timedelta(seconds=90),
            "price": Decimal("1.50"),
            "rank": math.nan,
            "more": {"scores": [1.0, math.inf]},
        }
        for row in ROWS
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    assert bm25.build(CorpusReader(tmp_path / "c.parquet"), tmp_path / "bm25") == 3
    ((document, _),) = BM25Retriever(tmp_path / "bm25", None).search(["Ada"], 1)[0]
    assert document == {
        **ROWS[1],
        "day": "2024-05-17",
        "at": "2024-05-17T12:30:00",
        "for": "0:01:30",
        "price": "1.50",
        "rank": None,
        "more": {"scores": [1.0, None]},
    }
    assert json.loads(encoded({"id": number}, "here")) == {"id": str(number)}
    pq.write_table(pa.Table.from_pylist([{**ROWS[0], "image": b"x"}]), tmp_path / "b.parquet")
    with pytest.raises(
        CorpusError,
        match=r"b\.parquet, row 1: JSON has no form for a value of type bytes: leave its",
    ):
        bm25.build(CorpusReader(tmp_path / "b.parquet"), tmp_path / "other")


def test_a_row_that_cannot_be_written_is_left_out_whole(tmp_path):
    """Else the passages behind it would be served one place off."""
    rows = [{**ROWS[0], "image": b"x"}, *({**row, "image": None} for row in ROWS[1:])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    reader = CorpusReader(tmp_path / "c.parquet", skip_bad=True)
    assert bm25.build(reader, tmp_path / "bm25") == 2 and reader.bad == 1
    retriever = BM25Retriever(tmp_path / "bm25", None)
    ((document, _),) = retriever.search(["Ada"], 1)[0]
    assert len(retriever) == 2 and document["id"] == ROWS[1]["id"]


def test_only_lines_are_served_without_an_index(tmp_path):
    array = tmp_path / "c.json"
    array.write_text(json.dumps(ROWS))
    for path in (array, write_source(tmp_path, "jsonl.gz"), write_source(tmp_path, "parquet")):
        with pytest.raises(CorpusError, match="expected JSONL, one document a line"):
            Corpus.of_lines(path)


def test_an_older_file_in_the_place_of_a_corpus_is_seen(tmp_path):
    """Copies keep their time, so it does not tell whether the offsets beside a file are its own."""
    path = write_lines(tmp_path / "c.jsonl", ROWS)
    assert len(Corpus.of_lines(path)) == 3
    for other in (
        [{"id": "9", "contents": "x" * 200}, *ROWS],
        ROWS[:2],
        [*ROWS, {"id": "9", "contents": "x"}],
    ):
        write_lines(path, other)
        os.utime(path, (1, 1))
        corpus = Corpus.of_lines(path)
        assert [corpus[i] for i in range(len(corpus))] == other
