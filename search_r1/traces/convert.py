"""Makes traces into rows for `verl.trainer.sft`, by the agent loop itself.

The loop goes through each trace as if its policy said it: the prompt, what stands around results,
cuts and the tokens that are trained are those of a training, because the same code makes them.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from search_r1.agent.loop import SearchAgentLoop
from search_r1.data.rejection import examples_of
from search_r1.prompts import build_prompt
from search_r1.replay import Memory, Script, completion_of, scripted
from search_r1.rewards.matching import exact_match
from search_r1.tools.base import ToolResponse
from search_r1.tools.toolbox import answering
from search_r1.traces.read import question_of, read_files, read_trace, score_of
from search_r1.traces.records import check_answered, check_form, has_tokens_of, is_record
from search_r1.traces.text import call_tags
from search_r1.traces.trace import Reason, Rejected, Trace
from search_r1.traces.turns import ScriptedTurns, scripted_turns
from verl.agent import Completion, Image, Source, Trajectory
from verl.utils.errors import ConfigError, DataError, listed
from verl.utils.tokenizer import encode_chat
from verl.utils.wording import counted

Example = dict[str, list[int]]
"""`input_ids` and `loss_mask`, as `verl.trainer.sft` reads them."""


def agent_problems(agent: object) -> list[str]:
    """What of an agent has no counterpart in a trace, so that rows for it cannot be made."""
    if not isinstance(agent, SearchAgentLoop) or not agent.calls_tools:
        return ["finetune.data=traces: this method has no turns that call a tool; remove method="]
    problems = []
    if not agent.words.search_format.call_tag and agent.search is not None:
        problems.append(
            "finetune.data=traces: this method writes searches in a form of its own; remove method="
        )
    if agent.rewrites_contexts or agent.config.condense.by is not None:
        problems.append(
            "finetune.data=traces: a trace does not say how contexts are written anew or results "
            "condensed; remove agent.context and agent.condense"
        )
    return problems


class Converter:
    """Makes rows of traces, for one agent."""

    def __init__(
        self,
        agent: SearchAgentLoop,
        template: str,
        min_score: float,
        names: Mapping[str, str],
    ) -> None:
        """`template`: of the prompts, where the agent has none and takes those of the data.

        `names`: for names of tools in traces those of the agent. Raises ConfigError for an agent
        that no trace shows, and for names of tools that it has not.
        """
        problems = agent_problems(agent)
        tools = [tool.name for tool in getattr(agent, "tools", ())]
        problems += [
            f"finetune.trace_tools.{name}={own}: the agent has no such tool, only "
            f"{', '.join(tools) or 'none'}"
            for name, own in names.items()
            if own not in tools
        ]
        if problems:
            raise ConfigError(problems)
        self.agent = agent
        self.template = template
        self.min_score = min_score
        self.names = names
        self.tags = call_tags(agent.tools)

    async def example(self, row: Mapping[str, Any]) -> Example:
        """The example of a row of a trace file. Raises Rejected."""
        if is_record(row):
            kept = await self._tokens_of_record(dict(row))
            if kept is not None:
                return kept
        trace = read_trace(row, self.tags)
        self._check_score(score(trace))
        return example_of(await self.replayed(trace))

    async def _tokens_of_record(self, record: dict[str, Any]) -> Example | None:
        """The tokens of a record of this very agent as they were sampled; None for another's."""
        check_form(record)
        self._check_score(score_of(record))
        asked = await self._asked(question_of(record))
        tags = self.agent.dialect_facts().get("tags")
        if not has_tokens_of(record, asked, tags, self.agent.tokenizer):
            return None
        check_answered(record)
        self._check_lengths(asked, [(s["source"], s["token_ids"]) for s in record["segments"]])
        (example,) = examples_of(record)
        return example

    async def _asked(self, question: str) -> list[int]:
        """The prompt of a question. Raises Rejected."""
        nothing = ScriptedTurns(turns=(), responses=())
        return (await self._run(question, nothing)).prompt_ids

    async def replayed(self, trace: Trace) -> Trajectory:
        """The trajectory in which the agent's policy says what the trace says. Raises Rejected."""
        prompt_ids = await self._asked(trace.question)
        script = scripted_turns(trace.said, self.agent, self.names, prompt_ids)
        trajectory = await self._run(trace.question, script)
        segments = [(str(s.source), s.token_ids) for s in trajectory.segments]
        self._check_lengths(trajectory.prompt_ids, segments)
        self._check_read(trajectory, script)
        return trajectory

    def _check_read(self, trajectory: Trajectory, script: ScriptedTurns) -> None:
        """Raises Rejected where the agent did not read the turns of a script as they are meant."""
        num_turns = len(script.turns)
        own = sum(segment.source is Source.MODEL for segment in trajectory.segments)
        observed = len(trajectory.segments) - own
        if trajectory.stop_reason == "context":
            most = self.agent.config.max_prompt_length
            check_length("data.max_prompt_length", len(trajectory.token_ids), most)
        if trajectory.stop_reason == "max_turns" and own < num_turns:
            most = self.agent.max_calls
            raise Rejected(Reason.TOO_MANY_CALLS, f"{num_turns - 1} turns call, max_turns={most}")
        if trajectory.void_turns:
            raise Rejected(Reason.MISREAD, "a turn is read as neither a call nor an answer")
        if (own, observed, trajectory.stop_reason) != (num_turns, len(script.responses), "answer"):
            said = self.agent.tokenizer.decode(trajectory.segments[-1].token_ids)
            raise Rejected(
                Reason.MISREAD,
                f"turn {own} of {num_turns} ends the trajectory ({trajectory.stop_reason}): "
                f"{said!r:.80}",
            )

    async def _run(self, question: str, script: ScriptedTurns) -> Trajectory:
        """Lets the agent's policy say a script; behind it the policy says nothing more.

        Raises Rejected.
        """
        prompt = [{"role": "user", "content": build_prompt(question, self.template)}]
        row = {"data_source": "traces", "prompt": prompt, "extra_info": {"question": question}}
        kwargs = self.agent.config.apply_chat_template_kwargs
        prompt_ids = encode_chat(self.agent.tokenizer, prompt, **kwargs)
        responses = list(script.responses)

        def give(key: str) -> ToolResponse:
            expected, response = responses.pop(0) if responses else ("no tool", ToolResponse(""))
            if not key.startswith(f"{expected}("):
                raise Rejected(Reason.MISREAD, f"a call of {expected} is read as {key:.80}")
            return response

        async def nothing_more(
            prompt_ids: list[int],
            *,
            max_tokens: int,
            stop: Sequence[str] = (),
            images: Sequence[Image] = (),
        ) -> Completion:
            return completion_of([], 0, stop, self.agent.tokenizer)

        said = Script(script.turns)
        generate = scripted(nothing_more, said, Memory(), self.agent.tokenizer)
        with answering(give, lambda key, response: None):
            return await self.agent.run(prompt_ids, row, generate)

    def _check_lengths(
        self, prompt_ids: Sequence[int], segments: Sequence[tuple[str, Sequence[int]]]
    ) -> None:
        """Raises Rejected where a prompt, a turn or a context is longer than in a training."""
        config = self.agent.config
        length = len(prompt_ids)
        check_length("data.max_start_length", length, config.max_start_length)
        for source, token_ids in segments:
            if source == Source.MODEL:
                check_length("data.max_prompt_length", length, config.max_prompt_length)
                check_length("data.max_response_length", len(token_ids), config.max_response_length)
            length += len(token_ids)
        check_length(
            "data.max_prompt_length + data.max_response_length",
            length,
            config.max_prompt_length + config.max_response_length,
        )

    def _check_score(self, score: float | None) -> None:
        """Raises Rejected for a known score that is not high enough; NaN is not."""
        if score is not None and not score >= self.min_score:
            raise Rejected(Reason.LOW_SCORE, f"{score:g} is less than {self.min_score:g}")


