"""`python -m verl.trainer.main_ppo key=value ...`: composes, validates, builds the processes, trains.

Everything that can be wrong with a run is found before the first process starts.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

CONFIGS = str(Path(__file__).resolve().parents[2] / "configs")


@hydra.main(config_path=CONFIGS, config_name="ppo", version_base=None)
def main(cfg: DictConfig) -> None:
    """Hydra's entry point. Errors that a user can act on end the program without a traceback."""
    from verl.utils.errors import ConfigError, DataError

    try:
        run_ppo(OmegaConf.to_container(cfg, resolve=True))  # pyright: ignore[reportArgumentType]
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")


def run_ppo(raw: dict[str, Any]) -> None:
    """Validates the composed configuration, then trains. Raises ConfigError or DataError before anything is started."""
    config, tokenizer, agent, reward = prepare(raw)
    check_trainable(config, agent)
    train_set = load_dataset(config, tokenizer, config.data.train_files, config.data.train_data_num)
    val_set = load_val_set(config, tokenizer)
    check_environment(config, agent)
    write_config(raw, config)
    train(config, tokenizer, agent, reward, train_set, val_set)


def prepare(raw: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Configuration, tokenizer, agent and reward. Raises ConfigError listing every problem."""
    from verl.trainer.config import PPOConfig, build_agent, build_reward, build_tokenizer, validate

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    config: PPOConfig = validate(raw)
    tokenizer = build_tokenizer(config)
    return config, tokenizer, build_agent(config, tokenizer), build_reward(config, tokenizer)


def load_dataset(config: Any, tokenizer: Any, files: Any, limit: int | None) -> Any:
    """The questions of `files`, `limit` of them if it is given. Raises DataError naming file and row."""
    from verl.utils.dataset import RLHFDataset

    data = config.data
    return RLHFDataset(files, tokenizer, data.max_start_length, limit or -1, data.apply_chat_template_kwargs)


def load_val_set(config: Any, tokenizer: Any) -> Any:
    """The held-out questions: all, the first `val_data_num`, or a fixed sample of every data source."""
    from verl.utils.dataset import sample_per_source

    data = config.data
    val_set = load_dataset(config, tokenizer, data.val_files, data.val_data_num)
    if data.val_sample_per_source is not None:
        val_set.keep(sample_per_source(val_set.rows, data.val_sample_per_source, data.val_sample_seed))
    return val_set


def check_environment(config: Any, agent: Any) -> None:
    """Raises ConfigError when what the run needs beside its configuration is not there."""
    from verl.trainer.checks import environment_problems
    from verl.utils.errors import ConfigError

    if problems := environment_problems(config, agent):
        raise ConfigError(problems)


def check_trainable(config: Any, agent: Any) -> None:
    """Raises ConfigError for engines and loops whose trajectories cannot be trained on."""
    from verl.utils.errors import ConfigError

    problems = []
    if config.actor_rollout_ref.rollout.name == "openai":
        problems.append("actor_rollout_ref.rollout.name=openai: an endpoint gives no tokens or weights to train")
    if not getattr(agent, "trainable", True):
        problems.append(f"agent._target_={config.agent['_target_']}: its contexts are rewritten, for evaluation only")
    if problems:
        raise ConfigError(problems)


def write_config(raw: dict[str, Any], config: Any) -> None:
    """Writes the resolved configuration to the run folder."""
    run_dir = Path(config.trainer.default_local_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(raw)))


def train(config: Any, tokenizer: Any, agent: Any, reward: Any, train_set: Any, val_set: Any) -> None:
    """Starts Ray, the workers and the engines, trains, writes the final policy, and ends them all."""
    import ray
    import torch

    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    from verl.trainer.ppo.rollout import RolloutManager
    from verl.utils.checkpoint import find_latest
    from verl.utils.tracking import Tracking, truncate_metrics

    trainer_cfg, device = config.trainer, device_of(config)
    resume = trainer_cfg.resume_mode == "auto" and find_latest(trainer_cfg.default_local_dir)
    start_ray(config)
    tracking = rollout = None
    try:
        roles, group = build_workers(config, device, len(train_set))
        rollout = RolloutManager(config, device, group.locations)
        roles["actor"].connect_engines(rollout.servers)
        logging.getLogger(__name__).info("policy: %s", roles["actor"].describe()[0])
        extra = torch.load(resume / "trainer.pt", weights_only=False) if resume else {}
        if resume:
            truncate_metrics(trainer_cfg.default_local_dir, int(resume.name.removeprefix("global_step_")))
        tracking = Tracking(
            trainer_cfg.default_local_dir,
            trainer_cfg.logger,
            trainer_cfg.project_name,
            trainer_cfg.experiment_name,
            config.model_dump(),
            trainer_cfg.panels,
            extra.get("wandb"),
        )
        trainer = RayPPOTrainer(
            config, tokenizer, agent, reward, train_set, val_set, roles, group.world_size, rollout, tracking
        )
        if resume:
            trainer.load_checkpoint()
        trainer.fit()
        if trainer_cfg.save_hf and not trainer_cfg.val_only:
            roles["actor"].save_pretrained(str(Path(trainer_cfg.default_local_dir) / "hf"))
    finally:
        if rollout is not None:
            rollout.shutdown()
        if tracking is not None:
            tracking.finish()
        ray.shutdown()


def device_of(config: Any) -> str:
    """`cuda` or `cpu`."""
    import torch

    if config.trainer.device != "auto":
        return config.trainer.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def start_ray(config: Any) -> None:
    """A Ray of our own, or the cluster at `trainer.ray_address`."""
    import ray

    address = config.trainer.ray_address
    ray.init(
        address=address or "local",  # not given, Ray would join RAY_ADDRESS or whatever runs on this machine
        include_dashboard=False if address is None else None,
        log_to_driver=True,
        logging_level=logging.WARNING,
    )


def build_workers(config: Any, device: str, num_rows: int) -> tuple[dict[str, Any], Any]:
    """One process per accelerator holding actor and, where the algorithm needs them, reference and critic."""
    from verl.single_controller.worker_group import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
    from verl.trainer.ppo.ray_trainer import total_training_steps
    from verl.workers.actor import ActorWorker
    from verl.workers.critic import CriticWorker
    from verl.workers.reference import ReferenceWorker

    model, trainer = config.actor_rollout_ref, config.trainer
    steps = total_training_steps(config, num_rows)
    pool = RayResourcePool([trainer.n_gpus_per_node] * trainer.nnodes, use_gpu=device == "cuda")
    group = RayWorkerGroup(pool, device, trainer.seed, trainer.threads_per_rank, trainer.deterministic)
    specs = {"actor": RayClassWithInitArgs(ActorWorker, model.model, model.actor, model.rollout, steps)}
    if config.use_reference:
        specs["ref"] = RayClassWithInitArgs(ReferenceWorker, model.model, model.ref, model.rollout.temperature)
    if config.use_critic:
        specs["critic"] = RayClassWithInitArgs(CriticWorker, config.critic, steps)
    return {role: group.add_role(role, spec) for role, spec in specs.items()}, group


if __name__ == "__main__":
    main()
