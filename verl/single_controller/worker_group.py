"""The driver's side of the accelerator processes: where they run, and how they are called."""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import ray
from ray.actor import ActorHandle as ActorHandle
from ray.exceptions import ActorUnavailableError as ActorUnavailableError
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from transformers.utils.logging import disable_progress_bar

from verl.single_controller.decorator import Registered, collect, dispatch, registered
from verl.single_controller.worker import (
    Worker,
    init_process_group,
    make_deterministic,
    seed_everything,
    share_of_cores,
    stacks,
)
from verl.utils.errors import ConfigError, DataError, RewardError
from verl.utils.processes import sharing_cores

logger = logging.getLogger(__name__)
SOON_S = 10
"""Seconds that the cluster may take to place the processes before a message says so."""
ActorDied = (RayActorError, OutOfMemoryError, NodeDiedError)
"""What a call raises when its process died.

For a process that Ray killed because memory ran out it is not a RayActorError."""
LIVENESS_S = 30
"""Seconds after which a process that does not answer counts as lost."""
STACKS_S = 10
"""Seconds that processes have to return their stacks."""


class WorkerLost(RuntimeError):
    """A process of the run died or no longer answers.

    What it held is gone, and the run must start again.
    """


class RayClassWithInitArgs:
    """A worker class and its arguments, which are the same on every rank."""

    def __init__(self, cls: type[Worker], *args: Any, **kwargs: Any) -> None:
        self.cls = cls
        self.args = args
        self.kwargs = kwargs


@dataclass
class RayResourcePool:
    """One process per accelerator: `process_on_nodes=[8, 8]` is two nodes of eight."""

    process_on_nodes: list[int]
    use_gpu: bool = True
    timeout_s: float = 300
    group: PlacementGroup | None = field(default=None, init=False)

    @property
    def world_size(self) -> int:
        return sum(self.process_on_nodes)

    def get_placement_group(self) -> PlacementGroup:
        """Makes the placement group once: one bundle per node, no two on the same node.

        Raises RuntimeError when the cluster cannot provide them in time.
        """
        if self.group is None:
            bundles: list[dict[str, float]] = [
                {"CPU": n, "GPU": n} if self.use_gpu else {"CPU": n} for n in self.process_on_nodes
            ]
            self.group = placement_group(bundles, strategy="STRICT_SPREAD")
            soon = min(SOON_S, self.timeout_s)
            if not self.group.wait(soon):
                later = self.timeout_s - soon
                logger.warning("%s; waiting %g s for that", cannot_place(bundles), later)
                if not self.group.wait(later):
                    raise RuntimeError(
                        f"{cannot_place(bundles)}: lower trainer.nnodes / trainer.n_gpus_per_node "
                        "(or actor_rollout_ref.rollout.nnodes / n_gpus_per_node), add nodes, or "
                        "end what holds them (`ray status` shows it)"
                    )
        return self.group

    def spawn_hosts(self) -> tuple[list[ActorHandle], list[dict[str, Any]]]:
        """Starts all processes of the pool; returns them and their locations by rank."""
        group = self.get_placement_group()
        host_class = ray.remote(concurrency_groups={WATCH: 1})(WorkerHost)  # pyright: ignore
        hosts: list[ActorHandle] = []
        for node, size in enumerate(self.process_on_nodes):
            on_node = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=node)
            for _ in range(size):
                host = host_class.options(
                    num_cpus=1,
                    num_gpus=int(self.use_gpu),
                    scheduling_strategy=on_node,
                    runtime_env={"env_vars": sharing_cores()},
                )
                hosts.append(host.remote())
        return hosts, ray.get([host.location.remote() for host in hosts])


def cannot_place(bundles: list[dict[str, float]]) -> str:
    """A message: what was asked of the cluster, and what each of its nodes has, in use or not."""
    has: list[str] = []
    for node in ray.nodes():
        if node["Alive"]:
            resources = {kind: node["Resources"].get(kind, 0) for kind in ("CPU", "GPU")}
            has.append(f"{node['NodeManagerAddress']} {resources}")
    return f"Ray cannot place {bundles} on nodes of their own; there are {', '.join(has)}"


