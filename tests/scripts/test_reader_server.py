"""The endpoint that serves a small model: answers in batches are those that each request gets
alone."""

import asyncio
import sys

import httpx
import pytest

from search_r1.world.base import SHIPPED
from tests.e2e.runs import ROOT
from tests.retrieval import serving

sys.path.insert(0, str(ROOT / "scripts" / "bench"))
import reader_server

TEXTS = (
    "Question: Where does Torvel live?\n",
    "Doc 1 Torvel inhabits Zorbin.\nQuery: Torvel\nFacts:",
)


@pytest.fixture(scope="module")
def reader():
    if not (SHIPPED / "model.safetensors").exists():
        pytest.skip("no base model: python -m search_r1.world.base --out " + str(SHIPPED))
    return reader_server.Reader(str(SHIPPED))


def request(text, max_tokens=12):
    message = {"role": "user", "content": text}
    return reader_server.ChatRequest(messages=[message], max_tokens=max_tokens)


def test_a_batch_gets_what_each_request_gets_alone(reader):
    together = reader.continued([request(text) for text in TEXTS])
    assert together == [reader.continued([request(text)])[0] for text in TEXTS]
    assert together[0].startswith("<think>")
    (short,) = reader.continued([request(TEXTS[0], 2)])
    assert together[0].startswith(short) and len(short) < len(together[0])


def test_requests_over_http_are_answered(reader):
    with serving(reader_server.app_of(reader)) as address:

        async def ask():
            async with httpx.AsyncClient(timeout=60) as client:
                bodies = [request(text).model_dump() | {"model": "reader"} for text in TEXTS]
                return await asyncio.gather(
                    *(client.post(f"{address}/v1/chat/completions", json=body) for body in bodies)
                )

        replies = [r.json()["choices"][0]["message"]["content"] for r in asyncio.run(ask())]
    assert replies == reader.continued([request(text) for text in TEXTS])
