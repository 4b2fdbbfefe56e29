"""The driver of a training: it prepares the run, starts all processes, trains, and ends them."""

import logging
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.exceptions import RayError, RayTaskError

from verl.agent import AgentLoop, GroupReward, RewardFn, RewardPreflight
from verl.single_controller.worker_group import WorkerLost
from verl.trainer.config import PPOConfig
from verl.trainer.console import plan, show_tail
from verl.trainer.packing import decide_packing
from verl.trainer.ppo.checkpoints import read_state
from verl.trainer.ppo.information_gain import COMPONENT
from verl.trainer.ppo.processes import Processes, start_processes
from verl.trainer.ppo.ray_trainer import ENDINGS, RayPPOTrainer
from verl.trainer.precision import slow_precision
from verl.trainer.preparation import (
    Task,
    check_environment,
    load_train_set,
    load_val_set,
    prepare,
    running_ray,
    write_config,
)
from verl.trainer.resume import check_resume
from verl.trainer.supervise import LOST, Stop
from verl.trainer.watchdog import Watchdog
from verl.utils.checkpoint_storage import CheckpointError
from verl.utils.dataset import RLHFDataset
from verl.utils.errors import ConfigError, DataError
from verl.utils.model_names import HF, finished_model
from verl.utils.run_folder import find_latest, folder_of, held, remove_leftovers, step_of
from verl.utils.trackers import missing_clients
from verl.utils.tracking import Timers, Tracking, truncate_metrics
from verl.utils.webhook import webhook_of

logger = logging.getLogger(__name__)
ENDED_BY_ERROR = "ended by an error"
PLAIN = (ConfigError, DataError, CheckpointError, *ENDINGS)
"""Errors whose message says all: neither a traceback nor the log of the processes is needed."""


def drive(raw: dict[str, Any], stop: Stop) -> int:
    """Trains; returns the exit status.

    Errors that a user can act on end the run without a traceback.
    """
    try:
        run_ppo(raw, stop)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        status = status_of(error)
        webhook = webhook_of(raw["trainer"]["alert_webhook_env"])
        if webhook is not None and status != LOST:
            name = str(raw["trainer"]["experiment_name"])
            webhook.tell(name, ENDED_BY_ERROR, f"{type(error).__name__}: {error}")
        if status is None:
            raise
        return status
    return 128 + stop.requested if stop.requested else 0


def status_of(error: Exception) -> int | None:
    """Logs a known error and returns its exit status; None for one whose traceback is needed."""
    if isinstance(error, PLAIN):
        sys.stderr.write(f"error: {error}\n")
        return 1
    if is_loss(error):
        logger.error("lost: %s", error)
        return LOST
    return None


def is_loss(error: Exception) -> bool:
    """Whether a process was lost, so that another start may help."""
    # a RayTaskError is an error of our own code, raised in another process
    return isinstance(error, (WorkerLost, RayError)) and not isinstance(error, RayTaskError)


def run_ppo(raw: dict[str, Any], stop: Stop) -> None:
    """Validates the composed configuration, then trains.

    Raises ConfigError or DataError before anything is started.
    """
    config, task = prepare(raw)
    check_trainable(config, task.agent, task.reward)
    train_set = load_train_set(config, task.tokenizer)
    val_set = load_val_set(config, task.tokenizer)
    check_environment(config, task.agent, gpus_here(config))
    with held(config.trainer.default_local_dir):
        logger.info("%s", plan_of(config, len(train_set)))
        if slow := slow_precision(config):
            logger.warning("%s", slow)
        config = decide_packing(config)
        resume = checkpoint_to_resume(config, train_set)
        write_config(raw, config)
        train(config, task, train_set, val_set, stop, resume)


def plan_of(config: PPOConfig, num_questions: int) -> str:
    """The first line of a run."""
    newest = find_latest(config.trainer.default_local_dir)
    steps = config.total_training_steps(num_questions)
    return plan(config, num_questions, steps, step_of(newest) if newest else None)


def gpus_here(config: PPOConfig) -> int:
    """GPUs that a training on one machine needs there; 0 when a cluster has them."""
    return config.num_gpus if config.trainer.ray_address is None else 0


