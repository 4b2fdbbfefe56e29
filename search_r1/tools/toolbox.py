"""Runs calls of tools: checks their arguments, keeps the limits, caches, records and replays."""

import asyncio
import json
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from jsonschema import Draft202012Validator

from search_r1.tools.base import Arguments, Tool, ToolFailed, ToolResponse


@dataclass(frozen=True)
class Executed:
    """A call's response."""

    response: ToolResponse
    latency_s: float | None = None
    """Seconds that it took; None for a call that was refused."""


class Answers(NamedTuple):
    """Who gives responses to calls, and who is told of all responses."""

    give: Callable[[str], ToolResponse | None]
    tell: Callable[[str, ToolResponse], object]


_answers: ContextVar[Answers | None] = ContextVar("answers", default=None)


@contextmanager
def answering(
    give: Callable[[str], ToolResponse | None], tell: Callable[[str, ToolResponse], object]
) -> Iterator[None]:
    """Answers calls of this block by `give`, which gets their `call_key`, where it is not None.

    These calls are not run. `tell(key, response)` is told of every response, also of those
    given here. The block holds for the present task and for those that it starts.
    """
    token = _answers.set(Answers(give, tell))
    try:
        yield
    finally:
        _answers.reset(token)


def given_response(name: str, arguments: Arguments) -> ToolResponse | None:
    """The response that `answering` gives to a call; None for one that is to be run."""
    answers = _answers.get()
    return None if answers is None else answers.give(call_key(name, arguments))


def tell_response(name: str, arguments: Arguments, response: ToolResponse) -> None:
    """Tells the block `answering` what a call was answered."""
    answers = _answers.get()
    if answers is not None:
        answers.tell(call_key(name, arguments), response)


