"""The HTTP interface against its own description."""

import os

import pytest
from hypothesis import HealthCheck, given, settings

from search_r1.search.engines.bm25 import BM25Retriever
from search_r1.search.index.corpus import Corpus
from search_r1.search.server.app import create_app
from search_r1.search.server.service import ServerSettings
from search_r1.search.store import DocumentStore, StoreLimits
from tests.retrieval import serving, wait_until_ready, write_corpus
from tests.search_r1.search.echo import ROWS

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
"""Beyond 200, other ones at every run."""
schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    corpus = write_corpus(folder, ROWS)
    limits = ServerSettings(max_queries=5, max_query_chars=40)

    def documents():
        return DocumentStore(Corpus.of_lines(corpus), "id", StoreLimits(page_chars=20))

    made = create_app(lambda: BM25Retriever(folder / "bm25", corpus), limits, documents)
    with serving(made) as base:
        wait_until_ready(f"{base}/health")
        yield schemathesis.openapi.from_url(f"{base}/openapi.json")


def test_answers_are_as_described_and_never_5xx(api):
    operations = [result.ok() for result in api.get_all_operations()]
    asked = {"/retrieve", "/open", "/find"}
    assert {operation.path for operation in operations} == asked | {"/health", "/metrics"}
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    for operation in operations:
        for mode in modes[: 2 if operation.path in asked else 1]:

            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                derandomize=EXAMPLES == 200,
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def fuzz(case):
                response = case.call_and_validate()
                assert response.status_code < 500

            fuzz()
