"""Pages of the web as documents: those that a search has found can be opened."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx

from search_r1.search.disk_cache import DiskCache
from search_r1.search.extras import require
from search_r1.search.index.groups import title_and_text
from search_r1.search.index.html import title_and_text as title_and_text_of_html
from search_r1.search.store import Store, StoreLimits, Text, Unreadable

MAX_PAGE_BYTES = 2 << 20
"""What is read of a page."""
ADDRESS = ("http://", "https://")


class WebPages(Store):
    """The pages that searches have found, named by their addresses.

    Which they are, and the texts of those that were read, stand in a file that the processes of a
    server share. No other address is asked, so that whoever opens documents cannot reach what no
    search has found. A page that cannot be read is asked for again the next time.
    """

    num_threads = 16

    def __init__(
        self, cache: Path, limits: StoreLimits | None = None, timeout_s: float = 10.0
    ) -> None:
        super().__init__("id", limits)
        require("web", "pages of the web")
        self.cache = DiskCache(cache)
        self.http = httpx.Client(timeout=timeout_s, follow_redirects=True)
        self.added = set[str]()
        """Those that this process has put into the file."""

    def add(self, documents: Iterable[dict[str, Any]]) -> None:
        """Lets pages be opened from now on; documents without an address are left out."""
        for document in documents:
            address = str(document["id"])
            if address.startswith(ADDRESS) and address not in self.added:
                self.cache.put(title_key(address), title_and_text(document["contents"])[0])
                self.added.add(address)

    def read(self, document: str) -> Text | None:
        """Fetches a page, unless its text is kept. Raises Unreadable when it cannot be fetched."""
        address = document.strip()
        title = self.cache.get(title_key(address))
        if title is None:
            return None
        text = self.cache.get(text_key(address))
        if text is None:
            text = text_at(self.http, address)
            if not text:
                raise Unreadable(address)
            self.cache.put(text_key(address), text)
        most = self.limits.max_document_chars
        return Text(address, title, f"{text[:most]}\n", [address], [0], len(text) > most)


def title_key(address: str) -> str:
    """The key of a page's title in the file."""
    return f"title of a page\n{address}"


def text_key(address: str) -> str:
    """The key of a page's text in the file."""
    return f"text of a page\n{address}"


def text_at(http: httpx.Client, address: str) -> str:
    """Fetches the text of a page, of its first 2 MiB; empty when it cannot be fetched."""
    data = b""
    try:
        with http.stream("GET", address) as answer:
            is_html = "html" in answer.headers.get("content-type", "")
            if answer.status_code != 200 or not is_html:
                return ""
            for chunk in answer.iter_bytes():
                data += chunk
                if len(data) > MAX_PAGE_BYTES:
                    break
    except (httpx.HTTPError, httpx.InvalidURL):
        return ""
    return title_and_text_of_html(data)[1]
