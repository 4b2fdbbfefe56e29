"""Preparation of trainings and evaluations: checks, data and task, and the start of Ray.

Everything that can be wrong with a run is found here, before its first process starts.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ray
from omegaconf import OmegaConf
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from transformers import PreTrainedTokenizerBase

from verl.agent import AgentLoop, RewardFn
from verl.trainer.config import (
    PPOConfig,
    build_agent,
    build_image_reader,
    build_reward,
    build_tokenizer,
    validate,
)
from verl.trainer.console import keeping, library_log
from verl.trainer.environment import environment_problems
from verl.trainer.host import run_folder_problems
from verl.utils.dataset import RLHFDataset, sample_per_source
from verl.utils.errors import ConfigError, DataError
from verl.utils.run_folder import write_atomically

logger = logging.getLogger(__name__)
NICENESS = "RAY_worker_niceness"
RAY_STARTS = 4
SLOW_START = "timed out during startup"
"""A part of Ray's message when a local node was not there after 30 s."""
"""The environment variable by which Ray's processes learn at which niceness they work."""
RAYS_HANDLER = "ray_print_logs"
"""The name of the handler by which Ray writes the lines of its processes to the console."""


@dataclass(frozen=True)
class Task:
    """What a run trains or evaluates a policy on: its tokenizer, agent loop and reward."""

    tokenizer: PreTrainedTokenizerBase
    agent: AgentLoop
    reward: RewardFn


def set_up_logging() -> None:
    """Makes log messages appear on the console, with their times."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)


def prepare(raw: dict[str, Any]) -> tuple[PPOConfig, Task]:
    """Validates the composed configuration and builds the task. Raises ConfigError."""
    set_up_logging()
    config = validate(raw)
    tokenizer = build_tokenizer(config)
    task = Task(tokenizer, build_agent(config, tokenizer), build_reward(config, tokenizer))
    return config, task


def load_train_set(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> RLHFDataset:
    """Loads the training questions: all, or a fixed sample of `train_data_num`."""
    data = config.data
    return load_dataset(
        config, tokenizer, data.train_files, data.train_data_num, data.train_sample_seed
    )


def load_val_set(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> RLHFDataset:
    """Loads the held-out questions: all, or a fixed sample of them or of every data source."""
    data = config.data
    val_set = load_dataset(
        config, tokenizer, data.val_files, data.val_data_num, data.val_sample_seed
    )
    if data.val_sample_per_source is not None:
        sample = sample_per_source(val_set.rows, data.val_sample_per_source, data.val_sample_seed)
        val_set.keep(sample)
    return val_set


def load_dataset(
    config: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    files: Sequence[str],
    limit: int | None,
    seed: int,
) -> RLHFDataset:
    """Loads the questions of `files`, or a sample of `limit` of them.

    Raises DataError naming file and row. For a missing file it names the command that makes it, if
    the configuration has one.
    """
    data = config.data
    missing = [path for path in files if not Path(path).is_file()]
    if missing and data.made_by:
        raise DataError(
            f"{missing[0]}: no such file. The files of this configuration are made by: "
            f"{data.made_by}"
        )
    return RLHFDataset(
        files,
        tokenizer,
        data.max_start_length,
        limit,
        data.apply_chat_template_kwargs,
        seed,
        build_image_reader(config),
    )


def check_environment(config: PPOConfig, agent: AgentLoop, gpus: int) -> None:
    """Raises ConfigError when something is missing that the run needs from its environment.

    `gpus`: how many GPUs it needs on this machine.
    """
    problems = environment_problems(config, agent, gpus)
    problems += run_folder_problems(config.trainer.default_local_dir)
    if problems:
        raise ConfigError(problems)


def write_config(raw: dict[str, Any], config: PPOConfig) -> None:
    """Writes the resolved configuration to the run folder."""
    run_dir = Path(config.trainer.default_local_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        write_atomically(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(raw)))
    except OSError as error:  # a run that is restarted on a full disk must go on
        logging.getLogger(__name__).warning("%s", error)


@contextmanager
def running_ray(config: PPOConfig) -> Iterator[None]:
    """Starts a local Ray, or joins the cluster at `trainer.ray_address`, until the block ends.

    What its processes write goes to the run folder, and to the console where something is wrong
    (`verl.trainer.console`).
    """
    with library_log(config.trainer.default_local_dir, "ray") as log:
        start_ray(config)
        keep_lines(log)
        try:
            yield
        finally:
            ray.shutdown()


def keep_lines(log: IO[str]) -> None:
    """Puts between Ray's processes and the console what keeps their lines and shows some.

    Ray gives the lines of all processes to a list of handlers, and takes its own from it, by name,
    when it shuts down.
    """
    for name, show in list(global_worker_stdstream_dispatcher.handlers):
        if name == RAYS_HANDLER:
            global_worker_stdstream_dispatcher.remove_handler(name)
            global_worker_stdstream_dispatcher.add_handler(name, keeping(log, show))


def start_ray(config: PPOConfig) -> None:
    """Starts a local Ray, or joins the cluster at `trainer.ray_address`.

    Engines and ranks of a local Ray work at the niceness of this process. Ray's default for them is
    15, at which any other busy process of the machine takes nearly all of their time. On a cluster
    the environment of its nodes decides (docs/multinode.md). A local Ray gives up a start that
    takes 30 s, which a busy machine may need: it is tried `RAY_STARTS` times.
    """
    os.environ.setdefault(NICENESS, "0")
    address = config.trainer.ray_address
    for attempt in range(1, RAY_STARTS + 1):
        try:
            connect_ray(address)
            return
        except Exception as error:  # Ray has no class of its own for it
            was_slow = address is None and SLOW_START in str(error)
            if not was_slow or attempt == RAY_STARTS:
                raise
            logger.warning("this machine is too busy for Ray to start in time; starting it again")
            ray.shutdown()


def connect_ray(address: str | None) -> None:
    """Starts a local Ray, or joins the cluster at `address`."""
    ray.init(
        # without an address Ray would join RAY_ADDRESS, or whatever runs on this machine
        address=address or "local",
        include_dashboard=False if address is None else None,
        log_to_driver=True,
        logging_level=logging.WARNING,
    )
