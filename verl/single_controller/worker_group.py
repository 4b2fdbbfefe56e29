"""The driver's side of the accelerator processes: where they are placed, and how their methods are called."""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy
from transformers.utils.logging import disable_progress_bar

from verl.single_controller.decorator import ATTRIBUTE, Dispatch, collect, dispatch
from verl.single_controller.worker import Worker, init_process_group, seed_everything


class RayClassWithInitArgs:
    """A worker class and the arguments to build it with, on every rank alike."""

    def __init__(self, cls: type[Worker], *args: Any, **kwargs: Any) -> None:
        self.cls, self.args, self.kwargs = cls, args, kwargs


@dataclass
class RayResourcePool:
    """One process per accelerator: `process_on_nodes=[8, 8]` is two nodes of eight."""

    process_on_nodes: list[int]
    use_gpu: bool = True
    timeout_s: float = 300
    groups: list[PlacementGroup] = field(default_factory=list, init=False)

    @property
    def world_size(self) -> int:
        return sum(self.process_on_nodes)

    def get_placement_groups(self) -> list[PlacementGroup]:
        """One group per node, made once. Raises RuntimeError when the cluster cannot provide them in time."""
        if not self.groups:
            bundle: dict[str, float] = {"CPU": 1, "GPU": 1} if self.use_gpu else {"CPU": 1}
            self.groups = [placement_group([bundle] * n, strategy="STRICT_PACK") for n in self.process_on_nodes]
            if not all(group.wait(self.timeout_s) for group in self.groups):
                raise RuntimeError(
                    f"the Ray cluster has {ray.cluster_resources()} and cannot place {self.process_on_nodes} processes "
                    f"per node with {bundle} each: lower trainer.nnodes / trainer.n_gpus_per_node or add nodes"
                )
        return self.groups


class WorkerHost:
    """The process of one rank: it holds the roles that share the rank (actor, reference, critic)."""

    def __init__(self) -> None:
        self.roles: dict[str, Worker] = {}

    def location(self) -> dict[str, Any]:
        """Node, accelerators, and an address with a free port."""
        with socket.socket() as s:
            s.bind(("", 0))
            port = s.getsockname()[1]
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return {"node_id": context.get_node_id(), "gpus": gpus, "ip": ray.util.get_node_ip_address(), "port": port}

    def setup(self, seed: int, *group: Any) -> None:
        disable_progress_bar()  # the driver has the console
        init_process_group(*group)
        seed_everything(seed)

    def add_role(self, role: str, spec: RayClassWithInitArgs) -> None:
        self.roles[role] = spec.cls(*spec.args, **spec.kwargs)

    def call(self, role: str, method: str, *args: Any) -> Any:
        return getattr(self.roles[role], method)(*args)


class RayWorkerGroup:
    """All ranks of a pool. `group["actor"].update_actor(batch)` calls a registered method on every rank."""

    def __init__(self, pool: RayResourcePool, device: str, seed: int, threads: int | None = None) -> None:
        self.world_size = pool.world_size
        self.hosts: list[Any] = [
            ray.remote(WorkerHost)
            .options(
                num_cpus=1,
                num_gpus=int(pool.use_gpu),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i),
            )
            .remote()
            for group, size in zip(pool.get_placement_groups(), pool.process_on_nodes, strict=True)
            for i in range(size)
        ]
        self.locations: list[dict[str, Any]] = ray.get([host.location.remote() for host in self.hosts])
        master = (self.world_size, self.locations[0]["ip"], self.locations[0]["port"], device, threads)
        ray.get([host.setup.remote(seed + rank, rank, *master) for rank, host in enumerate(self.hosts)])
        self.methods: dict[str, dict[str, Dispatch]] = {}

    def add_role(self, role: str, spec: RayClassWithInitArgs) -> "RoleView":
        """Builds the role on every rank (collectives allowed) and returns its methods."""
        ray.get([host.add_role.remote(role, spec) for host in self.hosts])
        members = {name: getattr(spec.cls, name) for name in dir(spec.cls)}
        self.methods[role] = {k: getattr(v, ATTRIBUTE) for k, v in members.items() if hasattr(v, ATTRIBUTE)}
        return self[role]

    def __getitem__(self, role: str) -> "RoleView":
        return RoleView(self, role)

    def execute(self, role: str, method: str, *args: Any) -> Any:
        """Calls a registered method on all ranks and waits. Raises what the first failing rank raised."""
        mode = self.methods[role][method]
        per_rank = dispatch(mode, self.world_size, args)
        calls = [host.call.remote(role, method, *a) for host, a in zip(self.hosts, per_rank, strict=True)]
        return collect(mode, ray.get(calls))

    def shutdown(self) -> None:
        for host in self.hosts:
            ray.kill(host)


class RoleView:
    """The registered methods of one role, as plain calls."""

    def __init__(self, group: RayWorkerGroup, role: str) -> None:
        self.group, self.role = group, role

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method not in self.group.methods[self.role]:
            raise AttributeError(f"{self.role} has no registered method {method!r}")
        return lambda *args: self.group.execute(self.role, method, *args)


def spawn(
    cls: type, *args: Any, node_id: str | None = None, num_cpus: float = 1, env: dict[str, str] | None = None, **kw: Any
) -> Any:
    """The handle of a Ray actor made from the plain class `cls`, on `node_id` if given."""
    options: dict[str, Any] = {"num_cpus": num_cpus, "runtime_env": {"env_vars": env or {}}}
    options["max_concurrency"] = 10_000  # asyncio actors: thousands of trajectories wait in one process
    if node_id:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(cls).options(**options).remote(*args, **kw)


def ready(handle: Any) -> Any:
    """A call that ends when the actor has been built; getting it raises what its constructor raised."""
    return handle.__ray_ready__.remote()


def get(refs: Any) -> Any:
    """Waits for the results of actor calls. Raises what the call raised."""
    return ray.get(refs)


def first_ready(refs: Sequence[Any]) -> int:
    """Place of a call that has ended; waits for one."""
    (ready,), _ = ray.wait(list(refs), num_returns=1)
    return refs.index(ready)


def kill(handle: Any) -> None:
    """Ends an actor at once."""
    ray.kill(handle)
