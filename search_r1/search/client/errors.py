"""The causes for which a search fails, one class for each."""


class SearchError(Exception):
    """A search failed for good.

    The message names the server, the cause and the number of attempts. `kind` is the name under
    which failures are counted.
    """

    kind = "other"


class Unreachable(SearchError):
    """The server could not be connected to, or the connection broke."""

    kind = "connection"


class OutOfTime(SearchError):
    """The deadline passed."""

    kind = "timeout"


class ServerBusy(SearchError):
    """The server answered 429: its queue is full. It may be asked again after `retry_after_s`."""

    kind = "overloaded"

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ServerFailed(SearchError):
    """The server answered with a status of 500 or more."""

    kind = "server"


class Rejected(SearchError):
    """The server answered with another status: the request is wrong, a retry does not help."""

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
