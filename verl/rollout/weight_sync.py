"""How the engines get the trainer's weights.

On CPU they are written to a memory file system, on GPU they are sent by vLLM's weight transfer.
"""

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import AutoProcessor, AutoTokenizer, PretrainedConfig, PreTrainedModel

from verl.single_controller.worker_group import RayError, get
from verl.workers.config import ModelConfig
from verl.workers.fsdp_model import full_parameters, full_shapes
from verl.workers.hf_folder import copy_companions
from verl.workers.image_tower import policy_class

MEMORY_FILES = "/dev/shm"
HEADS = {
    "model.embed_tokens.weight": "lm_head.weight",
    "model.language_model.embed_tokens.weight": "lm_head.weight",
    "model.text_model.embed_tokens.weight": "lm_head.weight",
    "model.decoder.embed_tokens.weight": "lm_head.weight",
    "transformer.wte.weight": "lm_head.weight",
    "transformer.word_embeddings.weight": "lm_head.weight",
    "gpt_neox.embed_in.weight": "embed_out.weight",
    "backbone.embeddings.weight": "lm_head.weight",
    "backbone.embed_tokens.weight": "lm_head.weight",
}
"""Names of embeddings in checkpoints, and of the heads that are tied to them."""


@contextmanager
def memory_folder() -> Iterator[str]:
    """Makes a folder in the memory file system, and removes it after the block.

    Folders that killed processes left behind are removed as well.
    """
    remove_dead_folders()
    with tempfile.TemporaryDirectory(
        prefix=f"{own_prefix()}{os.getpid()}-", dir=MEMORY_FILES
    ) as folder:
        yield folder


def own_prefix() -> str:
    """The prefix of the names of our folders there, followed by a process number.

    It names the process namespace, because a process number has a meaning only there.
    """
    return f"verl-{os.stat('/proc/self/ns/pid').st_ino}-"


def remove_dead_folders() -> None:
    """Removes the folders of processes that are gone."""
    prefix = own_prefix()
    for folder in Path(MEMORY_FILES).glob(f"{prefix}*"):
        if not Path("/proc", folder.name.removeprefix(prefix).split("-")[0]).exists():
            # another process may remove it at the same time
            shutil.rmtree(folder, ignore_errors=True)


def write_engine_model(model: ModelConfig, folder: str) -> None:
    """Writes a copy of the model for the CPU engine, with a head that is not tied.

    That engine packs `lm_head` apart from the embedding and does not pack it again on a reload.
    With tied weights the head would keep its old values: rollout and trainer log-probs would differ
    by 1 to 2 nats while training seems to work.
    """
    policy = policy_class(model).from_pretrained(
        model.path, dtype=torch.float32, trust_remote_code=model.trust_remote_code
    )
    # the language model alone, where the checkpoint also has towers for images that are not read
    config = policy.config
    config.tie_word_embeddings = not has_head(config)
    config.get_text_config().tie_word_embeddings = config.tie_word_embeddings
    config.architectures = [type(policy).__name__]
    config.save_pretrained(folder)
    copy_companions(model, Path(folder))
    source = model.tokenizer_path or model.path
    auto = AutoProcessor if model.reads_images else AutoTokenizer
    auto.from_pretrained(source, trust_remote_code=model.trust_remote_code).save_pretrained(folder)
    write_weights(full_parameters(policy), folder, has_head(config))


def has_head(config: PretrainedConfig) -> bool:
    """Whether vLLM's model of this family has a head.

    That of Gemma 2 has only the embedding, so no head can keep old values.
    """
    return config.model_type != "gemma2"


def write_weights(
    parameters: Iterable[tuple[str, torch.Tensor]], folder: str, own_head: bool = True
) -> None:
    """Writes `model.safetensors`.

    With `own_head` the file has a head in any case: a copy of the embedding where they are tied.
    """
    weights = {name: tensor.detach().cpu() for name, tensor in parameters}
    for embedding, head in HEADS.items():
        if (
            own_head and embedding in weights
        ):  # a state dict names both, and they share memory where they are tied
            weights[head] = weights.get(head, weights[embedding]).clone()
    unshared = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(unshared, Path(folder) / "model.safetensors", metadata={"format": "pt"})


