"""A missing optional package is named with its cure."""

import pytest

from search_r1.search import extras
from search_r1.search.engines.load import load
from search_r1.search.errors import RetrieverError
from search_r1.search.index_builder import main as build_index
from search_r1.search.retrieval_server import parse_arguments
from tests.retrieval import write_lines


@pytest.mark.parametrize(
    ("flags", "extra"),
    [
        (["--retriever_name", "e5"], "dense"),
        (["--retriever_name", "empty", "--reranker", "x"], "dense"),
    ],
)
def test_the_extra_is_named(flags, extra, monkeypatch, tmp_path):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(RetrieverError, match=rf"pip install -e '\.\[{extra}\]'"):
        load(parse_arguments([*flags, "--index_path", str(tmp_path)]))


def test_the_index_builder_says_so_without_a_traceback(monkeypatch, tmp_path):
    corpus = write_lines(tmp_path / "c.jsonl", [{"id": "0", "contents": "T\nx"}])
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    flags = ["--retrieval_method", "e5", "--corpus_path", str(corpus), "--save_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"error: --retrieval_method e5 .*\[dense\]"):
        build_index(flags)
