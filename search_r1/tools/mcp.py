"""The tools of an MCP server (Model Context Protocol), local or remote, as tools of the policy.

    agent.tools=[{_target_: search_r1.tools.mcp.McpTools, command: my-server, args: [--fast]}]
    agent.tools=[{_target_: search_r1.tools.mcp.McpTools, url: "http://node7:8000/mcp"}]

The server is asked once for its tools, when the agent loop is made. Calls go over one session for
each process and event loop, which is opened with the first call and again when the server was lost.
"""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator

from search_r1.tools.base import Arguments, Tool, ToolConfig, ToolResponse
from search_r1.tools.described import DescribedTool, Description
from verl.utils.config import did_you_mean
from verl.utils.errors import ConfigError

if TYPE_CHECKING:
    from mcp import types

    from search_r1.tools.mcp_session import McpServer

REPORTED = "The tool reported an error."
"""What the policy reads of an error that is not shown."""


class McpConfig(ToolConfig):
    """An MCP server: `command` starts one, `url` names one that is there already."""

    command: str | None = None
    """Program of a server that speaks over its standard input and output. Every process that rolls
    out starts its own."""
    args: list[str] = []
    """Arguments of the program."""
    env: list[str] = []
    """Names of the environment variables that the program gets beside PATH, HOME, USER, LOGNAME,
    SHELL and TERM. It inherits no others."""
    url: str | None = None
    """Address of a server that speaks streamable HTTP."""
    headers: dict[str, str] = {}
    """Headers of its requests: for each the name of the environment variable with its value."""
    tools: list[str] | None = None
    """Names of the server's tools that are used. null: all of them."""
    prefix: str = ""
    """Stands before the names of its tools, so that they differ from those of others."""
    show_errors: bool = False
    """Whether the policy reads what the server says of a call that failed. False: a fixed
    sentence."""
    pure: bool = False
    """Whether the same arguments always bring the same result, so that `cache_size` may be set."""
    connect_s: PositiveFloat = 30.0
    """Seconds that the server may take to start and to list its tools."""
    max_retries: NonNegativeInt = 4
    """Further attempts to reach a server that was lost."""
    backoff_s: NonNegativeFloat = 0.2
    """Wait before the first further attempt; doubled each time, with jitter."""

    @model_validator(mode="after")
    def _one_server(self) -> "McpConfig":
        if (self.command is None) == (self.url is None):
            raise ValueError("either command or url, for one MCP server")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"a url that is http(s)://HOST:PORT/PATH, not {self.url}")
        if self.url is not None and (self.args or self.env):
            raise ValueError("no args and env beside url: they are of a command")
        if self.command is not None and self.headers:
            raise ValueError("no headers beside command: they are of a url")
        return self

    @property
    def server(self) -> str:
        """The server in messages."""
        return f"the MCP server {self.command or self.url}"

    def missing_variables(self) -> list[str]:
        """Environment variables that it names and that are not set."""
        named = [*self.env, *self.headers.values()]
        return [name for name in dict.fromkeys(named) if name not in os.environ]


class McpTools(DescribedTool):
    """One tool of an MCP server; `from_section` makes one of each."""

    Config = McpConfig

    def __init__(self, config: McpConfig, description: Description, server: "McpServer") -> None:
        super().__init__(config, description)
        self.config = config
        self.server = server
        self.remote_name = description.name.removeprefix(config.prefix)

    @classmethod
    def from_section(cls, config: ToolConfig) -> Sequence[Tool]:
        """The tools of the server, which is started or reached for that.

        Raises ConfigError where it does not answer, or lacks a tool that is named.
        """
        assert isinstance(config, McpConfig)
        require_mcp()
        if missing := config.missing_variables():
            variables = ", ".join(missing)
            raise ConfigError([f"agent.tools: {config.server}: set the variable {variables}"])
        from search_r1.tools.mcp_session import McpServer, list_once

        # A loop of its own in a thread: the caller may itself be in a loop, or have none.
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(asyncio.run, list_once(config)).result()
        described = selected(config, found)
        server = McpServer(config)
        return [cls(config, description, server) for description in described]

    async def call(self, arguments: Arguments) -> ToolResponse:
        """Calls the tool of the server. Raises ToolFailed."""
        result = await self.server.call(self.remote_name, arguments)
        if result.is_error and not self.config.show_errors:
            return ToolResponse(REPORTED, error="reported")
        text, left_out = text_of(result)
        facts = {"left_out": dict(left_out)} if left_out else {}
        return ToolResponse(text, "reported" if result.is_error else "", facts)

    async def close(self) -> None:
        """Ends the session of this event loop, and with it a server that was started for it."""
        await self.server.close()


def require_mcp() -> None:
    """Raises ConfigError unless the SDK is installed."""
    if find_spec("mcp") is None:
        cure = "bash scripts/setup.sh mcp, or pip install -e '.[mcp]' in the project's folder"
        raise ConfigError([f"agent.tools: MCP servers need the package mcp: {cure}"])


def selected(config: McpConfig, found: Sequence["types.Tool"]) -> list[Description]:
    """The tools that the configuration asks for, in its order or that of the server.

    Raises ConfigError for names that the server does not have, and for tools that cannot be called.
    """
    by_name = {tool.name: tool for tool in found}
    names = list(by_name) if config.tools is None else list(dict.fromkeys(config.tools))
    known = ", ".join(by_name) or "none"
    problems = [
        f"agent.tools: {config.server} has no tool {name}{did_you_mean(name, by_name)} (it has "
        f"{known})"
        for name in names
        if name not in by_name
    ]
    described = [describe(config, by_name[name]) for name in names if name in by_name]
    problems += [
        f"agent.tools: {config.server}, tool {description.name}: expected {problem}; the key "
        "`tools` of its section can leave it out"
        for description in described
        for problem in description.problems()
    ]
    if not names:
        problems.append(f"agent.tools: {config.server} has no tools")
    if problems:
        raise ConfigError(problems)
    return described


def describe(config: McpConfig, tool: "types.Tool") -> Description:
    """What the policy is told of a tool of the server."""
    text = " ".join((tool.description or tool.title or "").split())
    return Description(config.prefix + tool.name, text, tool.input_schema)


def text_of(result: "types.CallToolResult") -> tuple[str, Counter[str]]:
    """What the policy reads of a result, and how many parts of each kind are no text.

    Texts follow each other in lines. Structured content stands for them where there are none, as
    servers give both for the same. Of images and the like it reads that they are there.
    """
    texts: list[str] = []
    named: list[str] = []
    left_out: Counter[str] = Counter()
    for block in result.content:
        if block.type == "text":
            texts.append(block.text)
            continue
        left_out[block.type] += 1
        named.append(name_of(block))
    if not texts and result.structured_content is not None:
        texts.append(json.dumps(result.structured_content, ensure_ascii=False))
    return "\n".join([*texts, *named]), left_out


def name_of(block: Any) -> str:
    """A part that is no text, in brackets: its kind, and what it says of itself."""
    owner = block.resource if block.type == "resource" else block
    kind = block.type.replace("_", " ")
    says = [getattr(owner, "uri", ""), getattr(owner, "mime_type", "")]
    return f"[{' '.join([kind, *(str(word) for word in says if word)])}]"
