"""Reads overrides, and writes them so that Hydra's grammar reads them back as they are meant."""

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException


def parse(overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
    """The parsed overrides, and messages about texts that are no overrides."""
    parser = OverridesParser.create()
    parsed: list[Override] = []
    problems: list[str] = []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            problems.append(
                f"{text}: expected key=value, with what is special in quotes ({first_line(error)})"
            )
    return parsed, problems


def first_line(error: Exception) -> str:
    """The first line of a message: the others of Hydra's are for its developers."""
    return str(error).strip().partition("\n")[0]


def written(value: object) -> str:
    """A value as it is written in an override.

    >>> written([None, True, 1e-06, "a,b", {"k": 1}])
    "[null,true,1e-06,'a,b',{k:1}]"
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{written(entry)}" for name, entry in value.items()) + "}"
    return quoted(value) if isinstance(value, str) else str(value)


def quoted(text: str) -> str:
    r"""A text as the value of an override, in quotes where Hydra would read something else.

    >>> quoted("data/a.parquet"), quoted("it's, or = not"), quoted("12"), quoted("${trainer.seed}")
    ('data/a.parquet', "'it\\'s, or = not'", "'12'", '${trainer.seed}')
    """
    parsed, _ = parse([f"key={text}"])
    if parsed and not parsed[0].is_sweep_override() and parsed[0].value() == text:
        return text
    return "'" + text.replace("\\'", "\\\\'").replace("'", "\\'") + "'"
