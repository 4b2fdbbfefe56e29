"""The prompting baselines of the paper's table 2, as variations of its own loop. Their texts are in
prompts.py."""

import re
from typing import Any, ClassVar

from search_r1.agent.actions import Answer, parse_action
from search_r1.agent.dialect import REACT, SEARCH_O1, Dialect
from search_r1.agent.loop import SearchAgentConfig, SearchAgentLoop, question_of
from search_r1.agent.observation import (
    encode_observation,
    encode_passages,
    neutralise,
    passages_text,
)
from search_r1.prompts import ANSWER_END, REASON_IN_DOCUMENTS_PROMPT, build_prompt
from search_r1.search.client import Passage
from verl.agent import Generate, Row, Segment, Source, Trajectory
from verl.utils.tokenizer import encode_text

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class ReActLoop(SearchAgentLoop):
    """Thought, action, observation (ReAct, arXiv 2210.03629)."""

    dialect: ClassVar[Dialect] = REACT


class SearchO1Loop(SearchAgentLoop):
    """Search-o1 (arXiv 2501.05366): a second call condenses the passages before the reasoning sees
    them."""

    dialect: ClassVar[Dialect] = SEARCH_O1

    async def _show(
        self,
        trajectory: Trajectory,
        stats: dict[str, Any],
        query: str,
        passages: list[Passage],
        emitted: str,
        generate: Generate,
    ) -> None:
        context = fit(
            self.tokenizer,
            passages_text([(p.title, p.text) for p in passages]),
            self.config.max_obs_length,
        )
        bare = self.ask(
            REASON_IN_DOCUMENTS_PROMPT.format(reasoning="", query=query, context=context)
        )
        room = max(1, self.config.max_prompt_length - len(bare))
        reasoning = self.tokenizer.decode(trajectory.response_ids[-room:], skip_special_tokens=True)
        side = self.ask(
            REASON_IN_DOCUMENTS_PROMPT.format(reasoning=reasoning, query=query, context=context)
        )
        completion = await generate(side, max_tokens=self.config.max_response_length)
        finding = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True).strip()
        ids, cut = encode_observation(
            neutralise(finding), self.tokenizer, self.config.max_obs_length, emitted, self.dialect
        )
        self._record(trajectory, stats, query, passages, ids, cut, condensed_from_tokens=len(side))


class RagLoop(SearchAgentLoop):
    """One search with the question, its passages in the prompt, one answer."""

    def __init__(self, config: SearchAgentConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self.max_searches = 0

    async def _begin(self, trajectory: Trajectory, stats: dict[str, Any], row: Row) -> None:
        question = question_of(row)
        passages = await self._search(stats, question)
        context = passages_text([(p.title, p.text) for p in passages])
        fitting = fit(self.tokenizer, context, self.config.max_obs_length)
        trajectory.prompt_ids = self.ask(
            build_prompt(question, self.config.template or "rag", fitting)
        )
        self._record(trajectory, stats, question, passages, [], cut=fitting != context)


class IRCoTLoop(SearchAgentLoop):
    """IRCoT (arXiv 2212.10509): every sentence of the reasoning is the next query; all passages
    stand above it.

    Contexts are written anew for every sentence, so these trajectories cannot be trained on.
    """

    trainable: ClassVar[bool] = False

    async def _begin(self, trajectory: Trajectory, stats: dict[str, Any], row: Row) -> None:
        stats["question"] = question_of(row)
        await self._collect(trajectory, stats, stats["question"])

    async def _collect(self, trajectory: Trajectory, stats: dict[str, Any], query: str) -> None:
        passages = await self._search(stats, query)
        pairs = [(p.title, p.text) for p in passages]
        ids, cut = encode_passages(pairs, self.tokenizer, self.config.max_obs_length, "")
        self._record(trajectory, stats, query, passages, ids, cut)

    async def _turn(
        self, trajectory: Trajectory, stats: dict[str, Any], generate: Generate, may_search: bool
    ) -> None:
        """A sentence; in the last turn all that is said."""
        context = self._context(trajectory, stats["question"])
        if len(context) > self.config.max_prompt_length:
            trajectory.stop_reason = "context"
            return
        completion = await generate(
            context, max_tokens=self.config.max_response_length, stop=[ANSWER_END]
        )
        stats["turns"] += 1
        text = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True).strip()
        said = SENTENCE_END.split(text, maxsplit=1)[0] if may_search else text
        answer = isinstance(parse_action(said)[0], Answer)
        if answer or not may_search:
            said = text[: parse_action(text)[1]]
        ids = encode_text(self.tokenizer, said + " ")
        trajectory.segments.append(
            Segment(Source.MODEL, ids, [0.0] * len(ids), completion.policy_version)
        )
        stats["valid_actions"] += answer or (may_search and bool(said))
        if answer:
            trajectory.stop_reason = "answer"
        elif not said:
            trajectory.stop_reason = "empty"
        elif not may_search:
            trajectory.stop_reason = "max_turns"
        else:
            await self._collect(trajectory, stats, said)

    def _context(self, trajectory: Trajectory, question: str) -> list[int]:
        """The prompt with every passage found so far, each once, and the sentences written so
        far."""
        found = [p for s in trajectory.segments for p in s.info.get("passages", ())]
        unique = list({p["id"]: (p["title"], p["text"]) for p in found}.values())
        room = self.config.max_prompt_length - self.config.max_start_length
        own = [t for s in trajectory.segments if s.source is Source.MODEL for t in s.token_ids]
        context = fit(self.tokenizer, passages_text(unique), max(1, room - len(own)))
        reasoning = self.tokenizer.decode(own, skip_special_tokens=True).strip()
        return self.ask(build_prompt(question, self.config.template or "ircot", context, reasoning))


def fit(tokenizer: Any, text: str, max_tokens: int) -> str:
    """`text` cut to its first `max_tokens` tokens."""
    ids = encode_text(tokenizer, text)
    return text if len(ids) <= max_tokens else tokenizer.decode(ids[:max_tokens])
