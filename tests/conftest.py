"""The fixtures that tests of several folders share, and what is skipped on a GPU."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.e2e.runs import CORPUS
from tests.models import make_tokenizer
from tests.retrieval import retrieval_server, write_corpus
from tests.templates import make_family_tokenizer
from verl.trainer.precision import register_precision
from verl.trainer.schema import register_models
from verl.utils.device import has_cuda_engine

TESTS = Path(__file__).parent

# where a test starts Ray itself; at Ray's niceness of 15 whatever runs beside it starves it
os.environ.setdefault("RAY_worker_niceness", "0")

register_models()  # tests compose with Hydra itself
register_precision()

# the same examples on every machine
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


LONGEST_FILES = (
    "e2e/test_survival.py",
    "e2e/test_tutorial.py",
    "e2e/test_train.py",
    "e2e/test_evaluate.py",
    "e2e/test_two_nodes.py",
    "e2e/test_finetune.py",
    "e2e/test_closed_world.py",
    "e2e/test_images.py",
    "verl/rollout/test_families.py",
    "verl/rollout/test_progress.py",
    "e2e/test_infer.py",
    "verl/test_rehearsal.py",
    "verl/test_checkpoint.py",
    "verl/test_update.py",
    "verl/test_forward.py",
    "verl/rollout/test_vllm_server.py",
)
"""Below tests/, the longest first: whole runs and engines. Each is the work of one process, and a
long one that begins last leaves the other processes without any."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first; the order within a file, and of the others, stays."""
    places = {TESTS / name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests marked `cpu_engine` where vLLM is the build for CUDA.

    That happens before any fixture of the test.
    """
    if has_cuda_engine() and item.get_closest_marker("cpu_engine"):
        pytest.skip(
            "vLLM's build for CUDA runs no engine on the CPU; tests/gpu has what belongs on a GPU"
        )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A small tokenizer with Qwen's special tokens and chat template."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    """URL of a retrieval server over four passages."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, CORPUS)
    with retrieval_server(folder) as (url, _):
        yield url


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """The tokenizer of a family by its name in tests/templates.py, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = make_family_tokenizer(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get
