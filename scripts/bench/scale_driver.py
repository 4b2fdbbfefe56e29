"""The driver's part of scale.py: seconds of every verb of a training step, with real Ray; the ranks
do not compute."""

import itertools
import pickle
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from scale_agents import AgentProcess, load_world, make_jobs, trajectories_of

from search_r1.agent.metrics import reduce_metrics
from verl.agent import Trajectory
from verl.protocol import ACTOR_MINI_BATCH, CRITIC_MINI_BATCH, DataProto
from verl.rollout.agent_worker import Failure, Job
from verl.rollout.records import trajectory_records
from verl.single_controller.decorator import collect, dispatch, registered
from verl.single_controller.worker_group import as_they_end, get, ready, spawn
from verl.trainer.config import AlgorithmConfig, KLControlConfig, RolloutCorrectionConfig
from verl.trainer.ppo.advantage import apply_kl_penalty, build_kl_controller, compute_advantage
from verl.trainer.ppo.batch_source import trajectory_metrics
from verl.trainer.ppo.batching import build_batch
from verl.trainer.ppo.core_algos import ADVANTAGE_ESTIMATORS
from verl.trainer.ppo.failures import check_failures
from verl.trainer.ppo.filters import correct_rollout, filter_loss
from verl.trainer.ppo.groups import groups_of, surviving
from verl.trainer.ppo.metrics import (
    compute_data_metrics,
    compute_throughput_metrics,
    staleness_metrics,
)
from verl.utils.tracking import Tracking
from verl.workers.actor import ActorWorker
from verl.workers.config import SamplingConfig
from verl.workers.critic import CriticWorker
from verl.workers.reference import ReferenceWorker

NUM_PROCESSES = 2
RANKS = 8
MINI_BATCHES = 2
SAMPLE = 100
"""Trajectories that an agent worker rolls out."""
ESTIMATORS = tuple(ADVANTAGE_ESTIMATORS)
CORRECTION = RolloutCorrectionConfig(
    rollout_is="token", rollout_rs="sequence", rollout_token_veto_threshold=1e-4
)
GRPO = (
    "submit",
    "collect",
    "drop and count",
    "records",
    "build batch",
    "send: log-probs",
    "send: reference",
    "advantage: grpo",
    "filter, correct",
    "send: actor",
    "metrics",
)
PPO = (
    *(verb for verb in GRPO if verb != "advantage: grpo"),
    "KL in reward",
    "send: values",
    "advantage: gae",
    "send: critic",
)


class RankProcess(AgentProcess):
    """An agent worker that also stands in for ranks: what it returns has the shapes of the real
    results."""

    async def run(
        self, jobs: Sequence[Job], sampling: dict[str, Any]
    ) -> list[Trajectory | Failure]:
        """The trajectories of the first SAMPLE jobs, and copies of them for the others: the driver
        is measured."""
        sample = pickle.dumps(await super().run(jobs[:SAMPLE], sampling))
        copies = itertools.chain.from_iterable(pickle.loads(sample) for _ in itertools.count())
        return list(itertools.islice(copies, len(jobs)))

    def call(self, method: str, data: DataProto) -> Any:
        """The answer of a rank to a call of one of `METHODS`."""
        result = METHODS[method][1]
        if result is None:
            return {"loss": float(data.batch["response_mask"].sum())}
        return DataProto({result: torch.full(data.batch["responses"].shape, -0.5)})


METHODS: dict[str, tuple[type, str | None]] = {
    "compute_log_prob": (ActorWorker, "old_log_probs"),
    "compute_ref_log_prob": (ReferenceWorker, "ref_log_prob"),
    "compute_values": (CriticWorker, "values"),
    "update_actor": (ActorWorker, None),
    "update_critic": (CriticWorker, None),
}
"""Whose method it is, and the column that it returns."""


class Ranks:
    """RANKS ranks that do not compute, in a few processes: what the driver does for them is the
    same."""

    def __init__(self, processes: list[Any]) -> None:
        self.processes = processes

    def arguments(self, method: str, batch: DataProto) -> list[tuple[Any, ...]]:
        """What each rank is sent, as RayWorkerGroup decides it."""
        call = registered(METHODS[method][0])[method]
        return dispatch(call.mode, RANKS, call.select(method, (batch,)))

    def execute(self, method: str, batch: DataProto) -> Any:
        """Calls all ranks and waits, as RayWorkerGroup does."""
        places = itertools.cycle(self.processes)
        calls = [
            process.call.remote(method, *args)
            for process, args in zip(places, self.arguments(method, batch), strict=False)
        ]
        return collect(registered(METHODS[method][0])[method].mode, as_they_end(calls))


class Verbs:
    """Seconds of each verb, in their order: of the driver's CPU, all threads, and of the clock."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = {}
        self.wall: dict[str, float] = {}

    def __call__(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `function` returns."""
        cpu = time.process_time()
        wall = time.perf_counter()
        result = function(*args, **kwargs)
        self.cpu[name] = time.process_time() - cpu
        self.wall[name] = time.perf_counter() - wall
        return result


