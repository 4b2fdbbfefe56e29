"""What the policy may call in its turns. Search is one such tool; a configuration adds others.

A tool of one's own is a class in one file, and one line of the configuration:

    from search_r1.agent.formats import tagged
    from search_r1.agent.tools import Tool, ToolResponse

    class Calculator(Tool):
        name = "calculator"
        format = tagged("calculate", "result")

        async def execute(self, argument: str) -> ToolResponse:
            try:
                return ToolResponse(str(evaluate(argument)))
            except ValueError:  # the policy wrote no sum
                return ToolResponse("that is no sum", valid=False)

    agent.tools=[{_target_: my_module.Calculator}]

The module is found in the repository's root and in the folders of PYTHONPATH.

The loop does the rest: it stops the engine where a call ends, splices the result in as an
observation, which is never trained, puts the protocol's tags in it into round brackets, cuts it to
`data.max_obs_length`, and counts. The reward for format knows the tags of every tool.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import iscoroutinefunction
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, TypeAdapter

from search_r1.agent.actions import SEARCH_TOOL
from search_r1.agent.formats import SEARCH_R1, ToolFormat
from verl.utils.config import Config
from verl.utils.errors import ConfigError
from verl.utils.loading import load_class

Section = dict[str, Any]
"""A tool in a configuration: `_target_`, its class, and the keys of its `Config`."""


class ToolFailed(Exception):
    """The tool broke, through no fault of the policy's: the trajectory fails."""


@dataclass(frozen=True)
class ToolResponse:
    """What a call brought."""

    text: str
    """What the policy reads."""
    valid: bool = True
    """False where the call was wrong, which the text then says: it is counted apart."""
    facts: dict[str, Any] = field(default_factory=dict)
    """For logs and rewards: they are kept in the observation's `info`."""


class Tool:
    """Base class of tools. A subclass gives `name`, `format` and `execute`.

    One instance serves all trajectories of a process, many of them at the same time.
    """

    Config: ClassVar[type[BaseModel]] = Config
    """Validates the tool's section, without `_target_`."""
    name: ClassVar[str]
    """The `kind` of its observations; its metrics are `env/<name>/..`."""
    argument_key: ClassVar[str] = "argument"
    """Under what name the argument of a call is kept in the observation's `info`."""
    format: ToolFormat
    description: ClassVar[str] = ""
    """Tells the policy how to call it. Stands before a prompt that is made from `template`."""

    def __init__(self, config: BaseModel) -> None:
        """Takes the validated section."""

    def preflight(self) -> list[str]:
        """Problems that would make its calls fail, found before any process is started."""
        return []

    async def execute(self, argument: str) -> ToolResponse:
        """Runs a call.

        A call that the policy got wrong is a response that is not `valid`. Raises ToolFailed when
        the environment is at fault; any other exception is a mistake of the tool and ends the run.
        """
        raise NotImplementedError

    def trajectory_facts(self) -> dict[str, Any]:
        """What it adds to the `info` of a trajectory that has just ended."""
        return {}

    async def close(self) -> None:
        """Frees what it holds."""


def tool_class(section: Section) -> type[Tool]:
    """The class that a section names. Raises ValueError where there is none."""
    target = section.get("_target_")
    if not isinstance(target, str):
        raise ValueError("a section whose _target_ names the class of a tool")
    try:
        cls = load_class(target, "_target_")
    except ConfigError as error:
        raise ValueError(
            f"a tool; {error.problems[0]}. Modules are found in the repository's root and in the "
            "folders of PYTHONPATH"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Tool)):
        raise ValueError("a subclass of search_r1.agent.tools.Tool")
    if missing := [name for name in ("name", "format") if not hasattr(cls, name)]:
        raise ValueError(f"a tool with {' and '.join(missing)}, which {target} does not have")
    if not iscoroutinefunction(cls.execute):
        raise ValueError(f"a tool whose execute is `async def`, which that of {target} is not")
    return cls


def without_target(section: Section) -> Section:
    """The keys of a section that are for the tool itself."""
    return {key: value for key, value in section.items() if key != "_target_"}


def validated(section: Section) -> Section:
    """The same section. Raises ValueError for a wrong class or a wrong key."""
    tool_class(section).Config.model_validate(without_target(section))
    return section


SECTIONS = TypeAdapter(list[Annotated[Section, AfterValidator(validated)]])


def check_sections(sections: Sequence[Section]) -> list[Section]:
    """The same sections. Raises ValueError for a wrong one, and for two tools of one name."""
    checked = SECTIONS.validate_python(sections)
    classes = [tool_class(section) for section in checked]
    names = Counter([SEARCH_TOOL, *(cls.name for cls in classes)])
    if repeated := [name for name, times in names.items() if times > 1]:
        raise ValueError(f"tools of different names, but {repeated[0]} is there twice")
    stops = Counter([SEARCH_R1.stop, *(cls.format.stop for cls in classes)])
    if repeated := [stop for stop, times in stops.items() if times > 1]:
        raise ValueError(f"tools that are called differently, but {repeated[0]} ends calls of two")
    return checked


def build_tool(section: Section) -> Tool:
    """The tool of a section."""
    cls = tool_class(section)
    return cls(cls.Config.model_validate(without_target(section)))
