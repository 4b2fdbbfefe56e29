"""Writes the logs of a server to stderr as JSON lines."""

import json
import logging
import time

QUIET_S = 10.0
STANDARD_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "color_message"}


class JsonLines(logging.Formatter):
    """Formats a message as a JSON object on one line, with the fields given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        extra = {k: v for k, v in record.__dict__.items() if k not in STANDARD_FIELDS}
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + "Z"
        line = {
            "time": when,
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **extra,
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class Quiet(logging.Filter):
    """Passes on a message at most once in ten seconds, with the number of those left out."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[str, float] = {}
        self.held: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now - self.last.get(record.msg, -QUIET_S) < QUIET_S:
            self.held[record.msg] = self.held.get(record.msg, 0) + 1
            return False
        self.last[record.msg] = now
        if held := self.held.pop(record.msg, 0):
            record.repeated = held
        return True


def set_up_logging(level: str) -> None:
    """Sets up logging to stderr as JSON lines. Queries are never logged."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    handler.addFilter(Quiet())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("search_r1").setLevel(level.upper())
