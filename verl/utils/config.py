"""The base of every config model: frozen, and a key that is not declared is an error."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Validated once, at the boundary; nobody writes to it afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
