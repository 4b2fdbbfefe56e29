"""Sessions with an MCP server: opened, shared by calls, lost and opened again.

The SDK's contexts must be left in the task that entered them, so each session lives in a task of
its own; calls use it from theirs.
"""

import asyncio
import logging
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TextIO

import anyio
import httpx2
from mcp import Client, MCPError, StdioServerParameters, stdio_client, types
from mcp.client.streamable_http import streamable_http_client
from mcp_types import CONNECTION_CLOSED

from search_r1.search.addresses import direct
from search_r1.search.retry import backoff
from search_r1.tools.base import Arguments, ToolFailed
from search_r1.tools.mcp import McpConfig
from verl.utils.errors import ConfigError

log = logging.getLogger(__name__)
MAX_EVENT_BYTES = 2**26
"""Of one event of a stream over HTTP. The SDK's own limit, 1 MiB, is less than results may be."""
MAX_PAGES = 1000
"""Of a list of tools: a server whose list has no end is wrong."""
STDERR = sys.__stderr__ or sys.stderr
"""Where servers write: a process can be given a file, and not what may have taken its place."""
SESSION_HEADER = "mcp-session-id"


class HttpClient(httpx2.AsyncClient):
    """Tries again while nobody listens, and notes that the server has forgotten the session.

    A request that found nobody listening was never received, so it may be sent again.
    """

    def __init__(self, config: McpConfig) -> None:
        read_s = None if config.deadline_s is None else config.deadline_s + config.connect_s
        super().__init__(
            headers={name: variable_of(variable) for name, variable in config.headers.items()},
            timeout=httpx2.Timeout(config.connect_s, read=read_s, pool=None),
            limits=httpx2.Limits(max_connections=None),
            mounts=direct(config.url or ""),
        )
        self.config = config
        self.patient = False
        """Whether it tries again: while a session is opened, that is tried again as a whole."""
        self.forgotten = False
        """Whether the session was refused, so that what was asked was not done."""

    async def send(self, request: httpx2.Request, **kwargs: Any) -> httpx2.Response:
        """Sends a request; the answer may have any status. Raises ConnectError and the like."""
        failures = 0
        while True:
            try:
                response = await super().send(request, **kwargs)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                failures += 1
                if not self.patient or failures > self.config.max_retries:
                    raise
                await asyncio.sleep(backoff(self.config.backoff_s, failures))
                continue
            if response.status_code == 404 and SESSION_HEADER in request.headers:
                self.forgotten = True
            return response


