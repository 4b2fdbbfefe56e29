"""One trajectory: generate, parse, call a tool, splice its result in, generate.

    <think> .. </think> <search> q </search>  MODEL
    \\n\\n<information> .. </information>\\n\\n   OBSERVATION
    <think> .. </think> <answer> a </answer>  MODEL

`max_turns` turns may call a tool, which is search unless `tools` adds others; one more, forced, may
only answer. The policy's tokens are kept as they were sampled, also where a token that completes a
tag runs past it (`>\\n\\n`): text is only decoded to find the action.

A policy may end its turn (`<|im_end|>`, EOS) although the trajectory goes on. Where the chat
template ends turns with that token, it stays and is trained, and the environment answers with a
user's message, written as the template writes it. Any other such token is the end of a document,
after which no model goes on reading: it is left out of the trajectory, untrained, and the
environment goes on in the policy's turn, as in the original. docs/templates.md shows whole
trajectories.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from search_r1.agent.actions import ToolCall, Turn, stop_reason
from search_r1.agent.agent_data import AgentData, Answered
from search_r1.agent.checks import (
    budget_problems,
    fold_problems,
    format_problems,
    image_problems,
    method_problems,
)
from search_r1.agent.condense import Condenser
from search_r1.agent.config import TAGS, SearchAgentConfig
from search_r1.agent.contexts import Contexts, summary_of
from search_r1.agent.dialects import Dialect, Observation, TagDialect, TagWords
from search_r1.agent.metrics import reduce_metrics
from search_r1.config import FinetuneConfig, SetupConfig
from search_r1.prompts import (
    INVALID_ACTION,
    INVALID_MESSAGE,
    LEFT_OUT,
    SUMMARY_END,
    budget,
    build_prompt,
    remaining,
)
from search_r1.tools.base import Tool, ToolFailed, ToolResponse
from search_r1.tools.formats import SEARCH_R1
from search_r1.tools.search import SearchTool, searching_at
from search_r1.tools.sections import build_tools, naming_problems
from search_r1.tools.toolbox import Toolbox, answering
from search_r1.trajectory import FINDING_KIND, SUMMARY_KIND, SUMMARY_REQUEST, required_question
from verl.agent import (
    TRAINING_STEP,
    AgentLoop,
    Completion,
    Generate,
    Row,
    Trajectory,
    TrajectoryFailed,
)
from verl.utils.errors import DataError
from verl.utils.images import ImageReader, images_of
from verl.utils.tokenizer import end_of_turn, user_turn

CHARS_PER_TOKEN = 64
"""More than any text has on average: what is longer is cut before it is encoded."""


class SearchAgentLoop(AgentLoop):
    """Search-R1's loop over the plain tags (arXiv 2503.09516, algorithm 1)."""

    Config: ClassVar = SearchAgentConfig
    top_level_keys: ClassVar = frozenset(
        {"max_turns", "do_search", "template", "method_suffix", "retriever", "setup", "finetune"}
    )
    sections: ClassVar = {"setup": SetupConfig, "finetune": FinetuneConfig}
    """Models of the top-level sections that are not passed to the loop."""
    calls_tools: ClassVar[bool] = True
    """False where the method itself decides what is called: such a method has search alone."""
    reads_images: ClassVar[bool] = True
    words: ClassVar[TagWords] = TagWords(SEARCH_R1, INVALID_ACTION, INVALID_MESSAGE)
    """How the method speaks in tags."""
    reduce_metrics = staticmethod(reduce_metrics)
    answering = staticmethod(answering)

    def __init__(self, config: SearchAgentConfig, tokenizer: Any) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.search = None
        if config.do_search:
            self.search = SearchTool(config.retriever, self.words.search_format)
        further = build_tools(config.tools)
        self.tools: list[Tool] = further if self.search is None else [self.search, *further]
        self.toolbox = Toolbox(
            self.tools,
            CHARS_PER_TOKEN * self._most_tokens_read(),
            config.record_calls,
            config.replay_calls,
        )
        self.dialect = self._dialect()
        self.condenser = Condenser(
            config.condense,
            tokenizer,
            config.apply_chat_template_kwargs,
            config.max_prompt_length,
        )
        self.contexts = Contexts(config.context, tokenizer)
        self.max_calls = config.max_turns if self.tools else 0
        template_kwargs = config.apply_chat_template_kwargs
        self.ends_of_template = user_turn(tokenizer, **template_kwargs).before
        self.turn_ends = {tokenizer.eos_token_id, end_of_turn(tokenizer, **template_kwargs)}

    def _most_tokens_read(self) -> int:
        """Most tokens of a result that anybody reads."""
        condense = self.config.condense
        read = condense.max_result_tokens if condense.by is not None else 0
        return max(self.config.max_obs_length, read)

    def _dialect(self) -> Dialect:
        """How calls and results are written. Raises ConfigError where the model does not fit."""
        if self.config.format == TAGS:
            return TagDialect(self.config, self.tokenizer, self.tools, self.words)
        from search_r1.agent.native import NativeDialect

        return NativeDialect(self.config, self.tokenizer, self.tools)

    def preflight(self) -> list[str]:
        """What would keep the loop from working: budgets, options without effect, tools."""
        problems = budget_problems(self.config, self.tools)
        problems += fold_problems(self.config, len(self.dialect.summary_request()))
        problems += method_problems(self.config, self.tools, self.calls_tools)
        problems += image_problems(self.config, self.calls_tools, self.image_reader)
        if self.words is not SearchAgentLoop.words:
            problems += format_problems(self.config)
        problems += naming_problems(self.tools)
        problems += self.dialect.preflight()
        problems += self.toolbox.preflight()
        problems += self.condenser.preflight()
        return problems

    def read_images_by(self, reader: ImageReader) -> None:
        """Puts the images of rows and results into contexts."""
        self.image_reader = reader
        self.dialect.image_reader = reader
        for tool in self.tools:
            tool.shows_images = True

    @property
    def needs_tokens(self) -> bool:
        """Whether it speaks in the tokens of a chat template."""
        return self.config.format != TAGS

    @property
    def rewrites_contexts(self) -> bool:
        """Whether trajectories may have several rows."""
        condense = self.config.condense
        has_findings = condense.by == "policy" and condense.train
        return self.config.context.rewrites or has_findings

    @property
    def can_branch(self) -> bool:
        """Whether each call of the engine is a turn, and only tools say what is read between."""
        return not self.rewrites_contexts and self.config.condense.by is None

    async def close(self) -> None:
        """Closes the tools."""
        await self.toolbox.close()
        await self.condenser.close()

    async def run(self, prompt_ids: list[int], row: Row, generate: Generate) -> Trajectory:
        """Rolls out one question. Raises TrajectoryFailed when a tool fails for good."""
        trajectory = Trajectory(list(prompt_ids), images=images_of(row, self.image_reader))
        step = row.get(TRAINING_STEP)
        limit = self.config.turns_at(step)
        max_calls = min(limit, self.max_calls)
        data = AgentData(row, generate, trajectory, self.tools, max_calls)
        with searching_at(step):
            await self._begin(data)
            while not trajectory.stop_reason:
                await self._turn(data, may_call=data.turns < data.max_calls)
        trajectory.info |= data.facts() | self.dialect_facts()
        if self.config.max_turns_schedule is not None:
            trajectory.info["max_turns"] = data.max_calls
        if self.config.retriever.noise.is_on:
            trajectory.info["noise"] = self.config.retriever.noise.share_at(step)
        departure = self.dialect.departure(trajectory, data.messages, data.shown)
        if departure is not None:
            trajectory.info["template_departure"] = departure
        if failures := self.toolbox.take_failures():
            trajectory.info["tool_failures"] = failures
        for tool in self.tools:
            trajectory.info |= tool.trajectory_facts()
        return trajectory

    def dialect_facts(self) -> dict[str, Any]:
        """The tags in which tools are called and answer, where they are not those of Search-R1."""
        tags = {"call": self.dialect.call_tags, "result": self.dialect.result_tags}
        usual = {"call": (SEARCH_R1.call_tag,), "result": (SEARCH_R1.result_tag,)}
        return {} if tags == usual else {"tags": {kind: list(t) for kind, t in tags.items()}}

    async def _begin(self, data: AgentData) -> None:
        """Before the first turn: makes the prompt, where it is not that of the data."""
        limit = budget(data.max_calls, self.dialect.unit) if self.config.show_remaining else ""
        if self.config.template is not None:
            prompt = build_prompt(required_question(data.row), self.config.template)
            before = f"{self.dialect.instructions()} {limit}".strip()
            text = f"{before} {prompt}".lstrip()
            data.messages = [{"role": "user", "content": text}]
        elif limit:
            *earlier, last = data.row["prompt"]
            data.messages = [*earlier, {**last, "content": f"{limit} {last['content']}"}]
        elif self.dialect.shows_tools:
            data.messages = list(data.row["prompt"])
        if data.messages:
            data.trajectory.prompt_ids = self.dialect.ask(data.messages)
            data.context.base = data.trajectory.prompt_ids

    def ask(self, text: str) -> list[int]:
        """Ids of a text as the only message of a user."""
        return self.dialect.ask([{"role": "user", "content": text}])

    async def _turn(self, data: AgentData, may_call: bool) -> None:
        """Generates a turn and answers it; sets `stop_reason` when it was the last."""
        trajectory = data.trajectory
        self.contexts.shorten(data.context, trajectory)
        if self.contexts.is_full(data.context, trajectory):
            await self._fold(data)
        context = trajectory.token_ids
        if len(context) > self.config.max_prompt_length:
            trajectory.stop_reason = "context"
            trajectory.truncated = True
            return
        completion = await data.generate(
            context,
            max_tokens=self.config.max_response_length,
            stop=self.dialect.stop(may_call=self.max_calls > 0),
            images=trajectory.images,
        )
        data.turns += 1
        turn = self.dialect.parse(completion.token_ids)
        reason = stop_reason(completion, turn, may_call)
        self._add_turn(trajectory, completion, bool(reason), turn=data.turns)
        trajectory.stop_reason = reason
        trajectory.void_turns += turn.is_void
        if turn.overrun:
            data.overruns.append(turn.overrun)
        data.dropped += turn.num_dropped
        is_readable = any(call.malformed is None for call in turn.calls)
        if turn.answer is not None or (is_readable and not reason):
            data.valid_actions += 1
        if not reason:
            await self._respond(data, turn)

    async def _fold(self, data: AgentData) -> None:
        """Lets the policy sum its context up, and goes on from the prompt and the summary."""
        trajectory = data.trajectory
        request = self.dialect.summary_request()
        trajectory.add_observation(request, kind=SUMMARY_REQUEST)
        completion = await data.generate(
            trajectory.token_ids,
            max_tokens=self.config.context.max_summary_length,
            stop=[SUMMARY_END],
        )
        facts = {"turn": data.turns, "kind": SUMMARY_KIND}
        if self.config.context.train_summaries:
            trajectory.add_completion(completion, is_aside=True, **facts)
        else:
            trajectory.add_observation(completion.token_ids, **facts)
        text = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        summary = f"{summary_of(text)}\n{self._note(data)}".strip()
        base = self.dialect.folded(trajectory.prompt_ids, data.messages, summary)
        self.contexts.fold(data.context, trajectory, base)
        data.folds += 1

    async def _respond(self, data: AgentData, turn: Turn) -> None:
        """Answers a turn that goes on: runs its calls, or says that it held none."""
        ended_by = self._ended_by(data.trajectory)
        note = self._note(data)
        if not turn.calls:
            ids = self.dialect.correction(ended_by, note)
            facts = {"turn": data.turns, "kind": "invalid_action"} | (
                {"note": note} if note else {}
            )
            data.trajectory.add_observation(ids, **facts)
            return
        executed = await self._execute(data, turn.calls)
        responses = [one.response for one in executed]
        try:
            observations = self.dialect.results(turn, responses, ended_by, note)
        except DataError as error:  # an image of the corpus, which the policy cannot help
            raise TrajectoryFailed(f"{turn.calls}: {error}", data.num_calls + 1) from error
        if self.config.condense.train:
            self._add_side_calls(data, executed)
        first = len(data.trajectory.segments)
        for call, one, observation in zip(turn.calls, executed, observations, strict=True):
            self._observe(data, call, one, observation)
        if self.config.context.keep_observations is not None:
            left_out = [ToolResponse(LEFT_OUT) for _ in executed]
            for number, short in enumerate(self.dialect.results(turn, left_out, ended_by), first):
                data.context.placeholders[number] = short.token_ids

    def _note(self, data: AgentData) -> str:
        """What an answer to the present turn says of the turns left; empty where nothing."""
        if not self.config.show_remaining:
            return ""
        return remaining(data.max_calls - data.turns, self.dialect.unit)

    def _add_side_calls(self, data: AgentData, executed: Sequence[Answered]) -> None:
        """Adds the policy's calls that shortened results, each as a row of its own."""
        trajectory = data.trajectory
        present = trajectory.token_ids
        for side_call in [one.side_call for one in executed if one.side_call is not None]:
            trajectory.rewrite(side_call.prompt_ids)
            data.context.shortened[len(trajectory.segments)] = []
            trajectory.add_completion(
                side_call.completion, is_aside=True, turn=data.turns, kind=FINDING_KIND
            )
            trajectory.rewrite(present)

    @staticmethod
    def _ended_by(trajectory: Trajectory) -> int | None:
        """The token of the chat template by which the policy has ended its turn, if it has."""
        return trajectory.segments[-1].info.get("ended_by")

    async def _execute(self, data: AgentData, calls: Sequence[ToolCall]) -> list[Answered]:
        """Runs the calls of a turn together, each at once.

        Raises TrajectoryFailed when one fails; the others are given up.
        """
        most = self.config.max_parallel_calls
        error = ToolResponse(f"Only {most} calls are answered in a turn.", error="too_many")
        refused = [Answered(error) for _ in calls[most:]]
        tasks = [asyncio.create_task(self._call(data, call)) for call in calls[:most]]
        try:
            return [*await asyncio.gather(*tasks), *refused]
        except ToolFailed as failure:
            raise TrajectoryFailed(str(failure), num_calls=data.num_calls + 1) from failure
        finally:
            for task in tasks:
                task.cancel()

    async def _call(self, data: AgentData, call: ToolCall) -> Answered:
        """Runs one call. Raises ToolFailed."""
        if call.malformed is not None:
            return Answered(call.malformed)
        executed = await self.toolbox.execute(call.tool, call.arguments)
        response = executed.response
        side_call = None
        if self.condenser.wants(call.tool, response):
            query = " ".join(map(str, call.arguments.values()))
            beside = (SUMMARY_KIND, SUMMARY_REQUEST)
            said = [
                s
                for s in data.trajectory.segments
                if not s.is_aside and s.info.get("kind") not in beside
            ]
            written = [token for segment in said for token in segment.token_ids]
            response, side_call = await self.condenser(data.generate, written, query, response)
        return Answered(response, executed.latency_s, side_call)

    def _add_turn(
        self, trajectory: Trajectory, completion: Completion, is_last: bool, turn: int
    ) -> None:
        """Appends what the policy wrote.

        In its info stands `ended_by`, the token by which the policy ended its turn, or `left_out`,
        the same token where it has no place in a trajectory that goes on.
        """
        facts: dict[str, Any] = {"turn": turn, "finish_reason": completion.finish_reason}
        last = completion.token_ids[-1] if completion.token_ids else None
        if last is not None and (last in self.turn_ends or last == completion.stop_reason):
            if is_last or last in self.ends_of_template:
                facts["ended_by"] = last
            else:
                facts["left_out"] = last
                completion = replace(
                    completion,
                    token_ids=completion.token_ids[:-1],
                    log_probs=completion.log_probs[:-1],
                )
        trajectory.add_completion(completion, **facts)

    def _observe(
        self, data: AgentData, call: ToolCall, executed: Answered, observation: Observation
    ) -> None:
        """Appends the observation of a call, with its facts, and counts."""
        response = executed.response
        facts = response.facts | {
            "turn": data.turns,
            "kind": call.tool,
            "arguments": call.arguments,
            "latency_s": executed.latency_s,
            "cut": observation.cut,
        }
        if response.error:
            facts["error"] = response.error
        data.count(call, executed, observation)
        data.shown.append(observation.shown)
        data.trajectory.add_observation(observation.token_ids, observation.images, **facts)
