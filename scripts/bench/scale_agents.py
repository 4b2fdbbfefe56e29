"""The agent workers' part of scale.py: CPU seconds of a trajectory, and where they go."""

import asyncio
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from synthetic import FakeEngine, Words, World, make_tokenizer, serve
from transformers import AutoTokenizer

from search_r1.agent import dialects
from search_r1.agent.config import SearchAgentConfig
from search_r1.agent.loop import SearchAgentLoop
from search_r1.launch import free_port
from search_r1.rewards.compose import SearchReward
from search_r1.rewards.config import SearchRewardConfig
from search_r1.search.client import Passage
from search_r1.search.client.config import RetrieverConfig
from search_r1.search.noise import Noise
from verl import agent
from verl.agent import Source, Trajectory
from verl.rollout.agent_worker import AgentLoopWorker, Failure, Job
from verl.rollout.router import Router
from verl.single_controller.worker_group import get, ready, spawn
from verl.workers.config import SamplingConfig

Stopwatch = dict[str, float]
EVERY_JOB = 1 << 20
"""Under way at a time."""


def prepare(folder: Path, vocabulary: int, words: int) -> None:
    """Writes the tokenizer and the number of words, unless they are there from another run."""
    if not (folder / "words").exists():
        folder.mkdir(parents=True, exist_ok=True)
        make_tokenizer(folder, vocabulary, Words(words, seed=0))
        (folder / "words").write_text(str(words))


def load_world(folder: Path) -> World:
    """The same in every process."""
    words = int((folder / "words").read_text())
    return World(AutoTokenizer.from_pretrained(folder), Words(words, seed=1))


class FakeRetriever:
    """Finds passages at once."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def search(self, query: str, noise: Noise) -> list[Passage]:
        """The passages of a query, whatever noise is asked for."""
        found = self.world.found(query)
        return [
            Passage.from_contents(p["document"]["id"], p["document"]["contents"], p["score"])
            for p in found
        ]

    def take_errors(self) -> dict[str, int]:
        """None."""
        return {}


class AgentProcess(AgentLoopWorker):
    """An agent worker with the real loop and reward, and beside them stand-ins or what it is
    given."""

    def __init__(
        self, folder: Path, searches: int = 4, engines: Any = None, retriever: str | None = None
    ) -> None:
        self.world = load_world(folder)
        tokenizer = self.world.tokenizer
        turn = 500
        config = SearchAgentConfig(
            max_turns=searches,
            max_prompt_length=1024 * max(4, searches),
            max_response_length=turn,
            retriever=RetrieverConfig(url=retriever) if retriever else RetrieverConfig(),
        )
        self.agent = SearchAgentLoop(config, tokenizer)
        if retriever is None:
            assert self.agent.search is not None
            self.agent.search.client = FakeRetriever(self.world)  # pyright: ignore
        self.reward = SearchReward(SearchRewardConfig(em=1.0), tokenizer)
        self.engines = engines or FakeEngine(self.world)
        self.limit(EVERY_JOB)

    async def cpu_seconds(
        self, jobs: list[Job], sampling: dict[str, Any]
    ) -> tuple[float, int, int]:
        """CPU seconds of this process for the jobs, tokens that the engine made, and tokens in
        all."""
        began = time.process_time()
        done = trajectories_of(await self.run(jobs, sampling))
        seconds = time.process_time() - began
        return (
            seconds,
            sum(t.num_tokens(Source.MODEL) for t in done),
            sum(len(t.token_ids) for t in done),
        )


def trajectories_of(results: list[Trajectory | Failure]) -> list[Trajectory]:
    """Raises RuntimeError where one failed."""
    failed = [result for result in results if isinstance(result, Failure)]
    if failed:
        raise RuntimeError(f"{len(failed)} trajectories failed: {failed[0].message}")
    return [result for result in results if isinstance(result, Trajectory)]


def make_jobs(world: World, prompts: int, group: int) -> list[Job]:
    """`group` jobs for each of `prompts` questions."""
    jobs = []
    for number, row in enumerate(world.rows(prompts)):
        ids = world.tokenizer(row["prompt"][0]["content"])["input_ids"]
        jobs += [Job(f"u{number}", f"u{number}-{copy}", row, ids) for copy in range(group)]
    return jobs


def watched(owner: Any, name: str, label: str, spent: Stopwatch) -> None:
    """Replaces a function by one that adds its seconds of CPU to `spent`."""
    function: Callable[..., Any] = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[label] += time.thread_time() - began

    setattr(owner, name, timed)


def in_process(folder: Path, count: int, searches: int) -> dict[str, float]:
    """Milliseconds of CPU per trajectory by what takes them, without Ray and HTTP."""
    process = AgentProcess(folder, searches)
    jobs = make_jobs(process.world, count, 1)
    sampling = SamplingConfig().params()
    asyncio.run(process.cpu_seconds(jobs[: max(1, count // 10)], sampling))
    seconds, own, tokens = asyncio.run(process.cpu_seconds(jobs, sampling))
    spent: Stopwatch = defaultdict(float)
    watched(process.agent.tokenizer, "decode", "decode", spent)
    watched(dialects, "encode_observation", "encode passages", spent)
    watched(agent, "context_digest", "digest", spent)
    watched(process, "reward", "reward (with its decode)", spent)
    asyncio.run(process.cpu_seconds(jobs, sampling))
    per_trajectory = {f"{label} ms": 1000 * value / count for label, value in sorted(spent.items())}
    return {
        "tokens": tokens / count,
        "generated tokens": own / count,
        "all ms": 1000 * seconds / count,
        **per_trajectory,
        "generated tokens/s": own / seconds,
    }


def serve_world(folder: Path, port: int) -> None:
    """A process that is the retriever."""
    asyncio.run(serve(load_world(folder), port))


class EngineProcess(FakeEngine):
    """The engine in a process of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__(load_world(folder))


def with_transport(folder: Path, count: int) -> dict[str, float]:
    """The same with engine calls through Ray and searches through HTTP, of one agent worker. Ray
    must run."""
    port = free_port()
    server = multiprocessing.get_context("spawn").Process(
        target=serve_world, args=(folder, port), daemon=True
    )
    server.start()
    engine = spawn(EngineProcess, folder, num_cpus=0)
    worker = spawn(
        AgentProcess,
        folder,
        engines=Router([engine]),
        retriever=f"http://127.0.0.1:{port}/retrieve",
        num_cpus=0,
    )
    try:
        get([ready(engine), ready(worker)])
        jobs = make_jobs(load_world(folder), count, 1)
        sampling = SamplingConfig().params()
        get(worker.cpu_seconds.remote(jobs[: max(1, count // 10)], sampling))
        seconds, own, tokens = get(worker.cpu_seconds.remote(jobs, sampling))
    finally:
        server.terminate()
        server.join()
    return {
        "tokens": tokens / count,
        "generated tokens": own / count,
        "all ms": 1000 * seconds / count,
        "generated tokens/s": own / seconds,
    }
