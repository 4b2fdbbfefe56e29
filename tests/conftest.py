"""What whole runs share."""

import pytest
from hypothesis import settings

from tests.e2e.runs import CORPUS
from tests.retrieval import retrieval_server, write_corpus

settings.register_profile("suite", deadline=None, derandomize=True)  # the same examples on every machine
settings.load_profile("suite")


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    """URL of a retrieval server over four passages."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, CORPUS)
    with retrieval_server(folder) as (url, _):
        yield url