def check_trainable(config: PPOConfig, agent: AgentLoop, reward: RewardFn) -> None:
    """Raises ConfigError for engines whose trajectories cannot be trained on.

    It also raises for branches of an agent loop that cannot branch, for dynamic sampling or a gate
    by a metric that the reward does not have, for a reward that has the name of the gain of
    information or says that it does not fit the agent loop, for one that compares trajectories
    where they are compared with a greedy one, and for loggers that are not installed.
    """
    problems = []
    if config.actor_rollout_ref.rollout.name == "openai":
        problems.append(
            "actor_rollout_ref.rollout.name=openai: an endpoint gives no tokens or weights to train"
        )
    if agent.is_evaluated_alone:
        problems.append(
            f"agent._target_={config.agent['_target_']}: this method is evaluated alone, nothing "
            "of it is trained; evaluate a model with it, or leave it out"
        )
    if agent.rewrites_contexts and not config.actor_rollout_ref.actor.state_masking:
        problems.append(
            "actor_rollout_ref.actor.state_masking=false trains what the environment says, which "
            "is left out where contexts are written anew (agent.context, agent.condense, IRCoT)"
        )
    if config.actor_rollout_ref.rollout.branches.rounds and not agent.can_branch:
        problems.append(
            "actor_rollout_ref.rollout.branches: trajectories of this agent cannot begin with the "
            "turns of another one, because contexts are written anew or results are condensed "
            "(agent.context, agent.condense, IRCoT), or its loop does not say how "
            "(verl.agent.AgentLoop.can_branch)"
        )
    filters = config.algorithm.filter_groups
    gate = config.data.gate
    metrics = {"algorithm.filter_groups.metric": filters.metric} if filters.enable else {}
    metrics |= {"data.gate.metric": gate.metric} if gate.is_on else {}
    entries = getattr(reward, "entries", None)
    if config.algorithm.information_gain.weight and COMPONENT in (entries or ()):
        problems.append(
            f"algorithm.information_gain.weight: the reward has a number {COMPONENT} of its own, "
            "in whose place the gain of information would be logged; rename that one"
        )
    problems += [
        f"{key}={metric}: the reward has no such number, only {', '.join(sorted(entries))}"
        for key, metric in metrics.items()
        if entries is not None and metric not in entries
    ]
    if isinstance(reward, GroupReward) and getattr(reward, "compares", True) and config.uses_greedy:
        problems.append(
            f"algorithm.adv_estimator={config.algorithm.adv_estimator}: the reward compares the "
            "trajectories of a prompt (score_groups, such as reward.otc_grpo), and the greedy one, "
            "with which they are compared, is not among them: choose another estimator, or a "
            "reward of single trajectories"
        )
    if isinstance(reward, RewardPreflight):
        problems += reward.preflight(agent)
    problems += [
        f"trainer.logger: {name} is not installed; bash scripts/setup.sh {name}, or pip install "
        f"'search-r1[{name}]'"
        for name in missing_clients(config.trainer.logger)
    ]
    if problems:
        raise ConfigError(problems)


def checkpoint_to_resume(config: PPOConfig, train_set: RLHFDataset) -> Path | None:
    """Finds the checkpoint to resume from; None if the run starts from the beginning.

    Logs what has changed in the configuration since then. Raises ConfigError when the run must not
    resume from it, CheckpointError when it cannot be read.
    """
    root = config.trainer.default_local_dir
    folder = find_latest(root)
    if folder is None:
        return None
    if config.trainer.resume_mode == "disable":
        raise ConfigError(
            [
                f"trainer.resume_mode=disable, but {root} holds checkpoints of an earlier run: "
                "name another folder by trainer.default_local_dir, or delete them"
            ]
        )
    for change in check_resume(folder, config, train_set.rows):
        logger.info("changed since %s: %s", folder.name, change)
    return folder


def train(
    config: PPOConfig,
    task: Task,
    train_set: RLHFDataset,
    val_set: RLHFDataset,
    stop: Stop,
    resume: Path | None,
) -> None:
    """Starts Ray and all processes, trains from the checkpoint `resume`, and ends all of them.

    When the run has reached its end, the policy is written to the run folder.
    """
    root = config.trainer.default_local_dir
    remove_leftovers(root)
    with running_ray(config), tail_shown(root):
        stop.listen()  # again, because Ray has installed its own handler of SIGTERM
        train_under_ray(config, task, train_set, val_set, stop, resume)


