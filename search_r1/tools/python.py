"""A Python interpreter as a tool: a call is a program, what it prints is the result."""

import asyncio
import re
import textwrap
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

from pydantic import PositiveInt

from search_r1.tools.base import Schema, Tool, ToolFailed, ToolResponse
from search_r1.tools.sandbox import Outcome, SandboxConfig, run_program

FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
"""A program as models write it in their answers."""

PROBE = """
import os, signal, socket

attempts = {
    "landlock": [lambda: os.listdir(os.pardir), lambda: open(f"/proc/{os.getppid()}/environ")],
    "seccomp": [socket.socket, os.fork, lambda: os.kill(os.getppid(), 0)],
}
for part, acts in attempts.items():
    for act in acts:
        try:
            act()
        except PermissionError:
            continue
        print(part)
        break
"""
"""Tries what no program may do, and prints the parts of the sandbox that let it."""


class PythonConfig(SandboxConfig):
    """The limits of a program, and what is shown of it."""

    shown_chars: PositiveInt = 2000
    """Characters of its output that the policy reads. The middle of a longer output is left out, so
    that the end, where an error stands, is read."""


class PythonTool(Tool):
    """Runs programs of the policy, each in a sandbox of its own; nothing is kept between calls."""

    Config: ClassVar = PythonConfig
    name = "python"
    argument_key = "code"
    description = (
        "It runs a Python program and returns what the program prints, and the value of an "
        "expression in its last line. Each program starts anew, without network."
    )

    def __init__(self, config: PythonConfig) -> None:
        super().__init__(config)
        self.config = config

    @property
    def parameters(self) -> Schema:
        code = {"type": "string", "description": "A Python program, which prints its result."}
        return {"type": "object", "properties": {"code": code}, "required": ["code"]}

    def preflight(self) -> list[str]:
        """Runs a program that tries to get out; a problem where it cannot run or gets out."""
        # A thread, as the caller may run a loop of its own.
        with ThreadPoolExecutor(1) as thread:
            try:
                outcome = thread.submit(asyncio.run, run_program(PROBE, self.config)).result()
            except ToolFailed as failure:
                return [f"agent.tools: {self.name}: {failure}"]
        holes = [part for part in outcome.output.split() if part not in self.config.allow_without]
        if outcome.error or holes:
            found = f"{outcome.error} {' '.join(outcome.output.split())}".strip()
            return [f"agent.tools: {self.name}: expected a sandbox that holds, but found: {found}"]
        return []

    async def execute(self, argument: str) -> ToolResponse:
        """Runs a program. Raises ToolFailed where none can be started."""
        outcome = await run_program(program_of(argument), self.config)
        return ToolResponse(self._text(outcome), outcome.error)

    def _text(self, outcome: Outcome) -> str:
        """What the policy reads."""
        shown = shortened(outcome.output.strip("\n"), self.config.shown_chars)
        lines = [line for line in (shown, outcome.note) if line]
        return "\n".join(lines) or "The program printed nothing."


def program_of(text: str) -> str:
    """The program in a call: without a fence around it, and without a common indentation.

    >>> program_of("```python\\nprint(1)\\n```")
    'print(1)\\n'
    """
    fenced = FENCE.fullmatch(text.strip())
    return textwrap.dedent(fenced[1] if fenced else text.strip("\n"))


def shortened(text: str, most: int) -> str:
    """The text, or its beginning and its end where it is longer than `most`.

    >>> shortened("abcdefgh", 4)
    'ab\\n[4 characters left out]\\ngh'
    """
    if len(text) <= most:
        return text
    head, tail = (most + 1) // 2, most // 2
    return f"{text[:head]}\n[{len(text) - most} characters left out]\n{text[len(text) - tail :]}"
