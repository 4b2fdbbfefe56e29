"""Checks of the installed packages: versions, namesakes, and whether the engine can be imported."""

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from search_r1.doctor.finding import Finding, fine, problem, warning
from search_r1.program import CONSOLE_SCRIPT
from verl.namesake import CURE, namesake
from verl.utils.device import gpu_is_meant, has_cuda_engine, listed_gpus, setup_problem

IMPORT_S = 180
"""How long the engine may take to be imported. It takes half a minute on a busy machine."""
INSTALL = f"pip install '{CONSOLE_SCRIPT}[EXTRA]', or in a clone: bash scripts/setup.sh"
TRAINS = ("torch", "ray", "transformers", "hydra-core")
"""Packages whose versions are told where nothing is wrong."""


def installed() -> Finding:
    """Whether the project is installed, and not only found by PYTHONPATH."""
    try:
        return fine(CONSOLE_SCRIPT, version(CONSOLE_SCRIPT))
    except PackageNotFoundError:
        return warning(
            CONSOLE_SCRIPT,
            "it is not installed, so that its pins cannot be compared",
            "in a clone: bash scripts/setup.sh",
        )


def pins() -> Finding:
    """Whether the packages that a training needs are there, in the versions that are pinned."""
    engine = "gpu" if has_cuda_engine() or listed_gpus() else "cpu"
    try:
        lines = dict.fromkeys(pinned(("", "train", engine)))
        wrong = [text for line in lines if (text := unmet(line))]
    except PackageNotFoundError:
        return fine("packages", "not compared")
    except ImportError:
        return problem("packages", "packaging is not installed", "pip install packaging")
    if wrong:
        return problem("packages", "; ".join(wrong), INSTALL.replace("EXTRA", engine))
    return fine("packages", f"as pinned for {engine}: {', '.join(map(with_version, TRAINS))}")


def pinned(extras: tuple[str, ...]) -> Iterator[str]:
    """The requirements of the installed project for these extras, also of extras that they name.

    Raises PackageNotFoundError if it is not installed.
    """
    from packaging.requirements import Requirement

    for line in requires(CONSOLE_SCRIPT) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if requirement.name == CONSOLE_SCRIPT:
            yield from pinned(tuple(requirement.extras))
        else:
            yield f"{requirement.name}{requirement.specifier}"


def unmet(line: str) -> str | None:
    """What is wrong with the installed package; None if it meets the requirement."""
    from packaging.requirements import Requirement

    requirement = Requirement(line)
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(found, prereleases=True):
        return None
    return f"{requirement.name} is {found}, not {requirement.specifier}"


def with_version(name: str) -> str:
    """A package and its version."""
    return f"{name} {version(name)}"


def other_verl() -> Finding:
    """Whether PyPI's `verl` is installed too, which has a package of the same name."""
    if found := namesake(sys.path):
        return problem("package verl", f"PyPI's verl is installed too ({found})", CURE)
    return fine("package verl", "this project's alone")


def engine() -> Finding:
    """Whether vLLM and Ray can be imported together, in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", "import ray, vllm"],
            capture_output=True,
            text=True,
            timeout=IMPORT_S,
        )
    except subprocess.TimeoutExpired:
        return warning(
            "engine",
            f"vLLM was not imported within {IMPORT_S} s",
            "see whether the machine is busy, or the environment on a slow file system",
        )
    if done.returncode == 0:
        return fine("engine", "vLLM and Ray can be imported")
    last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    return problem(
        "engine", f"vLLM cannot be imported: {last}", INSTALL.replace("EXTRA", "cpu|gpu")
    )


def gpus() -> Finding:
    """Whether there are GPUs, and whether this environment can use them."""
    there = listed_gpus()
    if not gpu_is_meant():
        return fine("GPUs", "none: trainings run on the CPU")
    if there and not has_cuda_engine():
        return warning(
            "GPUs",
            f"{len(there)} here, and the environment has vLLM for the CPU",
            "make an environment for GPUs: pip install 'search-r1[gpu]', or bash scripts/setup.sh",
        )
    if found := setup_problem():
        return problem("GPUs", found, "see docs/hardware.md")
    return fine("GPUs", "; ".join(line.partition(" (UUID")[0] for line in there))


CHECKS = (installed, other_verl, pins, engine, gpus)
