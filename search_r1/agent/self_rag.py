"""Self-RAG as a prompting baseline: retrieve on demand, then let the model judge itself.

    needs passages? --no--> answer
        | yes
        search: for each passage   relevant? --yes--> answer --> supported by the passage?
        the answer that its passage supports best

The paper (arXiv 2310.11511) trains a model to say reflection tokens and weighs their probabilities.
Here nothing is trained: an untrained model is asked for each verdict in words, and verdicts count
as what they say. There is one search, with the question, as in the paper's runs on short answers.
"""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from search_r1.agent.actions import ToolCall, Turn, stop_reason
from search_r1.agent.agent_data import AgentData
from search_r1.agent.condense import fit
from search_r1.agent.config import SearchAgentConfig
from search_r1.agent.dialects import Observation
from search_r1.agent.loop import SearchAgentLoop
from search_r1.agent.observation import neutralise, tag_pattern
from search_r1.prompts import (
    ANSWER_END,
    SELF_RAG_NEED_PROMPT,
    SELF_RAG_RELEVANCE_PROMPT,
    SELF_RAG_SUPPORT_PROMPT,
    VERDICT_END,
    build_prompt,
    format_passages,
    with_mark,
)
from search_r1.tools.base import SEARCH_TOOL
from search_r1.trajectory import required_question
from verl.agent import Completion

CRITIQUE_KIND = "critique"
"""In the `info` of a segment in which the model judges, beside the answer."""
CANDIDATE_KIND = "candidate"
"""In the `info` of a segment with an answer that another one was preferred to."""
VERDICT = re.compile(r"<verdict>(.*?)</verdict>", re.DOTALL)
TAG = tag_pattern(native_tags=["verdict"])
"""What no passage and no judged answer may hold."""
SUPPORT = {"full": 2, "partial": 1, "none": 0}
"""How much a passage supports an answer, by the verdict."""


@dataclass(frozen=True)
class Reply:
    """What the model said to a request of its own."""

    prompt_ids: list[int]
    completion: Completion
    verdict: str = ""
    """In lower case; empty where it gave none."""


@dataclass(frozen=True)
class Candidate:
    """An answer, and what the model thinks of it."""

    reply: Reply
    turn: Turn
    support: Reply | None = None
    """Whether its passage supports it; None for an answer without a passage."""

    @property
    def rank(self) -> tuple[bool, int]:
        """What orders candidates: whether there is an answer at all, then how well supported."""
        verdict = self.support.verdict if self.support is not None else ""
        return self.turn.answer is not None, SUPPORT.get(verdict, 0)


