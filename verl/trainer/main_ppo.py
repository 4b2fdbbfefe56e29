"""`python -m verl.trainer.main_ppo key=value ...`: composes, validates, builds the processes,
trains.

Everything that can be wrong with a run is found before the first process starts.
"""

import logging
import signal
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from verl.trainer.compose import as_plain, checked_arguments
from verl.trainer.supervise import LOST, Stop, follow_supervisor, supervise

CONFIGS = str(Path(__file__).resolve().parents[2] / "configs")


@hydra.main(config_path=CONFIGS, config_name="ppo", version_base=None)
def main(cfg: DictConfig) -> None:
    """Hydra's entry point: the supervisor, or under it the driver. A job of a multirun is its own
    driver."""
    set_up_logging()
    own = follow_supervisor()
    raw = plain_or_exit(cfg)
    if own is None and HydraConfig.get().mode != RunMode.MULTIRUN:
        status = supervised(raw)
    else:
        if own:  # resume_mode=disable is about what an earlier run has written
            raw["trainer"]["resume_mode"] = "auto"
        status = drive(raw)
    if status:
        sys.exit(status)


def plain_or_exit(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as dicts and lists. Exits naming every value that is required and not
    given."""
    from verl.utils.errors import ConfigError

    try:
        return as_plain(cfg)
    except ConfigError as error:
        sys.exit(f"error: {error}")


def supervised(raw: dict[str, Any]) -> int:
    """Exit status of this command in a process of its own, started again when it is lost."""
    trainer = raw["trainer"]
    limit = trainer["max_restarts"]
    return supervise(
        [sys.executable, "-m", "verl.trainer.main_ppo", *sys.argv[1:]],
        str(trainer["default_local_dir"]),
        limit if isinstance(limit, int) else 0,  # what is no number is the driver's to refuse
    )


def drive(raw: dict[str, Any]) -> int:
    """Exit status of a run within this process. Errors that a user can act on end it without a
    traceback."""
    with Stop() as stop:
        try:
            run_ppo(raw, stop)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except Exception as error:
            status = status_of(error)
            if status is None:
                raise
            return status
    return 128 + stop.requested if stop.requested else 0


def status_of(error: Exception) -> int | None:
    """Exit status for an error that is known, after saying what it is; None for one whose traceback
    is needed."""
    from verl.utils.checkpoint_storage import CheckpointError
    from verl.utils.errors import ConfigError, DataError

    if isinstance(error, (ConfigError, DataError, CheckpointError)):
        sys.stderr.write(f"error: {error}\n")
        return 1
    from ray.exceptions import RayError, RayTaskError

    from verl.single_controller.worker_group import WorkerLost
    from verl.trainer.ppo.ray_trainer import ENDINGS

    if isinstance(error, (WorkerLost, RayError)) and not isinstance(
        error, RayTaskError
    ):  # that is our code's own
        logging.getLogger(__name__).error("lost: %s", error)
        return LOST
    if isinstance(error, ENDINGS):
        sys.stderr.write(f"error: {error}\n")
        return 1
    return None


def run_ppo(raw: dict[str, Any], stop: Stop) -> None:
    """Validates the composed configuration, then trains. Raises ConfigError or DataError before
    anything is started."""
    from verl.trainer.packing import decide_packing
    from verl.utils.run_folder import held

    config, tokenizer, agent, reward = prepare(raw)
    check_trainable(config, agent, reward)
    train_set = load_train_set(config, tokenizer)
    val_set = load_val_set(config, tokenizer)
    check_environment(config, agent, gpus_here(config))
    with held(config.trainer.default_local_dir):
        config = decide_packing(config)
        resume = checkpoint_to_resume(config, train_set)
        write_config(raw, config)
        train(config, tokenizer, agent, reward, train_set, val_set, stop, resume)


def set_up_logging() -> None:
    """Times and messages on the console."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)


def prepare(raw: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Configuration, tokenizer, agent and reward. Raises ConfigError."""
    from verl.trainer.config import PPOConfig, build_agent, build_reward, build_tokenizer, validate

    set_up_logging()
    config: PPOConfig = validate(raw)
    tokenizer = build_tokenizer(config)
    return config, tokenizer, build_agent(config, tokenizer), build_reward(config, tokenizer)


def load_train_set(config: Any, tokenizer: Any) -> Any:
    """The training questions: all, or a fixed sample of `train_data_num`."""
    data = config.data
    return load_dataset(
        config, tokenizer, data.train_files, data.train_data_num, data.train_sample_seed
    )


def load_dataset(config: Any, tokenizer: Any, files: Any, limit: int | None, seed: int) -> Any:
    """The questions of `files`, a sample of `limit` if it is given. Raises DataError naming file
    and row.

    For a missing file it names the command that makes it, if the configuration knows one.
    """
    from verl.utils.dataset import RLHFDataset
    from verl.utils.errors import DataError

    data = config.data
    missing = [path for path in files if not Path(path).is_file()]
    if missing and data.made_by:
        raise DataError(
            f"{missing[0]}: no such file. The files of this configuration are made by: "
            f"{data.made_by}"
        )
    return RLHFDataset(
        files, tokenizer, data.max_start_length, limit, data.apply_chat_template_kwargs, seed
    )


def load_val_set(config: Any, tokenizer: Any) -> Any:
    """The held-out questions: all, a fixed sample of `val_data_num`, or one of every data
    source."""
    from verl.utils.dataset import sample_per_source

    data = config.data
    val_set = load_dataset(
        config, tokenizer, data.val_files, data.val_data_num, data.val_sample_seed
    )
    if data.val_sample_per_source is not None:
        val_set.keep(
            sample_per_source(val_set.rows, data.val_sample_per_source, data.val_sample_seed)
        )
    return val_set


def gpus_here(config: Any) -> int:
    """GPUs that a training on one machine needs there; 0 when a cluster has them."""
    return config.num_gpus if config.trainer.ray_address is None else 0


def check_environment(config: Any, agent: Any, gpus: int) -> None:
    """Raises ConfigError when what the run needs beside its configuration is not there, such as
    `gpus` GPUs."""
    from verl.trainer.checks import environment_problems
    from verl.trainer.host import run_folder_problems
    from verl.utils.errors import ConfigError

    problems = environment_problems(config, agent, gpus)
    problems += run_folder_problems(config.trainer.default_local_dir)
    if problems:
        raise ConfigError(problems)


def check_trainable(config: Any, agent: Any, reward: Any) -> None:
    """Raises ConfigError for engines and loops whose trajectories cannot be trained on.

    Also for dynamic sampling on a metric that the reward does not have.
    """
    from verl.utils.errors import ConfigError

    problems = []
    if config.actor_rollout_ref.rollout.name == "openai":
        problems.append(
            "actor_rollout_ref.rollout.name=openai: an endpoint gives no tokens or weights to train"
        )
    if not getattr(agent, "trainable", True):
        problems.append(
            f"agent._target_={config.agent['_target_']}: its contexts are rewritten, for "
            "evaluation only"
        )
    filters = config.algorithm.filter_groups
    entries = getattr(reward, "entries", None)
    if filters.enable and entries is not None and filters.metric not in entries:
        problems.append(
            f"algorithm.filter_groups.metric={filters.metric}: the reward has no such number, only "
            f"{', '.join(sorted(entries))}"
        )
    if problems:
        raise ConfigError(problems)


def checkpoint_to_resume(config: Any, train_set: Any) -> Path | None:
    """The checkpoint that the run goes on from, None if it begins anew. Says what the configuration
    changes since then.

    Raises ConfigError when the run must not go on from it, CheckpointError when it cannot be read.
    """
    from verl.trainer.resume import check_resume
    from verl.utils.errors import ConfigError
    from verl.utils.run_folder import find_latest

    root = config.trainer.default_local_dir
    folder = find_latest(root)
    if folder is None:
        return None
    if config.trainer.resume_mode == "disable":
        raise ConfigError(
            [
                f"trainer.resume_mode=disable, but {root} holds checkpoints of an earlier run: "
                "name another folder by "
                "trainer.default_local_dir, or delete them"
            ]
        )
    for change in check_resume(folder, config, train_set.rows):
        logging.getLogger(__name__).info("changed since %s: %s", folder.name, change)
    return folder


def write_config(raw: dict[str, Any], config: Any) -> None:
    """Writes the resolved configuration to the run folder."""
    from verl.utils.run_folder import write_atomically

    run_dir = Path(config.trainer.default_local_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        write_atomically(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(raw)))
    except OSError as error:  # a run that is started again on a full disk goes on
        logging.getLogger(__name__).warning("%s", error)


def train(
    config: Any,
    tokenizer: Any,
    agent: Any,
    reward: Any,
    train_set: Any,
    val_set: Any,
    stop: Stop,
    resume: Path | None,
) -> None:
    """Starts Ray and all processes, trains from `resume` on, writes the final policy, and ends them
    all."""
    import ray

    from verl.trainer.ppo.processes import start_processes
    from verl.trainer.ppo.ray_trainer import ENDINGS, RayPPOTrainer
    from verl.trainer.watchdog import Watchdog
    from verl.utils.model_names import HF
    from verl.utils.run_folder import folder_of, remove_leftovers, step_of
    from verl.utils.tracking import Timers

    trainer_cfg = config.trainer
    root = trainer_cfg.default_local_dir
    remove_leftovers(root)
    start_ray(config)
    stop.listen()  # Ray has taken SIGTERM
    tracking = None
    try:
        with Watchdog(trainer_cfg.hang_timeout_s, root) as watchdog:
            processes = start_processes(
                config, config.device, config.total_training_steps(len(train_set))
            )
            watchdog.stacks = processes.stacks
            for rollout in processes.rollouts:
                rollout.on_progress = watchdog.progress
            logging.getLogger(__name__).info("policy: %s", processes.roles["actor"].describe()[0])
            tracking = start_tracking(config, resume)
            trainer = RayPPOTrainer(
                config,
                tokenizer,
                agent,
                reward,
                train_set,
                val_set,
                processes,
                tracking,
                Timers(watchdog.beat),
                stop,
            )
            if resume:
                trainer.load_checkpoint(step_of(resume))
            try:
                trainer.fit()
            except ENDINGS:  # all processes are well: nothing of the last checkpoint is lost
                trainer.checkpoints.complete()
                raise
            ended = not trainer_cfg.val_only and not stop.requested
            trained = resume is None or step_of(resume) < trainer.step
            if trainer_cfg.save_hf and ended and (trained or not has_policy_of(root, trainer.step)):
                processes.roles["actor"].save_pretrained(
                    str(Path(root) / HF), folder_of(root, trainer.step).name
                )
            processes.shutdown()
    finally:
        if tracking is not None:
            tracking.finish()
        ray.shutdown()


def has_policy_of(root: str, step: int) -> bool:
    """Whether the run folder holds the final policy, made of the checkpoint of `step`, its
    newest."""
    from verl.utils.model_names import finished_model
    from verl.utils.run_folder import find_latest, folder_of

    newest = find_latest(root)
    is_last = newest is not None and newest.name == folder_of(root, step).name
    return is_last and finished_model(Path(root)) is not None


def start_tracking(config: Any, resume: Path | None) -> Any:
    """Where metrics go. Those after the checkpoint that the run starts from, or all without one,
    are dropped: they are written again. The wandb run of a checkpoint goes on."""
    from verl.trainer.ppo.checkpoints import read_state
    from verl.utils.run_folder import step_of
    from verl.utils.tracking import Tracking, truncate_metrics

    trainer = config.trainer
    truncate_metrics(trainer.default_local_dir, step_of(resume) if resume else -1)
    return Tracking(
        trainer.default_local_dir,
        trainer.logger,
        trainer.project_name,
        trainer.experiment_name,
        config.model_dump(),
        trainer.panels,
        read_state(resume)["wandb"] if resume else None,
    )


def start_ray(config: Any) -> None:
    """A Ray of our own, or the cluster at `trainer.ray_address`."""
    import ray

    address = config.trainer.ray_address
    ray.init(
        address=address
        or "local",  # not given, Ray would join RAY_ADDRESS or whatever runs on this machine
        include_dashboard=False if address is None else None,
        log_to_driver=True,
        logging_level=logging.WARNING,
    )


if __name__ == "__main__":
    sys.argv[1:] = checked_arguments(sys.argv[1:], "ppo")
    main()