def placement(locations: Sequence[dict[str, Any]]) -> str:
    """Which ranks are on which node, as text.

    >>> first = {"ip": "10.0.0.1", "node_id": "4fd9f15d43"}
    >>> placement([first, first, {"ip": "10.0.0.2", "node_id": "7c84312646"}])
    'ranks 0-1 on 10.0.0.1 (node 4fd9f15d), ranks 2-2 on 10.0.0.2 (node 7c843126)'
    """
    texts = []
    first = 0
    for (node, ip), ranks in groupby(locations, key=lambda at: (at["node_id"], at["ip"])):
        last = first + len(list(ranks)) - 1
        texts.append(f"ranks {first}-{last} on {ip} (node {node[:8]})")
        first = last + 1
    return ", ".join(texts)


WATCH = "watch"
"""Calls that are answered while the process is at work."""


class WorkerHost:
    """The process of one rank, which holds the roles that share it (actor, reference, critic)."""

    def __init__(self) -> None:
        self.roles: dict[str, Worker] = {}
        self.store: TCPStore | None = None

    def location(self) -> dict[str, Any]:
        """The node, the accelerators and the process of this rank."""
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return {
            "node_id": context.get_node_id(),
            "ip": ray.util.get_node_ip_address(),
            "gpus": gpus,
            "pid": os.getpid(),
        }

    def open_store(self, address: str) -> int:
        """Opens the store in which the ranks meet, and returns the port that the system chose."""
        self.store = store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        return store.port

    def setup(
        self,
        seed: int,
        deterministic: bool,
        rank: int,
        size: int,
        address: str,
        port: int,
        device: str,
        threads: int | None,
        ranks_here: int,
    ) -> None:
        """Joins the process group as `rank`, with a random state of its own.

        Without a number of `threads` the cores are shared by the `ranks_here` on this machine.
        """
        disable_progress_bar()  # the driver has the console
        threads = threads or share_of_cores(ranks_here)
        os.environ["MASTER_ADDR"] = address
        if deterministic:
            make_deterministic()
        init_process_group(rank, size, self.store or TCPStore(address, port), device, threads)
        seed_everything(seed)

    @ray.method(concurrency_group=WATCH)
    def stacks(self) -> str:
        """Returns the stacks of the threads of this process."""
        return stacks()

    def add_role(self, role: str, spec: RayClassWithInitArgs) -> None:
        self.roles[role] = spec.cls(*spec.args, **spec.kwargs)

    def call(self, role: str, method: str, *args: Any) -> Any:
        return getattr(self.roles[role], method)(*args)


class RayWorkerGroup:
    """All ranks of a pool; a RoleView calls a registered method on every rank."""

    def __init__(
        self,
        pool: RayResourcePool,
        device: str,
        seed: int,
        threads: int | None = None,
        deterministic: bool = False,
    ) -> None:
        self.world_size = pool.world_size
        self.hosts, self.locations = pool.spawn_hosts()
        logger.info("%s", placement(self.locations))
        address = self.locations[0]["ip"]
        (port,) = self._wait("open_store", [self.hosts[0].open_store.remote(address)])
        group = (self.world_size, address, port, device, threads)
        ranks_on = Counter(location["ip"] for location in self.locations)
        setup = [
            host.setup.remote(seed + rank, deterministic, rank, *group, ranks_on[location["ip"]])
            for rank, (host, location) in enumerate(zip(self.hosts, self.locations, strict=True))
        ]
        self._wait("setup", setup)
        self.methods: dict[str, dict[str, Registered]] = {}

    def add_role(self, role: str, spec: RayClassWithInitArgs) -> "RoleView":
        """Builds the role on every rank and returns its methods. Constructors may communicate."""
        self._wait(role, [host.add_role.remote(role, spec) for host in self.hosts])
        self.methods[role] = registered(spec.cls)
        return self[role]

    def __getitem__(self, role: str) -> "RoleView":
        return RoleView(self, role)

    def execute(self, role: str, method: str, *args: Any) -> Any:
        """Calls a registered method on all ranks and waits.

        Raises KeyError when a batch lacks a column that the method reads, else what `_wait` does.
        """
        name = f"{role}.{method}"
        call = self.methods[role][method]
        per_rank = dispatch(call.mode, self.world_size, call.select(name, args))
        calls = [
            host.call.remote(role, method, *a) for host, a in zip(self.hosts, per_rank, strict=True)
        ]
        return collect(call.mode, self._wait(name, calls))

    def _wait(self, name: str, calls: list[Any]) -> list[Any]:
        """Waits for the results of the ranks.

        Raises WorkerLost if a rank died, else what the first failing rank raised.
        """
        try:
            return as_they_end(calls)
        except RayError as error:
            if lost := self.lost_ranks():
                raise WorkerLost(f"{name}: {'; '.join(lost)}") from error
            raise

    def lost_ranks(self) -> list[str]:
        """Asks all ranks and returns those that do not answer, with their locations.

        Ranks that are alive answer, even while their collectives fail because of a lost one.
        """
        pings: list[Any] = [host.stacks.remote() for host in self.hosts]
        answered, _ = ray.wait(pings, num_returns=len(pings), timeout=LIVENESS_S)
        return [
            f"rank {rank} (process {at['pid']} on {at['ip']}) is gone"
            for rank, (ping, at) in enumerate(zip(pings, self.locations, strict=True))
            if ping not in answered or died(ping)
        ]

    def stacks(self) -> dict[str, Any]:
        """Starts a call to each rank that returns its stacks; the calls by name of the rank."""
        return {f"rank {rank}": host.stacks.remote() for rank, host in enumerate(self.hosts)}

    def shutdown(self) -> None:
        for host in self.hosts:
            ray.kill(host)


