"""Every key of `data` and `trainer` changes something that can be seen from outside.

Roles, engines, Ray, torch and wandb only write down what they are asked.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.keys import SIGNAL, Bench, Case, Probe, Setting, defaults_of
from tests.search_r1.agent.scripted import ADA, ANSWER, SEARCH, Engine, Library
from tests.templates import make_family_tokenizer
from tests.verl.fake_roles import ROWS, SMALL, Questions, make_processes, trainer_over
from tests.verl.questions import row
from verl.rollout.vllm_server import VLLMServer
from verl.single_controller import worker_group
from verl.single_controller.worker_group import WorkerHost
from verl.trainer import driver, preparation, supervise
from verl.trainer.config import DataConfig, TrainerConfig, build_agent
from verl.trainer.ppo.ray_trainer import ENDINGS
from verl.trainer.preparation import Task
from verl.trainer.supervise import LOST, Stop
from verl.utils import tracking as tracking_module
from verl.utils.errors import ConfigError, DataError
from verl.utils.run_folder import best, steps
from verl.utils.webhook import Webhook

GRPO = ("grpo", *SMALL)
PPO = ("ppo", *SMALL)
DETERMINISTIC = (*GRPO, "+mode=deterministic")
TRAIN = "train.parquet"
OTHER_TRAIN = "other_train.parquet"
VAL = "val.parquet"
OTHER_VAL = "other_val.parquet"
BENCH = Bench(
    defaults=defaults_of(DataConfig, "data") | defaults_of(TrainerConfig, "trainer"),
    recipe=GRPO,
    values={
        "data.train_files": [TRAIN],
        "data.val_files": [VAL],
        "data.max_start_length": 2048,
        "data.max_prompt_length": 4096,
        "data.max_response_length": 500,
        "data.max_obs_length": 500,
    },
)

# Questions and batches


def write_questions() -> None:
    """Four files of questions from two sources."""
    sizes = {TRAIN: 40, OTHER_TRAIN: 12, VAL: 30, OTHER_VAL: 9}
    for name, size in sizes.items():
        sources = ["often" if number % 3 else "seldom" for number in range(size)]
        rows = [row(source, f"{name}: who is {n}?") for n, source in enumerate(sources)]
        pq.write_table(pa.Table.from_pylist(rows), name)


def questions(load: Callable[[Any, Any], Any], setting: Setting) -> Any:
    """The questions of a set with the ids of their prompts, or why they cannot be had."""
    write_questions()
    try:
        loaded = load(setting.config, setting.tokenizer)
    except DataError as error:
        return str(error)
    return [question["prompt"] for question in loaded.rows], loaded.prompt_ids


train_questions = partial(questions, preparation.load_train_set)
val_questions = partial(questions, preparation.load_val_set)


def batches(setting: Setting) -> Any:
    """The questions of every batch, in their order."""
    return [event[1] for event in run(setting).said if event[0] == "submit rollout"]


# The loop of the agent

QUESTION = {"extra_info": {"question": "Where was Ada Marin born?"}}


def trajectory(setting: Setting) -> Any:
    """Every call of the engine, and every token of a trajectory that searches twice."""
    loop = build_agent(setting.config, setting.tokenizer)
    loop.search.client = Library([ADA])
    engine = Engine(setting.tokenizer, [SEARCH, SEARCH, ANSWER, ANSWER, ANSWER])
    prompt_ids = setting.tokenizer("Where was Ada Marin born?")["input_ids"]
    rolled = asyncio.run(loop.run(prompt_ids, QUESTION, engine))
    return engine.calls, rolled.token_ids, rolled.stop_reason


# The processes that are started


class Started(Exception):
    """All processes are there: what follows is not looked at."""


class RecordingRay:
    """Stands in for Ray: writes down what it and torch are asked, by topic; no process starts."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked: dict[str, list[Any]] = {}
        patch.setattr("ray.init", lambda address, **_: self.note("cluster", address))
        patch.setattr("ray.shutdown", lambda: None)
        patch.setattr("ray.remote", self.remote)
        patch.setattr("ray.get", lambda results: results)
        patch.setattr("ray.wait", lambda results, **_: (results[:1], results[1:]))
        patch.setattr(worker_group, "placement_group", self.placement_group)
        store = SimpleNamespace(set_timeout=lambda timeout: None)
        patch.setattr(worker_group, "TCPStore", lambda *_: store)
        patch.setattr(worker_group, "disable_progress_bar", lambda: None)
        for variable in ("MASTER_ADDR", "CUBLAS_WORKSPACE_CONFIG"):
            patch.setenv(variable, "")  # set by a rank, and put back after the probe
        patch.setattr("torch.cuda.is_available", lambda: False)
        patch.setattr("torch.cuda.set_device", lambda device: None)
        patch.setattr("torch.distributed.init_process_group", self.init_process_group)
        patch.setattr("torch.set_num_threads", partial(self.note, "threads"))
        patch.setattr("torch.use_deterministic_algorithms", partial(self.note, "deterministic"))
        for seed in ("random.seed", "numpy.random.seed", "torch.manual_seed"):
            patch.setattr(seed, partial(self.note, seed))

    def note(self, topic: str, *asked: Any) -> None:
        self.asked.setdefault(topic, []).append(asked)

    def placement_group(self, bundles: list[dict[str, float]], strategy: str) -> Any:
        self.note("nodes", len(bundles))
        self.note("places of a node", bundles[0])
        return SimpleNamespace(wait=lambda seconds: True)

    def init_process_group(self, backend: str, *, rank: int, world_size: int, **_: Any) -> None:
        self.note("process groups", backend, rank, world_size)

    def remote(self, *classes: type, **options: Any) -> Any:
        if not classes:
            return self.remote
        (cls,) = classes
        made = SimpleNamespace(remote=partial(Handle, self, cls))
        return SimpleNamespace(options=lambda **_: made)


