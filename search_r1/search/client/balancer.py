"""Which of several servers to ask: the least busy one that has not just failed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

MAX_REST_S = 5.0
"""A server that failed rests no longer."""
MAX_BUSY_REST_S = 60.0
"""Nor does one that is busy, whatever it says."""


@dataclass
class Server:
    """A replica, as this client sees it."""

    url: str
    in_flight: int = 0
    failures: int = 0
    """How often it has failed in a row."""
    resting_until: float = 0.0
    is_busy: bool = False
    """Whether its last answer was 429."""


class Balancer:
    """Passive health checks: a server that fails rests, longer with every failure in a row.

    The next request to it is the probe.
    """

    def __init__(self, urls: Sequence[str], rest_s: float) -> None:
        self.servers = [Server(url) for url in urls]
        self.rest_s = rest_s

    def pick(self, now: float) -> Server:
        """The least busy server that does not rest; if all do, the first to have rested enough."""
        awake = [server for server in self.servers if server.resting_until <= now]
        if not awake:
            return min(self.servers, key=lambda server: server.resting_until)
        least = min(server.in_flight for server in awake)
        return random.choice([server for server in awake if server.in_flight == least])

    @property
    def any_is_busy(self) -> bool:
        """Whether there is a server that will answer, though not yet."""
        return any(server.is_busy for server in self.servers)

    def succeeded(self, server: Server) -> None:
        """Notes that a server answered: it may be asked again at once."""
        server.failures = 0
        server.resting_until = 0.0
        server.is_busy = False

    def failed(self, server: Server, now: float) -> None:
        """Notes that a server did not answer, or answered with an error of its own."""
        server.failures += 1
        server.is_busy = False
        server.resting_until = now + min(MAX_REST_S, self.rest_s * 2 ** min(server.failures, 10))

    def refused(self, server: Server, now: float, wait_s: float) -> None:
        """Notes that a server answered 429: it is well, but wants to be left alone for `wait_s`."""
        server.is_busy = True
        server.resting_until = now + min(MAX_BUSY_REST_S, wait_s)
