"""Hands what a run has to say to a service that shows it, without waiting for the service."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Concatenate, ParamSpec

from verl.utils.trackers import Tracker

logger = logging.getLogger(__name__)
P = ParamSpec("P")
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
        self.last: Future[None] | None = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"tracker-{name}")

    def post(
        self, method: Callable[Concatenate[Any, P], None], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Has `method` of the tracker called later."""
        self.last = self.thread.submit(self._call, method.__name__, *args, **kwargs)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> None:
        try:
            getattr(self.tracker, method)(*args, **kwargs)
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
        _, late = wait([self.last] if self.last else [], timeout=wait_s)
        self.thread.shutdown(wait=False, cancel_futures=True)
        if late:
            logger.warning("%s: not all was sent within %g s", self.name, wait_s)
        if self.missed:
            logger.warning("%s: %d calls failed", self.name, self.missed)