class Handle:
    """The handle of a Ray actor without a process. That of a rank sets torch up as a rank does."""

    def __init__(self, ray: RecordingRay, cls: type, *args: Any, **kwargs: Any) -> None:
        self.cls = cls
        if cls is VLLMServer:
            ray.note("engine seeds", kwargs["seed"])
            ray.note("engine lengths", kwargs["max_model_len"])

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=partial(self._answer, method))

    def _answer(self, method: str, *args: Any) -> Any:
        if self.cls is not WorkerHost:
            return (method, id(self))
        if method == "location":
            return {"node_id": "a" * 56, "ip": "127.0.0.1", "gpus": ["0"], "pid": 1}
        if method == "setup":
            WorkerHost().setup(*args)
        if method == "call" and args[1] == "describe":
            raise Started
        return (method, id(self))


NO_TASK: Any = None
"""The start of the processes does not need it."""


def asked(topic: str) -> Probe:
    """The probe that says what is asked about `topic` when the processes of a run start."""

    def probe(setting: Setting) -> Any:
        ray = RecordingRay(setting.patch)
        with Stop() as stop, pytest.raises(Started):
            driver.train(setting.config, NO_TASK, Questions(), Questions(), stop, None)
        return ray.asked.get(topic)

    return probe


# Whole runs

MIXED = {number: [0.0, 1.0, 0.0, 1.0] for number in range(ROWS)}
"""Scores of the trajectories of each question."""


@dataclass
class Finished:
    """A run that has ended."""

    processes: Any
    folder: Path
    ending: str
    """What ended it before its last step; empty where nothing did."""

    @property
    def said(self) -> list[Any]:
        return self.processes.said


