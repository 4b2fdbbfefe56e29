"""Two Ray nodes on one machine: ranks of one group on both, a whole training, nothing left."""

import os
import re
import uuid
from collections import Counter
from pathlib import Path

import pytest
import ray
import torch
import torch.distributed as dist
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions
from ray.cluster_utils import Cluster

from tests.e2e.runs import arguments, metrics, train
from tests.models import make_tiny_qwen2
from tests.processes import wait_for
from verl.single_controller.decorator import Dispatch, register
from verl.single_controller.worker import Worker
from verl.single_controller.worker_group import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
)

pytestmark = pytest.mark.cpu_engine

MARK = "SEARCH_R1_TEST_MARK"


class Summing(Worker):
    """A role with collectives."""

    @register(Dispatch.ONE_TO_ALL)
    def sums(self):
        own = torch.tensor([float(10**self.rank)])
        gathered = [torch.zeros(1) for _ in range(self.world_size)]
        dist.all_gather(gathered, own)
        dist.all_reduce(own)
        return self.rank, own.item(), [value.item() for value in gathered]


@pytest.fixture(scope="module")
def mark():
    """What every process of the cluster and of its runs has in its environment."""
    os.environ[MARK] = uuid.uuid4().hex
    yield os.environ[MARK]
    del os.environ[MARK]


@pytest.fixture(scope="module")
def cluster(mark):
    """Two nodes of two CPUs."""
    cluster = Cluster()
    cluster.add_node(num_cpus=2, include_dashboard=False)
    cluster.add_node(num_cpus=2)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def driver(cluster):
    ray.init(cluster.address, log_to_driver=False)
    yield
    ray.shutdown()


def marked(mark):
    """The commands of the living processes with the mark, by process id.

    Those that Ray keeps for its next job are left out.
    """
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if (
            f"{MARK}={mark}".encode() in environment.split(b"\0")
            and command
            and b"ray::IDLE" not in command
        ):
            found[int(entry.name)] = command.replace(b"\0", b" ").decode().strip()
    return found


def test_ranks_of_a_group_are_on_both_nodes_in_order_and_reduce_across(driver):
    group = RayWorkerGroup(RayResourcePool([2, 2], use_gpu=False), "cpu", seed=0, threads=1)
    nodes = [place["node_id"] for place in group.locations]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
    assert set(nodes) == {node["NodeID"] for node in ray.nodes()}
    results = group.add_role("summing", RayClassWithInitArgs(Summing)).sums()
    assert results == [(rank, 1111.0, [1.0, 10.0, 100.0, 1000.0]) for rank in range(4)]
    group.shutdown()


def test_more_than_the_cluster_has_is_refused_with_what_it_has(driver):
    for asked in ([1, 1, 1], [3, 1]):
        with pytest.raises(
            RuntimeError, match=r"cannot place .* there are .*'CPU': 2.*'CPU': 2.*trainer\.nnodes"
        ):
            RayResourcePool(asked, use_gpu=False, timeout_s=1).get_placement_group()


@pytest.fixture(scope="module")
def run(tmp_path_factory, cluster, mark, retriever):
    """A training on both nodes: its folder, status and output, and what ran before it."""
    before = marked(mark)
    folder = tmp_path_factory.mktemp("run")
    model = make_tiny_qwen2(tmp_path_factory.mktemp("model"), tied=True)
    more = {
        "trainer__ray_address": cluster.address,
        "trainer__nnodes": 2,
        "actor_rollout_ref__rollout__num_agent_workers": 2,
        "trainer__total_training_steps": 2,
    }
    status, output = train("grpo", arguments(folder, model, retriever__url=retriever, **more))
    return folder, status, output, before


def actors(cluster):
    """The actors that the cluster remembers: class, state, node."""
    state = GlobalState()
    options = GcsClientOptions.create(
        cluster.address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False
    )
    state._initialize_global_state(options)
    table = state.actor_table(None).values()
    return [
        (actor["ActorClassName"], actor["State"], actor["Address"]["NodeID"]) for actor in table
    ]


def test_a_run_trains_on_two_nodes(run, cluster):
    folder, status, output, _ = run
    assert status == 0, output[-3000:]
    placed = re.search(r"ranks 0-0 on \S+ \(node (\w+)\), ranks 1-1 on \S+ \(node (\w+)\)", output)
    assert placed and placed[1] != placed[2]
    for line in metrics(folder)[1:]:
        assert line["rollout/context_violations"] == 0 and line["rollout/logprob_diff_max"] <= 1e-3
        assert (
            line["actor/grad_norm"] >= 0
            and line["training/policy_version"] == line["training/global_step"]
        )
    engines = [node for name, _, node in actors(cluster) if name == "VLLMServer"]
    # they read what rank 0 leaves in /dev/shm
    assert engines and all(node.startswith(placed[1]) for node in engines)


def test_the_cluster_outlives_the_run_and_nothing_else_does(run, cluster, mark, driver):
    *_, before = run
    assert [node["Alive"] for node in ray.nodes()] == [True, True]
    assert ray.get(ray.remote(lambda: 5).remote()) == 5
    found = actors(cluster)
    assert Counter(name for name, *_ in found)["WorkerHost"] >= 2 and {
        state for _, state, _ in found
    } == {"DEAD"}
    wait_for(lambda: marked(mark).keys() <= before.keys())


def test_without_an_address_a_run_has_a_ray_of_its_own(
    tmp_path, cluster, tmp_path_factory, retriever
):
    """One node, whatever else runs on the machine: two are refused."""
    model = make_tiny_qwen2(tmp_path_factory.mktemp("model"), tied=True)
    status, output = train(
        "grpo", arguments(tmp_path, model, retriever__url=retriever, trainer__nnodes=2)
    )
    assert status == 1 and re.search(
        r"cannot place .* there are \S+ {'CPU': [^{]*}: lower trainer.nnodes", output
    ), output
