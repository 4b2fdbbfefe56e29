"""Any Python function with types in its signature as a tool: no class is written.

    def population(city: Annotated[str, "Name of the city, in English."], year: int = 2020) -> int:
        \"\"\"Tells how many people live in a city.\"\"\"

    agent.tools=[{_target_: search_r1.tools.function.FunctionTool, function: my_module.population}]

A function says by `CallError` that the policy got a call wrong. Any other exception is a mistake of
the function: the trajectory fails, and the policy reads nothing of it.
"""

import asyncio
import inspect
import json
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from search_r1.tools.base import (
    Arguments,
    CallError,
    Schema,
    Tool,
    ToolConfig,
    ToolFailed,
    ToolResponse,
)
from search_r1.tools.described import DescribedTool, Description, first_line
from verl.utils.errors import ConfigError
from verl.utils.loading import load_class, place_of

log = logging.getLogger(__name__)
Function = Callable[..., Any]
MAX_ABANDONED = 64
"""Threads of given-up calls that may still run where `max_concurrency` sets no limit."""


class FunctionConfig(ToolConfig):
    """A function that is a tool."""

    function: str
    """Where it is: `module.name`."""
    name: str | None = None
    """Its name for the policy. null: the function's own."""
    description: str | None = None
    """What the policy is told. null: the first paragraph of the function's docstring."""
    pure: bool = False
    """Whether the same arguments always bring the same result, so that `cache_size` may be set."""

    @field_validator("function")
    @classmethod
    def _has_a_signature(cls, path: str) -> str:
        arguments_of(load(path), path)
        return path

    @model_validator(mode="after")
    def _can_be_told(self) -> "FunctionConfig":
        for problem in described(self).problems():
            raise ValueError(f"{problem} ({self.function})")
        return self


@dataclass(frozen=True)
class FunctionArguments:
    """The arguments of a function, for pydantic."""

    model: type[BaseModel]
    """Its fields have names of their own, as a parameter may be called like a method of a model;
    their aliases are those of the parameters."""
    names: dict[str, str]
    """The parameters, by the names of the fields."""

    @property
    def schema(self) -> Schema:
        """The JSON schema, without the titles that pydantic adds."""
        schema = self.model.model_json_schema(by_alias=True)
        del schema["title"]
        for property_ in schema.setdefault("properties", {}).values():
            property_.pop("title", None)
        return schema

    def read(self, arguments: Arguments) -> dict[str, Any]:
        """The values of the arguments that were given. Raises ValidationError."""
        model = self.model.model_validate(arguments)
        given = [field for field in self.names if field in model.model_fields_set]
        return {self.names[field]: getattr(model, field) for field in given}


class FunctionTool(DescribedTool):
    """Calls a function: an `async def` in the event loop, any other in a thread.

    No thread can be stopped: a function that is given up at the deadline runs on, and its thread
    with it. Such threads are counted. When as many run as calls may run at the same time, further
    calls fail.
    """

    Config = FunctionConfig

    def __init__(self, config: FunctionConfig) -> None:
        super().__init__(config, described(config))
        self.path = config.function
        self.function = load(config.function)
        self.arguments = arguments_of(self.function, config.function)
        self.abandoned = 0
        """Threads that still run, although their calls were given up."""
        self.given_up = 0
        """Calls in threads that were given up, since `trajectory_facts`."""

    @classmethod
    def from_section(cls, config: ToolConfig) -> Sequence[Tool]:
        """The function as a tool. Its name is only known with its section."""
        assert isinstance(config, FunctionConfig)
        return [cls(config)]

    async def call(self, arguments: Arguments) -> ToolResponse:
        """Calls the function.

        Raises ToolFailed where the function raises anything but CallError.
        """
        try:
            return await self._answer(arguments)
        except CallError as error:
            return ToolResponse(str(error), error="call")
        except ToolFailed:
            raise
        except (Exception, SystemExit) as error:
            message = f"{self.path}: {self._place(error)}"
            raise ToolFailed(message, kind="exception") from error

    async def _answer(self, arguments: Arguments) -> ToolResponse:
        """The response to a call. Raises what the function raises."""
        try:
            given = self.arguments.read(arguments)
        except ValidationError as error:
            return ToolResponse(misfit(error), error="arguments")
        if inspect.iscoroutinefunction(self.function):
            value = await self.function(**given)
        else:
            value = await self._in_thread(partial(self.function, **given))
        # A decorator may hide that a function is `async def`.
        return as_response(await value if inspect.isawaitable(value) else value)

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        """What `call` returns in a thread of its own. Raises what it raises.

        The thread is a daemon, so that one that never ends keeps no process from ending.
        """
        most = self.limits.max_concurrency or MAX_ABANDONED
        if self.abandoned >= most:
            message = f"{self.path}: {self.abandoned} calls that were given up still run"
            raise ToolFailed(message, kind="threads")
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        outcome = Outcome()

        def run() -> None:
            outcome.take(partial(copied.run, call))
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._ended, ended)

        copied = copy_context()
        threading.Thread(target=run, name=self.path, daemon=True).start()
        try:
            await ended
        except asyncio.CancelledError:
            if not ended.done() or ended.cancelled():
                self.abandoned += 1
                self.given_up += 1
                log.warning("%s was given up, and its thread runs on", self.path)
            raise
        return outcome.get()

    def _ended(self, ended: "asyncio.Future[None]") -> None:
        """Tells who waits for a thread that it has ended, or that an abandoned one has."""
        if ended.done():
            self.abandoned -= 1
        else:
            ended.set_result(None)

    def _place(self, error: BaseException) -> str:
        """The exception, and the last line of the function's file on the way there."""
        code = getattr(inspect.unwrap(self.function), "__code__", None)
        return place_of(error, code.co_filename if code else "")

    def trajectory_facts(self) -> dict[str, Any]:
        """Calls whose threads were given up, if there were any.

        They are those of all trajectories since the last one that ended: right in the sum.
        """
        given_up, self.given_up = self.given_up, 0
        return {f"given_up/{self.name}": given_up} if given_up else {}


