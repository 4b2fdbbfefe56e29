"""Every key of a configuration, for the tests that prove of each that it changes something."""

from collections.abc import Iterator
from typing import Any, get_args

from verl.utils.config import Config


def is_section(annotation: Any) -> bool:
    """Whether a key of this type holds further keys instead of a value."""
    return isinstance(annotation, type) and issubclass(annotation, Config)


def sections_within(annotation: Any) -> Iterator[type[Config]]:
    """The sections among the parts of a type, such as those that the entries of a mapping hold."""
    for part in get_args(annotation):
        if is_section(part):
            yield part
        else:
            yield from sections_within(part)


def defaults_of(section: type[Config], name: str) -> dict[str, Any]:
    """The default of every key of the section `name`, by dotted key; None where there is none.

    A `*` stands for the names that the entries of a mapping may have.
    """
    defaults: dict[str, Any] = {}
    for field_name, field in section.model_fields.items():
        key = f"{name}.{field_name}"
        if is_section(field.annotation):
            defaults |= defaults_of(field.annotation, key)
            continue
        defaults[key] = None if field.is_required() else field.default
        for entry in sections_within(field.annotation):
            defaults |= defaults_of(entry, f"{key}.*")
    return defaults
