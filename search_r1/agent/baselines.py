"""The prompting baselines of the paper's table 2, as variations of its own loop.

Their texts are in prompts.py.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from search_r1.agent.actions import Answer, ToolCall, parse_action
from search_r1.agent.agent_data import AgentData
from search_r1.agent.condense import CondenseConfig, fit
from search_r1.agent.config import SearchAgentConfig
from search_r1.agent.dialects import Observation, TagWords
from search_r1.agent.loop import SearchAgentLoop
from search_r1.agent.observation import encode_observation, neutralise
from search_r1.prompts import (
    ANSWER_END,
    REACT_INVALID_ACTION,
    REACT_INVALID_MESSAGE,
    SEARCH_O1_INVALID_ACTION,
    SEARCH_O1_INVALID_MESSAGE,
    build_prompt,
    format_passages,
)
from search_r1.tools.base import SEARCH_TOOL
from search_r1.tools.formats import REACT, SEARCH_O1
from search_r1.trajectory import required_question
from verl.agent import Source, Trajectory
from verl.utils.errors import ConfigError

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class ReActLoop(SearchAgentLoop):
    """Thought, action, observation (ReAct, arXiv 2210.03629)."""

    words: ClassVar[TagWords] = TagWords(REACT, REACT_INVALID_ACTION, REACT_INVALID_MESSAGE)


class SearchO1Loop(SearchAgentLoop):
    """Search-o1 (arXiv 2501.05366): a second call of the engine condenses what a search found."""

    words: ClassVar[TagWords] = TagWords(
        SEARCH_O1, SEARCH_O1_INVALID_ACTION, SEARCH_O1_INVALID_MESSAGE
    )

    def __init__(self, config: SearchAgentConfig, tokenizer: Any) -> None:
        if config.condense.by is not None:
            message = "agent.condense: Search-o1 shortens results itself; remove the section"
            raise ConfigError([message])
        condense = CondenseConfig(
            by="policy",
            train=False,
            max_tokens=config.max_response_length,
            max_result_tokens=config.max_obs_length,
        )
        super().__init__(config.model_copy(update={"condense": condense}), tokenizer)


class RagLoop(SearchAgentLoop):
    """One search with the question, its passages in the prompt, one answer."""

    calls_tools: ClassVar[bool] = False

    def __init__(self, config: SearchAgentConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self.max_calls = 0

    async def _begin(self, data: AgentData) -> None:
        """Searches, and makes the prompt with what was found."""
        question = required_question(data.row)
        call = ToolCall(SEARCH_TOOL, {"query": question})
        (found,) = await self._execute(data, [call])
        context = neutralise(found.response.text)
        fitting = fit(self.tokenizer, context, self.config.max_obs_length)
        template = self.config.template or "rag"
        data.trajectory.prompt_ids = self.ask(build_prompt(question, template, fitting))
        self._observe(data, call, found, Observation([], cut=fitting != context))


class IRCoTLoop(SearchAgentLoop):
    """IRCoT (arXiv 2212.10509): every sentence of the reasoning is the next query.

    All passages stand above the reasoning. Contexts are written anew for every sentence, so that a
    trajectory has a row for each. Of what was sampled, the tokens up to the end of the sentence are
    kept and trained.
    """

    calls_tools: ClassVar[bool] = False
    rewrites_contexts: ClassVar[bool] = True

    async def _begin(self, data: AgentData) -> None:
        """Searches for the question."""
        question = required_question(data.row)
        data.trajectory.info["question"] = question
        await self._collect(data, question)

    async def _collect(self, data: AgentData, query: str) -> None:
        """Searches, and appends what was found."""
        call = ToolCall(SEARCH_TOOL, {"query": query})
        (found,) = await self._execute(data, [call])
        text = neutralise(found.response.text)
        ids, cut = encode_observation(text, self.tokenizer, self.config.max_obs_length, "")
        self._observe(data, call, found, Observation(ids, cut))

    async def _turn(self, data: AgentData, may_call: bool) -> None:
        """Generates a sentence; in the last turn all that is said."""
        trajectory = data.trajectory
        context = self._context(trajectory, required_question(data.row))
        if len(context) > self.config.max_prompt_length:
            trajectory.stop_reason = "context"
            trajectory.truncated = True
            return
        trajectory.rewrite(context)
        completion = await data.generate(
            context, max_tokens=self.config.max_response_length, stop=[ANSWER_END]
        )
        data.turns += 1
        text = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True).strip()
        said, is_answer = self._next_sentence(text, may_call)
        size = num_tokens_of(self.tokenizer, completion.token_ids, said)
        is_whole = size == len(completion.token_ids)
        kept = replace(
            completion,
            token_ids=completion.token_ids[:size],
            log_probs=completion.log_probs[:size],
            finish_reason=completion.finish_reason if is_whole else "stop",
        )
        trajectory.add_completion(kept, turn=data.turns)
        data.valid_actions += is_answer or (may_call and bool(said))
        if is_answer:
            trajectory.stop_reason = "answer"
        elif not said:
            trajectory.stop_reason = "empty"
        elif not may_call:
            trajectory.stop_reason = "max_turns"
        else:
            await self._collect(data, said)

    def _next_sentence(self, text: str, may_call: bool) -> tuple[str, bool]:
        """What of a generated text is kept, and whether it answers.

        That is the first sentence, and everything up to the answer in the last turn, or where the
        sentence holds an answer.
        """
        said = SENTENCE_END.split(text, maxsplit=1)[0] if may_call else text
        is_answer = isinstance(parse_action(said)[0], Answer)
        if is_answer or not may_call:
            said = text[: parse_action(text)[1]]
        return said, is_answer

    def _context(self, trajectory: Trajectory, question: str) -> list[int]:
        """The prompt with every passage found so far, each once, and the sentences so far."""
        found = [p for s in trajectory.segments for p in s.info.get("passages", ())]
        unique = {p["id"]: (p["title"], p["text"]) for p in found}
        passages = neutralise(format_passages(list(unique.values())))
        own = [s.token_ids for s in trajectory.segments if s.source is Source.MODEL]
        sentences = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in own]
        reasoning = " ".join(sentences)
        room = self.config.max_prompt_length - self.config.max_start_length - sum(map(len, own))
        context = fit(self.tokenizer, passages, max(1, room))
        return self.ask(build_prompt(question, self.config.template or "ircot", context, reasoning))


def num_tokens_of(tokenizer: Any, token_ids: Sequence[int], said: str) -> int:
    """How many of the tokens it takes to say `said`, with which their text begins."""
    for size in range(len(token_ids)):
        if len(tokenizer.decode(token_ids[:size], skip_special_tokens=True).lstrip()) >= len(said):
            return size
    return len(token_ids)
