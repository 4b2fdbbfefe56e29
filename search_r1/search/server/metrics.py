"""The metrics of a server for Prometheus. With several workers their figures are summed."""

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
"""Bounds of the buckets of durations, in seconds."""
MULTIPROC_DIR = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable of the folder where workers keep their figures."""


class ServerMetrics:
    """The metrics of one worker process."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "retrieval_requests", "Requests by status", ["status"], registry=registry
        )
        self.queries = Counter("retrieval_queries", "Queries asked", registry=registry)
        self.cached = Counter(
            "retrieval_cache_hits", "Queries answered from the cache", registry=registry
        )
        self.errors = Counter("retrieval_errors", "Failures by kind", ["kind"], registry=registry)
        self.queue = Gauge(
            "retrieval_queue_depth",
            "Queries waiting",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.batch_size = Histogram(
            "retrieval_batch_size",
            "Queries per engine call",
            buckets=[2**i for i in range(11)],
            registry=registry,
        )
        self.reads = Counter(
            "retrieval_reads",
            "Documents opened or searched, by endpoint and outcome",
            ["endpoint", "outcome"],
            registry=registry,
        )
        self.reads_waiting = Gauge(
            "retrieval_reads_waiting",
            "Reads of documents waiting",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.read_seconds = Histogram(
            "retrieval_read_seconds", "Time of a read", buckets=SECONDS, registry=registry
        )
        self.seconds = Histogram(
            "retrieval_request_seconds", "Time of a request", buckets=SECONDS, registry=registry
        )
        self.engine_seconds = Histogram(
            "retrieval_engine_seconds", "Time of an engine call", buckets=SECONDS, registry=registry
        )

    def render(self) -> bytes:
        """The text of `/metrics`."""
        registry = self.registry
        if MULTIPROC_DIR in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return generate_latest(registry)
