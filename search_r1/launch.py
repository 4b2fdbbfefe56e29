"""Starts a training on one machine, with everything that it needs.

    python -m search_r1.launch --config-name grpo [key=value ...]

Makes what the `setup` section names (closed world, base model, training files, index), unless it is
there already and up to date. Then it serves the index, trains with the same overrides, and writes a
report. The training is `verl.trainer.main_ppo`, or `search_r1.finetune` where `finetune.data` is
set. What `setup` leaves null is not made: for the paper's recipes only the training is started.
"""

import json
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from search_r1.config import SetupConfig
from search_r1.data.made import is_current
from search_r1.data.prepare import TEST, TRAIN, inputs_of
from search_r1.report import write_report
from search_r1.world.generate import OPTIONS_FILE, WorldConfig
from verl.trainer import compose
from verl.trainer.config import validate
from verl.trainer.supervise import supervise_driver
from verl.utils.addresses import direct
from verl.utils.config import problems_of
from verl.utils.errors import ConfigError, DataError
from verl.utils.places import root, shipped
from verl.utils.processes import Forward, dying_with_this, ended, exit_status

logger = logging.getLogger(__name__)
SERVER_START_S = 120
MAX_SERVER_RESTARTS = 10
BASE_FILES = ("config.json", "model.safetensors", "tokenizer.json")
BASE = "data/closed_world/base"
ARITHMETIC_BASE = "data/closed_world/arithmetic/base"
DEEP_BASE = "data/closed_world/deep/base"
PATHS = (
    "data.train_files",
    "data.val_files",
    "trainer.default_local_dir",
    "custom_reward_function.path",
    "finetune.traces",
    "setup.world",
    "setup.questions",
    "setup.corpus_path",
    "setup.index_dir",
)
"""Keys whose values are paths.

Paths on the command line are relative to the working directory, those in configs/ to the
repository, or to the working directory where the program was installed from a wheel.
"""
OF_SMALL_BASE = (
    "actor_rollout_ref.actor.optim.lr",
    "data.max_response_length",
    "actor_rollout_ref.actor.fsdp_config.dtype",
)
"""Keys whose values in experiment=own_data suit only a model as small as the one it names."""
SMALL_WIDTH = 256
"""The largest hidden size of such a model."""
TOKENIZER = "actor_rollout_ref.model.tokenizer_path"
MODELS = ("actor_rollout_ref.model.path", TOKENIZER, "critic.model.path", "teacher.model.path")
"""Keys whose values are paths or names of models on the Hugging Face hub."""


def main(argv: Sequence[str] | None = None) -> int:
    """Launches the run that the command line describes; returns the exit status of the training."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        return launch(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        sys.exit(f"error: {error}")


def launch(argv: Sequence[str]) -> int:
    """Prepares, serves, trains and reports; returns the exit status of the training.

    Raises ConfigError for a wrong configuration, before anything is made or started.
    """
    line = compose.read_command_line(argv, "grpo")
    if line.only_shows:
        complete = compose.absolute(line.overrides, Path.cwd(), PATHS, MODELS)
        shown = ["--config-name", line.config_name, *line.flags, *complete]
        return subprocess.call([sys.executable, "-m", "verl.trainer.main_ppo", *shown], cwd=root())
    if line.is_foreign:
        raise ConfigError(
            [
                "--config-path, --config-dir: the launcher reads configs/ alone; "
                "verl.trainer.main_ppo takes them"
            ]
        )
    if line.multirun:
        raise ConfigError(
            ["--multirun: what surrounds a run is made for one: scripts/sweep.sh makes several"]
        )
    config, overrides = composed(line.config_name, line.overrides)
    if kept := values_of_small_base(config, overrides):
        raise ConfigError(
            [
                "experiment=own_data has the values of the closed world's small base model: take "
                f"experiment=own_model, or give your own for {' '.join(kept)}"
            ]
        )
    validate(compose.as_plain(config))
    if config.finetune.data is not None:
        return run_with_setup("search_r1.finetune", line.config_name, overrides, config)
    status = train(line.config_name, overrides, config)
    if status == 0:
        sys.stdout.write(write_report(Path(config.trainer.default_local_dir)))
    return status


def composed(
    config_name: str, overrides: Sequence[str], models: Sequence[str] = MODELS
) -> tuple[DictConfig, list[str]]:
    """Composes a configuration, and makes `root()` the working directory.

    Returns the configuration and the overrides with absolute paths. Paths in configs/ stay relative
    to `root()`. `models` are the keys whose values may be names on the hub instead of paths.
    Raises ConfigError.
    """
    complete = compose.absolute(overrides, Path.cwd(), PATHS, models)
    config = compose.composed(config_name, complete)
    os.chdir(root())
    return config, complete


def values_of_small_base(config: DictConfig, overrides: Sequence[str]) -> list[str]:
    """The values of experiment=own_data that are kept although the command names a larger model."""
    given = {text.partition("=")[0] for text in overrides}
    if "experiment=own_data" not in overrides or MODELS[0] not in given:
        return []
    if is_small(Path(config.actor_rollout_ref.model.path)):
        return []
    return [f"{key}={OmegaConf.select(config, key)}" for key in OF_SMALL_BASE if key not in given]


def is_small(model: Path) -> bool:
    """Whether this is a folder of a model of the size of the closed world's base."""
    description = model / "config.json"
    if not description.is_file():
        return False
    width = json.loads(description.read_text(encoding="utf-8")).get("hidden_size")
    return width is not None and width <= SMALL_WIDTH


