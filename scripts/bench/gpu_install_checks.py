"""What a GPU environment can show without a GPU: every module imports, and everything called has
the form called for.

    python scripts/bench/gpu_install_checks.py

`scripts/bench/gpu_install.sh` makes the environment, and a stub of libcuda.so.1 for the compiled
modules that link to the driver. Prints a line per failure, then the versions and counts; exit
status 1 after a failure.
"""

import asyncio
import importlib
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "triton",
    "vllm",
    "transformers",
    "ray",
    "flashinfer-python",
    "faiss-gpu",
    "sentence-transformers",
)
OWN = ("verl", "search_r1")
MODEL = "data/closed_world/base"
"""Folder of any model, whose configuration the engine's arguments read."""
MODULES = (
    "torch.nn.attention.varlen",
    "torch.distributed.fsdp",
    "triton.backends.nvidia.compiler",
    "vllm.platforms.cuda",
    "vllm.device_allocator.cumem",
    "vllm.distributed.device_communicators.pynccl",
    "vllm.distributed.weight_transfer.ipc_engine",
    "vllm.distributed.weight_transfer.nccl_engine",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.v1.attention.backends.triton_attn",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.worker.gpu.sample.sampler",
    "flashinfer",
    "faiss",
)
"""What only a GPU run imports; the compiled modules of vLLM come on top."""

TRANSFER = "vllm.distributed.weight_transfer"
ENGINE = "vllm.v1.engine.async_llm:AsyncLLM"
SIGNATURES: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    # what is called, positional arguments (self among them), keywords
    ("torch.nn.attention.varlen:varlen_attn", 7, ("scale", "window_size", "enable_gqa")),
    (
        "torch.distributed.fsdp:fully_shard",
        1,
        ("mesh", "mp_policy", "offload_policy", "reshard_after_forward"),
    ),
    ("torch.distributed.fsdp:MixedPrecisionPolicy", 0, ("param_dtype", "reduce_dtype")),
    ("torch.distributed.fsdp:CPUOffloadPolicy", 0, ()),
    ("torch.distributed:init_process_group", 1, ("store", "rank", "world_size", "timeout")),
    ("torch.distributed.device_mesh:init_device_mesh", 2, ("mesh_dim_names",)),
    (
        "torch.distributed.checkpoint.state_dict_saver:async_save",
        1,
        ("storage_writer", "process_group"),
    ),
    ("torch.optim:AdamW", 1, ("lr", "betas", "weight_decay", "fused")),
    (f"{ENGINE}.from_engine_args", 1, ()),
    (f"{ENGINE}.generate", 4, ()),
    (f"{ENGINE}.collective_rpc", 2, ("args",)),
    (f"{ENGINE}.collective_rpc", 2, ("kwargs",)),
    (f"{ENGINE}.pause_generation", 1, ("mode", "clear_cache")),
    (f"{ENGINE}.resume_generation", 1, ()),
    (f"{ENGINE}.reset_prefix_cache", 1, ()),
    (f"{ENGINE}.sleep", 2, ()),
    (f"{ENGINE}.wake_up", 2, ()),
    (f"{ENGINE}.shutdown", 1, ("timeout",)),
    (f"{ENGINE}.init_weight_transfer_engine", 2, ()),
    (f"{ENGINE}.start_weight_update", 1, ()),
    (f"{ENGINE}.update_weights", 2, ()),
    (f"{ENGINE}.finish_weight_update", 1, ()),
    (f"{TRANSFER}.base:WeightTransferInitRequest", 0, ("init_info",)),
    (f"{TRANSFER}.base:WeightTransferUpdateRequest", 0, ("update_info",)),
    (f"{TRANSFER}.base:ParamMeta", 3, ()),
    (
        f"{TRANSFER}.ipc_engine:IPCTrainerInitInfo",
        0,
        ("rank", "packed", "packed_buffer_size_bytes"),
    ),
    (
        f"{TRANSFER}.nccl_engine:NCCLTrainerInitInfo",
        0,
        (
            "rank",
            "master_address",
            "master_port",
            "world_size",
            "packed",
            "packed_buffer_size_bytes",
        ),
    ),
    (f"{TRANSFER}.factory:WeightTransferTrainerFactory.trainer_init", 1, ("client", "source")),
    ("faiss:index_cpu_to_all_gpus", 1, ("co",)),
    ("faiss:read_index", 2, ()),
    ("faiss:get_num_gpus", 0, ()),
)
ATTRIBUTES = (
    f"{TRANSFER}.base:WeightSource.metadata",
    "vllm.sampling_params:RequestOutputKind.FINAL_ONLY",
    "vllm.v1.engine.exceptions:EngineDeadError",
    "transformers.utils.import_utils:is_flash_attn_2_available",
    "faiss:StandardGpuResources",
    "faiss:GpuMultipleClonerOptions.useFloat16",
    "faiss:GpuMultipleClonerOptions.shard",
    "faiss:IO_FLAG_MMAP_IFC",
)


