"""A user's own files become a corpus that can be indexed and searched."""

import json

import pytest

from search_r1.search.engines import bm25
from search_r1.search.make_corpus import main, passages


@pytest.fixture
def folder(tmp_path):
    files = tmp_path / "files"
    (files / "deep").mkdir(parents=True)
    (files / "plain_note.txt").write_text("The harbour of Torvel is old. " * 40)
    (files / "deep" / "guide.md").write_text(
        "---\ntags: [x]\n---\n# The Guide\n\nSome **bold** and a [link](http://x).\n\n```\ncode "
        "here\n```\n"
    )
    (files / "page.html").write_text(
        "<html><head><title>A Page</title></head><body><p>Marna is hilly.</p></body></html>"
    )
    (files / "picture.png").write_bytes(b"\x89PNG")
    return files


def run(folder, tmp_path, *flags):
    assert main(["--input", str(folder), "--out", str(tmp_path / "c.jsonl"), *flags]) == 0
    return [json.loads(line) for line in (tmp_path / "c.jsonl").open()]


def test_files_become_titled_passages(folder, tmp_path, capsys):
    rows = {row["id"]: row["contents"] for row in run(folder, tmp_path)}
    assert "5 passages of 3 files; left out: 1 of another kind" in capsys.readouterr().out
    assert rows["deep/guide.md#0"] == '"The Guide"\nThe Guide Some bold and a link. code here'
    assert rows["page.html#0"] == '"A Page"\nMarna is hilly.'
    title, text = rows["plain_note.txt#1"].split("\n")
    assert title == '"plain note"' and len(text.split()) == 100
    bm25.build(tmp_path / "c.jsonl", tmp_path / "bm25")
    (hits,) = bm25.BM25Retriever(tmp_path / "bm25", tmp_path / "c.jsonl").search(
        ["Is Marna hilly?"], 1
    )
    assert hits[0][0]["id"] == "page.html#0"


def test_a_short_rest_joins_the_passage_before_it():
    assert [len(p.split()) for p in passages("w " * 210, 100)] == [100, 110]
    assert [len(p.split()) for p in passages("w " * 230, 100)] == [100, 100, 30]
    assert [len(p.split()) for p in passages("w " * 5, 100)] == [5] and list(
        passages("", 100)
    ) == []


def test_unreadable_files_are_named_or_left_out(folder, tmp_path, capsys):
    (folder / "bad.txt").write_bytes(b"abc \xff\xfe def")
    with pytest.raises(SystemExit, match=r"bad.txt: not UTF-8 .*byte 4"):
        run(folder, tmp_path)
    assert not (tmp_path / "c.jsonl").exists() and not (tmp_path / "c.jsonl.tmp").exists()
    run(folder, tmp_path, "--skip-bad")
    assert "1 unreadable" in capsys.readouterr().out


def test_a_folder_without_text_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="no text in"):
        main(["--input", str(tmp_path / "empty"), "--out", str(tmp_path / "c.jsonl")])