def train(config_name: str, overrides: Sequence[str], config: DictConfig) -> int:
    """Prepares and serves what `setup` names, trains under supervision, and returns the status."""
    arguments = ["--config-name", config_name, *overrides]
    with prepare_and_serve(config, overrides) as server:
        if server is None:
            return supervise_driver(arguments, config.trainer)
        arguments.append(f"retriever.url={server.url}")
        return supervise_driver(arguments, config.trainer, meanwhile=server.revive)


def run_with_setup(
    program: str, config_name: str, overrides: Sequence[str], config: DictConfig
) -> int:
    """Prepares and serves what `setup` names, runs a module once, and returns its exit status."""
    command = [sys.executable, "-m", program, "--config-name", config_name, *overrides]
    with prepare_and_serve(config, overrides) as server:
        return run([*command, f"retriever.url={server.url}"] if server else command, server)


def run(command: list[str], server: "RetrievalServer | None") -> int:
    """Runs a program until it ends, and returns its exit status.

    Meanwhile SIGINT and SIGTERM are passed on to the program, and `server` is restarted when it
    ends. The program is killed when this process dies, whatever the cause.
    """
    with Forward() as signals:
        program = signals.start(command, preexec_fn=dying_with_this())
        while not ended(program, 1.0):
            if server is not None:
                server.revive()
        return exit_status(signals.reap())


@contextmanager
def prepare_and_serve(
    config: DictConfig, overrides: Sequence[str]
) -> Iterator["RetrievalServer | None"]:
    """Makes what `setup` names, and serves its index until the block ends.

    Yields None where no server is started: the command names one by `retriever.url`, `setup` names
    no index, or the run does not search.
    """
    setup = read_setup(compose.as_plain(config))
    named = any(o.startswith("retriever.url=") for o in overrides)
    if setup.index_dir and not setup.corpus_path and not named and config.do_search:
        raise ConfigError(
            [
                f"setup.index_dir={setup.index_dir}: name the corpus that is searched by "
                "setup.corpus_path"
            ]
        )
    prepare(setup, config)
    if setup.index_dir is None or named or not config.do_search:
        yield None
        return
    if config.trainer.nnodes > 1:
        sys.exit(
            f"error: trainer.nnodes={config.trainer.nnodes}: a retrieval server started here "
            "answers on this machine alone: start one that all nodes reach, and name it by "
            "retriever.url (docs/multinode.md)"
        )
    with RetrievalServer(
        Path(setup.index_dir, "bm25"),
        str(setup.corpus_path),
        int(config.retriever.topk),
        setup.server_flags,
    ) as server:
        yield server


def read_setup(raw: Mapping[str, Any]) -> SetupConfig:
    """The typed `setup` section. Raises ConfigError naming every wrong key."""
    try:
        return SetupConfig.model_validate(raw["setup"])
    except ValidationError as error:
        raise ConfigError(problems_of(error, "setup.", SetupConfig)) from error


