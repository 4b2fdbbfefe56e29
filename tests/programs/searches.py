"""A program that a launcher runs beside a retrieval server: `searches.py BEHAVIOUR URL FOLDER`."""

import signal
import sys
import time
from pathlib import Path

import httpx


class Program:
    """Each public method is a behaviour; the file `ready` says that it has begun."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url = url
        self._folder = folder

    def _search(self) -> int:
        """Returns the status of a search, 0 where nobody answers."""
        try:
            return httpx.post(self._url, json={"queries": ["Torvel"]}, timeout=5).status_code
        except httpx.TransportError:
            return 0

    def _ready(self) -> None:
        (self._folder / "ready").touch()

    def searches_until_answered(self) -> None:
        """Once the test has killed the server."""
        self._ready()
        while not (self._folder / "killed").exists():
            time.sleep(0.02)
        while self._search() != 200:
            time.sleep(0.1)

    def searches_after_a_signal(self) -> None:
        """Ends with 130 if the signal came once and the server still answers."""
        got: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: got.append(number))
        self._ready()
        while not got:
            time.sleep(0.02)
        time.sleep(0.5)  # a second signal, which must not come, would come by then
        assert self._search() == 200
        assert got == [signal.SIGINT]
        sys.exit(130)

    def works(self) -> None:
        self._ready()
        time.sleep(3600)


if __name__ == "__main__":
    getattr(Program(sys.argv[2], Path(sys.argv[3])), sys.argv[1])()
