"""`python -m verl.trainer.main_eval --config-name CONFIG [key=value ...]`: evaluates a model.

The configuration is that of a training. `actor_rollout_ref.model.path`, a Hugging Face model, is
evaluated on `data.val_files`, sampled as `actor_rollout_ref.rollout.val_kwargs` says. The
trajectories are written to `trainer.default_local_dir`/evaluation.jsonl. An interrupted evaluation
continues where it was.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import ray
from omegaconf import DictConfig
from ray.exceptions import RayError

from verl.rollout.local import LocalRollout
from verl.rollout.manager import RolloutManager
from verl.single_controller.worker_group import collect_stacks
from verl.trainer.compose import CONFIGS, as_plain, checked_arguments
from verl.trainer.config import PPOConfig
from verl.trainer.console import show_tail
from verl.trainer.evaluation import evaluate, identify
from verl.trainer.ppo.failures import RolloutFailed
from verl.trainer.preparation import (
    check_environment,
    load_val_set,
    prepare,
    running_ray,
    write_config,
)
from verl.trainer.watchdog import Watchdog
from verl.utils.errors import ConfigError, DataError, RewardError

RESULT = "evaluation.jsonl"


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="grpo")
def main(cfg: DictConfig) -> None:
    """Evaluates. Errors that a user can act on become plain messages."""
    try:
        run_eval(as_plain(cfg))
    except (ConfigError, DataError, RewardError, RolloutFailed) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.stderr.write("stopped: the same command goes on where this was\n")
        sys.exit(128 + signal.SIGINT)


def run_eval(raw: dict[str, Any]) -> Path:
    """Evaluates, and returns the path of the file of trajectories.

    Raises ConfigError or DataError before anything is started, RolloutFailed after.
    """
    # the engines must read the weights, because no weight sync brings them
    raw["actor_rollout_ref"]["rollout"]["load_format"] = "auto"
    config, task = prepare(raw)
    val_set = load_val_set(config, task.tokenizer)
    check_environment(config, task.agent, gpus_of_engines(config))
    path = Path(config.trainer.default_local_dir) / RESULT
    identify(config, val_set, path.with_suffix(".meta.json"))
    write_config(raw, config)
    with rollout_of(config) as rollout:
        evaluate(config, val_set, rollout, task.tokenizer, path)
    return path


def gpus_of_engines(config: PPOConfig) -> int:
    """The number of GPUs that the engines take on a node: all, unless it is configured."""
    rollout = config.actor_rollout_ref.rollout
    all_of_them = config.trainer.n_gpus_per_node
    if rollout.num_replicas is None:
        return all_of_them
    return min(all_of_them, rollout.num_replicas * rollout.tensor_model_parallel_size)


@contextmanager
def rollout_of(config: PPOConfig) -> Iterator[RolloutManager | LocalRollout]:
    """Starts the rollout: engines under Ray, or a client of an endpoint in this process.

    Engines that hang end this process with the status LOST (`verl.trainer.watchdog`).
    """
    if config.actor_rollout_ref.rollout.name == "openai":
        local = LocalRollout(config)
        try:
            yield local
        finally:
            local.shutdown()
        return
    root = config.trainer.default_local_dir
    with running_ray(config), Watchdog(config.trainer.hang_timeout_s, root) as watchdog:
        rollout = None
        try:
            rollout = RolloutManager(config, config.device, engine_locations(config, config.device))
            watchdog.watch(partial(running_stacks, rollout))
            rollout.report_progress_to(watchdog.progress)
            yield rollout
        except RayError:
            show_tail(root)
            raise
        finally:
            if rollout is not None:
                rollout.shutdown()


def running_stacks(rollout: RolloutManager) -> dict[str, str]:
    """The stacks of engines and agent workers, by name."""
    return collect_stacks(rollout.stacks())


def engine_locations(config: PPOConfig, device: str) -> list[dict[str, Any]]:
    """This node's accelerators, one engine rank each; on the CPU one place without any."""
    node = ray.get_runtime_context().get_node_id()
    count = config.trainer.n_gpus_per_node if device == "cuda" else 1
    return [{"node_id": node, "gpus": [str(i)] if device == "cuda" else []} for i in range(count)]


if __name__ == "__main__":
    sys.argv[1:] = checked_arguments(sys.argv[1:], "grpo")
    main()