def prepare(setup: SetupConfig, config: DictConfig) -> None:
    """Makes what `setup` names, unless it is there already and up to date.

    Exits with a message where making it would replace files that must not be replaced.
    """
    try:
        if setup.world:
            options = setup.world_options
            model = Path(config.actor_rollout_ref.model.path)
            base = Path(setup.world, "base")
            # A model that is missing anywhere else is a mistake in the configuration.
            is_base = model.resolve() == base.resolve()
            if is_base and not base.exists():
                refuse_what_no_base_has_learned(options)
            prepare_world(Path(setup.world), options)
            if is_base:
                prepare_base(base, options.arithmetic, options.deep)
        if setup.questions:
            prepare_questions(setup, config)
    except DataError as error:
        sys.exit(f"error: {error}")
    if setup.index_dir and setup.corpus_path:
        flags = [
            "--retrieval_method",
            "bm25",
            "--corpus_path",
            setup.corpus_path,
            "--save_dir",
            setup.index_dir,
        ]
        module("search_r1.search.index_builder", *flags)


def refuse_what_no_base_has_learned(options: WorldConfig) -> None:
    """Raises DataError for a world with two kinds of questions of which a base has learned one."""
    if options.arithmetic and options.deep:
        raise DataError(
            "setup.world_options: no base model has learned both arithmetic and deep questions: "
            "set one of them, or name a model of your own in actor_rollout_ref.model.path"
        )


def prepare_world(folder: Path, options: WorldConfig) -> None:
    """Makes the closed world if any of its files is missing.

    A world without a record of its options counts as made with the defaults. If there is a world
    with other options, the program exits and names them. Raises DataError when a file is missing
    and another one was changed by hand.
    """
    if (folder / "corpus.jsonl").exists():
        refuse_other_options(folder, options)
    missing = [name for name in options.files if not (folder / name).exists()]
    if missing and not is_current(folder, options.model_dump(), options.files):
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options]
        module("search_r1.world", "--out", str(folder), *flags)


def refuse_other_options(folder: Path, options: WorldConfig) -> None:
    """Exits when the world in `folder` was made with other options."""
    made = WorldConfig()
    record = folder / OPTIONS_FILE
    if record.exists():
        made = WorldConfig.model_validate_json(record.read_text(encoding="utf-8"))
    differing = [name for name, value in options if getattr(made, name) != value]
    if not differing:
        return
    there = ", ".join(f"{name}={getattr(made, name)}" for name in differing)
    asked = ", ".join(f"{name}={getattr(options, name)}" for name in differing)
    sys.exit(
        f"error: setup.world={folder} was made with {there}; setup.world_options asks for {asked}. "
        "Remove the folder, or name another"
    )


def base_of(arithmetic: bool, deep: bool) -> str:
    """The place of the base model of such worlds in the repository."""
    if deep:
        return DEEP_BASE
    return ARITHMETIC_BASE if arithmetic else BASE


def prepare_base(folder: Path, arithmetic: bool = False, deep: bool = False) -> None:
    """Copies the base model of the closed world if it is missing, or builds it.

    All worlds have the same one, but for those with questions that need arithmetic, and those with
    deep questions. It comes with the program; where it was deleted from the repository, it is
    built.

    Raises DataError when only some of its files are there.
    """
    missing = [name for name in BASE_FILES if not (folder / name).exists()]
    ours = shipped(base_of(arithmetic, deep))
    if len(missing) == len(BASE_FILES) and ours.is_dir() and not folder.exists():
        shutil.copytree(ours, folder)
    elif len(missing) == len(BASE_FILES):
        flags = ["--arithmetic"] * arithmetic + ["--deep"] * deep
        module("search_r1.world.base", "--out", str(folder), *flags)
    elif missing:
        raise DataError(
            f"{folder} is not a whole model, it lacks {', '.join(missing)}: remove the folder"
        )


def files_of(value: str | Sequence[str]) -> list[str]:
    """The files that a key names: its value is one name or a list of names."""
    return [value] if isinstance(value, str) else list(value)


