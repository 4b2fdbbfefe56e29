"""Processes that end together (children that follow parents, and sessions), and share cores."""

import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
WAIT_POLICY = "OMP_WAIT_POLICY"
"""Environment variable that libgomp reads when torch is imported."""


def ended(pid: int, timeout_s: float | None = None) -> bool:
    """Waits `timeout_s` seconds (None: any time) and returns whether the process has ended.

    A child is not reaped.
    """
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return _ended(process, timeout_s)
    finally:
        os.close(process)


def _ended(process: int, timeout_s: float | None = None) -> bool:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


def follow(pid: int, action: Callable[[], object]) -> None:
    """Calls `action` from a thread of its own when the process `pid` ends.

    Raises ProcessLookupError if it has ended already.
    """
    process = os.pidfd_open(pid)

    def watch() -> None:
        _ended(process)
        action()

    threading.Thread(target=watch, daemon=True, name=f"follow-{pid}").start()


@contextmanager
def writing_to(file: IO[str]) -> Iterator[None]:
    """Sends stdout and stderr of this process to a file during the block.

    Processes that it starts in the block write there as long as they live.
    """
    with ExitStack() as restoring:
        for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
            stream.flush()
            copy = os.dup(descriptor)
            restoring.callback(os.close, copy)
            restoring.callback(os.dup2, copy, descriptor)
            restoring.callback(stream.flush)
            os.dup2(file.fileno(), descriptor)
        yield


def dying_with_this() -> Callable[[], None]:
    """A `preexec_fn` that makes the kernel kill the child when the thread that started it ends.

    It uses prctl(2) of Linux.
    """
    parent = os.getpid()

    def die_with_parent() -> None:
        if LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
        if os.getppid() != parent:  # it ended in between
            os._exit(1)

    return die_with_parent


def session_members(session: int) -> list[int]:
    """The living processes of a session, without zombies, from /proc (proc_pid_stat(5))."""
    members = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended in between
            state, _, _, sid = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(sid) == session and state not in "ZX":
                members.append(int(entry.name))
    return members


def session_over(session: int, timeout_s: float) -> bool:
    """Waits `timeout_s` seconds at most; returns whether a session has no process any more."""
    deadline = time.monotonic() + timeout_s
    while session_members(session):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def kill_session(session: int, timeout_s: float = 10.0) -> list[int]:
    """Kills the processes of a session, and returns those left after `timeout_s` seconds.

    The calling process is not killed. The leader of the session must not have been reaped yet,
    because its number could then belong to another process.
    """
    deadline = time.monotonic() + timeout_s
    while (
        members := [pid for pid in session_members(session) if pid != os.getpid()]
    ) and time.monotonic() < deadline:
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return members


def exit_status(returncode: int) -> int:
    """The exit status as a shell reports it: 128 + n for a process that signal n ended.

    >>> exit_status(2), exit_status(-9)
    (2, 137)
    """
    return returncode if returncode >= 0 else 128 - returncode


class Forward:
    """Starts a process, and passes every SIGINT and SIGTERM of this process on to it.

    `received`: the numbers of these signals, in order.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._pending: list[int] = []
        self._child: subprocess.Popen[bytes] | None = None

    def start(
        self,
        command: list[str],
        env: dict[str, str] | None = None,
        preexec_fn: Callable[[], object] | None = None,
    ) -> int:
        """Starts the command in a session of its own, and returns its process id.

        Because of the session, a terminal's Ctrl-C reaches it only through this object.
        """
        self._child = subprocess.Popen(
            command, start_new_session=True, env=env, preexec_fn=preexec_fn
        )
        self._flush()  # signals that came while it was started
        return self._child.pid

    def reap(self) -> int:
        """Waits for the process, and returns its return code."""
        assert self._child is not None
        # once it is reaped, its number may belong to another process
        child, self._child = self._child, None
        return child.wait()

    def _flush(self) -> None:
        while self._child is not None and self._pending:
            with suppress(IndexError, ProcessLookupError):  # a handler has sent it in between
                os.kill(self._child.pid, self._pending.pop(0))

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.received.append(signum)
        self._pending.append(signum)
        self._flush()

    def __enter__(self) -> "Forward":
        self._previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._child is not None:  # the block was left by an exception
            kill_session(self._child.pid)
            self.reap()


def sharing_cores() -> dict[str, str]:
    """The environment of a process whose threads may have to share cores with other processes.

    Threads that spin while they wait for one that has lost its core make a step twelve times as
    long; asleep they cost nothing that shows (docs/hardware.md).
    """
    return {WAIT_POLICY: os.environ.get(WAIT_POLICY, "PASSIVE")}