class Outcome:
    """What a call in another thread returned or raised.

    A future would not take a StopIteration, which a function may raise.
    """

    def __init__(self) -> None:
        self.value: Any = None
        self.error: BaseException | None = None

    def take(self, call: Callable[[], Any]) -> None:
        """Calls, and keeps what comes of it."""
        try:
            self.value = call()
        except BaseException as error:
            self.error = error

    def get(self) -> Any:
        """Returns the value, or raises the exception."""
        if self.error is None:
            return self.value
        if isinstance(self.error, Exception):
            raise self.error
        raise RuntimeError(f"{type(self.error).__name__}: {self.error}") from self.error


def load(path: str) -> Function:
    """The function at a dotted path. Raises ValueError where there is none."""
    try:
        function = load_class(path, "function")
    except ConfigError as error:
        raise ValueError(
            f"a function; {error.problems[0]}. Modules are found in the repository's root and in "
            "the folders of PYTHONPATH"
        ) from error
    if not inspect.isroutine(function):
        raise ValueError(f"a function, which {path} is not")
    return function


def arguments_of(function: Function, path: str) -> FunctionArguments:
    """The arguments that a function takes.

    Raises ValueError, naming the parameter, where they cannot be told by a JSON schema.
    """
    try:
        hints = get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters
    except (NameError, TypeError, ValueError) as error:
        raise ValueError(f"a function whose signature can be read: {path}: {error}") from error
    fields: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, parameter in parameters.items():
        if problem := parameter_problem(parameter, hints.get(name)):
            raise ValueError(f"a function whose parameters {problem}: {name} of {path}")
        field = f"argument_{len(fields)}"
        fields[field] = (hints[name], field_of(parameter, hints[name]))
        names[field] = name
    config = ConfigDict(extra="forbid", validate_by_alias=True)
    model = create_model("Arguments", __config__=config, **fields)
    return FunctionArguments(model, names)


def parameter_problem(parameter: inspect.Parameter, hint: Any) -> str:
    """What a parameter lacks that a call by name needs; empty for a good one."""
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return "each have a name, no *args or **kwargs"
    if parameter.kind is parameter.POSITIONAL_ONLY:
        return "can be given by name"
    if parameter.annotation is parameter.empty:
        return "have types"
    if isinstance(parameter.default, FieldInfo):
        return "have a Field within Annotated[...], not as a default"
    try:
        TypeAdapter(hint).json_schema()
    except (PydanticUserError, NameError, TypeError) as error:
        return f"have types that JSON can carry ({first_line(error)})"
    return ""


def field_of(parameter: inspect.Parameter, hint: Any) -> Any:
    """The field of a parameter: its default, and the text in `Annotated[..., "text"]`."""
    default = ... if parameter.default is parameter.empty else parameter.default
    notes = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    text = next((note for note in notes if isinstance(note, str)), None)
    if text is None:  # a description of None would hide the one of a Field within the hint
        return Field(default, alias=parameter.name)
    return Field(default, alias=parameter.name, description=text)


def described(config: FunctionConfig) -> Description:
    """What the policy is told of a function. Raises ValueError where it cannot be."""
    function = load(config.function)
    arguments = arguments_of(function, config.function)
    paragraph = (inspect.getdoc(function) or "").partition("\n\n")[0]
    text = " ".join(paragraph.split()) if config.description is None else config.description
    name = getattr(function, "__name__", "") if config.name is None else config.name
    return Description(name, text, arguments.schema)


def misfit(error: ValidationError) -> str:
    """What the policy is told of arguments that do not fit."""
    mistakes = [
        f"{' '.join(map(str, details['loc']))}: {details['msg']}".removeprefix(": ")
        for details in error.errors()
    ]
    return f"The arguments do not fit: {'; '.join(mistakes)}."


def as_response(value: Any) -> ToolResponse:
    """A function's result as the policy reads it: text as it is, anything else as JSON."""
    if isinstance(value, ToolResponse):
        return value
    if isinstance(value, str):
        return ToolResponse(value)
    return ToolResponse(json.dumps(to_jsonable_python(value), ensure_ascii=False))
