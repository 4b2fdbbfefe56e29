"""Engines for experiments: oracle, random, empty, noisy, recorded and replayed."""

import json
import math
import random
import statistics

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from search_r1.search.engine import EngineError
from search_r1.search.engines.load import load
from search_r1.search.errors import CorpusError, RetrieverError
from search_r1.search.retrieval_server import parse_arguments
from search_r1.search.server.latency import Latency
from tests.retrieval import retrieval_server, write_corpus, write_lines

ROWS = [
    {"id": str(i), "contents": f'"Name{i}"\nName{i} lives in Place{i % 10}, as others do.'}
    for i in range(100)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("index")
    write_corpus(path, ROWS)
    infos = [
        {"question": "Where does Name3 live?", "gold_ids": ["3"]},
        {"question": "Who?", "gold_ids": ["13", "5"]},
    ]
    pq.write_table(
        pa.Table.from_pylist([{"extra_info": info} for info in infos]), path / "q.parquet"
    )
    return path


def engine(folder, *flags):
    return load(parse_arguments(["--corpus_path", str(folder / "corpus.jsonl"), *map(str, flags)]))


def ids(hits):
    return [document["id"] for document, _ in hits]


def test_empty_finds_nothing(folder):
    assert engine(folder, "--retriever_name", "empty").search(["a", "b"], 3) == [[], []]


def test_random_is_the_same_for_the_same_query(folder):
    e = engine(folder, "--retriever_name", "random")
    first, second = e.search(["a", "b"], 5)
    assert (
        ids(first) != ids(second)
        and ids(e.search(["b"], 5)[0]) == ids(second)
        and len(set(ids(first))) == 5
    )
    assert ids(
        engine(folder, "--retriever_name", "random", "--seed", 1).search(["a"], 5)[0]
    ) != ids(first)


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
def test_noisy_replaces_its_share(folder, noise):
    flags = ["--index_path", folder / "bm25"]
    clean = engine(folder, *flags)
    noisy = engine(folder, *flags, "--retriever_name", "noisy", "--noise", noise)
    queries = [f"Place{i % 10} Name{i}" for i in range(100)]
    pairs = list(zip(clean.search(queries, 5), noisy.search(queries, 5), strict=True))
    kept = statistics.mean(a == b for x, y in pairs for a, b in zip(ids(x), ids(y), strict=True))
    assert kept == pytest.approx(1 - noise, abs=0.08)
    assert ids(noisy.search(queries[7:8], 5)[0]) == ids(pairs[7][1])


def test_a_bad_ranking_is_the_same_passages_in_another_order(folder):
    flags = ["--index_path", folder / "bm25"]
    clean = engine(folder, *flags)
    noisy = engine(folder, *flags, "--retriever_name", "noisy", "--noise", 0, "--shuffled", 5)
    queries = [f"Place{i % 10} Name{i}" for i in range(100)]
    pairs = list(zip(clean.search(queries, 8), noisy.search(queries, 8), strict=True))
    assert all(sorted(ids(x)[:5]) == sorted(ids(y)[:5]) for x, y in pairs)
    assert all(ids(x)[5:] == ids(y)[5:] for x, y in pairs)
    first = statistics.mean(ids(x)[0] == ids(y)[0] for x, y in pairs)
    assert first == pytest.approx(1 / 5, abs=0.1)
    (cut,) = noisy.search(queries[:1], 2)
    assert ids(cut) == ids(pairs[0][1])[:2], "drawn from the first five, however few are asked for"


def test_oracle_gives_gold_passages_alone(folder):
    e = engine(
        folder,
        "--retriever_name",
        "oracle",
        "--index_path",
        folder / "bm25",
        "--questions",
        folder / "q.parquet",
    )
    assert len(e) == 3
    found = e.search(["Where does Name3 live?", "Who?", "Name13", "Place3"], 3)
    assert [ids(hits) for hits in found] == [["3"], ["13", "5"], ["13"], ["3", "13"]]


def test_oracle_knows_the_questions_of_all_its_files(folder, tmp_path):
    table = [{"extra_info": {"question": "Where does Name7 live?", "gold_ids": ["7"]}}]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "further.parquet")
    flags = ["--retriever_name", "oracle", "--index_path", folder / "bm25"]
    files = [folder / "q.parquet", tmp_path / "further.parquet"]
    e = engine(folder, *flags, "--questions", *files)
    assert len(e) == 4
    assert [ids(hits) for hits in e.search(["Where does Name7 live?", "Who?"], 3)] == [
        ["7"],
        ["13", "5"],
    ]


def test_oracle_of_other_passages_is_refused(folder, tmp_path):
    table = [{"extra_info": {"question": "a", "gold_ids": ["777"]}}]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "q.parquet")
    flags = ["--retriever_name", "oracle", "--index_path", folder / "bm25"]
    with pytest.raises(CorpusError, match="'777' is not in"):
        engine(folder, *flags, "--questions", tmp_path / "q.parquet")
    with pytest.raises(RetrieverError, match="--questions"):
        engine(folder, *flags)


def test_a_replayed_run_gives_identical_passages(folder, tmp_path):
    record = tmp_path / "runs" / "record.jsonl"
    bodies = [
        {"queries": [f"Place{i}", f"Name{i}"], "topk": 2 + i % 2, "return_scores": True}
        for i in range(10)
    ]
    with retrieval_server(folder, "--record", str(record)) as (url, _):
        recorded = [httpx.post(url, json=body).json() for body in bodies]
    flags = ["--retriever_name", "replay", "--index_path", str(record)]
    random.Random(0).shuffle(order := list(range(10)))
    with retrieval_server(folder, *flags) as (url, _):
        replayed = {i: httpx.post(url, json=bodies[i]).json() for i in order}
        unknown = httpx.post(url, json={"queries": ["never asked"]})
    assert [replayed[i] for i in range(10)] == recorded
    assert unknown.status_code == 500 and "not recorded" in unknown.text


def test_replay_names_a_bad_line(tmp_path, folder):
    path = write_lines(
        tmp_path / "r.jsonl", [{"query": "a", "topk": 1, "hits": []}, {"query": "b"}]
    )
    with pytest.raises(CorpusError, match="line 2: not a recorded search"):
        engine(folder, "--retriever_name", "replay", "--index_path", path)
    good = write_lines(
        tmp_path / "g.jsonl",
        [{"query": "a", "topk": 1, "hits": [[{"id": 1, "contents": "x"}, 0.5]]}],
    )
    e = engine(folder, "--retriever_name", "replay", "--index_path", good)
    found = e.search(["a", "b"], 1)
    assert json.dumps(found[0]) == '[[{"id": 1, "contents": "x"}, 0.5]]' and isinstance(
        found[1], EngineError
    )


def test_injected_latency_has_its_quantiles():
    latency = Latency(200, 2000)
    draws = sorted(latency.draw() for _ in range(20000))
    assert draws[10000] == pytest.approx(0.2, rel=0.05) and draws[19800] == pytest.approx(
        2.0, rel=0.1
    )
    assert math.isclose(latency.mu, math.log(0.2))
