"""The driver's side of the rollout: engines, agent workers, weight versions."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from verl.agent import Row, Trajectory
from verl.rollout.agent_worker import AgentLoopWorker, Failure, Job
from verl.rollout.job import Submitted, make_jobs
from verl.rollout.router import Router
from verl.rollout.vllm_server import VLLMServer
from verl.single_controller.worker_group import (
    ActorDied,
    RayError,
    WorkerLost,
    first_ready,
    get,
    kill,
    ready,
    spawn,
)
from verl.trainer.config import PPOConfig
from verl.workers.config import RolloutConfig, SamplingConfig

logger = logging.getLogger(__name__)
MAX_RESTARTS = 3
"""The most restarts of engines between two batches."""
PROGRESS_S = 60.0
"""Seconds between two questions to the agent workers how far they are, during a wait."""
ANSWER_S = 5.0
"""Seconds to wait for an answer to that."""


def sleep_level(rollout: RolloutConfig) -> int:
    """vLLM's level of sleep for the engines.

    Level 2 drops the weights, and the transfer at every wake-up brings all of them back. Level 1
    would copy them to pinned host memory and back for nothing (3B: 6 GB an engine, 48 GB a node of
    eight). But no transfer brings the draft model of speculative decoding, so level 1 is used with
    it. Buffers, such as the tables of rotary embeddings, are kept at both levels.
    """
    return 1 if rollout.engine_kwargs.get("speculative_config") else 2


def fitting_replicas(rollout: RolloutConfig, num_gpus: int) -> int:
    """The number of engines that so many GPUs hold, at least one."""
    return max(1, num_gpus // rollout.tensor_model_parallel_size)


class RolloutManager:
    """Engines with their agent workers, and the version of the weights that the engines hold.

    An engine that dies is started again and given the present weights. Its trajectories go on at
    once on another engine, or else when it is back. `locations`: one place per accelerator of the
    engines, in the order of the ranks. `pinned`: the engines keep weights that the actor may no
    longer have, so an engine that dies cannot be replaced.
    """

    def __init__(
        self,
        config: PPOConfig,
        device: str,
        locations: Sequence[dict[str, Any]],
        *,
        name: str = "rollout",
        replicas: int | None = None,
        pinned: bool = False,
    ) -> None:
        self.config = config
        self.device = device
        self.locations = locations
        self.name = name
        rollout = config.actor_rollout_ref.rollout
        self.version = -1
        self.seeded = rollout.per_request_seed
        self.pinned = pinned
        self.colocated = config.actor_rollout_ref.hybrid_engine
        self.sleeps = device == "cuda" and self.colocated
        self.sleep_level = sleep_level(rollout)
        fitting = fitting_replicas(rollout, len(locations)) if device == "cuda" else 1
        self.replicas = replicas or rollout.num_replicas or fitting
        self.servers = [self._spawn_server(rank) for rank in range(self.replicas)]
        self.capacity = 2 * self.replicas * rollout.max_num_seqs
        """Trajectories under way that keep the engines busy: twice as many as they compute at a
        time, because about half of them are searching."""
        self.workers = [self._spawn_worker() for _ in range(rollout.num_agent_workers)]
        self._build_all()
        self.lifelines = [server.wait_for_death.remote() for server in self.servers]
        self.actor: Any = None
        self.next_worker = self.restarts = 0
        self.on_progress: Callable[[], object] = lambda: None
        """Called when a trajectory that is waited for has finished, at most `progress_s` seconds
        late."""
        self.progress_s = min(PROGRESS_S, config.trainer.hang_timeout_s / 4)
        self.finished: dict[str, int] = {}

    def _spawn_server(self, rank: int) -> Any:
        model = self.config.actor_rollout_ref.model
        rollout = self.config.actor_rollout_ref.rollout
        tp = rollout.tensor_model_parallel_size
        ranks = (
            self.locations[rank * tp : (rank + 1) * tp]
            if self.device == "cuda"
            else self.locations[:1]
        )
        return spawn(
            VLLMServer,
            rollout,
            model,
            max_model_len=self.config.max_model_len,
            device=self.device,
            colocated=self.colocated,
            replica_rank=rank,
            num_replicas=self.replicas,
            seed=self.config.trainer.seed,
            visible_devices=[gpu for location in ranks for gpu in location["gpus"]],
            node_id=ranks[0]["node_id"],
            num_cpus=0,
            env={"VLLM_NO_USAGE_STATS": "1"},
        )

    def _spawn_worker(self) -> Any:
        """Starts an agent worker, which has its share of `capacity` under way."""
        share = math.ceil(self.capacity / self.config.actor_rollout_ref.rollout.num_agent_workers)
        return spawn(AgentLoopWorker, self.config, Router(self.servers), share, num_cpus=0)

    def _build_all(self) -> None:
        """Waits until engines and agent workers are built, all of them at the same time."""
        engines = [server.start.remote() for server in self.servers]
        get(engines + [ready(worker) for worker in self.workers])

    def report_progress_to(self, on_progress: Callable[[], object]) -> None:
        """Sets the function to call when a trajectory that is waited for has finished."""
        self.on_progress = on_progress

    def announce_version(self, version: int) -> None:
        """Sets the version that the next `update_weights` will bring.

        An engine that is restarted before that call gets these weights already.
        """
        self.version = version

    def connect(self, actor: Any) -> None:
        """Sets the actor from which the engines get their weights."""
        self.actor = actor
        actor.connect_engines(self.name, self.servers, self.colocated)

    def generate(
        self, rows: Sequence[Row], prompts: Sequence[list[int]], sampling: SamplingConfig, seed: int
    ) -> tuple[list[Job], list[Trajectory | Failure]]:
        """Rolls out `sampling.n` trajectories per row; returns jobs and results in the same order.

        The trajectories of a row are side by side and share a new uuid as their group. `seed` seeds
        every call where `rollout.per_request_seed` is set.
        """
        return self.collect(self.submit(rows, prompts, sampling, seed))

    def submit(
        self,
        rows: Sequence[Row],
        prompts: Sequence[list[int]],
        sampling: SamplingConfig,
        seed: int,
        name: str = "rollout",
    ) -> Submitted:
        """Starts to roll out as `generate` does, and returns at once; `collect` waits for the end.

        Any number of trajectories may be submitted: an agent worker runs its share of `capacity` at
        a time and lets the rest wait.
        """
        jobs = make_jobs(rows, prompts, sampling, seed if self.seeded else None)
        parts: list[list[Job]] = [[] for _ in self.workers]
        for index, job in enumerate(jobs):
            parts[(self.next_worker + index // sampling.n) % len(parts)].append(job)
        running = [
            w.run.remote(p, sampling.params())
            for w, p in zip(self.workers, parts, strict=True)
            if p
        ]
        self.next_worker = (self.next_worker + len(rows)) % len(parts)
        return Submitted(jobs, [part for part in parts if part], running, name)

    def first_done(self, pending: Sequence[Submitted]) -> int:
        """Waits until one of them has ended; returns its index. Each must be of one prompt."""
        return self._first_ready([submitted.running[0] for submitted in pending])

    def is_done(self, submitted: Submitted) -> bool:
        """Whether `collect` would return at once."""
        return all(first_ready([call], timeout_s=0) is not None for call in submitted.running)

    def drain(self, pending: Sequence[Submitted]) -> None:
        """Waits until all of them have ended."""
        waiting = [call for submitted in pending for call in submitted.running]
        while waiting:
            waiting.pop(self._first_ready(waiting, pending))

    def collect(self, submitted: Submitted) -> tuple[list[Job], list[Trajectory | Failure]]:
        """Waits for jobs and results, in the order in which they were submitted.

        Raises WorkerLost if an agent worker died.
        """
        self.drain([submitted])
        try:
            done = get(submitted.running)
        except ActorDied as error:
            raise WorkerLost("an agent worker died, and its trajectories with it") from error
        self.restarts = 0
        results: dict[str, Trajectory | Failure] = {}
        for part, out in zip(submitted.parts, done, strict=True):
            results |= {job.session: result for job, result in zip(part, out, strict=True)}
        return submitted.jobs, [results[job.session] for job in submitted.jobs]

    def _first_ready(self, calls: Sequence[Any], told: Sequence[Submitted] = ()) -> int:
        """Waits until a call has ended, and returns its index.

        Restarts engines that die meanwhile, and logs now and then how far the batches in `told`
        are.
        """
        while True:
            place = first_ready([*calls, *self.lifelines], timeout_s=self.progress_s)
            if place is None:
                self._look_for_progress(told)
                continue
            if place < len(calls):
                self.on_progress()
                return place
            if self.pinned:
                raise WorkerLost(
                    f"a {self.name} engine died, and with it the weights that it was to keep"
                )
            self.restart_dead()
            self._transfer()

    def _look_for_progress(self, told: Sequence[Submitted]) -> None:
        """Calls `on_progress` if trajectories have finished since the last time.

        Also logs how many trajectories of each batch in `told` have finished.
        """
        finished: dict[str, int] = {}
        asked = [worker.progress.remote() for worker in self.workers]
        for call in asked:
            if first_ready([call], timeout_s=ANSWER_S) is None:
                continue  # busy or hanging: without progress the watchdog ends the run
            try:
                finished |= get(call)
            except ActorDied:
                continue  # the call that is waited for ends as well and raises this
        if finished != self.finished:
            self.on_progress()
        self.finished = finished
        for batch in told:
            done = 0
            for part, call in zip(batch.parts, batch.running, strict=True):
                has_ended = first_ready([call], timeout_s=0) is not None
                done += len(part) if has_ended else finished.get(part[0].session, 0)
            logger.info(
                "%s: %s of %s trajectories", batch.name, f"{done:,}", f"{len(batch.jobs):,}"
            )

    def restart_dead(self, asleep: bool = False, whole_group: bool = False) -> None:
        """Restarts every engine that has died.

        `asleep`: the other engines sleep, so the new ones are put to sleep as well. `whole_group`:
        all engines are restarted, because those that live wait for the dead ones and will not
        return. Raises WorkerLost when engines die again and again.
        """
        dead = [
            rank
            for rank, line in enumerate(self.lifelines)
            if first_ready([line], timeout_s=0) is not None
        ]
        if whole_group:
            dead = list(range(self.replicas))
        if not dead:
            return
        self.restarts += 1 if whole_group else len(dead)
        if self.restarts > MAX_RESTARTS:
            raise WorkerLost(
                f"{self.restarts} {self.name} engines died while one batch was rolled out"
            )
        for rank in dead:
            logger.warning("%s engine %d is lost; starting it again", self.name, rank)
            kill(self.servers[rank])  # it may be alive and only out of reach
            self.servers[rank] = self._spawn_server(rank)
        try:
            self._bring_up(dead, asleep)
        except RayError as error:  # the first start worked, so this is no mistake of the user
            raise WorkerLost(f"a {self.name} engine died and could not be started again") from error

    def _bring_up(self, ranks: Sequence[int], asleep: bool) -> None:
        """Builds the new engines of these ranks and has the agent workers use them."""
        if self.sleeps and self.actor is not None:
            # a new engine needs its share of the GPU at once
            self.actor.free_cached_memory()
        get([self.servers[rank].start.remote() for rank in ranks])
        if self.actor is not None:  # nothing is sampled from initial weights
            get([self.servers[rank].begin_weight_update.remote() for rank in ranks])
        if asleep:
            get([self.servers[rank].sleep.remote(self.sleep_level) for rank in ranks])
        for rank in ranks:
            self.lifelines[rank] = self.servers[rank].wait_for_death.remote()
            get([worker.replace_engine.remote(rank, self.servers[rank]) for worker in self.workers])
        if self.actor is not None:
            self.connect(self.actor)

    def update_weights(self, version: int) -> None:
        """Transfers the actor's weights to the engines, under a new version."""
        self.version = version
        self.restart_dead(asleep=self.sleeps)
        self._transfer(wakes=self.sleeps)

    def _transfer(self, wakes: bool = False) -> None:
        """Transfers the actor's weights to all engines; starts over if one dies meanwhile.

        Engines on GPUs of their own form one NCCL group with the actor. If one is lost during the
        transfer, the others hang in the broadcast, and all are replaced.
        """
        while self.actor is not None:
            in_broadcast = False
            try:
                if wakes:
                    self.actor.free_cached_memory()
                    get([server.wake_up.remote(["weights"]) for server in self.servers])
                get([server.begin_weight_update.remote() for server in self.servers])
                in_broadcast = self.device == "cuda" and not self.colocated
                self.actor.send_weights(self.name)
                in_broadcast = False
                if wakes:
                    self.actor.free_cached_memory()
                    get([server.wake_up.remote(["kv_cache"]) for server in self.servers])
                get(
                    [
                        server.finish_weight_update_and_resume.remote(self.version)
                        for server in self.servers
                    ]
                )
                return
            except ActorDied:
                self.restart_dead(whole_group=in_broadcast)

    def sleep(self) -> None:
        """Frees the accelerators for the update, where engines and training share them.

        An engine that has died is left alone; `update_weights` starts it again.
        """
        for call in [
            server.sleep.remote(self.sleep_level) for server in self.servers if self.sleeps
        ]:
            try:
                get(call)
            except ActorDied:
                logger.warning("a %s engine died before it could sleep", self.name)

    def stacks(self) -> dict[str, Any]:
        """Starts a call to each process that returns its stacks; the calls by process name."""
        named = [(f"{self.name} engine {i}", server) for i, server in enumerate(self.servers)]
        named += [
            (f"{self.name} agent worker {i}", worker) for i, worker in enumerate(self.workers)
        ]
        return {name: handle.stacks.remote() for name, handle in named}

    def shutdown(self) -> None:
        """Ends all its processes."""
        get([worker.close.remote() for worker in self.workers])
        get([server.shutdown.remote() for server in self.servers])
        for actor in (*self.workers, *self.servers):
            kill(actor)
