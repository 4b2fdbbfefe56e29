"""One trajectory: generate, parse, search, splice, generate.

    <think> .. </think> <search> q </search> | \\n\\n<information>..</information>\\n\\n | ..
    <answer> a </answer>
    MODEL                                     OBSERVATION                              MODEL

`max_turns` turns may search; one more, forced, may only answer. The policy's tokens are kept as
they were sampled, also where a token that completes a tag runs past it (`>\\n\\n`): text is only
decoded to find the action.

A policy may end its turn (`<|im_end|>`, EOS) although the trajectory goes on. Where the chat
template ends turns with that token, it stays and is trained, and the environment answers with a
user's message, written as the template writes it. Any other such token is the end of a document,
after which no model goes on reading: it is left out of the trajectory, untrained, and the
environment goes on in the policy's turn, as in the original. docs/templates.md shows whole
trajectories.
"""

import time
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import PositiveInt, field_validator

from search_r1.agent.actions import Answer, Invalid, Search, parse_action
from search_r1.agent.dialect import SEARCH_R1, Dialect
from search_r1.agent.metrics import reduce_metrics
from search_r1.agent.observation import encode_passages
from search_r1.prompts import ANSWER_END, TEMPLATES, build_prompt
from search_r1.search.client import Passage, RetrievalClient, SearchError, check_server
from search_r1.search.client.config import RetrieverConfig
from verl.agent import Completion, Generate, Row, Trajectory, TrajectoryFailed
from verl.utils.config import Config
from verl.utils.errors import DataError
from verl.utils.tokenizer import encode_chat, encode_text, end_of_turn, user_turn


class SearchAgentConfig(Config):
    max_turns: PositiveInt = 4
    """Turns that may search; one more turn, without search, is forced after them."""
    do_search: bool = True
    """False: one turn without search, the R1 baseline."""
    template: str | None = None
    """Prompt template to ask `extra_info.question` in; null: the prompt of the data."""
    apply_chat_template_kwargs: dict[str, Any] = {}
    """Further arguments of the tokenizer's chat template, for prompts made from `template`."""
    max_start_length: PositiveInt = 2048
    """Longest prompt, in tokens."""
    max_prompt_length: PositiveInt = 4096
    """Longest context of any turn, in tokens; a trajectory that reaches it ends."""
    max_response_length: PositiveInt = 500
    """Most tokens of one turn."""
    max_obs_length: PositiveInt = 500
    """Most tokens of one observation; passages are cut inside their block."""
    stop_at_answer: bool = True
    """End a turn at </answer>; false lets the policy emit EOS itself."""
    retriever: RetrieverConfig = RetrieverConfig()

    @field_validator("template")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in TEMPLATES:
            raise ValueError(f"expected null or one of {', '.join(TEMPLATES)}")
        return value