class RoleView:
    """The registered methods of one role, as plain calls."""

    def __init__(self, group: RayWorkerGroup, role: str) -> None:
        self.group = group
        self.role = role

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method not in self.group.methods[self.role]:
            raise AttributeError(f"{self.role} has no registered method {method!r}")
        return lambda *args: self.group.execute(self.role, method, *args)


def spawn(
    cls: type,
    *args: Any,
    node_id: str | None = None,
    num_cpus: float = 1,
    env: dict[str, str] | None = None,
    **kw: Any,
) -> Any:
    """Starts a Ray actor of the plain class `cls`, on `node_id` if given; returns its handle."""
    options: dict[str, Any] = {"num_cpus": num_cpus, "runtime_env": {"env_vars": env or {}}}
    # asyncio actors: thousands of trajectories wait in one process
    options["max_concurrency"] = 10_000
    options["enable_task_events"] = False  # Ray would keep 100,000 of them, one per call
    if node_id:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(cls).options(**options).remote(*args, **kw)


def as_they_end(calls: Sequence[Any]) -> list[Any]:
    """Waits for the results, in the order of the calls.

    As soon as a call fails it raises what that call raised, even if others still hang.
    """
    results: dict[Any, Any] = {}
    while waiting := [call for call in calls if call not in results]:
        (done,), _ = ray.wait(waiting)
        results[done] = ray.get(done)
    return [results[call] for call in calls]


def died(call: ray.ObjectRef) -> bool:
    """Whether a call that has ended was ended by the death of its process."""
    try:
        ray.get(call)
    except ActorDied:
        return True
    return False


def ready(actor: ActorHandle) -> ray.ObjectRef:
    """Starts a call that ends when the actor has been built.

    Getting its result raises what the actor's constructor raised.
    """
    return actor.__ray_ready__.remote()


def get(calls: ray.ObjectRef | Sequence[ray.ObjectRef]) -> Any:
    """Waits for the results of actor calls. Raises what a call raised.

    An error that a user can act on is raised as itself, without the traceback of the other
    process.
    """
    try:
        return ray.get(calls)
    except RayTaskError as error:
        if isinstance(error.cause, (ConfigError, DataError, RewardError)):
            raise error.cause from None
        raise


def first_ready(calls: Sequence[ray.ObjectRef], timeout_s: float | None = None) -> int | None:
    """Waits for a call to end and returns its index; None after `timeout_s` seconds."""
    ended, _ = ray.wait(list(calls), num_returns=1, timeout=timeout_s)
    return list(calls).index(ended[0]) if ended else None


def kill(actor: ActorHandle) -> None:
    """Ends an actor at once."""
    ray.kill(actor)


def collect_stacks(calls: Mapping[str, Any]) -> dict[str, str]:
    """Waits STACKS_S seconds for the stacks of processes; returns them by the names of `calls`."""
    deadline = time.monotonic() + STACKS_S
    return {
        name: answer(call, max(0.1, deadline - time.monotonic())) for name, call in calls.items()
    }


def answer(call: Any, timeout_s: float) -> str:
    """Waits for the answer of a process, and returns it, or a text saying that there was none."""
    if first_ready([call], timeout_s) is None:
        return f"no answer within {timeout_s:.0f} s\n"
    try:
        return get(call)
    except RayError as error:
        return f"{type(error).__name__}: {error}\n"