def run(setting: Setting, scores: dict | None = None, skipped_steps: float = 0.0) -> Finished:
    """A whole run over roles and engines that write down what they are asked."""
    config = setting.config
    patch = setting.patch
    processes = make_processes(config, scores)
    for role in processes.roles.values():
        role.skipped_steps = skipped_steps
    validations: list[int] = []

    def score(*_: Any) -> tuple[dict[str, float], list[Any]]:
        validations.append(1)
        number = len(validations)
        return {"val/test_score/all": number / 100, "val/test_score/tiny": -number / 100}, []

    patch.setattr("ray.init", lambda **_: None)
    patch.setattr("ray.shutdown", lambda: None)
    patch.setattr(driver, "start_processes", lambda *_: processes)
    patch.setattr("verl.trainer.ppo.validation.score", score)
    tokenizer = SimpleNamespace(pad_token_id=0, decode=str)
    agent = SimpleNamespace(reduce_metrics=lambda trajectories: {})
    ending = ""
    with Stop() as stop:
        try:
            task = Task(tokenizer, agent, None)
            driver.train(config, task, Questions(), Questions(), stop, None)
        except ENDINGS as error:
            ending = str(error)
    return Finished(processes, Path(config.trainer.default_local_dir), ending)


def verbs(setting: Setting) -> Any:
    """What roles and engines are asked, in that order, validations included."""
    return [event[0] for event in run(setting).said]


def batches_of_certain_questions(setting: Setting) -> Any:
    """The questions of every batch where 0 is always solved, and 1 never; and how the run ends."""
    ended = run(setting, MIXED | {0: [1.0] * 4, 1: [0.0] * 4})
    return [event[1] for event in ended.said if event[0] == "submit rollout"], ended.ending


def checkpoints_written(setting: Setting) -> Any:
    """Every checkpoint, and whether it is written in the background."""
    return run(setting).processes.roles["actor"].checkpoints


def checkpoints_kept(setting: Setting) -> Any:
    """The steps whose checkpoints are there at the end."""
    return steps(run(setting).folder)


def best_checkpoint(setting: Setting) -> Any:
    """The step, metric and value of the best checkpoint."""
    return best(run(setting).folder)


def trajectory_files(setting: Setting) -> Any:
    """The files of trajectories of training steps."""
    return sorted(path.name for path in run(setting).folder.glob("trajectories/train_*"))


def tokens_recorded(setting: Setting) -> Any:
    """Which trajectories of the first step are written with facts of their tokens."""
    path = run(setting).folder / "trajectories/train_000001.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return ["advantages" in record["segments"][0] for record in records]


def verbs_with_a_failure(setting: Setting) -> Any:
    """What is asked in a run of which one of the eight trajectories of the first step fails."""
    ended = run(setting, MIXED | {0: [None, 1.0, 0.0, 1.0]})
    return [event[0] for event in ended.said]


def verbs_with_skipped_steps(setting: Setting) -> Any:
    """What is asked in a run of which no update is finite."""
    ended = run(setting, skipped_steps=1.0)
    return [event[0] for event in ended.said]


def run_that_collapses(setting: Setting) -> Any:
    """What follows on an alarm in step 2: factors on learning rates, weight syncs, how it ends."""
    certain = [1.0] * 4
    ended = run(setting, MIXED | {2: certain, 3: certain})
    syncs = [event for event in ended.said if event[0] == "update_weights"]
    return ended.processes.roles["actor"].lr_factors, syncs, ended.ending


def patience_of_the_watchdog(setting: Setting) -> Any:
    """The longest silence, in seconds, of engines that tell a watchdog of their progress."""
    watchdog = run(setting).processes.rollout.on_progress.__self__
    return watchdog.timeout_s


def place_to_resume_from(setting: Setting) -> Any:
    """What the next start of a run does with the checkpoint of the first one."""
    run(setting)
    try:
        found = driver.checkpoint_to_resume(setting.config, Questions())
    except ConfigError as error:
        return str(error)
    return found


def starts(setting: Setting) -> Any:
    """How often a driver is started that is lost every time."""
    begun: list[Any] = []

    def lose(*args: Any) -> int:
        begun.append(args)
        return LOST

    setting.patch.setattr(supervise, "run_once", lose)
    setting.patch.setattr(supervise, "rest", lambda *_: None)
    supervise.supervise_driver([], setting.raw["trainer"])
    return len(begun)


# Where metrics go