def resolve(path: str) -> Any:
    """The object at `module:name.name`."""
    module, _, names = path.partition(":")
    found: Any = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


def accepts(path: str, positional: int, keywords: tuple[str, ...]) -> None:
    """Raises TypeError unless the object can be called so; a catch-all `**kwargs` does not count
    for a keyword."""
    called = resolve(path)
    signature = inspect.signature(called)
    signature.bind(*[None] * positional, **dict.fromkeys(keywords))
    named = {p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD}
    if unnamed := set(keywords) - named:
        raise TypeError(f"takes {', '.join(sorted(unnamed))} only as any keyword")


def compiled_modules() -> Iterator[str]:
    """Names of vLLM's compiled modules."""
    root = Path(resolve("vllm:__file__")).parent
    for path in sorted(root.rglob("*.so")):
        if "third_party" not in path.parts:
            yield ".".join((*path.relative_to(root.parent).parent.parts, path.name.split(".")[0]))


def own_modules() -> Iterator[str]:
    """Names of all modules of the project but its commands' entry points."""
    for package in OWN:
        for module in pkgutil.walk_packages([package], f"{package}."):
            if not module.name.endswith("__main__"):
                yield module.name


def engine_arguments() -> None:
    """Builds vLLM's arguments for an engine on GPUs by the code of the engine server."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from verl.rollout.vllm_server import VLLMServer
    from verl.workers.config import ModelConfig, RolloutConfig

    seen: list[Any] = []
    AsyncLLM.from_engine_args = seen.append  # pyright: ignore[reportAttributeAccessIssue]
    for colocated in (True, False):
        server = VLLMServer(
            RolloutConfig(),
            ModelConfig(path=MODEL),
            max_model_len=64,
            device="cuda",
            colocated=colocated,
            replica_rank=0,
            num_replicas=1,
            visible_devices=["0"],
        )
        server._build(**server._gpu_arguments())
    if not all(isinstance(arguments, AsyncEngineArgs) for arguments in seen):
        raise TypeError(f"not AsyncEngineArgs: {seen}")


def sampling_parameters() -> None:
    """Builds vLLM's sampling parameters by the code of the engine server."""
    from vllm import SamplingParams

    from verl.rollout.vllm_server import VLLMServer
    from verl.workers.config import ModelConfig, RolloutConfig

    class Reached(Exception):
        pass

    class Engine:
        """Ends the request where the engine would begin."""

        def generate(self, prompt: Any, params: Any, request_id: str) -> Any:
            if not isinstance(params, SamplingParams):
                raise TypeError(f"not SamplingParams: {params}")
            raise Reached

    server = VLLMServer(
        RolloutConfig(),
        ModelConfig(path=MODEL),
        max_model_len=64,
        device="cuda",
        replica_rank=0,
        num_replicas=1,
    )
    server.engine = Engine()
    sampling = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "max_tokens": 8,
        "stop": ["a"],
        "seed": 0,
    }
    with suppress(Reached):
        asyncio.run(server.generate("0", [1], {**sampling, "log_probs": True}))


def checks() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is checked, and the call that raises if it is not so."""
    for name in MODULES:
        yield f"import {name}", lambda name=name: importlib.import_module(name)
    for name in compiled_modules():
        yield f"load {name}", lambda name=name: importlib.import_module(name)
    for path, positional, keywords in SIGNATURES:
        shown = f"call {path}({positional} positional, {', '.join(keywords) or 'no keywords'})"
        yield shown, lambda p=path, n=positional, k=keywords: accepts(p, n, k)
    for path in ATTRIBUTES:
        yield f"find {path}", lambda path=path: resolve(path)
    yield "build the arguments of an engine", engine_arguments
    yield "build the parameters of a request", sampling_parameters
    for name in own_modules():
        yield f"import {name}", lambda name=name: importlib.import_module(name)


def main() -> int:
    """Exit status."""
    counts: dict[str, int] = {}
    failed = 0
    for what, check in checks():
        counts[what.split()[0]] = counts.get(what.split()[0], 0) + 1
        try:
            check()
        except Exception as error:  # whatever a module raises while it is imported
            failed += 1
            traceback.print_exc()
            sys.stdout.write(f"FAILED {what}: {type(error).__name__}: {error}\n")
    sys.stdout.write("".join(f"{name} {version(name)}\n" for name in PACKAGES))
    numbers = ", ".join(f"{count} {verb}" for verb, count in counts.items())
    sys.stdout.write(f"{sum(counts.values())} checks ({numbers}), {failed} failed\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
