"""Words that a model proposes for documents, asked for over HTTP, and going on after a stop."""

import json

import pytest
from fastapi import Response

from search_r1 import expand
from search_r1.partial import started
from search_r1.search.engines import bm25
from search_r1.search.engines.bm25.expansions import Expansions
from tests.openai_server import Player
from tests.retrieval import serving, write_corpus

ROWS = [
    {"id": 0, "contents": "tide harbour boat"},
    {"id": "1", "contents": "moon crater"},
    {"id": "2", "contents": "bread oven boat"},
]
SCRIPTS = {
    "tide": ["Seaport, harbours; boats, ebb and flow"],
    "crater": ["<think>hm, a rock</think>lunar surface\nimpact"],
    "bread": ["Bakery"],
}


def command(folder, url, *more):
    index = ["--index_path", str(folder / "bm25"), "--corpus_path", str(folder / "corpus.jsonl")]
    asked = ["--url", f"{url}/v1", "--model", "m", "--max_df", "0.5", "--max_concurrent", "1"]
    return [*index, *asked, "--out", str(folder / "e.jsonl"), *more]


def written(path):
    return {row["id"]: row["terms"] for row in map(json.loads, path.open())}


def test_proposed_words_are_written_without_those_that_a_document_has(tmp_path):
    path = write_corpus(tmp_path, ROWS)
    player = Player(SCRIPTS)
    with serving(player.app) as url:
        assert expand.main(command(tmp_path, url)) == 0
    assert written(tmp_path / "e.jsonl") == {
        "0": ["Seaport", "ebb", "flow"],
        "1": ["lunar", "surface", "impact"],
        "2": ["Bakery"],
    }
    assert player.requests["bread"][0]["model"] == "m"
    bm25.build(path, tmp_path / "bm25", Expansions(tmp_path / "e.jsonl"))
    found = bm25.BM25Retriever(tmp_path / "bm25", path).rank("seaports", 3)
    assert [position for position, _ in found] == [0]


def test_the_same_command_goes_on_where_it_was_stopped(tmp_path):
    write_corpus(tmp_path, ROWS)
    part = tmp_path / "e.jsonl.part"
    refusing = Player({**SCRIPTS, "bread": [Response(status_code=400)]})
    with serving(refusing.app) as url:
        with pytest.raises(SystemExit, match=r"status 400.*the same command goes on"):
            expand.main(command(tmp_path, url))
        with part.open("a") as file:
            file.write('{"id": "2", "ter')
        with pytest.raises(SystemExit, match="begun with other settings"):
            expand.main(command(tmp_path, url, "--terms", "3"))
    assert not (tmp_path / "e.jsonl").exists()
    player = Player(SCRIPTS)
    with serving(player.app) as url:
        assert expand.main(command(tmp_path, url)) == 0
    assert list(player.requests) == ["bread"]
    assert set(written(tmp_path / "e.jsonl")) == {"0", "1", "2"} and not part.exists()


def test_a_finished_file_stays_and_other_settings_are_refused(tmp_path):
    write_corpus(tmp_path, ROWS)
    player = Player(SCRIPTS)
    with serving(player.app) as url:
        assert expand.main(command(tmp_path, url)) == 0
    asked = {name: len(requests) for name, requests in player.requests.items()}
    assert expand.main(command(tmp_path, "http://127.0.0.1:9")) == 0
    assert {name: len(requests) for name, requests in player.requests.items()} == asked
    with pytest.raises(SystemExit, match=r"e\.jsonl is there, made with other settings"):
        expand.main(command(tmp_path, url, "--terms", "3"))
    (tmp_path / "e.jsonl.made_from").unlink()
    with pytest.raises(SystemExit, match=r"made with other settings \(unknown\)"):
        expand.main(command(tmp_path, url))


def test_lines_end_where_they_were_ended(tmp_path):
    """Some characters end a line for Python, and stand in JSON as they are."""
    part = tmp_path / "e.jsonl.part"
    list(started(part, {}))
    rows = [{"id": "1", "question": "one\u2028two\x85three"}, {"id": "2", "question": "four"}]
    with part.open("a") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert list(started(part, {})) == rows


@pytest.mark.parametrize("left", ["", '{"corpus": "of a kil'])
def test_a_start_that_was_killed_before_its_first_line_is_no_start(tmp_path, left):
    part = tmp_path / "e.jsonl.part"
    part.write_text(left)
    assert list(started(part, {"terms": 3})) == []
    assert part.read_text() == '{"terms": 3}\n'


def test_an_endpoint_that_is_not_there_is_named(tmp_path):
    write_corpus(tmp_path, ROWS)
    with pytest.raises(SystemExit, match=r"error: --url: .* does not answer"):
        expand.main(command(tmp_path, "http://127.0.0.1:9"))


def reply(content):
    return {"choices": [{"message": {"content": content}}]}


@pytest.mark.parametrize("text", ["", "<think>only thoughts</think>", "..."])
def test_a_reply_without_words_adds_nothing(text):
    assert expand.read_terms(reply(text)) == []


@pytest.mark.parametrize(("said", "problem"), [(None, "a text, got None"), ("<think>a", "cut off")])
def test_a_reply_that_is_no_text_or_all_thought_is_unusable(said, problem):
    with pytest.raises(ValueError, match=problem):
        expand.read_terms(reply(said))
