"""`python -m verl.trainer.main_ppo key=value ...`: trains.

The command is a supervisor, which imports neither Ray nor torch. It starts itself a second time as
the driver (`verl.trainer.driver`), and restarts the driver when that is lost.
"""

import sys
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from verl.trainer.compose import CONFIGS, as_plain, checked_arguments
from verl.trainer.supervise import Stop, follow_supervisor, supervise_driver
from verl.utils.errors import ConfigError


@hydra.main(config_path=str(CONFIGS), config_name="ppo", version_base=None)
def main(cfg: DictConfig) -> None:
    """Supervises the training, or trains if a supervisor has started this process.

    A job of a multirun has no supervisor and is its own driver.
    """
    has_checkpoints = follow_supervisor()
    try:
        raw = as_plain(cfg)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    if has_checkpoints is None and HydraConfig.get().mode != RunMode.MULTIRUN:
        status = supervise_driver(sys.argv[1:], raw["trainer"])
    else:
        if has_checkpoints:  # resume_mode=disable concerns only checkpoints of earlier runs
            raw["trainer"]["resume_mode"] = "auto"
        status = drive(raw)
    if status:
        sys.exit(status)


def drive(raw: dict[str, Any]) -> int:
    """Trains within this process; returns the exit status."""
    with Stop() as stop:
        from verl.trainer import driver  # imports torch and Ray, which a supervisor does not need

        return driver.drive(raw, stop)


if __name__ == "__main__":
    sys.argv[1:] = checked_arguments(sys.argv[1:], "ppo")
    main()
