"""The processes of a run: training ranks with their roles, engines, agent workers."""

from dataclasses import dataclass
from typing import Any

from verl.rollout.manager import RolloutManager
from verl.single_controller.worker_group import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    collect_stacks,
)
from verl.trainer.config import PPOConfig
from verl.workers.actor import ActorWorker
from verl.workers.critic import CriticWorker
from verl.workers.reference import ReferenceWorker


@dataclass
class Processes:
    """The processes that the trainer drives."""

    group: RayWorkerGroup
    roles: dict[str, Any]
    """`actor`, and `ref`, `teacher` and `critic` where the algorithm uses them."""
    rollout: RolloutManager
    val_rollout: RolloutManager
    """The engines of the validation: the same as `rollout`, without `rollout.num_val_replicas`."""

    @property
    def rollouts(self) -> list[RolloutManager]:
        return (
            [self.rollout] if self.val_rollout is self.rollout else [self.rollout, self.val_rollout]
        )

    def stacks(self) -> dict[str, str]:
        """Returns the stacks of every process, or that it did not answer."""
        calls = self.group.stacks()
        for rollout in self.rollouts:
            calls |= rollout.stacks()
        return collect_stacks(calls)

    def shutdown(self) -> None:
        """Ends engines and agent workers; the training ranks end with Ray."""
        for rollout in self.rollouts:
            rollout.shutdown()


def start_processes(config: PPOConfig, device: str, total_steps: int) -> Processes:
    """Starts all of them and connects the actor with the engines."""
    model = config.actor_rollout_ref
    trainer = config.trainer
    pool = RayResourcePool(
        [trainer.n_gpus_per_node] * trainer.nnodes,
        use_gpu=device == "cuda",
        timeout_s=300 if trainer.ray_address else 10,  # a Ray of our own gets no further nodes
    )
    group = RayWorkerGroup(
        pool, device, trainer.seed, trainer.threads_per_rank, trainer.deterministic
    )
    specs = {
        "actor": RayClassWithInitArgs(
            ActorWorker, model.model, model.actor, model.rollout, total_steps
        )
    }
    if config.use_reference:
        specs["ref"] = RayClassWithInitArgs(
            ReferenceWorker, model.model, model.ref, model.rollout.temperature
        )
    if config.use_teacher:
        specs["teacher"] = RayClassWithInitArgs(
            ReferenceWorker, config.teacher.model, config.teacher, model.rollout.temperature
        )
    if config.use_critic:
        specs["critic"] = RayClassWithInitArgs(CriticWorker, config.critic, total_steps)
    roles = {role: group.add_role(role, spec) for role, spec in specs.items()}
    processes = Processes(group, roles, *start_rollouts(config, device, group.locations))
    for rollout in processes.rollouts:
        rollout.connect(roles["actor"])
    return processes


def start_rollouts(
    config: PPOConfig, device: str, training: list[dict[str, Any]]
) -> tuple[RolloutManager, RolloutManager]:
    """Starts the engines of the training and of the validation.

    They are on the accelerators of the training, or on accelerators of their own.
    """
    rollout = config.actor_rollout_ref.rollout
    places = training
    if not config.actor_rollout_ref.hybrid_engine and device == "cuda":
        pool = RayResourcePool([rollout.n_gpus_per_node] * rollout.nnodes)
        hosts, places = pool.spawn_hosts()
        places = [
            {**place, "host": host} for host, place in zip(hosts, places, strict=True)
        ]  # a host holds its GPU
    if rollout.num_val_replicas == 0:
        shared = RolloutManager(config, device, places)
        return shared, shared
    split = (
        len(places) - rollout.num_val_replicas * rollout.tensor_model_parallel_size
        if device == "cuda"
        else 0
    )
    return (
        RolloutManager(config, device, places[:split] or places),  # on the CPU all share the place
        RolloutManager(
            config,
            device,
            places[split:],
            name="val",
            replicas=rollout.num_val_replicas,
            pinned=True,
        ),
    )
