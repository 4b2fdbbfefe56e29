"""Processes that a test starts, waits for and finds by a mark; a disk that is full."""

import asyncio
import os
import resource
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

MARK = "PROCESSES_OF_TEST"
PATIENCE_S = 900
"""Longer than any whole run takes here that does not hang, on the busiest machine."""


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    """Returns when the condition holds; fails after a time that only a hang takes."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


async def until(condition: Callable[[], object], seconds: float = PATIENCE_S) -> None:
    """Returns when the condition holds, and lets the other tasks of this loop work until then."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.001)


def marked(mark: str) -> list[int]:
    """Living processes with the mark in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, psutil.Error):
            if mark.encode() not in (entry / "environ").read_bytes():
                continue
            if psutil.Process(int(entry.name)).status() != psutil.STATUS_ZOMBIE:
                found.append(int(entry.name))
    return found


@contextmanager
def family() -> Iterator[tuple[dict[str, str], Callable[[], list[int]]]]:
    """The environment for what a test starts, and a function that lists what is alive with it.

    None may be left at the end.
    """
    mark = f"{MARK}={uuid.uuid4().hex}"
    try:
        yield {**os.environ, MARK: mark.partition("=")[2]}, lambda: marked(mark)
        wait_for(lambda: not marked(mark))
    finally:
        for pid in marked(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, 9)


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Lets no file of this process grow beyond `size` bytes.

    Writes raise OSError, as on a full disk.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