class SelfRagLoop(SearchAgentLoop):
    """Retrieves on demand and takes the answer that is supported best.

    Everything but that answer is an aside. A verdict that cannot be read counts as the cautious
    one: passages are needed, a passage is not relevant, an answer is not supported.
    """

    calls_tools: ClassVar[bool] = False
    rewrites_contexts: ClassVar[bool] = True
    is_evaluated_alone: ClassVar[bool] = True

    def __init__(self, config: SearchAgentConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self.max_calls = 0

    async def _begin(self, data: AgentData) -> None:
        """Asks whether passages are needed, and searches for the question if they are."""
        question = required_question(data.row)
        text = SELF_RAG_NEED_PROMPT.format(question=with_mark(question))
        need = await self._judge(data, text)
        data.trajectory.prompt_ids = need.prompt_ids
        self._add_critique(data, need, of="need")
        if need.verdict == "no":
            return
        call = ToolCall(SEARCH_TOOL, {"query": question})
        (found,) = await self._execute(data, [call])
        self._observe(data, call, found, Observation([]))

    async def _turn(self, data: AgentData, may_call: bool) -> None:
        """Answers with each relevant passage, or without one, and says the best answer."""
        passages = self._passages(data)
        relevance = await asyncio.gather(*(self._relevance(data, p) for p in passages))
        for reply in relevance:
            self._add_critique(data, reply, of="relevance")
        relevant = [
            passage
            for passage, reply in zip(passages, relevance, strict=True)
            if reply.verdict == "yes"
        ]
        contexts: Sequence[str | None] = relevant or [None]
        candidates = await asyncio.gather(*(self._answer(data, c) for c in contexts))
        best = max(candidates, key=lambda candidate: candidate.rank)  # the first of equal ones
        for candidate in candidates:
            if candidate is not best:
                self._add_aside(data, candidate.reply, kind=CANDIDATE_KIND)
            if candidate.support is not None:
                self._add_critique(data, candidate.support, of="support")
        self._say(data, best)

    def _passages(self, data: AgentData) -> list[str]:
        """The passages that the search found, each as a prompt has it."""
        found = [
            passage
            for segment in data.trajectory.segments
            for passage in segment.info.get("passages", ())
        ]
        texts = [neutralise(format_passages([(p["title"], p["text"])]), TAG) for p in found]
        return [fit(self.tokenizer, text, self.config.max_obs_length) for text in texts]

    async def _relevance(self, data: AgentData, passage: str) -> Reply:
        """Whether a passage helps to answer the question."""
        question = with_mark(required_question(data.row))
        text = SELF_RAG_RELEVANCE_PROMPT.format(question=question, context=passage)
        return await self._judge(data, text)

    async def _answer(self, data: AgentData, passage: str | None) -> Candidate:
        """An answer with a passage or without any, and whether the passage supports it."""
        question = with_mark(required_question(data.row))
        template = "r1" if passage is None else self.config.template or "rag"
        prompt = build_prompt(question, template, passage or "")
        reply = await self._generate(data, prompt, ANSWER_END)
        turn = self.dialect.parse(reply.completion.token_ids)
        if passage is None or turn.answer is None:
            return Candidate(reply, turn)
        text = SELF_RAG_SUPPORT_PROMPT.format(
            question=question, context=passage, answer=neutralise(turn.answer, TAG)
        )
        return Candidate(reply, turn, await self._judge(data, text))

    async def _judge(self, data: AgentData, text: str) -> Reply:
        """The model's verdict on what a text asks."""
        reply = await self._generate(data, text, VERDICT_END)
        said = self.tokenizer.decode(reply.completion.token_ids, skip_special_tokens=True)
        found = VERDICT.search(said)
        verdict = found[1].strip().lower() if found else ""
        return Reply(reply.prompt_ids, reply.completion, verdict)

    async def _generate(self, data: AgentData, text: str, stop: str) -> Reply:
        """What the model says to a text, up to `stop`."""
        prompt_ids = self.ask(text)
        completion = await data.generate(
            prompt_ids, max_tokens=self.config.max_response_length, stop=[stop]
        )
        return Reply(prompt_ids, completion)

    def _add_critique(self, data: AgentData, reply: Reply, of: str) -> None:
        """Appends a verdict, and on what it is."""
        self._add_aside(data, reply, kind=CRITIQUE_KIND, of=of, verdict=reply.verdict)

    def _add_aside(self, data: AgentData, reply: Reply, **facts: Any) -> None:
        """Appends what the model said in a context of its own."""
        data.trajectory.rewrite(reply.prompt_ids)
        data.trajectory.add_completion(reply.completion, is_aside=True, turn=data.turns, **facts)

    def _say(self, data: AgentData, best: Candidate) -> None:
        """Ends the trajectory with an answer."""
        trajectory = data.trajectory
        completion = best.reply.completion
        data.turns += 1
        data.valid_actions += best.turn.answer is not None
        trajectory.rewrite(best.reply.prompt_ids)
        trajectory.stop_reason = stop_reason(completion, best.turn, may_call=False)
        trajectory.void_turns += best.turn.is_void
        self._add_turn(trajectory, completion, is_last=True, turn=data.turns)
