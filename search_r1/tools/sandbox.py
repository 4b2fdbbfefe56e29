"""Runs a program of the policy's in a process of its own that can reach nothing else.

The process gives up its rights itself (`launcher.py`): resource limits, Landlock for files, and a
filter of system calls (`syscalls.py`) for the network and other processes. That needs no privilege,
so it works in containers. A program can start no further process, so killing it leaves nothing
behind. What this does not promise stands in docs/tools.md.
"""

import ast
import asyncio
import logging
import math
import os
import platform
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal
from uuid import uuid4

from pydantic import PositiveFloat, PositiveInt, model_validator

from search_r1.tools import launcher
from search_r1.tools.base import ToolConfig, ToolFailed
from search_r1.tools.syscalls import filter_program

logger = logging.getLogger(__name__)

LAUNCHER = Path(launcher.__file__)
START_S = 30.0
"""Seconds until a process must run its program: more than a busy machine takes."""
WATCH_S = 0.05
"""Seconds between two looks at what a program holds on the disk."""
FILE_BYTES, FOLDER_BYTES = 1 << 16, 1 << 18
"""What a file and a folder are counted as, beside what they hold. Deleting them takes milliseconds,
a folder a hundred times as long as making it, and the call waits for that."""
MIB = 1 << 20
READABLE = (
    *("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"),
    *("/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu"),
)
"""What programs may read beside the interpreter and its packages: nothing of anyone's."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

ErrorKind = Literal["", "exception", "timeout", "memory", "output", "disk", "killed"]
ERRORS_OF_LIMITS: dict[str, ErrorKind] = {
    "timeout": "timeout",
    "output": "output",
    "disk": "disk",
    "threads": "killed",
}
"""By the limit that a program was stopped at."""


class SandboxConfig(ToolConfig):
    """Limits of a program."""

    max_concurrency: PositiveInt | None = 16
    """Programs that run at the same time in one process; further ones wait. null: any number."""
    timeout_s: PositiveFloat = 10.0
    """Seconds that a program may run."""
    cpu_s: PositiveFloat = 10.0
    """Seconds of a processor that a program may use, rounded up to whole ones."""
    memory_mb: PositiveInt = 1024
    """MiB of memory that a program may address, the interpreter's included."""
    output_kb: PositiveInt = 64
    """KiB that a program may print."""
    disk_mb: PositiveInt = 64
    """MiB that a program's files may hold together. A file counts for 64 KiB more than it holds,
    a folder for 256 KiB."""
    open_files: PositiveInt = 64
    """Files that a program may hold open."""
    threads: PositiveInt = 64
    """Threads that a program may run."""
    folder: str | None = None
    """Where each program gets a folder of its own, which is deleted after it. null: the system's
    folder for temporary files."""
    allow_without: list[Literal["landlock", "seccomp"]] = []
    """Parts of the sandbox that this machine may lack. Without `landlock` programs read and write
    all that the trainer may. Without `seccomp` they have the network and start other programs."""

    @model_validator(mode="after")
    def _deadline_leaves_time(self) -> "SandboxConfig":
        if self.deadline_s is not None and self.deadline_s <= self.timeout_s:
            raise ValueError(
                f"deadline_s={self.deadline_s:g} must be more than timeout_s={self.timeout_s:g}: "
                "a program that runs too long is the policy's mistake, one past the deadline fails "
                "the trajectory"
            )
        return self

    @property
    def output_bytes(self) -> int:
        return self.output_kb * 1024

    @property
    def resources(self) -> dict[str, int]:
        """Resource limits (setrlimit) by their names."""
        return {
            "RLIMIT_AS": self.memory_mb * MIB,
            "RLIMIT_CPU": math.ceil(self.cpu_s) + 1,
            "RLIMIT_FSIZE": self.disk_mb * MIB,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_CORE": 0,
        }

    def allowance(self, kind: str) -> str:
        """Tells the policy what a program may do; empty where no limit is concerned."""
        return {
            "timeout": f"run {self.timeout_s:g} s and compute {math.ceil(self.cpu_s)} s",
            "memory": f"use {self.memory_mb} MiB of memory",
            "output": f"print {self.output_kb} KiB",
            "disk": f"hold {self.disk_mb} MiB in files",
            "threads": f"run {self.threads} threads",
        }.get(kind, "")


@dataclass(frozen=True)
class Outcome:
    """What a program printed, and what went wrong with it."""

    output: str
    error: ErrorKind = ""
    note: str = ""
    """A sentence for the policy where the program could not say itself what went wrong."""


async def run_program(code: str, config: SandboxConfig) -> Outcome:
    """Runs a program and returns what it printed to stdout and stderr.

    Whatever the program does is an outcome. Raises ToolFailed where none can be started. Cancelled,
    it kills the program first.
    """
    async with working_folder(config.folder) as folder:
        process = await spawn(folder)
        program = Program(process, folder, config)
        try:
            await program.start(code)
            kind = await program.watch()
        finally:
            await program.end()
        return program.outcome(kind)


