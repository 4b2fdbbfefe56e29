"""Failures of the environment: a trajectory is run twice, then given up; nothing of it reaches the policy."""

import asyncio

from tests.models import make_tokenizer
from verl.agent import Completion, Trajectory, TrajectoryFailed, context_digest
from verl.workers.rollout.agent_worker import AgentLoopWorker, Failure, Job
from verl.workers.rollout.router import Router


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
        self.failures, self.runs = failures, {}

    async def run(self, prompt_ids, row, generate):
        name = row["name"]
        self.runs[name] = self.runs.get(name, 0) + 1
        trajectory = Trajectory(prompt_ids)
        trajectory.add_completion(await generate(prompt_ids, max_tokens=5, stop=["x"]))
        if self.runs[name] <= self.failures:
            raise TrajectoryFailed("retriever is down", num_calls=2)
        return trajectory


def worker(tmp_path, failures: int) -> AgentLoopWorker:
    made = AgentLoopWorker.__new__(AgentLoopWorker)
    made.agent, made.engines = Breaking(failures), Router([Engine()])
    made.tokenizer = make_tokenizer(tmp_path)
    made.reward = lambda trajectory, row: {"score": 1.0}
    return made


SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "log_probs": True}


async def test_one_failure_is_repeated_from_the_start(tmp_path):
    (result,) = await worker(tmp_path, 1).run([Job("u", "s", {"name": "a"}, [7])], SAMPLING)
    assert isinstance(result, Trajectory) and result.token_ids == [7, 1, 2] and result.reward == {"score": 1.0}
    assert result.context_violations == 0


async def test_two_failures_give_it_up_with_the_number_of_searches(tmp_path):
    jobs = [Job("u", f"s{i}", {"name": str(i)}, [7]) for i in range(3)]
    made = worker(tmp_path, 2)
    assert await made.run(jobs, SAMPLING) == [Failure("retriever is down", 2)] * 3
    assert made.engines.load == [0]
