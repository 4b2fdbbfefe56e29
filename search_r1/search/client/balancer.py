"""Chooses which of several servers to ask: the least busy one that has not just failed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

MAX_REST_S = 5.0
"""The longest time that a server rests after failures."""
MAX_BUSY_REST_S = 60.0
"""The longest time that a busy server rests, even if it asks for more."""


@dataclass
class Server:
    """What this client knows of one replica."""

    url: str
    in_flight: int = 0
    failures: int = 0
    """The number of its failures in a row."""
    resting_until: float = 0.0
    is_busy: bool = False
    """Whether its last answer was 429."""


class Balancer:
    """Checks the health of servers by their answers: one that fails rests, longer every time.

    The next request to it after the rest shows whether it is well again.
    """

    def __init__(self, urls: Sequence[str], rest_s: float) -> None:
        self.servers = [Server(url) for url in urls]
        self.rest_s = rest_s

    def pick(self, now: float) -> Server:
        """The least busy server that is not resting; if all rest, the one whose rest ends first."""
        awake = [server for server in self.servers if server.resting_until <= now]
        if not awake:
            return min(self.servers, key=lambda server: server.resting_until)
        least = min(server.in_flight for server in awake)
        return random.choice([server for server in awake if server.in_flight == least])

    @property
    def any_is_busy(self) -> bool:
        """Whether any server answered last that it is busy, and so will answer later."""
        return any(server.is_busy for server in self.servers)

    def succeeded(self, server: Server) -> None:
        """Records that a server answered, so that it may be asked again at once."""
        server.failures = 0
        server.resting_until = 0.0
        server.is_busy = False

    def failed(self, server: Server, now: float) -> None:
        """Records that a server did not answer, or answered with an error of its own."""
        server.failures += 1
        server.is_busy = False
        server.resting_until = now + min(MAX_REST_S, self.rest_s * 2 ** min(server.failures, 10))

    def refused(self, server: Server, now: float, wait_s: float) -> None:
        """Records that a server answered 429: it is well, but must not be asked for `wait_s`."""
        server.is_busy = True
        server.resting_until = now + min(MAX_BUSY_REST_S, wait_s)
