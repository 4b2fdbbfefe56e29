"""The retrieval side: corpus, BM25, server and client over real HTTP."""

import asyncio
import json
import math
import subprocess
import sys

import httpx
import pytest

from search_r1.search import bm25
from search_r1.search.client import RetrievalClient, SearchError, check_server
from search_r1.search.config import RetrieverConfig
from search_r1.search.corpus import Corpus, CorpusError
from tests.retrieval import retrieval_server, write_corpus

ROWS = [
    {"id": "0", "contents": '"Torvel"\nTorvel lies in Marna. It has a harbour.'},
    {"id": "1", "contents": '"Ada Marin"\nAda Marin was born in Torvel.'},
    {"id": "2", "contents": '"Bo Keld"\nBo Keld sails. Bo Keld was born at sea.'},
    {"id": "3", "contents": '"Marna"\nMarna is a country of hills.'},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("index")
    write_corpus(path, ROWS)
    return path


@pytest.fixture(scope="module")
def url(folder):
    with retrieval_server(folder, "--topk", "2") as (address, _):
        yield address


@pytest.mark.parametrize("num_queries", [0, 1, 2, 5])
def test_contract_with_and_without_scores(url, num_queries):
    """Two queries without scores broke the original: it took the second list for the scores."""
    queries = ["born in Torvel", "hills", "sails", "harbour", "the ?"][:num_queries]
    scored = httpx.post(url, json={"queries": queries, "topk": 3, "return_scores": True}).json()["result"]
    plain = httpx.post(url, json={"queries": queries, "topk": 3}).json()["result"]
    assert len(scored) == len(plain) == num_queries
    assert [[hit["document"] for hit in hits] for hits in scored] == plain
    if num_queries:
        assert scored[0][0]["document"] == ROWS[1] and scored[0][0]["score"] > scored[0][1]["score"]
    if num_queries == 5:
        assert scored[4] == []  # a query without a word finds nothing, and breaks nothing


def test_topk_of_server_and_validation_naming_the_field(url):
    assert len(httpx.post(url, json={"queries": ["Torvel Marin Keld born"]}).json()["result"][0]) == 2
    answer = httpx.post(url, json={"queries": "not a list"})
    assert answer.status_code == 422 and "queries" in answer.text


def test_health(url):
    answer = httpx.get(url.replace("/retrieve", "/health")).json()
    assert answer == {"status": "ok", "retriever": "bm25", "num_documents": 4}


def test_scores_are_lucenes_bm25(folder):
    """score = sum over query terms of log(1 + (N - n + .5) / (n + .5)) * tf / (tf + k1 (1 - b + b len / avg))."""
    tokens = bm25.tokenize([row["contents"] for row in ROWS])
    average = sum(map(len, tokens)) / len(tokens)
    (query,) = bm25.tokenize(["born Torvel"])
    expected = []
    for document in tokens:
        score = 0.0
        for term in query:
            n = sum(term in d for d in tokens)
            tf = document.count(term)
            length = 1 - bm25.B + bm25.B * len(document) / average
            score += math.log(1 + (len(tokens) - n + 0.5) / (n + 0.5)) * tf / (tf + bm25.K1 * length)
        expected.append(score)
    (hits,) = bm25.BM25Retriever(folder / "bm25", folder / "corpus.jsonl").search(["born Torvel"], 4)
    got = {document["id"]: score for document, score in hits}
    assert got == pytest.approx({str(i): s for i, s in enumerate(expected) if s > 0}, rel=1e-5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2: not JSON"),
        ('{"id": 1}', "line 2: expected an object"),
        (json.dumps(ROWS[0]), "line 2: id '0'"),
    ],
)
def test_bad_corpus_lines_are_named(tmp_path, line, message):
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    with pytest.raises(CorpusError, match=message):
        bm25.build(path, tmp_path / "bm25")
    assert not (tmp_path / "bm25").exists()


def test_an_index_of_another_corpus_is_refused(tmp_path):
    path = write_corpus(tmp_path, ROWS)
    path.write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(CorpusError, match="not the corpus"):
        Corpus(path, tmp_path / "bm25")


def test_index_builder_command_is_idempotent(tmp_path):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = ["--retrieval_method", "bm25", "--corpus_path", str(corpus), "--save_dir", str(tmp_path)]
    command = [sys.executable, "-m", "search_r1.search.index_builder", *flags]
    outputs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(2)]
    assert "4 documents" in outputs[0] and "already built" in outputs[1]


def client(url: str, **kwargs) -> RetrievalClient:
    return RetrievalClient(RetrieverConfig(url=url, **kwargs))


async def test_concurrent_searches_share_requests_and_equal_ones_are_sent_once(url):
    c, sent = client(url, batch_wait_s=0.05), []
    post = c.http.post

    async def counting(address, **kwargs):
        sent.append(kwargs["json"]["queries"])
        return await post(address, **kwargs)

    c.http.post = counting
    results = await asyncio.gather(*(c.search(q) for q in ["Torvel", "hills", "Torvel", "sails"]))
    assert sent == [["Torvel", "hills", "sails"]]
    assert results[0] == results[2] and results[1][0].title == '"Marna"' and results[1][0].id == "3"
    await c.close()


async def test_a_dead_server_is_an_error_with_its_cause():
    c = client("http://127.0.0.1:9/retrieve", max_retries=2, backoff_s=0.01)
    with pytest.raises(SearchError, match=r"127.0.0.1:9.*failed 3 times.*ConnectError"):
        await c.search("x")
    await c.close()


async def test_the_deadline_ends_a_slow_search(folder):
    with retrieval_server(folder, "--inject_latency_ms", "5000", "--inject_latency_p99_ms", "6000") as (slow, _):
        c = client(slow, timeout_s=0.5)
        with pytest.raises(SearchError, match=r"0\.5 s"):
            await c.search("x")
        await c.close()


async def test_a_restarted_server_is_found_again(folder):
    """The second server takes the port of the first."""
    with retrieval_server(folder) as (address, process):
        c = client(address, max_retries=30, backoff_s=0.2)
        assert await c.search("Torvel")
        process.kill()
        process.wait()
        pending = asyncio.create_task(c.search("hills"))
        await asyncio.sleep(0.3)
        with retrieval_server(folder, port=httpx.URL(address).port):
            assert (await pending)[0].id == "3"
        await c.close()


def test_check_server_names_address_and_cure(url):
    assert check_server(url) is None
    problem = check_server("http://127.0.0.1:9/retrieve")
    assert problem and "127.0.0.1:9" in problem and "retrieval_server.py" in problem