@asynccontextmanager
async def working_folder(parent: str | None) -> AsyncIterator[str]:
    """A folder that is there for a while. Raises ToolFailed where none can be made."""
    try:
        folder = os.path.realpath(tempfile.mkdtemp(prefix="python-tool-", dir=parent))
    except OSError as error:
        raise ToolFailed(f"no folder for a program can be made: {error}", kind="start") from error
    try:
        yield folder
    finally:
        await asyncio.to_thread(delete, folder)


class Child:
    """A process and its pipes. Belongs to one event loop."""

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        stdin: asyncio.StreamWriter,
        stdout: asyncio.StreamReader,
        pipe: asyncio.ReadTransport,
    ) -> None:
        self.process = process
        self.pid = process.pid
        self.stdin = stdin
        self.stdout = stdout
        self.pipe = pipe

    @classmethod
    async def start(cls, arguments: Sequence[str], folder: str, env: dict[str, str]) -> "Child":
        """Starts a process in a session of its own. Raises OSError.

        `subprocess` starts it without running Python in a copy of this process (vfork). The event
        loop's own way would do that, and a copy of a process with threads may wait for ever for a
        lock that one of them held.
        """
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            cwd=folder,
            env=env,
            start_new_session=True,
        )
        try:
            return await cls._attached(process)
        except BaseException:
            process.kill()
            process.wait()
            raise

    @classmethod
    async def _attached(cls, process: "subprocess.Popen[bytes]") -> "Child":
        """The process, with its pipes in the event loop."""
        loop = asyncio.get_running_loop()
        stdout = asyncio.StreamReader()
        pipe, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stdout), process.stdout
        )
        transport, protocol = await loop.connect_write_pipe(
            asyncio.streams.FlowControlMixin, process.stdin
        )
        return cls(process, asyncio.StreamWriter(transport, protocol, None, loop), stdout, pipe)

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while the process runs."""
        return self.process.poll()

    async def wait(self) -> None:
        """Waits until the process has ended, and takes its exit status."""
        if self.returncode is not None:
            return
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        descriptor = os.pidfd_open(self.pid)
        try:
            loop.add_reader(descriptor, ended.set)
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        self.process.wait()

    def close(self) -> None:
        """Closes the pipes."""
        self.stdin.close()
        self.pipe.close()


async def spawn(folder: str) -> Child:
    """Starts the launcher. Raises ToolFailed."""
    environment = {"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "MPLBACKEND": "Agg"}
    # Libraries reserve memory for each thread, and a program has one processor's time.
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-I", "-S", "-u", "-X", "utf8", str(LAUNCHER)]
    try:
        return await Child.start(command, folder, environment)
    except OSError as error:
        raise ToolFailed(f"no program can be started: {error}", kind="start") from error


class Program:
    """A program in its process."""

    def __init__(self, process: Child, folder: str, config: SandboxConfig) -> None:
        self.process = process
        self.folder = folder
        self.config = config
        self.printed = bytearray()
        self.stdin = process.stdin
        self.stdout = process.stdout

    async def start(self, code: str) -> None:
        """Hands the program over and waits until it runs. Raises ToolFailed if it cannot."""
        line = b""
        try:
            async with asyncio.timeout(START_S):
                self.stdin.write(f"{self._setup()!r}\n".encode())
                # A lone surrogate has no bytes; in a literal its escape is the same text.
                self.stdin.write(code.encode("utf-8", "backslashreplace"))
                with suppress(ConnectionError):  # what it says tells why it went
                    await self.stdin.drain()
                self.stdin.close()
                line = await self.stdout.readline()
            missing: dict[str, str] = ast.literal_eval(line.decode())
        except TimeoutError as error:
            message = f"a program did not start within {START_S:g} s"
            raise ToolFailed(message, kind="start") from error
        except (ValueError, SyntaxError) as error:
            said = line + await self.stdout.read(2000)
            message = f"a program did not start: {said.decode('utf-8', 'replace')}"
            raise ToolFailed(message, kind="start") from error
        refused = {part: why for part, why in missing.items() if part not in self._allowed}
        if refused:
            raise ToolFailed(unavailable(refused), kind="sandbox")

    @property
    def _allowed(self) -> list[str]:
        return list(self.config.allow_without)

    def _setup(self) -> dict[str, object]:
        """What the launcher is told."""
        filter_ = filter_program(platform.machine(), self.process.pid)
        packages = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
        return {
            "parent": os.getpid(),
            "folder": self.folder,
            "limits": self.config.resources,
            "readable": [sys.prefix, sys.base_prefix, *packages, *READABLE],
            "devices": DEVICES,
            "packages": packages,
            "filter": filter_ and filter_.hex(),
            "allow_without": self._allowed,
        }

    async def watch(self) -> str:
        """Waits until the program ends or crosses a limit; which one, empty where it ended."""
        tasks = [asyncio.create_task(t) for t in (self._follow(), self._guard())]
        try:
            done, _ = await asyncio.wait(
                tasks, timeout=self.config.timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            return next((task.result() for task in tasks if task in done), "timeout")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self) -> str:
        """Reads to the end of the output and of the process."""
        if await self._read():
            return "output"
        await self.process.wait()
        return ""

    async def _read(self) -> bool:
        """Reads the output, as much as is allowed; whether there is more."""
        most = self.config.output_bytes
        while len(self.printed) <= most:
            chunk = await self.stdout.read(most + 1 - len(self.printed))
            if not chunk:
                return False
            self.printed += chunk
        return True

    async def _guard(self) -> str:
        """Waits until the program holds too much."""
        while True:
            await asyncio.sleep(WATCH_S)
            most = self.config.disk_mb * MIB
            if await asyncio.to_thread(space, self.folder, self.process.pid, most) > most:
                return "disk"
            if threads(self.process.pid) > self.config.threads:
                return "threads"

    async def end(self) -> None:
        """Kills what still runs and waits until it is gone."""
        # The group outlives its leader only where the filter is missing and a program was started.
        if self.process.returncode is None or "seccomp" in self._allowed:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.stdin.close()
        # What it had printed can still be read, and the pipe must be empty to be closed.
        with suppress(TimeoutError):
            async with asyncio.timeout(START_S):
                await self._read()
                while await self.stdout.read(65536):
                    pass
                await self.process.wait()
        self.process.close()

    def outcome(self, crossed: str) -> Outcome:
        """What came of it. A program that ended before it could be killed has crossed no limit."""
        code = self.process.returncode
        most = self.config.output_bytes
        output = self.printed[:most].decode("utf-8", "replace")
        if crossed == "output" or (crossed and code == -signal.SIGKILL):
            note = f"The program was stopped: it may {self.config.allowance(crossed)}."
            return Outcome(output, ERRORS_OF_LIMITS[crossed], note)
        kind = kind_of(code)
        if allowance := self.config.allowance(kind):
            return Outcome(output, kind, f"The program failed: it may {allowance}.")
        note = ""
        if kind == "killed":
            note = f"The program crashed ({signal.Signals(-(code or -signal.SIGKILL)).name})."
        return Outcome(output, kind, note)


def kind_of(code: int | None) -> ErrorKind:
    """What an exit code, or the signal that ended a process, tells."""
    kinds: dict[int | None, ErrorKind] = {
        0: "",
        launcher.MEMORY: "memory",
        launcher.DISK: "disk",
        -signal.SIGXCPU: "timeout",
        -signal.SIGXFSZ: "disk",
    }
    return kinds.get(code, "killed" if code is None or code < 0 else "exception")


def space(folder: str, pid: int, most: int) -> int:
    """Bytes of the files in a folder and of deleted ones that are open; counts little past `most`.

    What cannot be looked at is too much.
    """
    total, pending = 0, [folder]
    try:
        while pending and total <= most:
            with suppress(FileNotFoundError), os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if total > most:
                        break
                    with suppress(FileNotFoundError):
                        is_folder = entry.is_dir(follow_symlinks=False)
                        total += blocks(entry.stat(follow_symlinks=False))
                        total += FOLDER_BYTES if is_folder else FILE_BYTES
                        pending += [entry.path] if is_folder else []
        return total + deleted_space(pid)
    except OSError:
        return most + 1


def deleted_space(pid: int) -> int:
    """Bytes of files that a process holds open and no folder holds any more."""
    total, descriptors = 0, f"/proc/{pid}/fd"
    with suppress(FileNotFoundError, ProcessLookupError):
        for name in os.listdir(descriptors):
            with suppress(FileNotFoundError):
                found = os.stat(f"{descriptors}/{name}")
                if stat.S_ISREG(found.st_mode) and found.st_nlink == 0:
                    total += blocks(found)
    return total


def blocks(found: os.stat_result) -> int:
    """Bytes on the disk, which a file with holes has fewer of than it is long."""
    return 512 * found.st_blocks


def threads(pid: int) -> int:
    """Threads of a process; 0 when it is gone."""
    with suppress(OSError):
        return os.stat(f"/proc/{pid}/task").st_nlink - 2
    return 0


def delete(folder: str) -> None:
    """Deletes a folder, however deep: subfolders are drawn up, so that no path gets too long."""
    names = (os.path.join(folder, f"{uuid4().hex}-{n}") for n in count())
    try:
        while subfolders := emptied(folder):
            for subfolder in subfolders:
                for further in emptied(subfolder):
                    os.rename(further, next(names))
                os.rmdir(subfolder)
        os.rmdir(folder)
    except OSError as error:
        logger.warning("the folder %s of a program is left: %s", folder, error)


def emptied(folder: str) -> list[str]:
    """Deletes the files of a folder; the subfolders, which may be entered from now on."""
    subfolders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                os.chmod(entry.path, 0o700)
                subfolders.append(entry.path)
            else:
                os.unlink(entry.path)
    return subfolders


def unavailable(missing: dict[str, str]) -> str:
    """Says what the sandbox lacks, and what can be done."""
    reasons = "; ".join(f"{part}: {why}" for part, why in missing.items())
    return (
        f"the sandbox for programs cannot be had ({reasons}). Train where the kernel has it, or "
        f"accept what programs can do without it by allow_without=[{', '.join(missing)}] "
        "(docs/tools.md says what that is)"
    )
