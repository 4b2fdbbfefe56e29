"""Behind a proxy, as on most clusters.

The program's own servers are asked directly, and what is public goes through the proxy.
"""

import asyncio
import socket
from pathlib import Path

import pytest

from search_r1.launch import RetrievalServer
from search_r1.search.addresses import direct, is_internal
from search_r1.search.client import RetrievalClient, SearchError, check_documents, check_server
from search_r1.search.client.config import RetrieverConfig
from search_r1.search.engines.bm25 import BM25Retriever
from search_r1.search.engines.web import WebRetriever, brave
from search_r1.search.index.corpus import Corpus
from search_r1.search.server.app import create_app
from search_r1.search.server.service import ServerSettings
from search_r1.search.store import DocumentStore
from tests.e2e.runs import CORPUS
from tests.openai_server import Player
from tests.proxies import behind, refusing_proxy
from tests.retrieval import serving, write_corpus
from verl.utils.endpoint import Endpoint, EndpointConfig, EndpointFailed, check_endpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture
def asked(monkeypatch):
    """What the only proxy was asked for."""
    with refusing_proxy() as (address, asked):
        behind(monkeypatch, address)
        yield asked


async def test_training_reaches_its_retrieval_server(tmp_path, asked):
    """The launcher waits for it, the check before the start asks it, the client searches it."""
    corpus = write_corpus(tmp_path, CORPUS)
    with RetrievalServer(tmp_path / "bm25", str(corpus), 3) as server:
        assert check_server(server.url) is None
        client = RetrievalClient(
            RetrieverConfig(url=[server.url, server.url.replace("127.0.0.1", "localhost")])
        )
        assert await client.search("Torvel")
        await client.close()
    assert asked == []


async def test_training_reaches_the_documents_of_its_server(tmp_path, asked):
    write_corpus(tmp_path, CORPUS)
    corpus = Corpus.of_lines(tmp_path / "corpus.jsonl")
    engine = BM25Retriever(tmp_path / "bm25", tmp_path / "corpus.jsonl")
    made = create_app(lambda: engine, ServerSettings(), lambda: DocumentStore(corpus, "id"))
    with serving(made) as base:
        url = f"{base}/retrieve"
        while await asyncio.to_thread(check_documents, url):
            pass  # it is loading
        client = RetrievalClient(RetrieverConfig(url=url))
        assert (await client.open(str(CORPUS[0]["id"]))).pages == 1
        await client.close()
    assert asked == []


async def test_a_retrieval_server_elsewhere_is_reached_through_the_proxy(asked):
    url = "http://search.example.org:8000/retrieve"
    client = RetrievalClient(RetrieverConfig(url=url, max_retries=0))
    with pytest.raises(SearchError, match="refused by the proxy"):
        await client.search("Torvel")
    await client.close()
    assert "503" in str(check_server(url))
    assert asked == [url, url]


async def test_an_endpoint_on_this_machine_and_one_elsewhere(asked):
    player = Player({"": ["an answer"]})
    with serving(player.app) as address:
        assert check_endpoint(EndpointConfig(url=f"{address}/v1")) is None
        endpoint = Endpoint(EndpointConfig(url=f"{address}/v1", max_retries=0))
        body = {"messages": [{"role": "user", "content": "who"}], "max_tokens": 5}
        assert await endpoint.post("/chat/completions", body, lambda reply: reply["choices"])
        await endpoint.close()
    assert asked == []
    public = Endpoint(EndpointConfig(url="http://api.example.org/v1", max_retries=0))
    with pytest.raises(EndpointFailed, match="refused by the proxy"):
        await public.post("/chat/completions", {}, lambda reply: reply)
    await public.close()
    assert asked == ["http://api.example.org/v1/chat/completions"]


def test_the_web_is_searched_through_the_proxy(asked):
    web = WebRetriever(brave("key", url="http://api.example.org/search"), max_retries=0)
    (found,) = web.search(["Torvel"], 3)
    assert isinstance(found, Exception)
    assert [target.partition("?")[0] for target in asked] == ["http://api.example.org/search"]


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.1.1",
        "::1",
        "10.1.2.3",
        "172.16.0.9",
        "192.168.1.1",
        "169.254.0.1",
        "fe80::1",
        "fd00::1",
        "localhost",
        "node17",
        "gpu-07",
        "node17.local",
        "db.internal",
        socket.gethostname().lower(),
    ],
)
def test_addresses_of_the_machine_and_its_cluster(host):
    assert is_internal(host)


@pytest.mark.parametrize(
    "host", ["8.8.8.8", "172.32.0.1", "2001:4860:4860::8888", "example.org", "", "a b", "?"]
)
def test_addresses_of_others(host):
    assert not is_internal(host)


def test_what_is_no_address_is_left_to_the_request():
    assert direct("http://[::1", "nonsense", "http://") == {}


def test_both_sides_have_the_same_rule():
    """The retrieval side runs without verl, and verl without it: neither imports the other's."""
    text = (ROOT / "search_r1/search/addresses.py").read_text()
    assert text == (ROOT / "verl/utils/addresses.py").read_text()
