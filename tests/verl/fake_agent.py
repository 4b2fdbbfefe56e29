"""An agent worker over an engine that answers at once, and an agent that fails when told to."""

import asyncio

from tests.models import make_tokenizer
from verl.agent import Completion, Trajectory, TrajectoryFailed, context_digest
from verl.rollout.agent_worker import AgentLoopWorker
from verl.rollout.router import Router


class Engine:
    """Answers every call with two tokens; `generate.remote` as on a Ray handle."""

    class generate:
        @staticmethod
        async def remote(request_id, prompt_ids, sampling):
            await asyncio.sleep(0)
            return Completion([1, 2], [-0.5, -0.25], "stop", None, 3, context_digest(prompt_ids))


class Breaking:
    """Fails the first `failures` runs of each question, in its second environment call."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.runs = {}

    async def run(self, prompt_ids, row, generate):
        name = row["name"]
        self.runs[name] = self.runs.get(name, 0) + 1
        trajectory = Trajectory(prompt_ids)
        trajectory.add_completion(await generate(prompt_ids, max_tokens=5, stop=["x"]))
        if self.runs[name] <= self.failures:
            raise TrajectoryFailed("retriever is down", num_calls=2)
        return trajectory


def make_worker(tmp_path, failures: int, max_under_way: int = 8) -> AgentLoopWorker:
    made = AgentLoopWorker.__new__(AgentLoopWorker)
    made.agent = Breaking(failures)
    made.engines = Router([Engine()])
    made.tokenizer = make_tokenizer(tmp_path)
    made.reward = lambda trajectory, row: {"score": 1.0}
    made.limit(max_under_way)
    return made


SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "log_probs": True}
