"""The shipped configurations, composed as a command composes them."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from verl.trainer.precision import register_precision
from verl.trainer.schema import register_models

register_models()  # for a test outside of tests/, whose conftest does the same
register_precision()
ROOT = Path(__file__).resolve().parents[1]


def composed(config: str, *overrides: str) -> dict:
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return OmegaConf.to_container(compose(config, list(overrides)), resolve=True)