class SearchAgentLoop:
    """Search-R1's loop over the plain tags (arXiv 2503.09516, algorithm 1)."""

    Config: ClassVar = SearchAgentConfig
    top_level_keys: ClassVar = frozenset(
        {"max_turns", "do_search", "template", "method_suffix", "retriever", "setup", "finetune"}
    )
    dialect: ClassVar[Dialect] = SEARCH_R1
    reduce_metrics = staticmethod(reduce_metrics)

    def __init__(self, config: SearchAgentConfig, tokenizer: Any) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.client = RetrievalClient(config.retriever) if config.do_search else None
        self.invalid_ids = encode_text(tokenizer, self.dialect.invalid)
        self.invalid_message_ids = encode_text(tokenizer, self.dialect.invalid_message)
        self.user_turn = user_turn(tokenizer, **config.apply_chat_template_kwargs)
        self.turn_ends = {
            tokenizer.eos_token_id,
            end_of_turn(tokenizer, **config.apply_chat_template_kwargs),
        }
        head = self.dialect.head
        self.head_margin = head[: len(head) - len(head.lstrip())]
        self.max_searches = config.max_turns if config.do_search else 0

    def preflight(self) -> list[str]:
        """Budgets that cannot hold one search, and a retriever that does not answer."""
        config = self.config
        problems = []
        if config.max_start_length > config.max_prompt_length:
            problems.append(
                f"data.max_prompt_length={config.max_prompt_length} is less than "
                "data.max_start_length="
                f"{config.max_start_length}"
            )
        least = config.max_start_length + config.max_response_length + config.max_obs_length
        if config.do_search and least > config.max_prompt_length:
            problems.append(
                f"data.max_prompt_length={config.max_prompt_length} has no room for one search: "
                f"data.max_start_length + data.max_response_length + data.max_obs_length = {least}"
            )
        tags = len(
            encode_passages([], self.tokenizer, config.max_prompt_length, "", self.dialect)[0]
        )
        if config.do_search and config.max_obs_length < 2 * tags:
            problems.append(
                f"data.max_obs_length={config.max_obs_length} has no room for a passage: "
                f"{(self.dialect.head + self.dialect.tail).strip()} takes {tags}"
            )
        checks = [check_server(url) for url in config.retriever.urls] if config.do_search else []
        problems += [f"retriever.url: {problem}" for problem in checks if problem]
        return problems

    async def close(self) -> None:
        if self.client is not None:
            await self.client.close()

    async def run(self, prompt_ids: list[int], row: Row, generate: Generate) -> Trajectory:
        """The trajectory of one question. Raises TrajectoryFailed when a search fails for good."""
        stats: dict[str, Any] = dict.fromkeys(("turns", "valid_actions", "searches", "cut"), 0)
        stats |= {"overruns": [], "latency_s": []}
        extra = row.get("extra_info") or {}
        stats |= {
            key: extra[key]
            for key in ("hops", "gold_ids", "gold_titles")
            if extra.get(key) is not None
        }
        trajectory = Trajectory(list(prompt_ids), info=stats)
        await self._begin(trajectory, stats, row)
        while not trajectory.stop_reason:
            await self._turn(
                trajectory, stats, generate, may_search=stats["turns"] < self.max_searches
            )
        if (
            self.client is not None
        ):  # of all trajectories since the last one that ended: right in the sum
            stats["search_errors"] = self.client.take_errors()
        return trajectory

    async def _begin(self, trajectory: Trajectory, stats: dict[str, Any], row: Row) -> None:
        """Before the first turn: the prompt, where it is not that of the data."""
        if self.config.template is not None:
            trajectory.prompt_ids = self.ask(build_prompt(question_of(row), self.config.template))

    def ask(self, text: str) -> list[int]:
        """Ids of a text as the only message of a user."""
        messages = [{"role": "user", "content": text}]
        return encode_chat(self.tokenizer, messages, **self.config.apply_chat_template_kwargs)

    async def _turn(
        self, trajectory: Trajectory, stats: dict[str, Any], generate: Generate, may_search: bool
    ) -> None:
        """One generation and what answers it; sets `stop_reason` when it was the last."""
        context = trajectory.token_ids
        if len(context) > self.config.max_prompt_length:
            trajectory.stop_reason = "context"
            trajectory.truncated = True
            return
        stop = [self.dialect.stop] * (self.max_searches > 0) + [
            ANSWER_END
        ] * self.config.stop_at_answer
        completion = await generate(context, max_tokens=self.config.max_response_length, stop=stop)
        stats["turns"] += 1
        text = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        action, end = parse_action(text, self.dialect.search)
        is_last = not completion.token_ids or isinstance(action, Answer) or not may_search
        self._add_turn(trajectory, completion, is_last, turn=stats["turns"])
        trajectory.void_turns += isinstance(action, Invalid)
        if text[end:]:
            stats["overruns"].append(text[end:])
        if not completion.token_ids:
            trajectory.stop_reason = "empty"
        elif isinstance(action, Answer):
            stats["valid_actions"] += 1
            trajectory.stop_reason = "answer"
        elif not may_search:
            trajectory.stop_reason = "max_turns"
        elif isinstance(action, Search):
            stats["valid_actions"] += 1
            passages = await self._search(stats, action.query)
            emitted = self.head_margin if has_ended(trajectory) else text[end:]
            await self._show(trajectory, stats, action.query, passages, emitted, generate)
        else:
            assert isinstance(action, Invalid)
            ids = self.invalid_message_ids if has_ended(trajectory) else self.invalid_ids
            self._reply(trajectory, ids, turn=stats["turns"], kind="invalid_action")

    def _add_turn(
        self, trajectory: Trajectory, completion: Completion, is_last: bool, turn: int
    ) -> None:
        """Appends what the policy wrote. In its info stand `ended_by`, the token by which the
        policy ended its turn, or `left_out`, the same where it has no place in a trajectory that
        goes on."""
        facts: dict[str, Any] = {"turn": turn, "finish_reason": completion.finish_reason}
        last = completion.token_ids[-1] if completion.token_ids else None
        if last is not None and (last in self.turn_ends or last == completion.stop_reason):
            if is_last or last in self.user_turn.before:
                facts["ended_by"] = last
            else:
                facts["left_out"] = last
                completion = replace(
                    completion,
                    token_ids=completion.token_ids[:-1],
                    log_probs=completion.log_probs[:-1],
                )
        trajectory.add_completion(completion, **facts)

    def _reply(self, trajectory: Trajectory, ids: list[int], **facts: Any) -> None:
        """Appends what the environment says: in the policy's turn, or where it has ended that, as a
        user's message."""
        if has_ended(trajectory):
            ids = self.user_turn.following(trajectory.segments[-1].info["ended_by"], ids)
        trajectory.add_observation(ids, **facts)

    async def _search(self, stats: dict[str, Any], query: str) -> list[Passage]:
        """What a query finds, counted and timed in `stats`. Raises TrajectoryFailed."""
        assert self.client is not None
        began = time.perf_counter()
        try:
            passages = await self.client.search(query)
        except SearchError as error:
            raise TrajectoryFailed(str(error), num_calls=stats["searches"] + 1) from error
        stats["searches"] += 1
        stats["latency_s"].append(time.perf_counter() - began)
        return passages

    async def _show(
        self,
        trajectory: Trajectory,
        stats: dict[str, Any],
        query: str,
        passages: list[Passage],
        emitted: str,
        generate: Generate,
    ) -> None:
        """Splices in what a search found; `emitted` is what of the block's head stands already,
        after the query."""
        pairs = [(p.title, p.text) for p in passages]
        ids, cut = encode_passages(
            pairs, self.tokenizer, self.config.max_obs_length, emitted, self.dialect
        )
        self._record(trajectory, stats, query, passages, ids, cut)

    def _record(
        self,
        trajectory: Trajectory,
        stats: dict[str, Any],
        query: str,
        passages: list[Passage],
        ids: list[int],
        cut: bool,
        **facts: Any,
    ) -> None:
        """Appends an observation with the facts of the last search."""
        stats["cut"] += cut
        shown = [{"id": p.id, "title": p.title, "text": p.text, "score": p.score} for p in passages]
        facts |= {
            "kind": "search",
            "query": query,
            "passages": shown,
            "latency_s": stats["latency_s"][-1],
            "cut": cut,
        }
        self._reply(trajectory, ids, turn=stats["turns"], **facts)


def has_ended(trajectory: Trajectory) -> bool:
    """Whether the policy, the last to write, has ended its turn by a token of the chat template."""
    return bool(trajectory.segments) and "ended_by" in trajectory.segments[-1].info


def question_of(row: Row) -> str:
    """The question of a row. Raises DataError where the data hold only its prompt."""
    question = (row.get("extra_info") or {}).get("question") or row.get("question")
    if not question:
        raise DataError(
            f"a {row.get('data_source')} row has no extra_info.question, which `template` needs: "
            "prepare it anew"
        )
    return str(question)
