"""A task whose trajectories last, so that faults can hit the middle of one.

A trajectory has two turns, and a pause and a search between them.
"""

import asyncio
import time
from pathlib import Path

from search_r1.search.client import RetrievalClient, SearchError
from search_r1.search.client.config import RetrieverConfig
from verl.agent import AgentLoop, Trajectory, TrajectoryFailed
from verl.utils.config import Config
from verl.utils.reward import policy_text


class SlowConfig(Config):
    url: str = ""
    """Of a retrieval server; empty: no search."""
    pause_s: float = 0.0
    """Between the turns."""
    began: str = ""
    """File that says when a trajectory last reached the pause."""


class TwoTurns(AgentLoop):
    Config = SlowConfig

    def __init__(self, config, tokenizer):
        super().__init__(config, tokenizer)
        self.client = None

    async def run(self, prompt_ids, row, generate):
        trajectory = Trajectory(prompt_ids, stop_reason="stop")
        trajectory.add_completion(await generate(prompt_ids, max_tokens=16))
        if self.config.began:
            Path(self.config.began).write_text(str(time.time()))
        await asyncio.sleep(self.config.pause_s)
        text = await self.search(row["prompt"][0]["content"]) if self.config.url else "and"
        trajectory.add_observation(self.tokenizer.encode(text, add_special_tokens=False))
        trajectory.add_completion(await generate(trajectory.token_ids, max_tokens=16))
        return trajectory

    async def search(self, query):
        self.client = self.client or RetrievalClient(RetrieverConfig(url=self.config.url, topk=1))
        try:
            return (await self.client.search(query))[0].text
        except SearchError as error:
            raise TrajectoryFailed(str(error), 1) from error


class Length:
    """The longer the better."""

    Config = Config

    def __init__(self, config, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, trajectory, row):
        return {"score": len(policy_text(trajectory, self.tokenizer)) / 100}
