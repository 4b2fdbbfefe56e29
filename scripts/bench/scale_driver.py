"""The driver's part of scale.py: seconds of every verb of a training step, with real Ray and ranks that do not compute."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import ray
import torch
from scale_agents import AgentProcess, load_world, make_jobs, trajectories_of

from search_r1.agent.metrics import reduce_metrics
from verl.agent import Trajectory
from verl.protocol import DataProto
from verl.single_controller.decorator import ATTRIBUTE, dispatch
from verl.single_controller.worker import Worker
from verl.single_controller.worker_group import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    RoleView,
    get,
    ready,
    spawn,
)
from verl.trainer.config import AlgorithmConfig, KLControlConfig, RolloutCorrectionConfig
from verl.trainer.ppo.advantage import apply_kl_penalty, build_kl_controller, compute_advantage
from verl.trainer.ppo.batching import build_batch, check_failures, groups_of, rollout_metrics, surviving
from verl.trainer.ppo.filters import correct_rollout, filter_loss
from verl.trainer.ppo.metrics import compute_data_metrics, compute_throughput_metrics, staleness_metrics
from verl.trainer.ppo.records import trajectory_records
from verl.utils.tracking import Tracking
from verl.workers.actor import ActorWorker
from verl.workers.config import SamplingConfig
from verl.workers.critic import CriticWorker
from verl.workers.reference import ReferenceWorker
from verl.workers.rollout.agent_worker import Job

NUM_AGENT_WORKERS, RANKS, MINI_BATCHES = 2, 8, 2
ESTIMATORS = get_args(AlgorithmConfig.model_fields["adv_estimator"].annotation)
CORRECTION = RolloutCorrectionConfig(rollout_is="token", rollout_rs="sequence", rollout_token_veto_threshold=1e-4)
RECORDS_EVERY = 10
"""`trainer.rollout_data_freq`."""
GRPO = (
    "submit", "collect", "drop and count", "records / 10", "build batch", "send: log-probs", "send: reference",
    "advantage: grpo", "filter, correct", "send: actor", "metrics",
)  # fmt: skip
PPO = (
    *(verb for verb in GRPO if verb != "advantage: grpo"),
    "KL in reward", "send: values", "advantage: gae", "send: critic",
)  # fmt: skip


def called_like(method: Any) -> Callable[[Any], Any]:
    """Marks a stand-in to be sent what the real method is sent."""

    def mark(stand_in: Any) -> Any:
        setattr(stand_in, ATTRIBUTE, getattr(method, ATTRIBUTE))
        return stand_in

    return mark


class FakeRank(Worker):
    """All roles of a rank. What it returns has the shapes of the real results."""

    def _numbers(self, data: DataProto, name: str) -> DataProto:
        return DataProto({name: torch.full(data.batch["responses"].shape, -0.5)})

    @called_like(ActorWorker.compute_log_prob)
    def compute_log_prob(self, data: DataProto) -> DataProto:
        return self._numbers(data, "old_log_probs")

    @called_like(ReferenceWorker.compute_ref_log_prob)
    def compute_ref_log_prob(self, data: DataProto) -> DataProto:
        return self._numbers(data, "ref_log_prob")

    @called_like(CriticWorker.compute_values)
    def compute_values(self, data: DataProto) -> DataProto:
        return self._numbers(data, "values")

    @called_like(ActorWorker.update_actor)
    def update_actor(self, data: DataProto) -> dict[str, float]:
        return {"loss": float(data.batch["advantages"].sum())}

    @called_like(CriticWorker.update_critic)
    def update_critic(self, data: DataProto) -> dict[str, float]:
        return {"loss": float(data.batch["returns"].sum())}


class Verbs:
    """Seconds of each verb, in their order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `function` returns."""
        began = time.perf_counter()
        result = function(*args, **kwargs)
        self.seconds[name] = time.perf_counter() - began
        return result


def status_gib(field: str) -> float:
    """A figure of /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 2**20


