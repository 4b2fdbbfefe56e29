"""Memory of what shares a GPU with the trainer: vLLM's engine, and a retriever.

vLLM takes `gpu_memory_utilization` of the GPU, whatever else is on it. Of that share it subtracts
its weights, what a profile run of `max_num_batched_tokens` takes at its peak, and its CUDA graphs;
the rest becomes KV cache (vLLM 0.32, `Worker.determine_available_memory`). When it starts, its
whole share must be free (`request_memory`), or it refuses. All figures are bytes on one GPU, and
pure functions of sizes. Nothing here was measured on a GPU.
"""

from dataclasses import dataclass

from verl.estimate.memory import FLOAT32, GIB, WIDTH, Entries, Sizes
from verl.workers.config import RolloutConfig

GRAPHS_GIB = 1.0
"""CUDA graphs of an engine: a guess. vLLM takes its own estimate from its share."""
WORKSPACES_GIB = 1.0
"""Workspaces of attention and of matrix products, in the engine's share: a guess."""
FAISS_SCRATCH_GIB = 1.5
"""What a `faiss.StandardGpuResources` reserves on a GPU of more than 8 GiB."""
ENCODER_GIB = 1.5
"""CUDA context of the retriever (.5), E5-base in float32 (.4), its activations (.6): a guess.

The first GPU has them."""
VECTOR_NUMBERS = 768
"""Numbers of an E5-base vector."""
VECTOR_BYTES = 2
"""FAISS keeps vectors on GPUs in float16 (`--faiss_gpu`)."""

WEIGHTS = "weights"
PROFILE = "profile run"
LOGITS = "logits of a step"
GRAPHS = "graphs, workspaces (a guess)"
KV_CACHE = "KV cache"
INDEX = "index, scratch, encoder"


@dataclass(frozen=True)
class EngineMemory:
    """An engine's share of one GPU."""

    weights: float
    profile: float
    """Activations of `max_num_batched_tokens` in one decoder layer."""
    logits: float
    """Logits of `max_num_seqs` tokens in the engine's dtype, and the sampler's float32 copy."""
    graphs: float
    kv_cache: float
    """What is left for keys and values; negative where the engine cannot start."""
    kv_bytes_per_token: float

    @property
    def share(self) -> float:
        """What the engine asks for: `gpu_memory_utilization` of the GPU."""
        return self.weights + self.profile + self.logits + self.graphs + self.kv_cache

    @property
    def kv_tokens(self) -> int:
        """Tokens in the KV cache. Every GPU of an engine holds the same ones, for its own heads."""
        return max(0, int(self.kv_cache // self.kv_bytes_per_token))

    def entries(self) -> Entries:
        """The parts of the share by name."""
        return {
            ("engine", WEIGHTS): self.weights,
            ("engine", PROFILE): self.profile,
            ("engine", LOGITS): self.logits,
            ("engine", GRAPHS): self.graphs,
            ("engine", KV_CACHE): self.kv_cache,
        }


def engine_memory(sizes: Sizes, rollout: RolloutConfig, gpu_memory: float) -> EngineMemory:
    """Divides an engine's share of a GPU of `gpu_memory` bytes."""
    width = WIDTH[rollout.dtype]
    tp = rollout.tensor_model_parallel_size
    weights = width * sizes.params / tp
    mlp = 3 * sizes.intermediate / tp  # gate, up, and their product
    stream = 4 * sizes.hidden  # hidden states, residual, two normed copies
    profile = width * (mlp + stream) * rollout.max_num_batched_tokens
    logits = (width + FLOAT32) * sizes.vocab * rollout.max_num_seqs
    graphs = (WORKSPACES_GIB + GRAPHS_GIB * (not rollout.enforce_eager)) * GIB
    rest = rollout.gpu_memory_utilization * gpu_memory - weights - profile - logits - graphs
    return EngineMemory(weights, profile, logits, graphs, rest, kv_bytes_per_token(sizes, rollout))


def kv_bytes_per_token(sizes: Sizes, rollout: RolloutConfig) -> float:
    """Keys and values of a token in all layers, on one of an engine's GPUs."""
    return 2 * sizes.layers * WIDTH[rollout.dtype] * sizes.keys / rollout.tensor_model_parallel_size


def retriever_memory(passages: int, gpus: int) -> float:
    """Bytes of an exact FAISS index of E5 vectors, sharded over `gpus` GPUs.

    The figure is that of the fullest GPU, which also holds the encoder.
    """
    index = passages * VECTOR_NUMBERS * VECTOR_BYTES / gpus
    return index + (FAISS_SCRATCH_GIB + ENCODER_GIB) * GIB