class WeightSender:
    """The trainer's side of a sync. Every training rank has one; rank 0 talks to the engines."""

    def __init__(
        self,
        model: PreTrainedModel,
        servers: Sequence[Any],
        device: str,
        dtype: torch.dtype = torch.float32,
        *,
        colocated: bool = True,
        ranks_per_server: int = 1,
    ) -> None:
        self.model = model
        self.servers = servers
        self.dtype = dtype
        self.client = EngineClient(servers, ranks_per_server)
        self.source: Any = None
        self.engine: Any = None
        if device == "cuda":
            self.engine = (
                self._connect_ipc()
                if colocated
                else self._connect_nccl(len(servers) * ranks_per_server)
            )

    def send(self) -> None:
        """Sends the present weights to all engines. A collective over the training ranks.

        Raises on rank 0 what an engine raised, once every rank is done, so that none is left
        waiting.
        """
        if self.engine is not None:
            self._transfer()
            return
        parameters = full_parameters(self.model)
        try:
            if dist.get_rank() == 0:
                with memory_folder() as folder:
                    write_weights(parameters, folder, has_head(self.model.config))
                    get([server.load_weights.remote(folder) for server in self.servers])
            else:
                for _ in parameters:
                    pass
        finally:  # an engine that died under rank 0 must not leave the other ranks waiting
            dist.barrier()

    def close(self) -> None:
        """Releases the connection, without waiting for the engines, which may be gone."""
        if self.engine is not None:
            self.engine.shutdown()

    def _transfer(self) -> None:
        """Sends through vLLM.

        Whatever happens to rank 0, it takes part in all gathers, because the other ranks wait for
        it. A group that was broken up because an engine died may raise too; then the death of the
        engine is raised instead.
        """
        try:
            self.engine.send_weights()
        except Exception:
            if self.client.failure is None:
                raise
        finally:
            self.source.exhaust()
        self.client.raise_failure()

    def _buffer_size(self) -> int:
        """Bytes of the buffer of a packed transfer.

        1 GiB as in vLLM, or the size of the largest tensor where that is more (embeddings of 7B),
        because it must fit.
        """
        return max(2**30, *(p.numel() * self.dtype.itemsize for p in self.model.parameters()))

    def _connect_ipc(self) -> Any:
        """Builds vLLM's trainer engine over CUDA IPC.

        Its ranks must be exactly those that share GPUs with the engines.
        """
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return self._connect(
            IPCTrainerInitInfo(
                rank=dist.get_rank(), packed=True, packed_buffer_size_bytes=self._buffer_size()
            )
        )

    def _connect_nccl(self, engine_ranks: int) -> Any:
        """Builds vLLM's trainer engine over NCCL.

        Rank 0 broadcasts to a group of itself and all engine processes. A broadcast never ends when
        a member of the group is gone, so rank 0 breaks the group up as soon as it hears of that.
        The engines that are left hang in their broadcast, and all must be replaced.
        """
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        with reserved_port() as port:
            engine = self._connect(
                NCCLTrainerInitInfo(
                    rank=dist.get_rank(),
                    master_address=os.environ["MASTER_ADDR"],
                    master_port=port,
                    world_size=1 + engine_ranks,
                    packed=True,
                    packed_buffer_size_bytes=self._buffer_size(),
                )
            )
        if engine.model_update_group is not None:  # only rank 0 has one
            self.client.on_failure = engine.model_update_group.destroy
        return engine

    def _connect(self, info: Any) -> Any:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        self.source = policy_source(self.model, self.dtype)
        return WeightTransferTrainerFactory.trainer_init(
            info, client=self.client, source=self.source
        )


@contextmanager
def reserved_port() -> Iterator[int]:
    """Reserves a free port for the duration of the block.

    The port is bound but not listened to, so that a listener with SO_REUSEADDR, such as vLLM's,
    still gets it.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]


def policy_source(model: PreTrainedModel, dtype: torch.dtype) -> Any:
    """The policy as a source of weights for vLLM: whole tensors under their checkpoint names.

    They are in the engine's dtype, with adapters merged.
    """
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class PolicySource(WeightSource):
        rest: Iterator[tuple[str, torch.Tensor]] = iter(())

        def metadata(self) -> list[Any]:
            return [ParamMeta(name, dtype, tuple(shape)) for name, shape in full_shapes(model)]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            named = full_parameters(model)
            self.rest = ((name, value.to(dtype).contiguous()) for name, value in named)
            return self.rest

        def exhaust(self) -> None:
            """Gathers what the last pass left over: a rank that stops early blocks the others."""
            for _ in self.rest:
                pass

    return PolicySource()


class EngineClient:
    """Implements vLLM's `VLLMWeightSyncClient` with the Ray handles of all replicas.

    A transfer is a chain of collectives of the training ranks, and only rank 0 calls the engines.
    An exception would take rank 0 out of the chain and leave the others in a barrier until the 30
    minutes of their process group are over. So the first failure is kept, later calls are skipped,
    and `raise_failure` raises it once all ranks are done.
    """

    def __init__(self, servers: Sequence[Any], ranks_per_server: int = 1) -> None:
        self.servers = servers
        self.ranks_per_server = ranks_per_server
        self.failure: RayError | None = None
        self.on_failure: Callable[[], None] | None = None
        """Called at the first failure, in the thread that noticed it."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connects every engine.

        Over NCCL the ranks of an engine come after those of the engine before it.
        """
        infos = [dict(init_info) for _ in self.servers]
        for place, info in enumerate(infos):
            if "rank_offset" in info:
                info["rank_offset"] += place * self.ranks_per_server
        get(
            [
                s.init_weight_transfer_engine.remote(i)
                for s, i in zip(self.servers, infos, strict=True)
            ]
        )

    def start_weight_update(self) -> None:
        self.failure = None
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update")

    def raise_failure(self) -> None:
        """Raises what the first failing engine of the last transfer raised, if there was one."""
        if self.failure is not None:
            raise self.failure

    def _call(self, method: str, *args: Any) -> None:
        if self.failure is not None:
            return
        try:
            get([getattr(server, method).remote(*args) for server in self.servers])
        except RayError as error:
            self.failure = error
            if self.on_failure is not None:
                self.on_failure()
