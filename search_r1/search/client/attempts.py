"""What a search may still spend: attempts, time, and patience with busy servers."""

from search_r1.search.client.config import RetrieverConfig
from search_r1.search.client.errors import OutOfTime, SearchError, ServerBusy


class Attempts:
    """The limits of one search.

    Only failures use up `max_retries` and `timeout_s`. Waiting for a busy server uses up
    `busy_timeout_s` instead: a retriever that is slower than the engines is no failure.
    """

    def __init__(self, config: RetrieverConfig) -> None:
        self.config = config
        self.failures = 0
        self.left_s = config.timeout_s
        self.patience_s = config.busy_timeout_s

    def failed(self, asked_s: float, error: SearchError) -> None:
        """Counts an attempt that failed after `asked_s` seconds.

        Raises OutOfTime, or an error of the same class, when time or attempts are used up.
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
        """Counts an attempt while a server is busy: attempts and time begin anew.

        Raises ServerBusy when the patience is used up.
        """
        self.failures = 0
        self.left_s = self.config.timeout_s
        self.patience_s -= asked_s
        if self.patience_s <= 0:
            raise ServerBusy(f"busy for {self.config.busy_timeout_s:g} s, last: {error}") from error

    def pause_after_failure(self, wanted_s: float) -> float:
        """Takes a pause of `wanted_s` seconds, or what is left, from the time; returns it."""
        pause_s = min(self.left_s, wanted_s)
        self.left_s -= pause_s
        return pause_s

    def pause_while_busy(self, wanted_s: float) -> float:
        """Takes a pause of `wanted_s` seconds, or what is left, from the patience; returns it."""
        pause_s = min(self.patience_s, wanted_s)
        self.patience_s -= pause_s
        return pause_s
