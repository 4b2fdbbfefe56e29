"""One training step of a recipe on cards that are not there.

    python tests/fake_card/rehearse.py LIBRARY FOLDER '{"recipe": "qwen2.5-3b-ppo", "layers": 2}'
    ...

For each case it writes one JSON file to FOLDER: what happened in which order on the first rank and
in each engine, what was on the card, dtypes and devices, and what each engine process received. The
configuration is the recipe's; the batch is small, and `layers` of the model may be fewer. LIBRARY
is what `card.build` made. Everything of verl runs but the agent loops, whose text a script writes.
"""

import json
import os
import sys
import tempfile
import traceback
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.fake_card import card
from tests.fake_card.card import GIB, Memory

SHAPES: dict[str, dict[str, Any]] = {  # of the config.json that Qwen publishes
    "3b": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
WORLD = 8
PROMPT = 2_000
TURN = 500
OBSERVATION = 149
TURNS = 5
"""Tokens of every trajectory: three of them nearly fill a micro-batch, and half of the tokens are
trained."""
ROWS_OF_A_RANK = 3


def model_folder(folder: Path, size: str, layers: int | None) -> str:
    """A local folder with the published config and a small tokenizer; no weights."""
    from transformers import Qwen2Config

    from tests.models import make_tokenizer

    shape: dict[str, Any] = SHAPES[size] | ({"num_hidden_layers": layers} if layers else {})
    make_tokenizer(folder)
    made: Any = Qwen2Config
    made(**shape, max_position_embeddings=32_768).save_pretrained(folder)
    return str(folder)


def configuration(case: dict[str, Any], path: str, run_dir: str) -> Any:
    """The recipe as it is composed for a training, with a small batch."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from verl.trainer.compose import CONFIGS
    from verl.trainer.config import validate

    algorithm = case["recipe"].rsplit("-", 1)[1]
    copies = 6 if algorithm == "grpo" else 1
    mini = WORLD * ROWS_OF_A_RANK
    overrides = [
        f"experiment=nq_hotpotqa/{case['recipe']}",
        f"actor_rollout_ref.model.path={path}",
        "actor_rollout_ref.model.pack_rows=true",  # what the driver's probe says of a Qwen2.5
        f"trainer.default_local_dir={run_dir}",
        f"data.train_batch_size={2 * mini // copies}",
        f"actor_rollout_ref.rollout.n={copies}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={mini}",
        "actor_rollout_ref.rollout.num_agent_workers=2",
        "trainer.total_training_steps=1",
        "trainer.val_before_train=false",
        "trainer.logger=[]",
        *case.get("overrides", []),
    ]
    with initialize_config_dir(str(CONFIGS), version_base=None):
        raw: Any = OmegaConf.to_container(compose(algorithm, overrides), resolve=True)
    return validate(raw)


class ScriptedWorker:
    """`AgentLoopWorker` whose loop searches without a retriever.

    Router and engines are the real ones.
    """

    def __init__(self, config: Any, engines: Any, max_under_way: int) -> None:
        self.engines = engines

    async def progress(self) -> dict[str, int]:
        return {}

    async def run(self, jobs: Any, sampling: dict[str, Any]) -> list[Any]:
        return [await self.one(job, sampling) for job in jobs]

    async def one(self, job: Any, sampling: dict[str, Any]) -> Any:
        from verl.agent import Trajectory

        trajectory = Trajectory(list(job.prompt_ids))
        params = {**sampling, "max_tokens": TURN, "stop": [], "seed": job.seed}
        for turn in range(TURNS):
            completion = await self.engines.generate(job.session, trajectory.token_ids, params)
            trajectory.add_completion(completion)
            if turn + 1 < TURNS:
                trajectory.add_observation([9] * OBSERVATION)
        self.engines.forget(job.session)
        trajectory.reward = {"score": float(hash(job.session) % 2)}
        return trajectory

    def replace_engine(self, replica: int, handle: Any) -> None:
        self.engines.replace(replica, handle)

    async def close(self) -> None: ...


class Rehearsal:
    """The stand-ins, in place."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.events: list[tuple[str, str]] = []
        self.timeline: list[tuple[Any, ...]] = []
        self.collectives: dict[str, int] = {}
        total = int(case.get("gpu_gib", 80) * GIB)
        self.memory = Memory(total, int(4 * GIB))
        colocated = not case.get("separate")
        self.memories = [self.memory, *(Memory(total, int(4 * GIB)) for _ in range(WORLD - 1))]
        if not colocated:
            self.memories = [Memory(total, int(4 * GIB)) for _ in range(WORLD)]
        self.case = case

    def log(self, who: str, what: str = "") -> None:
        self.events.append((who, what))
        m = self.memory
        figures = (m.allocated, m.reserved, m.peak, sum(self.memories[0].engine.values()))
        self.timeline.append((f"{who} {what}".strip(), *(round(x / GIB, 3) for x in figures)))

    def log_collective(self, name: str, tensors: list[Any]) -> None:
        for tensor in tensors:
            key = f"{name} {tensor.device.type} {str(tensor.dtype).removeprefix('torch.')}"
            self.collectives[key] = max(self.collectives.get(key, 0), tensor.nbytes)

    def put_in_place(self, weight_bytes: int) -> None:
        import torch
        import torch.multiprocessing.reductions as reductions
        import vllm.distributed.weight_transfer.nccl_engine as nccl_engine
        import vllm.distributed.weight_transfer.packed_tensor as packed
        import vllm.v1.engine.async_llm as async_llm

        from tests.fake_card import cluster, engine, mode, ranks
        from verl.rollout import manager as rollout
        from verl.single_controller import worker_group

        engine.check_calls(engine.StubEngine)
        self.engines = engine.Engines(self.memories, weight_bytes, self.log)
        if self.case.get("dies_at"):
            self.engines.dies_at = tuple(self.case["dies_at"])
        card.plug_in(
            self.memory,
            lambda: engine.UUID.format(self.engines.gpu),
            lambda what: self.log("rank", what),
        )
        self.mode = mode.CardMode(self.memory, self.log_collective)
        mode.put_in_place(self.mode)

        exports: Any = weakref.WeakValueDictionary()
        """What CUDA IPC shares, by handle; it lives as long as the trainer keeps it."""

        def reduce_tensor(tensor: Any) -> tuple[None, tuple[Any, ...]]:
            assert tensor.device.type == "cuda", "CUDA IPC cannot hand on a tensor of the host"
            handle = len(exports)
            exports[handle] = tensor
            return None, (handle, None, None, None, None, None, 0)

        packed.reduce_tensor = reduce_tensor  # pyright: ignore
        reductions.rebuild_cuda_tensor = lambda handle, *_: exports[handle]
        nccl_engine.open_trainer_endpoint = lambda info: engine.Group(
            self.engines, 0, info.world_size
        )  # pyright: ignore
        async_llm.AsyncLLM = self.engines  # pyright: ignore
        ranks.no_peers(lambda what: self.log("rank", what))
        ranks.models_without_weights()
        worker_group.ray = cluster.Cluster()  # pyright: ignore
        ranks.Host.mode = self.mode
        ranks.Host.memory = self.memory
        ranks.Host.log = self.log
        worker_group.WorkerHost = ranks.Host  # pyright: ignore
        worker_group.RayResourcePool.get_placement_group = lambda self: None  # pyright: ignore
        worker_group.PlacementGroupSchedulingStrategy = lambda *_, **__: None  # pyright: ignore
        worker_group.NodeAffinitySchedulingStrategy = lambda *_, **__: None  # pyright: ignore
        worker_group.TCPStore = lambda *_, **__: None  # pyright: ignore
        rollout.AgentLoopWorker = ScriptedWorker  # pyright: ignore
        assert torch.cuda.is_available()

    def train(self, config: Any) -> None:
        """The processes of the run, and `fit` up to the last sync."""
        from verl.trainer.ppo.processes import start_processes
        from verl.trainer.ppo.ray_trainer import RayPPOTrainer
        from verl.trainer.preparation import Task
        from verl.utils.tracking import Timers, Tracking

        rows = [
            {"data_source": "nq", "prompt": [], "extra_info": {"index": i}}
            for i in range(config.data.train_batch_size)
        ]
        train_set: Any = SimpleNamespace(rows=rows, prompt_ids=[[5] * PROMPT for _ in rows])
        sized = type("Rows", (SimpleNamespace,), {"__len__": lambda self: len(self.rows)})
        train_set = sized(rows=rows, prompt_ids=train_set.prompt_ids)
        assert config.device == "cuda"
        processes = start_processes(config, config.device, 10)
        self.describe(processes)
        tracking = Tracking(config.trainer.default_local_dir, [], "project", "run", {}, {})
        agent = SimpleNamespace(reduce_metrics=lambda drawn: {})
        tokenizer = SimpleNamespace(pad_token_id=0, decode=lambda *_, **__: "")
        stop: Any = SimpleNamespace(requested=0)
        trainer = RayPPOTrainer(
            config,
            Task(tokenizer, agent, None),
            train_set,
            train_set,
            processes,
            tracking,
            Timers(lambda name: None),
            stop,
        )
        trainer.finish = lambda: None  # a checkpoint of nothing
        trainer.is_due = lambda frequency: False
        trainer.fit()
        self.describe(processes)

    def describe(self, processes: Any) -> None:
        """Where the parameters of each role lie between two calls, and in which dtype."""
        roles = processes.group.hosts[0]._target.roles
        self.parameters = {
            name: sorted(
                {
                    f"{p.to_local().device.type} {str(p.dtype).removeprefix('torch.')}"
                    for p in (role.model if name == "ref" else role.state.model).parameters()
                }
            )
            for name, role in roles.items()
        }
        self.moments = {
            name: sorted(
                {
                    f"{x.to_local().device.type} {str(x.dtype).removeprefix('torch.')}"
                    for state in role.state.optimizer.state.values()
                    for x in state.values()
                    if hasattr(x, "to_local")
                }
            )
            for name, role in roles.items()
            if name != "ref"
        }


def estimated(config: Any, gpu_gib: float) -> dict[str, float]:
    """Peak GiB of each phase by `verl.trainer.estimate`, for the rehearsal's micro-batches."""
    from dataclasses import replace

    from verl.estimate import memory
    from verl.estimate.memory import Pass, peak
    from verl.estimate.report import total
    from verl.estimate.sizing import Longest, roles_of

    length = PROMPT + TURNS * TURN + (TURNS - 1) * OBSERVATION
    roles = []
    longest = Longest(length, TURNS * TURN / length, "", turns=TURNS - 1, written=TURNS * TURN)
    for role in roles_of(config, longest, {}):
        update = role.update and Pass(ROWS_OF_A_RANK * length, ROWS_OF_A_RANK * TURNS * TURN, "")
        infer = (
            2 * ROWS_OF_A_RANK
            if role.infer.tokens >= 2 * ROWS_OF_A_RANK * length
            else role.infer.tokens // length
        )
        roles.append(
            replace(role, infer=Pass(infer * length, infer * TURNS * TURN, ""), update=update)
        )
    share = config.actor_rollout_ref.rollout.gpu_memory_utilization * gpu_gib * GIB
    engine = {("", "engine"): share}
    phases = ["rollout", "log-probs", *["critic update"] * config.use_critic, "actor update"]
    return {
        phase: (total(peak(phase, roles, {}, engine)[0]) - memory.CONTEXTS_GIB * GIB) / GIB
        for phase in phases
    }


def rehearse(case: dict[str, Any]) -> dict[str, Any]:
    """What happened in a step of the case. Leaves the stand-ins in place."""
    from verl.estimate.sizing import read_model

    gpu_gib = case.get("gpu_gib", 80)
    with tempfile.TemporaryDirectory() as folder:
        path = model_folder(Path(folder), case["recipe"].split("-")[1], case.get("layers"))
        rehearsal = Rehearsal(case)
        config = configuration(case, path, f"{folder}/run")
        sizes, _ = read_model(config.actor_rollout_ref.model, "lm", {})
        estimate = estimated(config, gpu_gib)
        rehearsal.put_in_place(2 * sizes.params)
        rehearsal.train(config)
    return {
        "events": rehearsal.events,
        "timeline": rehearsal.timeline,
        "collectives": rehearsal.collectives,
        "received": {gpu: sorted(found) for gpu, found in rehearsal.engines.received.items()},
        "parameters": rehearsal.parameters,
        "moments": rehearsal.moments,
        "estimate": estimate,
    }


def in_a_fork(case: dict[str, Any], path: str) -> None:
    """Rehearses in a process that ends with it; writes the result to `path`."""
    child = os.fork()
    if child == 0:
        try:
            result = rehearse(case)
        except BaseException:
            result = {"error": traceback.format_exc()}
        Path(path).write_text(json.dumps(result))
        os._exit(0)  # engines have threads that wait for ever
    os.waitpid(child, 0)


def main() -> None:
    """Rehearses the cases one after the other; the imports, which take longest, are shared."""
    library, folder, *cases = sys.argv[1:]
    card.load(library)
    os.environ.update({"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"})
    import vllm.distributed.weight_transfer.ipc_engine
    import vllm.distributed.weight_transfer.nccl_engine
    import vllm.v1.engine.async_llm  # noqa: F401

    import verl.trainer.estimate
    import verl.trainer.main_ppo
    import verl.trainer.ppo.ray_trainer  # noqa: F401

    for number, case in enumerate(cases):
        in_a_fork(json.loads(case), f"{folder}/{number}.json")


if __name__ == "__main__":
    main()
