"""The base of config models, and messages about their errors.

Config models are frozen, and a key that they do not declare is an error.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from verl.utils.loading import load_class


class Config(BaseModel):
    """The base of every config model. It is validated once and never changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


@dataclass(frozen=True)
class OneOf:
    """Marks a text that must be one of the names in a table, `Annotated[str, OneOf("a.module.T")]`.

    The table is the only list of the names. It is loaded when a value is validated, so the model
    can be imported without the imports that the table needs.
    """

    table: str
    """Dotted path of a mapping, or of a sequence, of names."""

    @property
    def names(self) -> list[str]:
        return list(load_class(self.table, "table"))

    def check(self, value: str) -> str:
        """Returns the value, or raises pydantic's error of a literal if it is none of the names."""
        names = self.names
        if value in names:
            return value
        expected = f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}"
        message = "Input should be {expected}"
        raise PydanticCustomError("literal_error", message, {"expected": expected})

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))


EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a section of keys",
    "model": "a section of keys",
}
"""What was expected, by the beginning of pydantic's type of error (`int_parsing`, `list_type`)."""
ALTERNATIVES = {"str", "int", "float", "bool"}
"""Names that pydantic gives to the alternatives of a union in an error; they are no keys."""
BOUNDS = {
    "greater_than": ("gt", "a number above {}"),
    "greater_than_equal": ("ge", "{} or more"),
    "less_than": ("lt", "a number below {}"),
    "less_than_equal": ("le", "{} or less"),
    "literal_error": ("expected", "{}"),
    "too_short": ("min_length", "{} entries or more"),
    "too_long": ("max_length", "{} entries or fewer"),
}
"""By pydantic's type of error: the entry of its context that has the bound, and the text."""


def problems_of(
    error: ValidationError, prefix: str, model: type[BaseModel] | None = None
) -> list[str]:
    """One line for every wrong key: the key, what was given and what was expected.

    `prefix` is put before the keys. For a key that does not exist, the nearest key of `model` is
    suggested.
    """
    expected: dict[str, list[str]] = {}
    lines: dict[str, str] = {}
    for details in error.errors():
        key = prefix + key_of(details)
        if details["type"] == "extra_forbidden":
            known = (
                [f"{prefix}{name}" for name in keys_of_model(model)] if model is not None else []
            )
            lines[key] = f"{key}: there is no such key{did_you_mean(key, known)}"
        elif details["type"] == "missing":
            lines[key] = f"{key}: required, and not given"
        else:
            expected.setdefault(key, []).append(expectation(details))
            wanted = " or ".join(dict.fromkeys(expected[key]))
            lines[key] = f"{key}={shown(details['input'])}: expected {wanted}"
    return list(lines.values())


def key_of(details: ErrorDetails) -> str:
    """The dotted key of an error, without the names that pydantic adds for unions."""
    names = [str(part) for part in details["loc"]]
    return ".".join(name for name in names if "[" not in name and name not in ALTERNATIVES)


def expectation(details: ErrorDetails) -> str:
    """What pydantic expected, in words."""
    kind = details["type"]
    context = details.get("ctx", {})
    if kind == "int_from_float":
        return EXPECTED["int"]
    if kind in BOUNDS:
        name, text = BOUNDS[kind]
        bound = context.get(name)
        return text.format(f"{bound:g}" if isinstance(bound, float) else bound)
    beginning, _, rest = kind.partition("_")
    if beginning in EXPECTED and rest in ("type", "parsing", "attributes_type"):
        return EXPECTED[beginning]
    return details["msg"].removeprefix("Value error, ")


def shown(value: object) -> str:
    """A value as it is written on a command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def keys_of_model(model: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted keys of a model and of the models in it."""
    found: list[str] = []
    for name, field in model.model_fields.items():
        found.append(f"{prefix}{name}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += keys_of_model(field.annotation, f"{prefix}{name}.")
    return found


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that was probably meant; empty if there is none.

    Candidates are the same name with more sections before it, a similar name in the same section,
    and the same name in another section.

    >>> did_you_mean("train_batch_size", ["data.train_batch_size"])
    '; did you mean data.train_batch_size?'
    >>> did_you_mean("data.topk", ["retriever.topk"])
    '; did you mean retriever.topk?'
    >>> did_you_mean("trainer.seeed", ["trainer.seed", "trainer.save_freq"])
    '; did you mean trainer.seed?'
    >>> did_you_mean("agent.no", ["agent.dot"])
    ''
    """
    names = sorted(known)
    section, _, last = name.rpartition(".")
    siblings = {
        other.rpartition(".")[2]: other for other in names if other.rpartition(".")[0] == section
    }
    complete = [other for other in names if other.endswith(f".{name}")]
    spelt_alike = [siblings[word] for word in get_close_matches(last, siblings, n=1)]
    elsewhere = [other for other in names if other.rpartition(".")[2] == last and other != name]
    whole = [] if siblings else get_close_matches(name, names, n=1)
    for near in (complete, spelt_alike, get_close_matches(name, elsewhere, n=1, cutoff=0.0), whole):
        if near:
            return f"; did you mean {near[0]}?"
    return ""