def prepare_questions(setup: SetupConfig, config: DictConfig) -> None:
    """Makes the training files from `setup.questions`, unless they are there and up to date.

    Raises DataError when this would replace the user's own files, or when the configuration trains
    on other files.
    """
    path = Path(str(setup.questions))
    template = setup.template
    test_size = setup.test_size
    train_files = files_of(config.data.train_files)
    val_files = files_of(config.data.val_files)
    folder = Path(train_files[0]).parent if train_files else Path()
    expected = [folder / TRAIN, folder / TEST]
    if [*map(Path, train_files)] != expected[:1] or [*map(Path, val_files)] != expected[1:]:
        raise DataError(
            f"setup.questions={path} is made into {TRAIN} and {TEST} of one folder, but "
            f"data.train_files={config.data.train_files} and "
            f"data.val_files={config.data.val_files}: name these, or set setup.questions=null to "
            "train on your own files"
        )
    try:
        current = is_current(folder, inputs_of(path, template, test_size), (TRAIN, TEST))
    except DataError as error:
        raise DataError(
            f"setup.questions: {error}; setup.questions=null trains on the files that are there"
        ) from error
    if not current:
        flags = ["--questions", str(path), "--out", str(folder), "--template", template]
        module("search_r1.data.prepare", *flags, "--test-size", str(test_size))


def module(name: str, *flags: str) -> None:
    """Runs one of the project's commands; exits with its status if it fails."""
    status = subprocess.call([sys.executable, "-m", name, *flags])
    if status:
        sys.exit(status)


def free_port() -> int:
    """Finds a port of this machine that nobody listens on.

    It is below the range from which systems assign ports to outgoing connections, so that none of
    them takes it before the server does.
    """
    while True:
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


class RetrievalServer:
    """A retrieval server over an index, in a process of its own, that answers at `url`.

    A context manager: the server is stopped when the block ends, or killed when this process dies.
    Ctrl-C does not reach it, so that it answers until the run has ended.
    """

    def __init__(self, index: Path, corpus: str, topk: int, flags: Sequence[str] = ()) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/retrieve"
        command = [
            sys.executable,
            "-m",
            "search_r1.search.retrieval_server",
            "--retriever_name",
            "bm25",
        ]
        command += [
            "--index_path",
            str(index),
            "--corpus_path",
            corpus,
            "--topk",
            str(topk),
            "--port",
            str(self.port),
        ]
        self.command = [*command, "--log_level", "warning", *flags]  # the console is the run's
        self.restarts = 0

    def start(self) -> "subprocess.Popen[bytes]":
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            self.command, env=env, start_new_session=True, preexec_fn=dying_with_this()
        )

    def revive(self) -> None:
        """Starts the server again if it has ended, at most MAX_SERVER_RESTARTS times.

        Clients repeat their requests meanwhile.
        """
        if self.process.poll() is None or self.restarts > MAX_SERVER_RESTARTS:
            return
        self.restarts += 1
        what = f"the retrieval server ended (status {exit_status(self.process.returncode)})"
        if self.restarts > MAX_SERVER_RESTARTS:
            logger.error("%s after %d restarts: given up", what, MAX_SERVER_RESTARTS)
            return
        logger.warning("%s: restart %d of %d", what, self.restarts, MAX_SERVER_RESTARTS)
        self.process = self.start()

    def __enter__(self) -> "RetrievalServer":
        self.process = self.start()
        try:
            wait_until_healthy(f"http://127.0.0.1:{self.port}/health", self.process)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait()


def wait_until_healthy(url: str, server: "subprocess.Popen[bytes]") -> None:
    """Waits until the server answers.

    Exits with a message if the server ends first, or does not answer within SERVER_START_S seconds.
    """
    deadline = time.monotonic() + SERVER_START_S
    with httpx.Client(mounts=direct(url), timeout=1) as client:
        while time.monotonic() < deadline:
            if server.poll() is not None:
                sys.exit(
                    f"error: the retrieval server ended at once (status {server.returncode}); its "
                    "message is above"
                )
            try:
                if client.get(url).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
    sys.exit(f"error: the retrieval server did not answer at {url} within {SERVER_START_S} s")


if __name__ == "__main__":
    sys.exit(main())
