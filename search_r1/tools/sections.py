"""From the sections of `agent.tools` to tools."""

from collections import Counter
from collections.abc import Sequence
from inspect import iscoroutinefunction
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter

from search_r1.tools.base import Tool, ToolConfig
from verl.utils.errors import ConfigError
from verl.utils.loading import load_class

Section = dict[str, Any]
"""A tool in a configuration: `_target_`, its class, and the keys of its `Config`."""


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
        raise ValueError("a subclass of search_r1.tools.base.Tool")
    if not issubclass(cls.Config, ToolConfig):
        raise ValueError(f"a tool whose Config is a ToolConfig, which that of {target} is not")
    for method in (cls.call, cls.execute):
        if not iscoroutinefunction(method):
            raise ValueError(
                f"a tool whose {method.__name__} is `async def`, which that of {target} is not"
            )
    finds_tools = cls.from_section.__func__ is not Tool.from_section.__func__
    if finds_tools:
        return cls
    if not hasattr(cls, "name"):
        raise ValueError(f"a tool with a name, which {target} does not have")
    if cls.call is Tool.call and cls.execute is Tool.execute:
        raise ValueError(f"a tool that has `execute` or `call`, which {target} does not have")
    return cls


def config_of(section: Section) -> ToolConfig:
    """The validated keys of a section. Raises ValueError for a wrong class or a wrong key."""
    cls = tool_class(section)
    config = cls.Config.model_validate({k: v for k, v in section.items() if k != "_target_"})
    # What a function or a server does is no property of the class: its section says it.
    if config.cache_size and not getattr(config, "pure", cls.pure):
        raise ValueError(
            f"cache_size=0 for {section['_target_']}, which does not always answer the same"
        )
    return config


def validated(section: Section) -> Section:
    """The same section. Raises ValueError for a wrong class or a wrong key."""
    config_of(section)
    return section


SECTIONS = TypeAdapter(list[Annotated[Section, AfterValidator(validated)]])


def check_sections(sections: Sequence[Section]) -> list[Section]:
    """The same sections. Raises ValueError for a wrong one."""
    return SECTIONS.validate_python(sections)


def build_tools(sections: Sequence[Section]) -> list[Tool]:
    """The tools of all sections, in their order."""
    tools: list[Tool] = []
    for section in sections:
        tools += tool_class(section).from_section(config_of(section))
    return tools


def naming_problems(tools: Sequence[Tool]) -> list[str]:
    """What keeps calls of the tools apart from each other: two of one name."""
    names = Counter(tool.name for tool in tools)
    return [
        f"agent.tools: expected tools of different names, but {name} is there twice"
        for name, times in names.items()
        if times > 1
    ]
