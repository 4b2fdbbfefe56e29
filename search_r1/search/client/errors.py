"""Why a search failed: one class for each cause."""


class SearchError(Exception):
    """A search that failed for good.

    The message names server, cause and number of attempts; `kind` is the name by which failures are
    counted.
    """

    kind = "other"


class Unreachable(SearchError):
    """There was no connection, or it broke."""

    kind = "connection"


class OutOfTime(SearchError):
    """The deadline passed."""

    kind = "timeout"


class ServerBusy(SearchError):
    """The server answered 429: its queue is full, it may be asked again after `retry_after_s`."""

    kind = "overloaded"

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ServerFailed(SearchError):
    """The server answered with a status of 500 or more."""

    kind = "server"


class Rejected(SearchError):
    """The server answered with another status: the request is wrong, repeating it does not help."""

    kind = "rejected"


class BadAnswer(SearchError):
    """The answer breaks the contract (search_r1/search/schema.py)."""

    kind = "contract"


class EngineFailed(SearchError):
    """The engine failed on this query."""

    kind = "engine"


class Closed(SearchError):
    """The client was closed before there was an answer."""

    kind = "closed"
