"""Tools whose name, description and arguments are not written down in a class."""

import json
import re
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator, SchemaError
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from search_r1.tools.base import Schema, Tool, ToolConfig

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
"""Names that can stand in tags, in native calls and in the names of metrics."""


@dataclass(frozen=True)
class Description:
    """What the policy is told of a tool."""

    name: str
    text: str
    parameters: Schema

    def problems(self) -> list[str]:
        """What keeps it from being a tool."""
        found = []
        if not NAME.fullmatch(self.name):
            found.append(f"a name of letters, digits, _, . and -, not {self.name!r}")
        if self.parameters.get("type") != "object":
            found.append("arguments that are an object, by their schema")
        try:
            Draft202012Validator.check_schema(self.parameters)
            check_references(self.parameters)
        except (SchemaError, Unresolvable) as error:
            found.append(f"a schema of its arguments that can be used: {first_line(error)}")
        return found


def check_references(schema: Schema) -> None:
    """Raises Unresolvable for a reference that leads nowhere, or out of the schema.

    A validator would follow it in the middle of a run, over the network if it says so.
    """
    resolver = Registry().resolver_with_root(DRAFT202012.create_resource(schema))
    nodes: list[Any] = [schema]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                resolver.lookup(node["$ref"])
            nodes += node.values()
        elif isinstance(node, list):
            nodes += node


def first_line(error: Exception) -> str:
    """What an exception says, without the text that follows in further lines."""
    return str(error).partition("\n")[0]


class DescribedTool(Tool):
    """A tool that is described by a `Description`. A subclass gives `call`."""

    def __init__(self, config: ToolConfig, description: Description) -> None:
        super().__init__(config)
        self.name = description.name
        self.description = description.text
        self.schema = with_dictionaries(description.parameters)
        self.argument_key = main_argument(self.schema)
        self.instruction = self._tag_instruction()

    @property
    def parameters(self) -> Schema:
        return self.schema

    def _tag_instruction(self) -> str | None:
        """How to call it in tags, where its arguments are more than one text."""
        properties = self.schema.get("properties", {})
        main = properties.get(self.argument_key, {})
        if len(properties) == 1 and main.get("type") == "string":
            return None
        tags = self.tags
        schema = json.dumps(self.schema, ensure_ascii=False)
        return (
            f"You can call the tool {self.name} by <{tags.call_tag}> arguments </{tags.call_tag}>, "
            f"where the arguments are a JSON object of the schema {schema}, and its result will "
            f"stand between <{tags.result_tag}> and </{tags.result_tag}>. {self.description}"
        ).strip()


def with_dictionaries(schema: Schema) -> Schema:
    """The same schema, its properties all dictionaries: JSON schema also knows true and false.

    >>> with_dictionaries({"properties": {"a": True, "b": False}})
    {'properties': {'a': {}, 'b': {'not': {}}}}
    """
    written = {True: {}, False: {"not": {}}}
    properties = schema.get("properties", {})
    return schema | {
        "properties": {
            name: written[value] if isinstance(value, bool) else value
            for name, value in properties.items()
        }
    }


def main_argument(schema: Schema) -> str:
    """The argument that is the text of a call in tags: the first one, required ones before others.

    >>> main_argument({"properties": {"a": {}, "b": {}}, "required": ["b"]})
    'b'
    """
    names = [*schema.get("required", []), *schema.get("properties", {})]
    return names[0] if names else Tool.argument_key
