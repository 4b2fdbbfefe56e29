"""The agent loop of benchmarks, and questions for it: every turn searches, and what it finds is
there at once."""

from pathlib import Path

from search_r1.agent.actions import ToolCall
from search_r1.agent.agent_data import AgentData, Answered
from search_r1.agent.dialects import Observation
from search_r1.agent.loop import SearchAgentLoop
from search_r1.agent.observation import encode_passages
from search_r1.tools.base import SEARCH_TOOL, ToolResponse

TEXT = "Dupsel joined Fonzuv. Dupsel elected Mebkol. Sogvig inhabits Dupsel. Sogvig serves Zogpug."
MIN_TURN = 32
"""Tokens; turns of equal length would all end at once, which real ones do not."""
FOUND = [{"id": str(i), "title": f'"Title {i}"', "text": TEXT, "score": 1.0} for i in range(3)]
PAIRS = [(f'"Title {i}"', TEXT) for i in range(3)]


def write_questions(path: Path | str, count: int) -> None:
    """A file of questions whose answers nobody knows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "data_source": "bench",
            "prompt": [
                {"role": "user", "content": f"Question: Where does person number {i} live?\n"}
            ],
            "ability": "fact-reasoning",
            "reward_model": {"style": "rule", "ground_truth": {"target": ["x"]}},
            "extra_info": {"question": f"{i}"},
        }
        for i in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


class InstantLoop(SearchAgentLoop):
    """All of the loop's work but parsing and the request: the random model's text holds no
    query."""

    def preflight(self) -> list[str]:
        return []

    async def _turn(self, data: AgentData, may_call: bool) -> None:
        trajectory = data.trajectory
        length = MIN_TURN + hash((*trajectory.prompt_ids, data.turns)) % (
            self.config.max_response_length - MIN_TURN
        )
        completion = await data.generate(
            trajectory.token_ids, max_tokens=length, stop=["</search>", "</answer>"]
        )
        data.turns += 1
        trajectory.add_completion(completion, turn=data.turns)
        if not may_call:
            trajectory.stop_reason = "answer"
            return
        query = self.tokenizer.decode(completion.token_ids)
        ids, cut = encode_passages(PAIRS, self.tokenizer, self.config.max_obs_length, "")
        response = ToolResponse("", facts={"query": query, "passages": FOUND})
        call = ToolCall(SEARCH_TOOL, {"query": query})
        self._observe(data, call, Answered(response), Observation(ids, cut))
