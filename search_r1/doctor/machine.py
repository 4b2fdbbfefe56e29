"""Checks of the machine: Python, system, compiler, memory, folders and limits."""

import os
import platform
import resource
import shutil
import sys
from pathlib import Path

from search_r1.doctor.finding import Finding, fine, problem, warning
from verl.trainer.host import NCCL_BYTES, socket_problems, temporary_folder, write_problem
from verl.utils.places import root

GIB = 2**30
LEAST_DISK = 2 * GIB
"""Below it not even a run of the closed world ends."""
SMALL_DISK = 20 * GIB
"""Below it there is no room for the checkpoint of a model of some size."""
SMALL_MEMORY = 6 * GIB
FEW_FILES = 4096
"""Ray and the engines hold a file open for every process, socket and mapped part of an index."""
PYTHONS = ((3, 11), (3, 14))
"""The first version that is supported, and the first that is not."""


def python() -> Finding:
    """Whether this Python is one that the pinned packages have."""
    found = platform.python_version()
    if PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]:
        return fine("Python", f"{found}, {sys.executable}")
    return problem(
        "Python",
        f"{found} is not supported",
        "make an environment of Python 3.11, 3.12 or 3.13",
    )


def system() -> Finding:
    """Whether this is a Linux."""
    found = f"{platform.system()} {platform.release()}, {platform.machine()}"
    if platform.system() == "Linux":
        return fine("system", found)
    return problem("system", f"{found}: vLLM needs Linux", "use a Linux container, or WSL 2")


def compiler() -> Finding:
    """Whether there is a C compiler, which torch and Triton compile kernels with."""
    named = os.environ.get("CC")
    for name in [named] if named else ["cc", "gcc", "clang"]:
        if path := shutil.which(name):
            return fine("C compiler", path)
    return problem(
        "C compiler",
        f"CC={named} is no program" if named else "neither cc, gcc nor clang was found",
        "install gcc (Debian, Ubuntu: apt-get install gcc), or name a compiler by CC",
    )


def memory(meminfo: Path = Path("/proc/meminfo")) -> Finding:
    """Whether enough memory is free for the processes of a small run."""
    if not meminfo.exists():
        return warning("memory", f"{meminfo} is missing, so it cannot be told", "use Linux")
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    says = f"{in_gib(free)} available"
    if free >= SMALL_MEMORY:
        return fine("memory", says)
    return warning(
        "memory",
        f"{says}; a run of the closed world takes about {in_gib(SMALL_MEMORY)}",
        "end other programs, or raise the memory of the container",
    )


def shared_memory(folder: str = "/dev/shm") -> Finding:
    """Whether the memory file system has room for what processes share."""
    if not os.path.isdir(folder):
        return problem("shared memory", f"{folder} is missing", f"mount -t tmpfs tmpfs {folder}")
    free = shutil.disk_usage(folder).free
    says = f"{folder} has {in_gib(free)} left"
    if free >= GIB:
        return fine("shared memory", says)
    cure = f"docker run --shm-size=16g, or mount -o remount,size=16G {folder}"
    if free < NCCL_BYTES:
        return problem("shared memory", f"{says}; Ray and the engines share more", cure)
    return warning("shared memory", f"{says}; large models and several GPUs share more", cure)


def disk_of_runs() -> Finding:
    """Whether runs can be written to where they go, and whether there is room."""
    return disk("disk of runs", root() / "runs", "name another by trainer.default_local_dir")


def disk_of_temporary_files() -> Finding:
    """The same for the temporary folder, where Ray keeps its logs and objects."""
    return disk("temporary folder", Path(temporary_folder()), "name another by TMPDIR")


def disk(name: str, folder: Path, cure: str) -> Finding:
    """Whether a folder, or the nearest one above it, can be written and has room."""
    if found := write_problem(folder):
        return problem(name, f"{folder} {found}", cure)
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    says = f"{folder} has {in_gib(free)} left"
    if free < LEAST_DISK:
        return problem(name, says, f"make room, or {cure}")
    if free < SMALL_DISK:
        return warning(name, f"{says}: enough for small models only", f"make room, or {cure}")
    return fine(name, says)


def sockets() -> Finding:
    """Whether the paths of sockets in the temporary folders are short enough."""
    if found := socket_problems():
        return problem("paths of sockets", *cut_cure(found[0]))
    return fine("paths of sockets", "short enough")


def open_files() -> Finding:
    """Whether a process may open enough files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    says = f"{soft} at once, {hard} at most"
    if soft >= FEW_FILES:
        return fine("open files", says)
    return warning(
        "open files", f"{says}; many processes need more than {FEW_FILES}", "ulimit -n 65536"
    )


def cut_cure(message: str) -> tuple[str, str]:
    """The cause and the cure of a message that has both, `cause: cure`."""
    cause, _, cure = message.rpartition(": ")
    return (cause, cure) if cause else (message, "")


def in_gib(size: float) -> str:
    """A number of bytes as text."""
    return f"{size / GIB:,.1f} GiB"


CHECKS = (
    python,
    system,
    compiler,
    memory,
    shared_memory,
    disk_of_runs,
    disk_of_temporary_files,
    sockets,
    open_files,
)