class WandbRun:
    """A run of wandb that keeps its lines here."""

    id = "of wandb"

    def __init__(self) -> None:
        self.lines: list[Any] = []

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def log(self, metrics: dict[str, float]) -> None:
        self.lines.append(metrics)

    def finish(self) -> None:
        pass


@dataclass
class Tracked:
    """What a message and a line of metrics have come to."""

    wandb_runs: list[dict[str, Any]]
    wandb_lines: list[Any]
    console: list[str]
    files: dict[str, str]


def track(setting: Setting) -> Tracked:
    """Sends a message and a line of metrics to where the configuration says."""
    started: list[dict[str, Any]] = []
    wandb_run = WandbRun()
    console: list[str] = []

    def init(**kwargs: Any) -> WandbRun:
        started.append(kwargs)
        return wandb_run

    setting.patch.setattr("wandb.init", init)
    setting.patch.setattr(tracking_module.logger, "info", console.append)
    tracking = driver.start_tracking(setting.config, None)
    tracking.message("a message")
    tracking.log({"loss": 1.0}, 1)
    tracking.finish()
    files = {str(path): path.read_text() for path in Path().rglob("*.jsonl")}
    return Tracked(started, wandb_run.lines, console, files)


def name_in_wandb(argument: str) -> Probe:
    """The probe that says what wandb is given as `argument`."""

    def probe(setting: Setting) -> Any:
        (started,) = track(setting).wandb_runs
        return started[argument]

    return probe


def who_hears(setting: Setting) -> Any:
    """What comes to wandb and to the console."""
    tracked = track(setting)
    return tracked.wandb_lines, tracked.console


def who_is_alerted(setting: Setting) -> Any:
    """The variable whose webhook is told of a collapse."""
    told: list[str] = []
    for variable in ("ALERT_WEBHOOK", "OTHER_WEBHOOK"):
        setting.patch.setenv(variable, f"http://{variable}")
    setting.patch.setattr(Webhook, "tell", lambda webhook, *_: told.append(webhook.url))
    tracking = driver.start_tracking(setting.config, None)
    tracking.alert("collapse", "entropy")
    return told


def metrics_files(setting: Setting) -> Any:
    """The files of metrics, by their place."""
    return track(setting).files


def default_run_folder(setting: Setting) -> Any:
    """The run folder where the command line does not name one."""
    return setting.config.trainer.default_local_dir


# The collapse watch

SECOND = "second"
RECORDS = "trainer.trajectory_records"
RECORDED = {"trainer.rollout_data_freq": 1}
WATCH = "trainer.collapse_watch"


def alarms(first: list[float], second: list[float] | None = None) -> Probe:
    """The probe that says what the watch of a trainer makes of these curves."""

    def probe(setting: Setting) -> Any:
        trainer = trainer_over(setting.config, make_processes(setting.config))
        raised = []
        for step, value in enumerate(first):
            metrics = {SIGNAL: value} if second is None else {SIGNAL: value, SECOND: second[step]}
            raised.append(trainer.guard.observe(step, metrics))
        return [alarm.message() for alarm in raised if alarm is not None]

    return probe


UP_AND_DOWN = alarms([1.0, 1.0, 1.0, 3.0, 1.0, 0.2])
HALF = {"falls_to": 0.5}
ANY_SIGNAL = {f"{WATCH}.min_signals": 1}
ONE_SIGNAL = {f"{WATCH}.signals": {SIGNAL: HALF}} | ANY_SIGNAL
AT_ONCE = {f"{WATCH}.patience": 1}
TWO_SIGNALS = {f"{WATCH}.signals": {SIGNAL: HALF, SECOND: HALF}}
FAR_AWAY = {"above": 100.0, "below": -100.0}
UNBROKEN = {
    f"{WATCH}.signals": {SIGNAL: FAR_AWAY},
    f"{WATCH}.min_signals": 1,
    f"{WATCH}.patience": 1,
}
COLLAPSE = {
    f"{WATCH}.signals": {"critic/score/mean": {"above": 0.9}},
    f"{WATCH}.min_signals": 1,
    f"{WATCH}.patience": 1,
    "trainer.save_freq": 1,
}
ROLLED_BACK = COLLAPSE | {f"{WATCH}.response": "roll_back"}

