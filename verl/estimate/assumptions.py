"""What the time of a step is computed from: cards, and assumptions about load and efficiency."""

from dataclasses import dataclass
from types import SimpleNamespace

from verl.estimate.memory import GIB

GPUS = {"a100": (312.0, 2.0), "h100": (989.0, 3.35), "h200": (989.0, 4.8)}
"""Published peak of dense bfloat16 products in TFLOP/s, memory bandwidth in TB/s (SXM cards)."""
ASSUMPTIONS = {
    "prompt_tokens": (250.0, "tokens of a prompt: template and question"),
    "searches": (2.0, "searches of a trajectory"),
    "observed_tokens": (400.0, "tokens of the passages that a search brings into the context"),
    "written_tokens": (250.0, "tokens that the policy writes in a trajectory, all turns"),
    "train_efficiency": (
        0.40,
        "share of peak FLOP/s in passes of the trainer, communication included",
    ),
    "prefill_efficiency": (0.40, "share of peak FLOP/s in the engine's prefill"),
    "bandwidth_efficiency": (0.60, "share of the memory bandwidth in the engine's decoding"),
    "engine_step_ms": (
        3.0,
        "ms of an engine step beside reading memory: launches, sampler, scheduler",
    ),
    "engine_tokens_per_s": (
        0.0,
        "decoded tokens/s of a GPU where known; 0: from the memory bandwidth",
    ),
    "search_latency_s": (0.5, "seconds of one search"),
    "retriever_queries_per_s": (200.0, "queries/s of the retriever"),
    "pcie_gb_per_s": (25.0, "GB/s of a GPU from and to pinned host memory"),
    "pageable_gb_per_s": (
        6.0,
        "GB/s of a GPU from and to host memory that is not pinned (optimizer_offload)",
    ),
    "nvlink_gb_per_s": (150.0, "GB/s of an all-gather between the GPUs"),
    "host_adamw_gb_per_s": (5.0, "GB/s of host memory for AdamW of a rank (param_offload)"),
    "sync_overhead_s": (
        1.5,
        "seconds of a weight sync beside moving bytes: pause, reload of layers, resume",
    ),
    "sleep_wake_s": (3.0, "seconds to put the engines to sleep and to wake them"),
    "driver_s": (3.0, "seconds of the driver: building the batch, advantages, records"),
}
"""The assumptions by the name of their flag: the default, and what the assumption means."""


@dataclass(frozen=True)
class Gpu:
    """What a card can do at most, and how much memory it has."""

    flops: float
    """Floating-point operations per second."""
    bandwidth: float
    """Bytes per second."""
    memory: float
    """Bytes."""


def card(name: str, memory_gib: float) -> Gpu:
    """One of `GPUS`, with its memory."""
    tflops, terabytes = GPUS[name]
    return Gpu(tflops * 1e12, terabytes * 1e12, memory_gib * GIB)


def default_assumptions() -> SimpleNamespace:
    """Every assumption at its default."""
    return SimpleNamespace(**{name: default for name, (default, _) in ASSUMPTIONS.items()})
