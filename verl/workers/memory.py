"""Memory that a training process holds."""

import torch


def peak_memory(device: torch.device) -> dict[str, float]:
    """Takes the most GPU memory held at once since the last call, in GB of 1e9 bytes.

    `max_memory_allocated_gb` is that of tensors, `max_memory_reserved_gb` that of torch's
    allocator. The next call begins anew. On the CPU there is none.
    """
    if device.type != "cuda":
        return {}
    allocated = torch.cuda.max_memory_allocated(device)
    reserved = torch.cuda.max_memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {
        "max_memory_allocated_gb": allocated / 1e9,
        "max_memory_reserved_gb": reserved / 1e9,
    }
