"""Hands what a run has to say to a service that shows it, without waiting for the service."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Concatenate, ParamSpec

from verl.utils.trackers import SERVICES, TrackedRun, Tracker

logger = logging.getLogger(__name__)
P = ParamSpec("P")
Call = Callable[[], None]
LAST_WAIT_S = 60.0
"""Longest time that the end of a run waits for a service, in seconds."""


class Mailbox:
    """Calls one tracker in order, on a thread of its own.

    So a service that is slow or away neither holds up a step nor ends a training. What it misses
    is told once, and stands in the run folder all the same.
    """

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name = name
        self.tracker = tracker
        self.missed = 0
        self.calls: SimpleQueue[Call | None] = SimpleQueue()
        # a daemon, because a call that never returns must not keep the process alive
        self.thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self.thread.start()

    def post(
        self, method: Callable[Concatenate[Any, P], None], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Has `method` of the tracker called later."""
        bound = getattr(self.tracker, method.__name__)
        self.calls.put(lambda: bound(*args, **kwargs))

    def _work(self) -> None:
        """Makes the calls until None comes."""
        while (call := self.calls.get()) is not None:
            try:
                call()
            except Exception as error:  # clients raise whatever their transport raises
                self.missed += 1
                if self.missed == 1:
                    logger.warning(
                        "%s: %s: %s; the training goes on, and the run folder has everything",
                        self.name,
                        type(error).__name__,
                        error,
                    )

    def end(self, has_failed: bool) -> None:
        """Has the service's run ended, when all else is sent."""
        self.post(Tracker.finish, has_failed)
        self.calls.put(None)

    def report(self) -> None:
        """Logs what the service has missed."""
        if self.thread.is_alive():
            logger.warning("%s: not all was sent in time", self.name)
        if self.missed:
            logger.warning("%s: %d calls failed", self.name, self.missed)


def opened(name: str, run: TrackedRun) -> Mailbox | None:
    """The mailbox of a service that is told of a run; None, and a warning, where it is away."""
    try:
        return Mailbox(name, SERVICES[name](run))
    except Exception as error:  # clients raise whatever their transport raises
        logger.warning(
            "%s: %s: %s; the run goes on without it, and the run folder has everything",
            name,
            type(error).__name__,
            error,
        )
        return None


def close_all(
    mailboxes: Sequence[Mailbox], has_failed: bool = False, wait_s: float = LAST_WAIT_S
) -> None:
    """Ends the runs of all services; waits at most `wait_s` seconds for what is to be sent."""
    for mailbox in mailboxes:
        mailbox.end(has_failed)
    deadline = time.monotonic() + wait_s
    for mailbox in mailboxes:
        mailbox.thread.join(max(0.0, deadline - time.monotonic()))
        mailbox.report()
