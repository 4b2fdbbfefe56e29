"""What the policy may call in its turns. Search is one such tool; a configuration adds others.

A tool of one's own is a class in one file, and one line of the configuration:

    from search_r1.tools.base import Tool, ToolResponse

    class Calculator(Tool):
        name = "calculator"
        description = "Calculates the value of an expression."

        async def execute(self, argument: str) -> ToolResponse:
            try:
                return ToolResponse(str(evaluate(argument)))
            except ValueError:  # the policy wrote no sum
                return ToolResponse("that is no sum", error="no_sum")

    agent.tools=[{_target_: my_module.Calculator}]

The module is found in the repository's root and in the folders of PYTHONPATH.

The loop does the rest: it recognises calls, runs them within the limits of `ToolConfig`, splices
the results in as observations, which are never trained, puts the protocol's tags in them into round
brackets, cuts them to `data.max_obs_length`, and counts. The reward for format knows the tags of
every tool.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from search_r1.tools.formats import ToolFormat, tagged
from verl.utils.config import Config

SEARCH_TOOL = "search"
"""Name of the tool that searches."""
OPEN_TOOL = "open"
"""Name of the tool that opens documents."""
Arguments = dict[str, Any]
"""The arguments of a call, by their names."""
Schema = dict[str, Any]
"""A JSON schema of the arguments of a tool."""


class ToolConfig(Config):
    """Keys that the section of every tool has."""

    max_concurrency: PositiveInt | None = 64
    """Calls that run at the same time in one process; further ones wait. null: any number."""
    deadline_s: PositiveFloat | None = 60.0
    """Seconds that a call may run; after them the tool has failed. null: any number."""
    cache_size: NonNegativeInt = 0
    """Results to keep, by the arguments of their calls. Only for a tool that always answers the
    same arguments in the same way."""


class ToolFailed(Exception):
    """The tool broke, through no fault of the policy's: the trajectory fails.

    `kind` is counted, for instance `deadline` or `connection`. The message is for logs: the policy
    never reads it.
    """

    def __init__(self, message: str, kind: str = "failed") -> None:
        super().__init__(message, kind)
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[0])


class CallError(Exception):
    """The policy got a call wrong: raised by a function that is a tool (`FunctionTool`).

    The message is what the policy reads.
    """


@dataclass(frozen=True)
class ToolResponse:
    """What a call brought."""

    text: str
    """What the policy reads."""
    error: str = ""
    """What the policy did wrong, one word that is counted; empty for a good call. `text` then tells
    the policy."""
    facts: dict[str, Any] = field(default_factory=dict)
    """JSON values for logs and rewards: they are kept in the observation's `info`."""
    images: tuple[str, ...] = ()
    """Files of images, in base64, each of which stands at a `PLACE` of the text
    (`verl.utils.images`). Only a policy that reads images is shown them."""

    @property
    def valid(self) -> bool:
        return not self.error


class Tool:
    """Base class of tools. A subclass gives `name`, `description`, and `execute` or `call`.

    One instance serves all trajectories of a process, many of them at the same time.
    """

    Config: ClassVar[type[ToolConfig]] = ToolConfig
    """Validates the tool's section, without `_target_`."""
    pure: ClassVar[bool] = False
    """Whether the same arguments always bring the same response, so that it may be cached."""
    name: str
    """Its name in native calls, the `kind` of its observations; its metrics are
    `tool/<name>/...`."""
    argument_key: str = "argument"
    """The argument that is the text of a call in tags."""
    description: str = ""
    """Tells the policy what it does."""
    format: ToolFormat | None = None
    """How it is called in tags; None: `<name> argument </name>`, answered in `<result>`."""
    instruction: str | None = None
    """Tells the policy how to call it in tags, before a prompt that is made from `template`. None:
    a sentence made of `description`; empty: the prompt says it already."""

    shows_images: bool = False
    """Whether the policy reads the images of responses."""

    def __init__(self, config: ToolConfig) -> None:
        """Takes the validated section."""
        self.limits = config

    @classmethod
    def from_section(cls, config: ToolConfig) -> Sequence["Tool"]:
        """The tools of one section of the configuration: one, unless a subclass finds more."""
        return [cls(config)]

    @property
    def tags(self) -> ToolFormat:
        """How it is called in tags."""
        return self.format or tagged(self.name, "result")

    @property
    def tag_instruction(self) -> str:
        """How to call it in tags, for the prompt; may be empty."""
        if self.instruction is not None or not self.description:
            return self.instruction or ""
        tags = self.tags
        return (
            f"You can call the tool {self.name} by <{tags.call_tag}> {self.argument_key} "
            f"</{tags.call_tag}>, and its result will stand between <{tags.result_tag}> and "
            f"</{tags.result_tag}>. {self.description}"
        )

    @property
    def parameters(self) -> Schema:
        """JSON schema of its arguments: one text, unless a subclass says otherwise."""
        return {
            "type": "object",
            "properties": {self.argument_key: {"type": "string"}},
            "required": [self.argument_key],
        }

    def preflight(self) -> list[str]:
        """Problems that would make its calls fail, found before any process is started."""
        return []

    async def call(self, arguments: Arguments) -> ToolResponse:
        """Runs a call whose arguments fit `parameters`. Raises what `execute` raises."""
        return await self.execute(arguments[self.argument_key])

    async def execute(self, argument: str) -> ToolResponse:
        """Runs a call of a tool that has one argument.

        A call that the policy got wrong is a response with an `error`. Raises ToolFailed when the
        environment is at fault; any other exception is a mistake of the tool and ends the run.
        """
        raise NotImplementedError

    def trajectory_facts(self) -> dict[str, Any]:
        """What it adds to the `info` of a trajectory that has just ended."""
        return {}

    async def close(self) -> None:
        """Frees what it holds."""
