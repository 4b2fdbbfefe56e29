"""What proves of the keys of a configuration that each of them changes something.

A case names a key, another value than its default, and a probe: a function that lets the program do
something with a configuration, and says what came of it.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from tests.configs import ROOT
from verl.trainer.config import PPOConfig, validate
from verl.utils.config import Config

SIGNAL = "first"
"""The entry of a mapping that stands for all that could be in it."""


@dataclass
class Setting:
    """What a probe is given."""

    raw: dict[str, Any]
    """The composed configuration."""
    tokenizer: Any
    patch: pytest.MonkeyPatch
    """Undone after the probe, which works in an empty folder of its own."""

    @property
    def config(self) -> PPOConfig:
        return validate(self.raw)


Probe = Callable[[Setting], Any]
OF_THE_MODEL = object()


@dataclass
class Case:
    key: str
    other: Any
    """A value that is not the default."""
    probe: Probe
    also: dict[str, Any] = field(default_factory=dict)
    """Further keys, without which this one would show no effect; the same for both values."""
    recipe: tuple[str, ...] = ()
    """A configuration and overrides of Hydra, where those of the bench will not do."""
    default: Any = OF_THE_MODEL
    """What to compare with instead of the default of the model."""


@dataclass
class Bench:
    """What the cases of a few sections have in common."""

    defaults: dict[str, Any]
    """Of every key of these sections."""
    recipe: tuple[str, ...]
    """A configuration, and overrides of Hydra."""
    values: dict[str, Any] = field(default_factory=dict)
    """Of further keys, for all cases that do not set them."""

    def check(self, case: Case, tokenizer: Any, folder: Path) -> None:
        """Asserts that the probe of a case can tell the other value of its key from the default."""
        default = self.defaults[case.key] if case.default is OF_THE_MODEL else case.default
        raw = self._composed(case, default)
        with_default = observe(case.probe, raw, tokenizer, folder / "default")
        once_more = observe(case.probe, raw, tokenizer, folder / "once_more")
        assert with_default == once_more, "it changes by itself, so it proves nothing"
        changed = self._composed(case, case.other)
        with_other = observe(case.probe, changed, tokenizer, folder / "other")
        assert with_default != with_other

    def _composed(self, case: Case, value: Any) -> dict[str, Any]:
        key = case.key.replace("*", SIGNAL)
        return composed_with(case.recipe or self.recipe, self.values | case.also | {key: value})


def observe(probe: Probe, raw: dict[str, Any], tokenizer: Any, folder: Path) -> Any:
    """What a probe says of a configuration."""
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return probe(Setting(raw, tokenizer, patch))


@cache
def composed_once(config: str, *overrides: str) -> DictConfig:
    """A configuration whose interpolations are not resolved yet."""
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return compose(config, list(overrides))


def composed_with(recipe: tuple[str, ...], values: dict[str, Any]) -> dict[str, Any]:
    """A resolved configuration in which these values take the place of others."""
    config = copy.deepcopy(composed_once(*recipe))
    for key, value in values.items():
        OmegaConf.update(config, key, value, merge=False, force_add=SIGNAL in key)
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    return resolved


def defaults_of(section: type[Config], name: str) -> dict[str, Any]:
    """The default of every key of the section `name`, by dotted key; None where there is none.

    A `*` stands for the names that the entries of a mapping may have.
    """
    defaults: dict[str, Any] = {}
    for field_name, info in section.model_fields.items():
        key = f"{name}.{field_name}"
        if is_section(info.annotation):
            defaults |= defaults_of(info.annotation, key)
            continue
        defaults[key] = None if info.is_required() else info.default
        for entry in sections_within(info.annotation):
            defaults |= defaults_of(entry, f"{key}.*")
    return defaults


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
