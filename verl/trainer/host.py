"""Checks of the machine that a run is started on.

They cover folders that can be written, short socket paths, and shared memory.
"""

import errno
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verl.trainer.config import PPOConfig

SOCKET_PATH_BYTES = 107
"""Longest path of a socket (unix(7): sun_path has 108 bytes, the last one is zero)."""
RAY_SOCKET = "/ray/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""What Ray adds to its temporary folder, with the largest process number of a 64-bit machine."""
ENGINE_SOCKET = "/00000000-0000-0000-0000-000000000000"
"""What vLLM adds to the temporary folder: a UUID."""
SHORT = "it to a short folder that can be written, such as /tmp"
NCCL_BYTES = 128 * 2**20
"""Shared memory below which GPUs cannot be expected to talk: Docker's default of 64 MiB is known to
be too little."""
FLOAT32_BYTES = 4


def host_problems(config: "PPOConfig") -> list[str]:
    """What this machine lacks for a run with engines on it; each problem names its cure."""
    problems = folder_problems(config) + socket_problems()
    if config.device == "cpu":
        return problems + weight_problems(config)
    return problems + nccl_problems(config)


def folder_problems(config: "PPOConfig") -> list[str]:
    """Folders that engines and Ray must write to and cannot."""
    folders = {
        "Ray's temporary folder": (f"{ray_folder()}/ray", f"set RAY_TMPDIR: {SHORT}"),
        "the temporary folder": (temporary_folder(), f"set TMPDIR: {SHORT}"),
    }
    path = config.actor_rollout_ref.model.path
    if not Path(path).exists() and not has_weights(path):
        home = os.environ.get("HF_HOME", "~/.cache/huggingface")
        cache = os.environ.get("HF_HUB_CACHE", f"{home}/hub")
        folders[f"the cache of the Hugging Face hub, where {path} is to be kept"] = (
            cache,
            "set HF_HOME",
        )
    if config.device == "cuda" and config.actor_rollout_ref.rollout.name == "vllm":
        vllm = os.environ.get(
            "VLLM_CACHE_ROOT", f"{os.environ.get('XDG_CACHE_HOME', '~/.cache')}/vllm"
        )
        triton = os.environ.get(
            "TRITON_CACHE_DIR", f"{os.environ.get('TRITON_HOME', '~')}/.triton/cache"
        )
        folders["vLLM's cache of compiled code"] = (vllm, "set VLLM_CACHE_ROOT")
        folders["Triton's cache of compiled code"] = (triton, "set TRITON_CACHE_DIR")
    return [
        f"{what}: {folder} {problem}: {cure}"
        for what, (folder, cure) in folders.items()
        if (problem := write_problem(Path(folder).expanduser()))
    ]


def run_folder_problems(run_folder: str) -> list[str]:
    """Why the run folder cannot be written, if so.

    A full disk is no problem here, because a run goes on without writing.
    """
    problem = write_problem(Path(run_folder), full_is_fine=True)
    return (
        [f"trainer.default_local_dir={run_folder} {problem}: name another folder"]
        if problem
        else []
    )


def has_weights(name: str) -> bool:
    """Whether the weights of a model of the hub are on this machine already."""
    from huggingface_hub import try_to_load_from_cache

    files = (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)


def write_problem(folder: Path, full_is_fine: bool = False) -> str | None:
    """Why a folder, or the nearest existing one above it, cannot be written; None if it can."""
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(2**20))
            file.flush()
    except OSError as error:
        if full_is_fine and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return None
        return f"cannot be written ({error.strerror})"
    return None


def socket_problems() -> list[str]:
    """Temporary folders in which the path of a socket would be too long."""
    needs = [
        (
            "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR",
            ray_folder(),
            RAY_SOCKET,
            "Ray",
            "RAY_TMPDIR",
        ),
        ("TMPDIR", temporary_folder(), ENGINE_SOCKET, "vLLM", "TMPDIR"),
    ]
    return [
        f"{given}={folder}: the sockets of {owner} would have paths of "
        f"{len(os.fsencode(folder + name))} bytes, and {SOCKET_PATH_BYTES} is the most: set "
        f"{variable}: {SHORT}"
        for given, folder, name, owner, variable in needs
        if len(os.fsencode(folder + name)) > SOCKET_PATH_BYTES
    ]


def ray_folder() -> str:
    """Where Ray makes its folder `ray`."""
    return os.environ.get("RAY_TMPDIR") or temporary_folder()


def temporary_folder() -> str:
    """The folder of temporary files."""
    return os.environ.get("TMPDIR") or "/tmp"


def weight_problems(config: "PPOConfig") -> list[str]:
    """Whether the memory file system has room for the policy's weights in float32.

    Engines on the CPU read them from there. Files that killed processes left are removed first.
    """
    from verl.rollout.weight_sync import MEMORY_FILES, remove_dead_folders
    from verl.workers.hf_folder import skeleton_of

    if problem := write_problem(Path(MEMORY_FILES)):
        return [f"{MEMORY_FILES} {problem}: weights travel through it to engines on the CPU"]
    remove_dead_folders()
    # engines get merged weights, not adapters
    merged = config.actor_rollout_ref.model.model_copy(update={"lora_rank": 0})
    policy: Any = skeleton_of(merged)
    tied = policy.config.get_text_config().tie_word_embeddings
    head = policy.get_output_embeddings().weight.numel() if tied else 0
    engines = config.actor_rollout_ref.rollout.num_replicas or 1
    needed = FLOAT32_BYTES * (sum(p.numel() for p in policy.parameters()) + head) * engines
    return shared_memory_problems(
        MEMORY_FILES, needed, "the weights on their way to engines on the CPU take"
    )


def nccl_problems(config: "PPOConfig") -> list[str]:
    """Whether processes of several GPUs can talk through shared memory."""
    if config.num_gpus == 1:
        return []
    return shared_memory_problems(
        "/dev/shm", NCCL_BYTES, "processes of several GPUs talk through it and take"
    )


def shared_memory_problems(folder: str, needed: int, why: str) -> list[str]:
    """Whether the file system of a folder has `needed` bytes left."""
    state = os.statvfs(folder)
    free = state.f_bavail * state.f_frsize
    if free >= needed:
        return []
    return [
        f"{folder} has {free / 2**20:,.0f} MiB left; {why} {needed / 2**20:,.0f}: remove what "
        "others left there, or make it larger (docker run --shm-size=16g, or mount -o "
        f"remount,size=16G {folder})"
    ]
