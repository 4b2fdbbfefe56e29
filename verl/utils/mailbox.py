"""Hands what a run has to say to a service that shows it, without waiting for the service."""

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Concatenate, ParamSpec

from verl.utils.trackers import Tracker

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

    def close(self, wait_s: float = LAST_WAIT_S) -> None:
        """Ends the service's run; waits at most `wait_s` seconds for what is still to be sent."""
        self.post(Tracker.finish)
        self.calls.put(None)
        self.thread.join(wait_s)
        if self.thread.is_alive():
            logger.warning("%s: not all was sent within %g s", self.name, wait_s)
        if self.missed:
            logger.warning("%s: %d calls failed", self.name, self.missed)