class Toolbox:
    """The tools of a process. One instance serves all of its trajectories."""

    def __init__(
        self,
        tools: Sequence[Tool],
        max_chars: int,
        record_to: str | None = None,
        replay_from: str | None = None,
    ) -> None:
        self.tools = {tool.name: tool for tool in tools}
        self.max_chars = max_chars
        self.record_to = record_to
        self.replay_from = replay_from
        self.failures: dict[str, Counter[str]] = {tool.name: Counter() for tool in tools}
        """Failed calls by the tool's name and the kind of failure, since `take_failures`."""
        self._checks = {tool.name: Draft202012Validator(tool.parameters) for tool in tools}
        self._limits = {tool.name: limit(tool) for tool in tools}
        self._caches: dict[str, OrderedDict[str, ToolResponse]] = {
            tool.name: OrderedDict() for tool in tools
        }
        self._record: Path | None = None
        self._recorded: dict[str, ToolResponse] | None = None

    def preflight(self) -> list[str]:
        """What the tools lack. When calls are replayed, only whether there is a recording."""
        if self.replay_from is None:
            problems = [problem for tool in self.tools.values() for problem in tool.preflight()]
            return problems + self._record_problems()
        if any(Path(self.replay_from).glob("*.jsonl")):
            return []
        return [f"agent.replay_calls={self.replay_from}: there are no recorded calls (*.jsonl)"]

    def _record_problems(self) -> list[str]:
        """Why calls could not be recorded."""
        if self.record_to is None:
            return []
        try:
            Path(self.record_to).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return [f"agent.record_calls={self.record_to}: no folder can be made there ({error})"]
        if os.access(self.record_to, os.W_OK):
            return []
        return [f"agent.record_calls={self.record_to}: the folder cannot be written to"]

    async def execute(self, name: str, arguments: Arguments) -> Executed:
        """Runs a call, within the limits of its tool.

        A call that cannot be run (no such tool, arguments that do not fit) is answered by a
        response with an `error`; one that is given a response (`answering`) is not run. Raises
        ToolFailed.
        """
        if refusal := self._refusal(name, arguments):
            return Executed(refusal)
        if given := given_response(name, arguments):
            tell_response(name, arguments, given)
            return Executed(given)
        began = time.perf_counter()
        try:
            response = await self._answer(self.tools[name], arguments)
        except ToolFailed as failure:
            self.failures[name][failure.kind] += 1
            raise
        tell_response(name, arguments, response)
        return Executed(response, time.perf_counter() - began)

    def _refusal(self, name: str, arguments: Arguments) -> ToolResponse | None:
        """The answer to a call that no tool can run; None for a good one."""
        if name not in self.tools:
            known = ", ".join(self.tools)
            return ToolResponse(f"There is no tool {name!r}. Tools: {known}.", error="unknown_tool")
        mistake = next(self._checks[name].iter_errors(arguments), None)
        if mistake is None:
            return None
        where = "".join(f" {part}" for part in mistake.absolute_path)
        text = f"The arguments do not fit{where}: {mistake.message}."
        return ToolResponse(text, error="arguments")

    async def _answer(self, tool: Tool, arguments: Arguments) -> ToolResponse:
        """The response: recorded, kept from an earlier call, or new."""
        key = call_key(tool.name, arguments)
        if self.replay_from is not None:
            return self._replayed(key)
        cache = self._caches[tool.name]
        if key in cache:
            cache.move_to_end(key)
            return cache[key]
        response = await self._run(tool, arguments)
        if tool.limits.cache_size:
            cache[key] = response
            if len(cache) > tool.limits.cache_size:
                cache.popitem(last=False)
        if self.record_to is not None:
            self._write(Path(self.record_to), tool.name, arguments, response)
        return response

    async def _run(self, tool: Tool, arguments: Arguments) -> ToolResponse:
        """Runs the tool, when its other calls leave room. Raises ToolFailed."""
        deadline = asyncio.timeout(None)
        try:
            async with self._limits[tool.name], deadline:
                if tool.limits.deadline_s is not None:
                    now = asyncio.get_running_loop().time()
                    deadline.reschedule(now + tool.limits.deadline_s)
                response = await tool.call(arguments)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            message = f"{tool.name} took more than deadline_s={tool.limits.deadline_s:g}"
            raise ToolFailed(message, kind="deadline") from error
        # Half of a surrogate pair, which a program may print, cannot be encoded.
        text = response.text[: self.max_chars].encode("utf-8", "replace").decode("utf-8")
        return replace(response, text=text)

    def _write(self, folder: Path, name: str, arguments: Arguments, response: ToolResponse) -> None:
        """Appends a call to this process's file in `folder`."""
        if self._record is None:
            folder.mkdir(parents=True, exist_ok=True)
            self._record = folder / f"calls-{os.getpid()}-{uuid4().hex}.jsonl"
        line = {"tool": name, "arguments": arguments, **asdict(response)}
        with self._record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _replayed(self, key: str) -> ToolResponse:
        """The recorded response. Raises ToolFailed where the call was not recorded."""
        if self._recorded is None:
            self._recorded = read_recording(Path(self.replay_from or ""))
        if key not in self._recorded:
            raise ToolFailed(
                f"agent.replay_calls={self.replay_from} holds no call {key}", kind="not_recorded"
            )
        return self._recorded[key]

    def take_failures(self) -> dict[str, dict[str, int]]:
        """Failures by tool and kind since the last time this was asked."""
        taken = {name: dict(kinds) for name, kinds in self.failures.items() if kinds}
        for kinds in self.failures.values():
            kinds.clear()
        return taken

    async def close(self) -> None:
        """Closes the tools."""
        for tool in self.tools.values():
            await tool.close()


def limit(tool: Tool) -> AbstractAsyncContextManager[Any]:
    """What a call enters while it runs, so that no more than allowed run together."""
    most = tool.limits.max_concurrency
    return nullcontext() if most is None else asyncio.Semaphore(most)


def call_key(name: str, arguments: Arguments) -> str:
    """What two calls that ask the same have in common.

    >>> call_key("search", {"query": "capital of Peru"})
    'search({"query": "capital of Peru"})'
    """
    return f"{name}({json.dumps(arguments, sort_keys=True, ensure_ascii=False)})"


def lines_of(path: Path) -> list[str]:
    """The lines of a file that are not empty.

    A text may hold other line breaks, such as U+2028, which JSON leaves as they are.
    """
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_recording(folder: Path) -> dict[str, ToolResponse]:
    """Recorded responses by `call_key`; of several to one call the first.

    Raises ToolFailed for a line that cannot be read.
    """
    recorded: dict[str, ToolResponse] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(lines_of(path), 1):
            try:
                call = json.loads(line)
                images = tuple(call.get("images", ()))
                response = ToolResponse(call["text"], call["error"], call["facts"], images)
                recorded.setdefault(call_key(call["tool"], call["arguments"]), response)
            except (ValueError, KeyError, TypeError) as error:
                raise ToolFailed(f"{path}, line {number}: {error!r}", kind="recording") from error
    return recorded
