"""Counts what a search may still use: attempts, time, and waiting for busy servers."""

from search_r1.search.client.config import RetrieverConfig
from search_r1.search.client.errors import OutOfTime, SearchError, ServerBusy


class Attempts:
    """The limits of one search.

    Only failures count against `max_retries` and `timeout_s`. Waiting for a busy server counts
    against `busy_timeout_s` instead, because a retriever that is slower than the engines has not
    failed.
    """

    def __init__(self, config: RetrieverConfig) -> None:
        self.config = config
        self.failures = 0
        self.left_s = config.timeout_s
        self.patience_s = config.busy_timeout_s

    def failed(self, asked_s: float, error: SearchError) -> None:
        """Counts an attempt that failed after `asked_s` seconds.

        Raises OutOfTime when the time is used up, or an error of the class of `error` when the
        attempts are.
        """
        self.failures += 1
        self.left_s -= asked_s
        if self.left_s <= 0:
            raise OutOfTime(
                f"no answer in {self.config.timeout_s:g} s ({self.failures} attempts, last: "
                f"{error})"
            ) from error
        if self.failures > self.config.max_retries:
            raise type(error)(f"search failed {self.failures} times, last: {error}") from error

    def found_busy(self, asked_s: float, error: SearchError) -> None:
        """Counts an attempt that a busy server refused; attempts and time start again from zero.

        Raises ServerBusy when `busy_timeout_s` is used up.
        """
        self.failures = 0
        self.left_s = self.config.timeout_s
        self.patience_s -= asked_s
        if self.patience_s <= 0:
            raise ServerBusy(f"busy for {self.config.busy_timeout_s:g} s, last: {error}") from error

    def pause_after_failure(self, wanted_s: float) -> float:
        """Returns a pause of `wanted_s` seconds, or of the time that is left, and counts it."""
        pause_s = min(self.left_s, wanted_s)
        self.left_s -= pause_s
        return pause_s

    def pause_while_busy(self, wanted_s: float) -> float:
        """Returns a pause of `wanted_s` seconds, or what is left of `busy_timeout_s`; counts it."""
        pause_s = min(self.patience_s, wanted_s)
        self.patience_s -= pause_s
        return pause_s