def driver(folder: Path, prompts: int, group: int) -> dict[str, float]:
    """The seconds of one training step by verb, GiB of memory, and MiB that each rank is sent. Starts Ray, ends it."""
    ray.init(address="local", num_cpus=RANKS + 1, include_dashboard=False, log_to_driver=False)
    try:
        agents = [spawn(AgentProcess, folder, num_cpus=0) for _ in range(NUM_AGENT_WORKERS)]
        ranks = RayWorkerGroup(RayResourcePool([RANKS], use_gpu=False), "cpu", seed=0, threads=1)
        role = ranks.add_role("fake", RayClassWithInitArgs(FakeRank))
        get([ready(agent) for agent in agents])
        world = load_world(folder)
        warm = make_jobs(world, RANKS, group)
        step(warm, agents, role, world.tokenizer, folder)
        jobs = make_jobs(world, prompts, group)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status_gib("VmRSS")
        verbs, figures = step(jobs, agents, role, world.tokenizer, folder)
        figures["driver GiB"] = status_gib("VmHWM") - before
    finally:
        ray.shutdown()
    return {
        **verbs,
        "GRPO step": sum(verbs[verb] for verb in GRPO),
        "PPO step": sum(verbs[verb] for verb in PPO),
        **figures,
    }


def step(
    jobs: list[Job], agents: list[Any], role: RoleView, tokenizer: Any, folder: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by verb, and other figures."""
    verbs = Verbs()
    running = verbs("submit", submit, jobs, agents)
    ray.wait(running, num_returns=len(running), fetch_local=True)
    results = [result for part in verbs("collect", get, running) for result in part]
    jobs = [job for start in range(len(agents)) for job in jobs[start :: len(agents)]]
    trajectories = trajectories_of(results)
    verbs("drop and count", count, jobs, results)
    verbs("records / 10", write_records, jobs, trajectories, tokenizer, folder)
    verbs.seconds["records / 10"] /= RECORDS_EVERY
    batch: DataProto = verbs(
        "build batch", build_batch, jobs, trajectories, pad_token_id=tokenizer.pad_token_id,
        num_mini_batches=MINI_BATCHES, world_size=RANKS, state_masking=True,
    )  # fmt: skip
    batch = batch.union(verbs("send: log-probs", role.compute_log_prob, batch))
    batch = batch.union(verbs("send: reference", role.compute_ref_log_prob, batch))
    batch = batch.union(verbs("send: values", role.compute_values, batch))
    batch = advantages(batch, verbs)
    verbs("send: critic", role.update_critic, batch)
    sent = verbs("filter, correct", filter_and_correct, batch)
    verbs("send: actor", role.update_actor, sent)
    verbs("metrics", figures_of, batch)
    return verbs.seconds, {
        "trajectories": len(batch),
        "tokens": int(batch.batch["attention_mask"].sum()),
        "longest prompt": batch.batch["prompts"].shape[1],
        "longest response": batch.batch["responses"].shape[1],
        "batch MiB": sum(column.nbytes for column in batch.batch.values()) / 2**20,
        "MiB of trajectories": len(ray.cloudpickle.dumps(trajectories)) / 2**20,
        "MiB to a rank: log-probs": mib_to_a_rank(role, "compute_log_prob", batch),
        "MiB to a rank: actor": mib_to_a_rank(role, "update_actor", sent),
    }


def submit(jobs: list[Job], agents: list[Any]) -> list[Any]:
    """The calls under way."""
    sampling = SamplingConfig().params()
    return [agent.run.remote(jobs[start :: len(agents)], sampling) for start, agent in enumerate(agents)]


def count(jobs: list[Job], results: list[Any]) -> None:
    """What the trainer does with the results before it makes a batch of them."""
    check_failures(results, 0.1)
    _, trajectories, _ = surviving(jobs, results, min_group=2)
    groups_of(jobs, trajectories)
    rollout_metrics(trajectories)
    reduce_metrics(trajectories)


def write_records(jobs: list[Job], trajectories: list[Trajectory], tokenizer: Any, folder: Path) -> None:
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
    made: dict[str, DataProto] = {}
    for name in ESTIMATORS:
        config = AlgorithmConfig(adv_estimator=name)
        made[name], _ = verbs(f"advantage: {name}", compute_advantage, batch, config)
    return made["grpo"]


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


def mib_to_a_rank(role: RoleView, method: str, batch: DataProto) -> float:
    """Size of the pickled arguments of rank 0."""
    call = role.group.methods[role.role][method]
    arguments = dispatch(call, RANKS, (batch,))[0]
    return len(ray.cloudpickle.dumps(arguments)) / 2**20
