"""The base of every config model: frozen, and a key that is not declared is an error."""

from pydantic import BaseModel, ConfigDict, ValidationError


class Config(BaseModel):
    """Validated once, at the boundary; nobody writes to it afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def problems_of(error: ValidationError, prefix: str) -> list[str]:
    """Every wrong key under `prefix`, with what is wrong and what was given."""
    return [f"{prefix}{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
