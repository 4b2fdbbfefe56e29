"""Asks the retrieval servers of a run what they have to do."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from verl.utils.addresses import direct

TIMEOUT_S = 0.5
QUEUE = "retrieval_queue_depth"
SECONDS = "retrieval_request_seconds_sum"
REQUESTS = "retrieval_request_seconds_count"
MOST_BYTES = 1_000_000
"""Of an answer: what sends more is no retrieval server."""


class RetrieverState:
    """Follows the queue and the latency of servers by their `/metrics`."""

    def __init__(self, urls: Sequence[str]) -> None:
        """`urls`: the addresses that searches go to, `http://host:port/retrieve`."""
        self.urls = [url.removesuffix("/retrieve") + "/metrics" for url in urls]
        self.client = httpx.Client(timeout=TIMEOUT_S, mounts=direct(*self.urls))
        self._before: dict[str, tuple[float, float]] = {}

    def poll(self) -> dict[str, Any]:
        """Asks all servers.

        Returns `says`, what answered, as a text, and `sample`: the time, the queries that wait at
        all servers, and the mean seconds of the requests since the last call, None without one.
        Without an answer `sample` is None.
        """
        with ThreadPoolExecutor(len(self.urls)) as pool:  # one that is silent holds up no other
            answers = list(pool.map(self._ask, self.urls))
        found = [answer for answer in answers if answer is not None]
        says = f"{len(found)} of {len(self.urls)} answer"
        if not found:
            return {"says": says, "sample": None}
        requests = sum(count for _, _, count in found)
        seconds = sum(spent for _, spent, _ in found)
        latency = seconds / requests if requests > 0 else None
        waiting = sum(queue for queue, _, _ in found)
        return {"says": says, "sample": [round(time.time(), 1), waiting, latency]}

    def _ask(self, url: str) -> tuple[float, float, float] | None:
        """Queries that wait, and seconds and number of requests since the last call."""
        try:
            answer = self.client.get(url)
            answer.raise_for_status()
            numbers = numbers_of(answer.text[:MOST_BYTES])
            queue, seconds, requests = (numbers[name] for name in (QUEUE, SECONDS, REQUESTS))
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError):
            self._before.pop(url, None)
            return None
        before = self._before.get(url, (seconds, requests))
        self._before[url] = (seconds, requests)
        if requests < before[1]:  # the server was started anew
            before = (0.0, 0.0)
        return queue, seconds - before[0], requests - before[1]

    def close(self) -> None:
        """Closes the connections."""
        self.client.close()


def numbers_of(text: str) -> dict[str, float]:
    """The samples of a text in Prometheus' format, summed over their labels."""
    numbers: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            numbers[sample.name] = numbers.get(sample.name, 0.0) + sample.value
    return numbers
