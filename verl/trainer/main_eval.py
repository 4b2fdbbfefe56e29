"""`python -m verl.trainer.main_eval --config-name CONFIG [key=value ...]`: evaluates a Hugging Face model.

The configuration is that of training; `actor_rollout_ref.model.path` is evaluated on `data.val_files` as
`actor_rollout_ref.rollout.val_kwargs` say, and `trainer.default_local_dir`/evaluation.jsonl gets the trajectories. An
interrupted evaluation goes on where it was.
"""

import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from verl.trainer.main_ppo import check_environment, device_of, load_dataset, prepare, start_ray, write_config

CONFIGS = str(Path(__file__).resolve().parents[2] / "configs")
RESULT = "evaluation.jsonl"


@hydra.main(version_base=None, config_path=CONFIGS, config_name="grpo")
def main(cfg: DictConfig) -> None:
    """Composes the configuration, evaluates, and turns errors of the user's making into plain messages."""
    from verl.utils.errors import ConfigError, DataError

    try:
        run_eval(OmegaConf.to_container(cfg, resolve=True))  # pyright: ignore[reportArgumentType]
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")


def run_eval(raw: dict[str, Any]) -> Path:
    """The file of trajectories. Raises ConfigError or DataError before anything is started."""
    import ray

    from verl.trainer.evaluation import evaluate
    from verl.trainer.ppo.rollout import RolloutManager

    raw["actor_rollout_ref"]["rollout"]["load_format"] = "auto"  # no weight sync will bring the weights
    config, tokenizer, agent, _ = prepare(raw)
    val_set = load_dataset(config, tokenizer, config.data.val_files, config.data.val_data_num)
    check_environment(config, agent)
    write_config(raw, config)
    path, device, rollout = Path(config.trainer.default_local_dir) / RESULT, device_of(config), None
    start_ray(config)
    try:
        rollout = RolloutManager(config, device, engine_locations(config, device))
        evaluate(config, val_set, rollout, tokenizer, path)
    finally:
        if rollout is not None:
            rollout.shutdown()
        ray.shutdown()
    return path


def engine_locations(config: Any, device: str) -> list[dict[str, Any]]:
    """This node's accelerators, one engine rank each; on the CPU one place without any."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    count = config.trainer.n_gpus_per_node if device == "cuda" else 1
    return [{"node_id": node, "gpus": [str(i)] if device == "cuda" else []} for i in range(count)]


if __name__ == "__main__":
    main()
