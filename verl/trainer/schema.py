"""Lets a defaults list in configs/ name a pydantic model, whose defaults Hydra then composes.

    defaults:
      - verl.trainer.config.PPOConfig           # the keys of the library
      - search_r1.rewards.compose.SearchRewardConfig@reward
      - _self_                                  # what differs from them

So a default is written once, in the model that validates it. A task's models are found by their
dotted names, as its classes are by `_target_`, so the library imports no task.
"""

from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import MISSING, OmegaConf
from pydantic import BaseModel

from verl.utils.loading import load_class

SCHEME = "model"


def defaults_of(model: type[BaseModel]) -> dict[str, Any]:
    """Every key of a model with its default, sections nested; `???` where a value is required."""
    found: dict[str, Any] = {}
    dumped = model.model_construct().model_dump(mode="json", warnings=False)
    for name, field in model.model_fields.items():
        section = field.annotation
        if not field.is_required():
            found[name] = dumped[name]
        elif isinstance(section, type) and issubclass(section, BaseModel):
            found[name] = defaults_of(section)
        else:
            found[name] = MISSING
    return found


class ModelSource(ConfigSource):
    """The defaults of pydantic models, found by the dotted name of the model."""

    @staticmethod
    def scheme() -> str:
        return SCHEME

    def load_config(self, config_path: str) -> ConfigResult:
        """The defaults of a model. Raises ConfigError if there is no model of that name."""
        model = load_class(config_path.removesuffix(".yaml"), "defaults")
        return ConfigResult(
            provider=self.provider,
            path=f"{SCHEME}://",
            config=OmegaConf.create(defaults_of(model)),
            header={"package": None},
        )

    def available(self) -> bool:
        return True

    def is_config(self, config_path: str) -> bool:
        """Whether the path looks like the name of a class. Files of that name are found first."""
        name = config_path.removesuffix(".yaml")
        return "." in name and all(part.isidentifier() for part in name.split("."))

    def is_group(self, config_path: str) -> bool:
        return False

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []


class ModelSearchPath(SearchPathPlugin):
    """Adds the models to what Hydra searches, behind all folders."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("verl", f"{SCHEME}://")


def register_models() -> None:
    """Makes names of models known to Hydra in this process; a second call changes nothing."""
    for plugin in (ModelSource, ModelSearchPath):
        Plugins.instance().register(plugin)