def status_gib(field: str) -> float:
    """A figure of /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 2**20


def driver(folder: Path, prompts: int, group: int) -> dict[str, float]:
    """The seconds of one training step by verb, GiB of memory, and MiB that a rank is sent. Starts
    Ray and ends it."""
    torch.set_num_threads(1)  # so that CPU seconds are those of the work, not of threads that wait
    ray.init(address="local", num_cpus=NUM_PROCESSES, include_dashboard=False, log_to_driver=False)
    try:
        processes = [spawn(RankProcess, folder, num_cpus=0) for _ in range(NUM_PROCESSES)]
        get([ready(process) for process in processes])
        world = load_world(folder)
        step(make_jobs(world, RANKS, group), processes, world.tokenizer, folder)  # a warm-up
        jobs = make_jobs(world, prompts, group)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status_gib("VmRSS")
        verbs, figures = step(jobs, processes, world.tokenizer, folder)
        figures["driver GiB"] = status_gib("VmHWM") - before
    finally:
        ray.shutdown()
    steps = {"GRPO": GRPO, "PPO": PPO}
    return {
        **figures,
        **{f"{verb}, CPU s": seconds for verb, seconds in verbs.cpu.items()},
        **{
            f"{name} step, CPU s": sum(verbs.cpu[verb] for verb in parts)
            for name, parts in steps.items()
        },
        **{
            f"{name} step, s": sum(verbs.wall[verb] for verb in parts)
            for name, parts in steps.items()
        },
    }


def step(
    jobs: list[Job], processes: list[Any], tokenizer: Any, folder: Path
) -> tuple[Verbs, dict[str, float]]:
    """Seconds by verb, and other figures."""
    verbs = Verbs()
    ranks = Ranks(processes)
    running = verbs("submit", submit, jobs, processes)
    ray.wait(running, num_returns=len(running), fetch_local=True)
    results = [result for part in verbs("collect", get, running) for result in part]
    jobs = [job for start in range(len(processes)) for job in jobs[start :: len(processes)]]
    trajectories = trajectories_of(results)
    for trajectory in trajectories:
        trajectory.greedy_score = 0.0  # for ReMax, which is one of the estimators
    verbs("drop and count", count, jobs, results)
    verbs("records", write_records, jobs, trajectories, tokenizer, folder)
    batch: DataProto = verbs(
        "build batch",
        build_batch,
        jobs,
        trajectories,
        pad_token_id=tokenizer.pad_token_id,
        num_mini_batches=dict.fromkeys((ACTOR_MINI_BATCH, CRITIC_MINI_BATCH), MINI_BATCHES),
        world_size=RANKS,
        state_masking=True,
    )
    batch = batch.union(verbs("send: log-probs", ranks.execute, "compute_log_prob", batch))
    batch = batch.union(verbs("send: reference", ranks.execute, "compute_ref_log_prob", batch))
    batch = batch.union(verbs("send: values", ranks.execute, "compute_values", batch))
    batch = advantages(batch, verbs)
    verbs("send: critic", ranks.execute, "update_critic", batch)
    sent = verbs("filter, correct", filter_and_correct, batch)
    verbs("send: actor", ranks.execute, "update_actor", sent)
    verbs("metrics", figures_of, batch)
    return verbs, {
        "trajectories": len(batch),
        "tokens": int(batch.batch["attention_mask"].sum()),
        "longest response": batch.batch["responses"].shape[1],
        "batch MiB": sum(column.nbytes for column in batch.batch.values()) / 2**20,
        "trajectories, pickled MiB": len(pickle.dumps(trajectories)) / 2**20,
        "to a rank for log-probs, MiB": mib(ranks.arguments("compute_log_prob", batch)[0]),
        "to a rank for the update, MiB": mib(ranks.arguments("update_actor", sent)[0]),
    }


def submit(jobs: list[Job], agents: list[Any]) -> list[Any]:
    """The calls under way."""
    sampling = SamplingConfig().params()
    return [
        agent.run.remote(jobs[start :: len(agents)], sampling) for start, agent in enumerate(agents)
    ]


def count(jobs: list[Job], results: list[Any]) -> None:
    """What the trainer does with the results before it makes a batch of them."""
    check_failures(results, 0.1)
    _, trajectories, _ = surviving(jobs, results, min_group=2)
    groups_of(jobs, trajectories)
    trajectory_metrics(trajectories)
    reduce_metrics(trajectories)


def write_records(
    jobs: list[Job], trajectories: list[Trajectory], tokenizer: Any, folder: Path
) -> None:
    """Writes them to a run folder, which is then deleted."""
    tracking = Tracking(str(folder / "run"), [], "bench", "bench", {}, {})
    tracking.log_trajectories("train", trajectory_records(jobs, trajectories, tokenizer), 0)
    shutil.rmtree(folder / "run")


def advantages(batch: DataProto, verbs: Verbs) -> DataProto:
    """The batch with those of GRPO."""
    penalised = AlgorithmConfig(use_kl_in_reward=True, kl_ctrl=KLControlConfig(type="adaptive"))
    verbs("KL in reward", apply_kl_penalty, batch, penalised, build_kl_controller(penalised))
    plain = AlgorithmConfig()
    batch, _ = apply_kl_penalty(batch, plain, build_kl_controller(plain))
    for name in sorted(
        ESTIMATORS, key="grpo".__eq__
    ):  # grpo last: its batch is the one to go on with
        config = AlgorithmConfig(adv_estimator=name)
        made, _ = verbs(f"advantage: {name}", compute_advantage, batch, config)
    return made


def filter_and_correct(batch: DataProto) -> DataProto:
    """What the actor is sent, with all that can be configured."""
    batch, _ = filter_loss(batch, ["zero_variance", "void_turn", "truncated"])
    batch, _ = correct_rollout(batch, CORRECTION)
    return batch


def figures_of(batch: DataProto) -> dict[str, float]:
    """All metrics of a step."""
    timing = {"timing_s/step": 1.0}
    return {
        **staleness_metrics(batch, 0),
        **compute_data_metrics(batch, 4096),
        **compute_throughput_metrics(batch, timing, RANKS),
    }


def mib(arguments: tuple[Any, ...]) -> float:
    """Their size when pickled."""
    return len(pickle.dumps(arguments)) / 2**20