class Session:
    """One session with the server, in a task of its own."""

    def __init__(self, config: McpConfig, errlog: TextIO, retries: int) -> None:
        self.config = config
        self.errlog = errlog
        self.over = asyncio.Event()
        """Set when it is to end, or has lost the server."""
        self.tools: list[types.Tool] = []
        self.http: HttpClient | None = None
        self._opened: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._live(retries))

    @property
    def usable(self) -> bool:
        if self._task.done() or self.forgotten:
            return False
        return not (self._opened.done() and self.over.is_set())

    @property
    def ended(self) -> bool:
        return self._task.done()

    @property
    def forgotten(self) -> bool:
        """Whether the server no longer knows it."""
        return self.http is not None and self.http.forgotten

    async def client(self) -> Client:
        """The client, when the session is open. Raises ToolFailed when it cannot be opened."""
        # A caller that is cancelled does not keep the others from an open session.
        return await asyncio.shield(self._opened)

    async def _live(self, retries: int) -> None:
        """Holds the session; whoever waits for it is told when there will be none."""
        try:
            await self._try(retries)
        finally:
            self._fail(f"the session with {self.config.server} was closed")

    async def _try(self, retries: int) -> None:
        """Opens the session, again after failures, and holds it until it is over."""
        failures = 0
        while True:
            try:
                await self._hold()
                return
            except Exception as error:
                self.over.set()
                if self._opened.done():
                    log.warning("%s was lost: %s", self.config.server, cause(error))
                    return
                failures += 1
                if failures > retries:
                    self._fail(f"{self.config.server} does not answer: {cause(error)}")
                    return
            self.over.clear()
            await asyncio.sleep(backoff(self.config.backoff_s, failures))

    def _fail(self, message: str) -> None:
        """Tells those who wait for the session that there will be none."""
        if not self._opened.done():
            self._opened.set_exception(ToolFailed(message, kind="connection"))
            self._opened.exception()  # whoever asked may be gone

    async def _hold(self) -> None:
        """Opens the session once and holds it until it is over. Raises what the SDK raises."""
        client = Client(self._transport(), cache=None)
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(self.config.connect_s):
                    await stack.enter_async_context(client)
                    # The SDK knows by it how results must look and what belongs in headers.
                    self.tools = await all_tools(client)
            except TimeoutError as error:
                seconds = f"{self.config.connect_s:g}"
                raise TimeoutError(f"nothing within connect_s={seconds}") from error
            if self.http is not None:
                self.http.patient = True
            self._opened.set_result(client)
            try:
                await self.over.wait()
            finally:  # a transport that breaks ends the wait; no call may begin from then on
                self.over.set()

    @asynccontextmanager
    async def _transport(self) -> AsyncIterator[Any]:
        """The streams to and from the server; `over` is set when the one from it ends."""
        config = self.config
        async with AsyncExitStack() as stack:
            if config.command is not None:
                env = {name: variable_of(name) for name in config.env}
                server = StdioServerParameters(command=config.command, args=config.args, env=env)
                streams = stdio_client(server, self.errlog)
            else:
                self.http = await stack.enter_async_context(HttpClient(config))
                streams = streamable_http_client(
                    config.url or "", http_client=self.http, max_sse_event_size=MAX_EVENT_BYTES
                )
            received, sent = await stack.enter_async_context(streams)
            relay, relayed = anyio.create_memory_object_stream[Any](0)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._pass_on, received, relay)
                yield relayed, sent
                tasks.cancel_scope.cancel()

    async def _pass_on(self, received: Any, relay: Any) -> None:
        """Passes messages of the server on; their end is the end of the session."""
        async with relay:
            try:
                async for message in received:
                    await relay.send(message)
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                pass  # either end was closed
            finally:
                self.over.set()

    async def close(self) -> None:
        """Ends the session, and a server that was started for it."""
        self.over.set()
        if not self._opened.done():
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class McpServer:
    """An MCP server, which all of its tools share."""

    def __init__(self, config: McpConfig) -> None:
        self.config = config
        self.sessions: dict[asyncio.AbstractEventLoop, list[Session]] = {}
        """By their loops: the last of a loop serves calls, the others are ending."""

    def _session(self) -> Session:
        """The session of the running loop; a new one where there is none that can be used."""
        for loop in [loop for loop in self.sessions if loop.is_closed()]:
            del self.sessions[loop]
        sessions = self.sessions.setdefault(asyncio.get_running_loop(), [])
        if not sessions or not sessions[-1].usable:
            sessions[:] = [session for session in sessions if not session.ended]
            sessions.append(Session(self.config, STDERR, self.config.max_retries))
        return sessions[-1]

    async def call(self, name: str, arguments: Arguments) -> types.CallToolResult:
        """Calls a tool.

        Raises ToolFailed: `connection` where the server could not be reached or was lost while the
        call was under way, which is not repeated, as it may have been done; `protocol` where the
        server refused the call or its answer breaks the protocol.
        """
        for _ in range(self.config.max_retries):
            session = self._session()
            try:
                return await self._call(session, name, arguments)
            except ToolFailed as failure:
                # A server that knows no such session has not done what was asked.
                if not session.forgotten or failure.kind != "protocol":
                    raise
                session.over.set()
        return await self._call(self._session(), name, arguments)

    async def _call(
        self, session: Session, name: str, arguments: Arguments
    ) -> types.CallToolResult:
        """Calls a tool over a session. Raises ToolFailed."""
        client = await session.client()
        try:
            return await client.call_tool(name, arguments)
        except MCPError as error:
            if error.code == CONNECTION_CLOSED:
                message = f"{self.config.server} was lost during a call of {name}"
                raise ToolFailed(message, kind="connection") from error
            message = f"{self.config.server}, {name}: {error} ({error.code})"
            raise ToolFailed(message, kind="protocol") from error
        except Exception as error:  # whatever the SDK makes of an answer: no server ends a run
            message = f"{self.config.server}, {name}: {cause(error)}"
            raise ToolFailed(message, kind="protocol") from error

    async def close(self) -> None:
        """Ends the sessions of the running loop."""
        sessions = self.sessions.pop(asyncio.get_running_loop(), [])
        await asyncio.gather(*(session.close() for session in sessions))


async def list_once(config: McpConfig) -> list[types.Tool]:
    """The tools of the server, over a session for that alone.

    Raises ConfigError where it does not answer, with the last line that it wrote to its standard
    error.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as errlog:
        session = Session(config, errlog, retries=0)
        try:
            await session.client()
            return session.tools
        except ToolFailed as failure:
            errlog.seek(0)
            written = errlog.read().strip().splitlines()
            said = f"; it wrote: {written[-1]}" if written else ""
            raise ConfigError([f"agent.tools: {failure}{said}"]) from failure
        finally:
            await session.close()


async def all_tools(client: Client) -> list[types.Tool]:
    """All pages of the server's list of tools. Raises RuntimeError for one without an end."""
    found: list[types.Tool] = []
    cursor: str | None = None
    for _ in range(MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        found += page.tools
        cursor = page.next_cursor
        if not cursor:
            return found
    raise RuntimeError(f"its list of tools has more than {MAX_PAGES} pages")


def variable_of(name: str) -> str:
    """The value of an environment variable. Raises RuntimeError where it is not set."""
    if name not in os.environ:
        raise RuntimeError(f"the environment variable {name} is not set")
    return os.environ[name]


def cause(error: BaseException) -> str:
    """What was at the bottom of an error, without the groups and the chain around it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__} {error}".strip().partition("\n")[0]
