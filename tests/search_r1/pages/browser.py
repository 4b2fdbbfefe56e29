"""The machine's own Chromium for tests of pages, started once for the tests of a file."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium (Debian: apt-get install chromium)"
)
PATIENCE_MS = 60_000
"""The machine may have much else to do."""


@contextmanager
def started() -> Iterator[Browser]:
    """Starts the browser, and ends it after the block."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Opened:
    """A page that was opened from the disk, with all that it asked for or complained about."""

    def __init__(self, browser: Browser, path: Path, address: str = "", **context: object) -> None:
        self.context = browser.new_context(**context)  # pyright: ignore[reportArgumentType]
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("dialog", lambda dialog: self.errors.append(f"dialog {dialog.message}"))
        self.url = path.resolve().as_uri()
        self.page.goto(self.url + address)
        self.page.wait_for_selector("html[data-ready]")

    def close(self) -> None:
        """Closes the page. Raises AssertionError if it asked for anything, or complained."""
        self.context.close()
        foreign = [url for url in self.requests if url.partition("#")[0] != self.url]
        assert not foreign, foreign
        assert not self.errors, self.errors