def check_length(key: str, length: int, most: int) -> None:
    """Raises Rejected for more tokens than a key allows."""
    if length > most:
        raise Rejected(Reason.TOO_LONG, f"{length} tokens, more than {key}={most}")


def score(trace: Trace) -> float | None:
    """The reward of a trace, or else the exact match of its answer; None where no gold is known."""
    if trace.score is not None or not trace.golds:
        return trace.score
    return exact_match(trace.said.answer, trace.golds)


def example_of(trajectory: Trajectory) -> Example:
    """The tokens of a trajectory, of which those that the policy said are trained."""
    prompt_mask = [0] * len(trajectory.prompt_ids)
    loss_mask = prompt_mask + trajectory.response_mask
    return {"input_ids": trajectory.token_ids, "loss_mask": loss_mask}


@dataclass
class Conversion:
    """What became of the traces of some files."""

    examples: list[Example] = field(default_factory=list)
    rejected: list[tuple[str, Rejected]] = field(default_factory=list)
    """Traces that are not trained on, each with its file and line."""

    def summary(self) -> str:
        """One line: how many rows there are, and how many traces were rejected for which reason."""
        total = len(self.examples) + len(self.rejected)
        reasons = Counter(rejection.reason for _, rejection in self.rejected)
        parts = [f"{number:,} {reason}" for reason, number in reasons.most_common()]
        kept = f"{counted(len(self.examples), 'row')} of {counted(total, 'trace')}"
        return f"{kept}; left out: {', '.join(parts)}" if parts else kept

    def faults(self) -> list[str]:
        """A line for each trace with a fault: its place, the reason, what was found.

        A low score is no fault.
        """
        return [
            f"{place}: {error.reason} ({error})"
            for place, error in self.rejected
            if error.reason is not Reason.LOW_SCORE
        ]


def convert(converter: Converter, paths: Sequence[Path]) -> Conversion:
    """Makes rows of all traces of some files, and shows how far it is.

    Raises DataError for a file that cannot be read, and where no trace can be trained on.
    """
    conversion = asyncio.run(converted(converter, read_files(paths)))
    if not conversion.examples:
        raise DataError(
            f"none of the traces can be trained on: {conversion.summary()}\n"
            f"{listed(conversion.faults())}".rstrip()
        )
    return conversion


async def converted(
    converter: Converter, rows: Sequence[tuple[str, Mapping[str, Any] | str]]
) -> Conversion:
    """Makes rows of traces, given with their places; a text says what is wrong with one."""
    conversion = Conversion()
    try:
        for place, row in tqdm(rows, unit="traces", mininterval=1.0):
            try:
                if isinstance(row, str):
                    raise Rejected(Reason.UNKNOWN_FORM, row)
                conversion.examples.append(await converter.example(row))
            except Rejected as error:
                conversion.rejected.append((place, error))
    finally:
        await converter.agent.close()
    return conversion
