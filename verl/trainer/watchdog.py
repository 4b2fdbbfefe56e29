"""The watchdog: when a run hangs, it writes all stacks and ends the driver with LOST."""

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from verl.trainer.supervise import LOST

logger = logging.getLogger(__name__)


def leave() -> None:
    """Ends this process with LOST, without cleaning up: that might hang as well."""
    os._exit(LOST)


class Watchdog:
    """Writes all stacks to `folder`/stacks and calls `on_hang` after `timeout_s` without progress.

    Progress is a verb that begins, or a trajectory that finishes (`RolloutManager.on_progress`): a
    validation may take hours as long as trajectories finish. `stacks()` returns the stacks of the
    other processes by name, and has `stacks_timeout_s` seconds to do so.
    """

    def __init__(
        self,
        timeout_s: float,
        folder: str | Path,
        stacks: Callable[[], dict[str, str]] = dict,
        on_hang: Callable[[], object] = leave,
        stacks_timeout_s: float = 30.0,
    ) -> None:
        self.timeout_s = timeout_s
        self.stacks = stacks
        self.folder = Path(folder) / "stacks"
        self.on_hang = on_hang
        self.stacks_timeout_s = stacks_timeout_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._last = ("start", time.monotonic())

    def watch(self, stacks: Callable[[], dict[str, str]]) -> None:
        """Sets the function that returns the stacks of the other processes, once these exist."""
        self.stacks = stacks

    def beat(self, name: str) -> None:
        """Notes that the verb `name` begins."""
        self._last = (name, time.monotonic())

    def progress(self) -> None:
        """Notes that the present verb makes progress, so that it does not count as hanging."""
        self.beat(self._last[0])

    def _watch(self) -> None:
        while not self._ended.wait(max(0.0, self._last[1] + self.timeout_s - time.monotonic())):
            verb, since = self._last
            if time.monotonic() - since >= self.timeout_s:
                self._hang(verb, time.monotonic() - since)
                return

    def _hang(self, verb: str, seconds: float) -> None:
        what = (
            f"'{verb}' made no progress for {seconds:.0f} s "
            f"(trainer.hang_timeout_s={self.timeout_s:g})"
        )
        try:
            path = self._write(what)
            logger.error("%s: the stacks of all processes are in %s", what, path)
        except OSError as error:
            logger.error("%s: the stacks could not be written to %s (%s)", what, self.folder, error)
        finally:
            self.on_hang()

    def _write(self, what: str) -> Path:
        """Writes the file of stacks and returns its path.

        The driver's stacks are written first, in case those of the others cannot be had.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%SZ}.txt"
        with path.open("w") as file:
            file.write(f"{what}\n\n== driver\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            for name, text in self._others().items():
                file.write(f"\n== {name}\n{text}\n")
        return path

    def _others(self) -> dict[str, str]:
        """Returns the result of `stacks()`, or a message why there is none."""
        found: dict[str, str] = {"other processes": f"no answer within {self.stacks_timeout_s:g} s"}

        def ask() -> None:
            nonlocal found
            try:
                found = self.stacks()
            except Exception as error:  # whatever is broken, the run must end
                found = {"other processes": f"{type(error).__name__}: {error}"}

        asking = threading.Thread(target=ask, daemon=True, name="watchdog-stacks")
        asking.start()
        asking.join(self.stacks_timeout_s)
        return found

    def __enter__(self) -> "Watchdog":
        self.beat("start")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
