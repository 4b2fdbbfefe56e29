"""The precision that suits the machine at hand, for configurations that are to run on any.

dtype: ${fast_precision:}
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from verl.utils.device import gpu_is_meant

if TYPE_CHECKING:
    from verl.trainer.config import PPOConfig

INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}
"""What x86 and ARM processors that multiply bfloat16 numbers list; others do it in float32, and
convert before and after."""
CPU_INFO = Path("/proc/cpuinfo")


def fast_precision() -> str:
    """bfloat16 where a GPU is meant, or the processor has instructions for it; else float32."""
    return "bfloat16" if gpu_is_meant() or INSTRUCTIONS & cpu_flags() else "float32"


def slow_precision(config: "PPOConfig") -> str | None:
    """What makes a training on this processor many times slower, and the cure; None if nothing."""
    model = config.actor_rollout_ref
    dtypes = {
        "actor_rollout_ref.actor.fsdp_config.dtype": model.actor.fsdp_config.dtype,
        "actor_rollout_ref.rollout.dtype": model.rollout.dtype,
    }
    slow = [f"{key}=float32" for key, dtype in dtypes.items() if dtype == "bfloat16"]
    if config.device != "cpu" or not slow or INSTRUCTIONS & cpu_flags():
        return None
    return (
        "this processor has no instructions for bfloat16, and computes many times faster with "
        + " ".join(slow)
    )


def cpu_flags() -> set[str]:
    """What the first processor of this machine can do; empty where the system does not say."""
    if not CPU_INFO.exists():
        return set()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", CPU_INFO.read_text(), re.MULTILINE)
    return set(found.group(1).split()) if found else set()


def register_precision() -> None:
    """Lets configurations write `${fast_precision:}`."""
    OmegaConf.register_new_resolver("fast_precision", fast_precision, replace=True)
