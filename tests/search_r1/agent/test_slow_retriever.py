"""Engines that are much faster than the retriever: everything real but the engine, which answers at
once."""

import asyncio
import time

import pytest

from search_r1.agent.config import SearchAgentConfig
from search_r1.agent.loop import SearchAgentLoop
from search_r1.search.client.config import RetrieverConfig
from tests.models import make_tokenizer
from tests.retrieval import serving, wait_until_ready
from tests.search_r1.search.echo import app
from verl.agent import Completion, Trajectory, context_digest
from verl.rollout.agent_worker import AgentLoopWorker, Job
from verl.rollout.router import Router
from verl.utils.tokenizer import encode_text

QUESTIONS = 600
SECONDS_PER_QUERY = 0.02
DEADLINE_S = 4.0
"""All questions take the retriever 12 s: three times as long as a request may take."""
BATCH = 20
"""Queries that the server hands to the engine at a time."""
SAMPLING = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "log_probs": True}


class SlowLibrary:
    """Finds the query itself, and takes its time over each."""

    name = "slow"

    def __len__(self):
        return 1

    def search(self, queries, topk):
        time.sleep(SECONDS_PER_QUERY * len(queries))
        return [[({"id": "0", "contents": f'"T"\n{query}'}, 1.0)] for query in queries]


class Engine:
    """Searches for the question, then answers; `generate.remote` as on a Ray handle."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.generate = self

    async def remote(self, request_id, prompt_ids, sampling):
        text = self.tokenizer.decode(prompt_ids)
        question = text.split("?")[0]
        turn = (
            "<answer> found </answer>"
            if "<information>" in text
            else f"<search> {question} </search>"
        )
        ids = encode_text(self.tokenizer, turn)
        return Completion(ids, [-0.5] * len(ids), "stop", None, 1, context_digest(prompt_ids))


def make_worker(tokenizer, url, window):
    """An agent worker with a real loop and a real client, and so many trajectories under way."""
    retriever = RetrieverConfig(url=url, timeout_s=DEADLINE_S)
    config = SearchAgentConfig(retriever=retriever)
    made = AgentLoopWorker.__new__(AgentLoopWorker)
    made.agent = SearchAgentLoop(config, tokenizer)
    made.reward = lambda trajectory, row: {"score": 1.0}
    made.engines = Router([Engine(tokenizer)])
    made.limit(window)
    return made


@pytest.mark.parametrize("window", [16, QUESTIONS])
async def test_many_questions_at_once_and_no_trajectory_fails(tmp_path, window):
    tokenizer = make_tokenizer(tmp_path)
    jobs = [
        Job(f"u{i}", f"s{i}", {}, encode_text(tokenizer, f"What is {i} ?"))
        for i in range(QUESTIONS)
    ]
    server = app(SlowLibrary(), max_batch_size=BATCH, request_timeout_s=DEADLINE_S)
    with serving(server) as base:
        wait_until_ready(f"{base}/health")
        made = make_worker(tokenizer, f"{base}/retrieve", window)
        first, second = await asyncio.gather(
            made.run(jobs[: QUESTIONS // 2], SAMPLING), made.run(jobs[QUESTIONS // 2 :], SAMPLING)
        )
        await made.agent.close()
    results = first + second
    assert all(isinstance(result, Trajectory) for result in results)
    assert [result.info["searches"] for result in results] == [1] * QUESTIONS
    assert made.finished == {}
