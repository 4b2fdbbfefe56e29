"""A real HTTP proxy that refuses everything and remembers what it was asked for."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


class Refusing(BaseHTTPRequestHandler):
    """Answers every request with 503, after noting its target."""

    def refuse(self) -> None:
        self.server.asked.append(self.path)  # pyright: ignore[reportAttributeAccessIssue]
        body = b"refused by the proxy"
        self.send_response(503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_CONNECT = refuse

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the console of the tests clean."""


@contextmanager
def refusing_proxy() -> Iterator[tuple[str, list[str]]]:
    """(address, targets so far) of a proxy that a thread serves."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    asked: list[str] = []
    server.asked = asked  # pyright: ignore[reportAttributeAccessIssue]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def behind(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Sets the environment of a machine whose only way out is the proxy at `address`.

    It exempts nobody.
    """
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, address)