def train_under_ray(
    config: PPOConfig,
    task: Task,
    train_set: RLHFDataset,
    val_set: RLHFDataset,
    stop: Stop,
    resume: Path | None,
) -> None:
    """Does the part of `train` that needs Ray to run."""
    root = config.trainer.default_local_dir
    tracking = None
    has_failed = True
    try:
        with Watchdog(config.trainer.hang_timeout_s, root) as watchdog:
            total_steps = config.total_training_steps(len(train_set))
            processes = start_processes(config, config.device, total_steps)
            watchdog.watch(processes.stacks)
            for rollout in processes.rollouts:
                rollout.report_progress_to(watchdog.progress)
            logger.info("policy: %s", processes.roles["actor"].describe()[0])
            tracking = start_tracking(config, resume)
            timers = Timers(watchdog.beat)
            trainer = RayPPOTrainer(
                config, task, train_set, val_set, processes, tracking, timers, stop
            )
            if resume:
                trainer.load_checkpoint(step_of(resume))
            fit(trainer)
            if not config.trainer.val_only and not stop.requested:
                write_policy(config, processes, trainer.step, resume)
            processes.shutdown()
            tracking.alert(*ending(config, trainer, stop))
        has_failed = False
    except Exception as error:
        if tracking is not None and not is_loss(error):
            text = f"{type(error).__name__}: {error}"
            tracking.alert(ENDED_BY_ERROR, text, by_webhook=False)  # which `drive` tells
        raise
    finally:
        if tracking is not None:
            tracking.finish(has_failed)


@contextmanager
def tail_shown(root: str) -> Iterator[None]:
    """Shows the end of the log of the processes if the block is left by an error of theirs."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, PLAIN):
            show_tail(root)
        raise


def fit(trainer: RayPPOTrainer) -> None:
    """Trains. An error of ENDINGS is raised after the checkpoint under way is complete."""
    try:
        trainer.fit()
    except ENDINGS:
        trainer.checkpoints.complete()
        raise


def ending(config: PPOConfig, trainer: RayPPOTrainer, stop: Stop) -> tuple[str, str]:
    """What is told of a run that has ended by itself or by a signal: a title and a text."""
    title = "stopped" if stop.requested else "finished"
    metric = config.trainer.best_metric
    score = trainer.tracking.latest.get(metric) if metric else None
    reached = "" if score is None else f"; {metric} {score:.3f}"
    where = config.trainer.default_local_dir
    return title, f"after step {trainer.step} of {trainer.total}{reached}; run folder {where}"


def write_policy(config: PPOConfig, processes: Processes, step: int, resume: Path | None) -> None:
    """Writes the policy of the last `step` in Hugging Face format, if `trainer.save_hf` is set.

    A run that had nothing left to train writes it only if it is missing.
    """
    root = config.trainer.default_local_dir
    has_trained = resume is None or step_of(resume) < step
    if config.trainer.save_hf and (has_trained or not has_policy_of(root, step)):
        folder = str(Path(root) / HF)
        processes.roles["actor"].save_pretrained(folder, folder_of(root, step).name)


def has_policy_of(root: str, step: int) -> bool:
    """Whether the run folder has the final policy, made from its newest checkpoint `step`."""
    newest = find_latest(root)
    is_last = newest is not None and newest.name == folder_of(root, step).name
    return is_last and finished_model(Path(root)) is not None


def service_ids(state: Mapping[str, Any]) -> dict[str, str]:
    """Each service's name of the run of a checkpoint; older ones name that of wandb alone."""
    if "trackers" in state:
        return dict(state["trackers"])
    return {"wandb": state["wandb"]} if state.get("wandb") else {}


def start_tracking(config: PPOConfig, resume: Path | None) -> Tracking:
    """Starts writing metrics.

    Metrics of later steps than the checkpoint `resume`, or all metrics without one, are dropped
    because they will be written again. The services go on with the runs of the checkpoint.
    """
    trainer = config.trainer
    step = step_of(resume) if resume else 0
    truncate_metrics(trainer.default_local_dir, step if resume else -1)
    return Tracking(
        trainer.default_local_dir,
        trainer.logger,
        trainer.project_name,
        trainer.experiment_name,
        config.model_dump(),
        trainer.panels,
        service_ids(read_state(resume)) if resume else None,
        step,
        webhook_of(trainer.alert_webhook_env),
    )
