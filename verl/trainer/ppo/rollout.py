"""The driver's side of the rollout: engines, agent workers, weight versions."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from verl.agent import Row, Trajectory
from verl.single_controller.worker_group import first_ready, get, kill, ready, spawn
from verl.trainer.config import PPOConfig
from verl.workers.config import SamplingConfig
from verl.workers.rollout.agent_worker import AgentLoopWorker, Failure, Job
from verl.workers.rollout.router import Router
from verl.workers.rollout.vllm_server import VLLMServer


@dataclass(frozen=True)
class Submitted:
    """Trajectories under way."""

    jobs: list[Job]
    parts: list[list[Job]]
    """The jobs of each agent worker."""
    running: list[Any]


def make_jobs(
    rows: Sequence[Row], prompts: Sequence[list[int]], sampling: SamplingConfig, seed: int | None
) -> list[Job]:
    """`sampling.n` jobs per row, one group each; `seed` seeds every call of each, where it is given."""
    return [
        Job(uid, f"{uid}-{copy}", row, prompt, None if seed is None else seed + 1000 * (index * sampling.n + copy))
        for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True))
        for uid in [uuid.uuid4().hex]
        for copy in range(sampling.n)
    ]


class RolloutManager:
    """All engines and agent workers of a run, and the version of the weights that the engines hold."""

    def __init__(self, config: PPOConfig, device: str, locations: Sequence[dict[str, Any]]) -> None:
        rollout = config.actor_rollout_ref.rollout
        self.device, self.version = device, -1
        self.sleeps, self.seeded = device == "cuda", rollout.per_request_seed
        tp = rollout.tensor_model_parallel_size
        replicas = rollout.num_replicas or (max(1, len(locations) // tp) if device == "cuda" else 1)
        self.servers = [self._spawn_server(config, locations, rank, replicas) for rank in range(replicas)]
        workers = max(1, rollout.num_agent_workers)
        self.workers = [spawn(AgentLoopWorker, config, Router(self.servers), num_cpus=0) for _ in range(workers)]
        get([server.start.remote() for server in self.servers] + [ready(worker) for worker in self.workers])
        self.next_worker = 0
        self.capacity = 2 * replicas * rollout.max_num_seqs
        """Trajectories under way that keep the engines busy."""

    def _spawn_server(self, config: PPOConfig, locations: Sequence[dict[str, Any]], rank: int, replicas: int) -> Any:
        model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
        tp = rollout.tensor_model_parallel_size
        ranks = locations[rank * tp : (rank + 1) * tp] if self.device == "cuda" else locations[:1]
        return spawn(
            VLLMServer,
            rollout,
            model,
            max_model_len=config.max_model_len,
            device=self.device,
            replica_rank=rank,
            num_replicas=replicas,
            seed=config.trainer.seed,
            visible_devices=[gpu for location in ranks for gpu in location["gpus"]],
            node_id=ranks[0]["node_id"],
            num_cpus=0,
            env={"VLLM_NO_USAGE_STATS": "1"},
        )

    def generate(
        self, rows: Sequence[Row], prompts: Sequence[list[int]], sampling: SamplingConfig, seed: int
    ) -> tuple[list[Job], list[Trajectory | Failure]]:
        """`sampling.n` trajectories per row, side by side, each with its job: one fresh uuid per row is their group.

        `seed` seeds every call where `rollout.per_request_seed` is set.
        """
        return self.collect(self.submit(rows, prompts, sampling, seed))

    def submit(
        self, rows: Sequence[Row], prompts: Sequence[list[int]], sampling: SamplingConfig, seed: int
    ) -> "Submitted":
        """Starts what `generate` does; `collect` waits for it."""
        jobs = make_jobs(rows, prompts, sampling, seed if self.seeded else None)
        parts: list[list[Job]] = [[] for _ in self.workers]
        for index, job in enumerate(jobs):
            parts[(self.next_worker + index // sampling.n) % len(parts)].append(job)
        running = [w.run.remote(p, sampling.params()) for w, p in zip(self.workers, parts, strict=True) if p]
        self.next_worker = (self.next_worker + len(rows)) % len(parts)
        return Submitted(jobs, [part for part in parts if part], running)

    def first_done(self, pending: Sequence["Submitted"]) -> int:
        """Place of one of them that has ended; waits for it. Each must be of one prompt."""
        return first_ready([submitted.running[0] for submitted in pending])

    def collect(self, submitted: "Submitted") -> tuple[list[Job], list[Trajectory | Failure]]:
        """Jobs and results, in the order in which they were submitted."""
        results: dict[str, Trajectory | Failure] = {
            job.session: result
            for part, out in zip(submitted.parts, get(submitted.running), strict=True)
            for job, result in zip(part, out, strict=True)
        }
        return submitted.jobs, [results[job.session] for job in submitted.jobs]

    def update_weights(self, actor: Any) -> None:
        """Gives the engines the actor's weights, under a new version."""
        self.version += 1
        if self.sleeps:
            actor.free_cached_memory()
            get([server.wake_up.remote(["weights"]) for server in self.servers])
        get([server.begin_weight_update.remote() for server in self.servers])
        actor.send_weights()
        if self.sleeps:
            actor.free_cached_memory()
            get([server.wake_up.remote(["kv_cache"]) for server in self.servers])
        get([server.finish_weight_update_and_resume.remote(self.version) for server in self.servers])

    def sleep(self) -> None:
        """Frees the accelerators for the update, where they are shared."""
        if self.sleeps:
            get([server.sleep.remote(1) for server in self.servers])

    def shutdown(self) -> None:
        get([worker.close.remote() for worker in self.workers])
        get([server.shutdown.remote() for server in self.servers])
        for actor in (*self.workers, *self.servers):
            kill(actor)