# The table

ONE_STEP = {"trainer.total_training_steps": 1}
ONE_EPOCH = {"trainer.total_training_steps": None, "trainer.total_epochs": 1}
TWO_EPOCHS = {"trainer.total_training_steps": 6}
GATE = "data.gate"
GATED = TWO_EPOCHS | {f"{GATE}.rest_solved": 1}
WANDB = {"trainer.logger": ["wandb"]}
SHUFFLED = {"data.shuffle_train_dataloader": True}
NO_THINKING = {"enable_thinking": False}

TABLE = [
    Case("data.train_files", [OTHER_TRAIN], train_questions, default=[TRAIN]),
    Case("data.val_files", [OTHER_VAL], val_questions, default=[VAL]),
    Case("data.made_by", "make it", train_questions, {"data.train_files": ["missing.parquet"]}),
    Case("data.made_by", "make it", val_questions, {"data.val_files": ["missing.parquet"]}),
    Case("data.train_batch_size", 2, batches, ONE_STEP),
    Case("data.max_start_length", 3, train_questions),
    Case("data.max_start_length", 3, val_questions),
    Case("data.max_prompt_length", 60, trajectory, {"data.max_start_length": 20}),
    Case("data.max_prompt_length", 3000, asked("engine lengths")),
    Case("data.max_response_length", 5, trajectory),
    Case("data.max_response_length", 5, asked("engine lengths")),
    Case("data.max_obs_length", 20, trajectory),
    Case("data.train_data_num", 7, train_questions),
    Case("data.train_sample_seed", 1, train_questions, {"data.train_data_num": 7}),
    Case("data.val_data_num", 7, val_questions),
    Case("data.val_sample_per_source", 3, val_questions),
    Case("data.val_sample_seed", 1, val_questions, {"data.val_data_num": 7}),
    Case("data.val_sample_seed", 1, val_questions, {"data.val_sample_per_source": 3}),
    Case("data.shuffle_train_dataloader", False, batches),
    Case("data.source_weights", {"tiny": 1.0}, batches, TWO_EPOCHS),
    Case(f"{GATE}.rest_solved", 1, batches_of_certain_questions, TWO_EPOCHS),
    Case(f"{GATE}.rest_unsolved", 1, batches_of_certain_questions, TWO_EPOCHS),
    Case(f"{GATE}.metric", "em", batches_of_certain_questions, GATED),
    Case(f"{GATE}.solved_at", 2.0, batches_of_certain_questions, GATED),
    Case("data.apply_chat_template_kwargs", NO_THINKING, train_questions),
    Case("data.apply_chat_template_kwargs", NO_THINKING, val_questions),
    Case("data.apply_chat_template_kwargs", NO_THINKING, trajectory, {"template": "search"}),
    Case("trainer.project_name", "other", name_in_wandb("project"), WANDB),
    Case("trainer.experiment_name", "other", name_in_wandb("name"), WANDB, default="run"),
    Case("trainer.experiment_name", "other", default_run_folder, default="run"),
    Case("trainer.default_local_dir", "runs/other", metrics_files, default="runs/run"),
    Case("trainer.logger", ["wandb"], who_hears),
    Case("trainer.logger", ["console"], who_hears),
    Case("trainer.alert_webhook_env", "OTHER_WEBHOOK", who_is_alerted),
    Case("trainer.alert_webhook_env", None, who_is_alerted),
    Case("trainer.panels", {"panel": "loss"}, metrics_files),
    Case("trainer.device", "cuda", asked("places of a node")),
    Case("trainer.device", "cuda", asked("process groups")),
    Case("trainer.nnodes", 2, asked("nodes")),
    Case("trainer.n_gpus_per_node", 2, asked("places of a node")),
    Case("trainer.threads_per_rank", 61, asked("threads")),
    Case("trainer.ray_address", "auto", asked("cluster")),
    Case("trainer.seed", 7, batches, SHUFFLED),
    Case("trainer.seed", 7, asked("engine seeds")),
    Case("trainer.seed", 7, asked("torch.manual_seed")),
    Case("trainer.total_epochs", 1, verbs, {"trainer.total_training_steps": None}),
    Case("trainer.total_training_steps", 2, verbs, ONE_EPOCH),
    Case("trainer.critic_warmup", 1, verbs, recipe=PPO),
    Case("trainer.val_before_train", False, verbs),
    Case("trainer.val_only", True, verbs),
    Case("trainer.test_freq", 1, verbs),
    Case("trainer.save_freq", 1, checkpoints_written),
    Case("trainer.max_ckpt_to_keep", 1, checkpoints_kept, {"trainer.save_freq": 1}),
    Case("trainer.best_metric", None, best_checkpoint),
    Case("trainer.best_metric", "val/test_score/tiny", best_checkpoint),
    Case("trainer.async_save", False, checkpoints_written),
    Case("trainer.deterministic", True, asked("deterministic"), recipe=DETERMINISTIC),
    Case("trainer.resume_mode", "disable", place_to_resume_from),
    Case("trainer.save_hf", False, verbs),
    Case("trainer.rollout_data_freq", 2, trajectory_files),
    Case(f"{RECORDS}.tokens", False, tokens_recorded, RECORDED),
    Case(f"{RECORDS}.prompts", 1, tokens_recorded, RECORDED),
    Case("trainer.max_failed_share", 0.5, verbs_with_a_failure),
    Case("trainer.max_skipped_steps", 1, verbs_with_skipped_steps),
    Case("trainer.max_restarts", 1, starts),
    Case("trainer.hang_timeout_s", 60.0, patience_of_the_watchdog),
    Case(f"{WATCH}.signals", {SIGNAL: {"above": 2.0}}, UP_AND_DOWN, ANY_SIGNAL | AT_ONCE),
    Case(f"{WATCH}.signals.*.below", 0.5, UP_AND_DOWN, UNBROKEN),
    Case(f"{WATCH}.signals.*.above", 2.0, UP_AND_DOWN, UNBROKEN),
    Case(f"{WATCH}.signals.*.falls_to", 0.5, UP_AND_DOWN, UNBROKEN),
    Case(f"{WATCH}.signals.*.rises_to", 2.0, UP_AND_DOWN, UNBROKEN),
    Case(f"{WATCH}.signals.*.falls_by", 0.5, UP_AND_DOWN, UNBROKEN),
    Case(f"{WATCH}.min_signals", 1, alarms([1.0, 0.1], [1.0, 1.0]), TWO_SIGNALS | AT_ONCE),
    Case(f"{WATCH}.patience", 2, alarms([1.0, 0.1, 0.1, 0.1]), ONE_SIGNAL),
    Case(f"{WATCH}.min_history", 3, alarms([1.0, 0.1, 0.1]), ONE_SIGNAL | AT_ONCE),
    Case(f"{WATCH}.window", 2, alarms([1.0, 1.0, 1.0, 0.6, 0.6, 0.4]), ONE_SIGNAL | AT_ONCE),
    Case(f"{WATCH}.response", "stop", run_that_collapses, COLLAPSE),
    Case(f"{WATCH}.response", "roll_back", run_that_collapses, COLLAPSE),
    Case(f"{WATCH}.response", "stop", run_that_collapses, COLLAPSE, default="roll_back"),
    Case(f"{WATCH}.lr_factor", 0.25, run_that_collapses, ROLLED_BACK),
    Case(f"{WATCH}.max_roll_backs", 1, run_that_collapses, ROLLED_BACK),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One whose chat template reads an argument."""
    return make_family_tokenizer(tmp_path_factory.mktemp("tokenizer"), "qwen3")


@pytest.mark.parametrize("case", TABLE, ids=[f"{case.key}={case.other}" for case in TABLE])
def test_the_key_changes_what_its_probe_sees(case, tokenizer, tmp_path):
    BENCH.check(case, tokenizer, tmp_path)


def test_every_key_has_a_case():
    assert {case.key for case in TABLE} == set(BENCH.defaults)
