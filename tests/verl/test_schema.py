"""A model that a list of defaults names is the one place where its defaults stand."""

import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel

from tests.e2e.runs import ROOT
from verl.trainer.schema import defaults_of
from verl.utils.errors import ConfigError
from verl.utils.loading import load_class

CONFIGS = ROOT / "configs"


class Inner(BaseModel):
    size: int
    pair: tuple[float, float] = (0.9, 1e-6)


class Outer(BaseModel):
    name: str
    inner: Inner
    other: Inner = Inner(size=3)
    anything: dict[str, int] = {}


def test_defaults_of_a_model():
    assert defaults_of(Outer) == {
        "name": "???",
        "inner": {"size": "???", "pair": [0.9, 1e-6]},
        "other": {"size": 3, "pair": [0.9, 1e-6]},
        "anything": {},
    }


def composed(folder, text):
    (folder / "mine.yaml").write_text(text)
    with initialize_config_dir(str(folder), version_base=None):
        return compose("mine")


def test_a_list_of_defaults_names_models(tmp_path):
    text = f"defaults: [{__name__}.Outer@part, _self_]\npart: {{other: {{size: 4}}}}"
    config = composed(tmp_path, text)
    assert config.part.other == {"size": 4, "pair": [0.9, 1e-6]}
    assert OmegaConf.missing_keys(config) == {"part.name", "part.inner.size"}


def test_a_model_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"defaults=tests\.verl\.test_schema\.Nothing"):
        composed(tmp_path, f"defaults: [{__name__}.Nothing]")
    with pytest.raises(HydraException, match="nothing"):
        composed(tmp_path, "defaults: [nothing]")


def leaves(section, prefix=""):
    for key in section:
        value = OmegaConf.to_container(section, resolve=False)[key]
        if isinstance(value, dict) and value:
            yield from leaves(section[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("name", ["base", "search"])
def test_no_yaml_repeats_a_default(name):
    file = OmegaConf.load(CONFIGS / f"{name}.yaml")
    models = DictConfig({})
    for entry in file.pop("defaults"):
        target, _, package = entry.partition("@")
        if target != "_self_":
            defaults = defaults_of(load_class(target, "defaults"))
            models.merge_with({package: defaults} if package else defaults)
    repeated = [key for key, value in leaves(file) if OmegaConf.select(models, key) == value]
    assert not [key for key in repeated if OmegaConf.select(file, key) is not None]


def test_importing_the_models_loads_no_torch():
    """Help answers in seconds, so a model of the configuration needs nothing heavy."""
    code = (
        "import sys, verl.trainer.config, search_r1.agent.loop, search_r1.rewards.compose, "
        "search_r1.config; assert not {'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
