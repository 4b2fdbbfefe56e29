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

import time
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import PositiveInt, field_validator

from search_r1.agent.actions import SEARCH_TOOL, Action, Answer, Invalid, ToolCall, parse_action
from search_r1.agent.agent_data import AgentData
from search_r1.agent.formats import SEARCH_R1, ToolFormat
from search_r1.agent.metrics import reduce_metrics
from search_r1.agent.observation import encode_observation, neutralise, tag_pattern
from search_r1.agent.search_tool import SearchTool
from search_r1.agent.tools import (
    Section,
    Tool,
    ToolFailed,
    ToolResponse,
    build_tool,
    check_sections,
)
from search_r1.config import FinetuneConfig, SetupConfig
from search_r1.prompts import ANSWER_END, INVALID_ACTION, INVALID_MESSAGE, TEMPLATES, build_prompt
from search_r1.search.client.config import RetrieverConfig
from search_r1.trajectory import required_question
from verl.agent import AgentLoop, Completion, Generate, Row, Trajectory, TrajectoryFailed
from verl.utils.config import Config
from verl.utils.tokenizer import encode_chat, encode_text, end_of_turn, user_turn


class SearchAgentConfig(Config):
    max_turns: PositiveInt = 4
    """Turns that may search or call another tool; one more, that may not, is forced after them."""
    do_search: bool = True
    """False: no search; without another tool that is a single turn, the R1 baseline."""
    tools: list[dict[str, Any]] = []
    """Further tools: for each the class, `_target_`, and the keys of its `Config`
    (search_r1/agent/tools.py)."""
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

    @field_validator("tools")
    @classmethod
    def _known_tools(cls, value: list[Section]) -> list[Section]:
        return check_sections(value)


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
    search_format: ClassVar[ToolFormat] = SEARCH_R1
    invalid_action: ClassVar[str] = INVALID_ACTION
    """The answer to a turn without an action, in the policy's own turn."""
    invalid_message: ClassVar[str] = INVALID_MESSAGE
    """The same as a user's message: the answer where the policy has ended its turn."""
    reduce_metrics = staticmethod(reduce_metrics)

    def __init__(self, config: SearchAgentConfig, tokenizer: Any) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.search = SearchTool(config.retriever, self.search_format) if config.do_search else None
        further = [build_tool(section) for section in config.tools]
        self.tools: list[Tool] = further if self.search is None else [self.search, *further]
        self.tools_by_name = {tool.name: tool for tool in self.tools}
        # Without a tool, a turn that asks for a search all the same is no void turn.
        self.call_patterns = {tool.name: tool.format.call for tool in self.tools} or {
            SEARCH_TOOL: self.search_format.call
        }
        self.tag = tag_pattern(tool.format for tool in further)
        self.max_calls = config.max_turns if self.tools else 0
        self.invalid_ids = encode_text(tokenizer, self.invalid_action)
        self.invalid_message_ids = encode_text(tokenizer, self.invalid_message)
        self.user_turn = user_turn(tokenizer, **config.apply_chat_template_kwargs)
        self.turn_ends = {
            tokenizer.eos_token_id,
            end_of_turn(tokenizer, **config.apply_chat_template_kwargs),
        }

    def preflight(self) -> list[str]:
        """Budgets that cannot hold one call of a tool, and what the tools themselves lack."""
        problems = self._budget_problems()
        if self.config.tools and not self.calls_tools:
            problems.append("agent.tools: this method searches by itself and calls no other tool")
        for tool in self.tools:
            problems += self._block_problems(tool)
        for tool in self.tools:
            problems += tool.preflight()
        return problems

    def _budget_problems(self) -> list[str]:
        """Lengths that contradict each other."""
        config = self.config
        problems = []
        if config.max_start_length > config.max_prompt_length:
            problems.append(
                f"data.max_prompt_length={config.max_prompt_length} is less than "
                f"data.max_start_length={config.max_start_length}"
            )
        least = config.max_start_length + config.max_response_length + config.max_obs_length
        if self.tools and least > config.max_prompt_length:
            call = "search" if self.search else f"call of {self.tools[0].name}"
            problems.append(
                f"data.max_prompt_length={config.max_prompt_length} has no room for one {call}: "
                f"data.max_start_length + data.max_response_length + data.max_obs_length = {least}"
            )
        return problems

    def _block_problems(self, tool: Tool) -> list[str]:
        """Whether the tags around a result leave no room for the result itself."""
        limit = self.config.max_obs_length
        block = tool.format.head + tool.format.tail
        tags = len(encode_text(self.tokenizer, block))
        if limit >= 2 * tags:
            return []
        result = "a passage" if tool is self.search else f"a result of {tool.name}"
        return [
            f"data.max_obs_length={limit} has no room for {result}: {block.strip()} takes {tags}"
        ]

    async def close(self) -> None:
        """Closes the tools."""
        for tool in self.tools:
            await tool.close()

    async def run(self, prompt_ids: list[int], row: Row, generate: Generate) -> Trajectory:
        """Rolls out one question. Raises TrajectoryFailed when a tool fails for good."""
        trajectory = Trajectory(list(prompt_ids))
        data = AgentData(row, generate, trajectory, self.tools)
        await self._begin(data)
        while not trajectory.stop_reason:
            await self._turn(data, may_call=data.turns < self.max_calls)
        trajectory.info |= data.facts()
        for tool in self.tools:
            trajectory.info |= tool.trajectory_facts()
        return trajectory

    async def _begin(self, data: AgentData) -> None:
        """Before the first turn: makes the prompt, where it is not that of the data."""
        if self.config.template is not None:
            prompt = build_prompt(required_question(data.row), self.config.template)
            descriptions = [tool.description for tool in self.tools if tool.description]
            data.trajectory.prompt_ids = self.ask(" ".join([*descriptions, prompt]))

    def ask(self, text: str) -> list[int]:
        """Ids of a text as the only message of a user."""
        messages = [{"role": "user", "content": text}]
        return encode_chat(self.tokenizer, messages, **self.config.apply_chat_template_kwargs)

    @property
    def stop(self) -> list[str]:
        """Where the engine stops."""
        calls = [tool.format.stop for tool in self.tools] if self.max_calls else []
        return [*calls, ANSWER_END] if self.config.stop_at_answer else calls

    async def _turn(self, data: AgentData, may_call: bool) -> None:
        """Generates a turn and answers it; sets `stop_reason` when it was the last."""
        trajectory = data.trajectory
        context = trajectory.token_ids
        if len(context) > self.config.max_prompt_length:
            trajectory.stop_reason = "context"
            trajectory.truncated = True
            return
        completion = await data.generate(
            context, max_tokens=self.config.max_response_length, stop=self.stop
        )
        data.turns += 1
        text = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        action, end = parse_action(text, self.call_patterns)
        reason = stop_reason(completion, action, may_call)
        self._add_turn(trajectory, completion, bool(reason), turn=data.turns)
        trajectory.stop_reason = reason
        trajectory.void_turns += isinstance(action, Invalid)
        if text[end:]:
            data.overruns.append(text[end:])
        if isinstance(action, Answer) or (isinstance(action, ToolCall) and not reason):
            data.valid_actions += 1
        if not reason:
            await self._respond(data, action, text[end:])

    async def _respond(self, data: AgentData, action: Action, emitted: str) -> None:
        """Answers a turn that goes on. `emitted` is what the policy wrote behind its action."""
        ended = has_ended(data.trajectory)
        if isinstance(action, ToolCall):
            tool = self.tools_by_name[action.tool]
            response = await self._call(data, tool, action.argument)
            response = await self._revise(data, tool, action.argument, response)
            ids, cut = encode_observation(
                neutralise(response.text, self.tag),
                self.tokenizer,
                self.config.max_obs_length,
                tool.format.margin if ended else emitted,
                tool.format,
            )
            self._observe(data, tool, action.argument, response, ids, cut)
        else:
            ids = self.invalid_message_ids if ended else self.invalid_ids
            self._reply(data.trajectory, ids, turn=data.turns, kind="invalid_action")

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
        """Appends what the environment says.

        It stands in the policy's turn or, where the policy has ended that, as a user's message.
        """
        if has_ended(trajectory):
            ids = self.user_turn.following(trajectory.segments[-1].info["ended_by"], ids)
        trajectory.add_observation(ids, **facts)

    async def _call(self, data: AgentData, tool: Tool, argument: str) -> ToolResponse:
        """Runs a call, counts and times it. Raises TrajectoryFailed."""
        began = time.perf_counter()
        try:
            response = await tool.execute(argument)
        except ToolFailed as error:
            raise TrajectoryFailed(str(error), num_calls=data.num_calls + 1) from error
        counts = data.counts[tool.name]
        counts.calls += 1
        counts.valid_calls += response.valid
        counts.latency_s.append(time.perf_counter() - began)
        return response

    async def _revise(
        self, data: AgentData, tool: Tool, argument: str, response: ToolResponse
    ) -> ToolResponse:
        """The response as the policy is to read it; a method may write it anew."""
        return response

    def _observe(
        self,
        data: AgentData,
        tool: Tool,
        argument: str,
        response: ToolResponse,
        ids: list[int],
        cut: bool,
    ) -> None:
        """Appends the observation of the tool's last call, with its facts."""
        counts = data.counts[tool.name]
        counts.cut += cut
        facts = response.facts | {
            "turn": data.turns,
            "kind": tool.name,
            tool.argument_key: argument,
            "latency_s": counts.latency_s[-1],
            "cut": cut,
        }
        self._reply(data.trajectory, ids, **facts)


def stop_reason(completion: Completion, action: Action, may_call: bool) -> str:
    """Why a trajectory ends with this turn; empty where it goes on."""
    if not completion.token_ids:
        return "empty"
    if isinstance(action, Answer):
        return "answer"
    return "" if may_call else "max_turns"


def has_ended(trajectory: Trajectory) -> bool:
    """Whether the policy, the last to write, has ended its turn by a token of the chat template."""
    return bool(trajectory.segments) and "ended_by" in trajectory.segments[-1].info
