"""Shows runs while they go on: curves, alarms, trajectories, cost, and the time that is left.

    python -m search_r1.pages.watch RUN [RUN ...] [--out FILE.html]

The page is served on this machine alone unless --host says otherwise, and follows the folders of
the runs. Whoever opens it needs the token in the printed address. With --out the same page is
written as one file, as the runs are now, and nothing is served.
"""

import argparse
import asyncio
import math
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from pathlib import Path

import uvicorn
from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse

from search_r1.pages.access import LOOPBACK, Access, address_of, guarded_app
from search_r1.pages.comparison import Comparison
from search_r1.pages.cost import Prices
from search_r1.pages.html import TRAJECTORY_MODULES, json_text, packed, page_html
from search_r1.pages.watched_run import Message, WatchedRun, unique_names
from search_r1.program import command_parser, program_name
from verl.utils.errors import DataError

MODULES = (
    "uplot.js",
    *TRAJECTORY_MODULES,
    "series.js",
    "charts.js",
    "timers.js",
    "runs.js",
    "watch.js",
)
"""In the order in which they need each other."""
STYLES = ("base.css", "trajectory.css", "uplot.css", "watch.css")
MOST_WAITING = 1000
"""Messages that wait for a page that does not read; then it is let go, and connects again."""
SHORTEST_S = 0.1
"""Least seconds between two looks at the runs."""
END_S = 1
"""Seconds that open pages have when the server ends."""
Page = asyncio.Queue[list[Message] | None]
"""What an open page is to be told; None ends it."""


class Watch:
    """Some runs, and their comparison."""

    def __init__(self, folders: Sequence[Path], prices: Prices) -> None:
        """Raises DataError for what is no run folder."""
        self.runs = [
            WatchedRun(folder, name, number, prices)
            for number, (folder, name) in enumerate(
                zip(folders, unique_names(folders), strict=True)
            )
        ]
        self.comparison = Comparison(folders)

    def poll(self) -> list[Message]:
        """Looks at the runs, and returns what has changed."""
        messages = [message for run in self.runs for message in self._look_at(run)]
        return [*messages, *([self._compared()] if self.comparison.poll() else [])]

    def _look_at(self, run: WatchedRun) -> list[Message]:
        """What has changed in a run. Whatever its folder holds, the other runs are shown."""
        try:
            return run.poll()
        except Exception as error:
            return run.unreadable(error)

    def snapshot(self) -> list[Message]:
        """All that is known, for a page that was just opened."""
        return [
            *(message for run in self.runs for message in run.snapshot()),
            self._compared(),
        ]

    def _compared(self) -> Message:
        return {"kind": "comparison", "table": self.comparison.table}

    def html(self, messages: Sequence[Message] | None = None) -> str:
        """The page: with these messages, or one that asks its server for them."""
        about = {
            "live": messages is None,
            "made": datetime.now().astimezone().isoformat(timespec="seconds"),
            "runs": [run.name for run in self.runs],
        }
        blocks = {
            "about": packed(json_text(about)),
            "messages": packed(json_text(list(messages or ()))),
        }
        return page_html("Runs", MODULES, STYLES, blocks, connects=messages is None)


class Feed:
    """Tells every open page what changes. Without an open page nobody looks at the runs."""

    def __init__(self, watch: Watch, every_s: float) -> None:
        self.watch = watch
        self.every_s = every_s
        self.pages: set[Page] = set()
        self.newcomers: list[Page] = []
        """Pages that were opened since the last look, and know nothing yet."""
        self.opened = asyncio.Event()

    async def follow(self) -> None:
        """Looks at the runs again and again, while a page is open.

        Nobody else looks, so that a page that is closed during a look takes nothing from others.
        """
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.every_s):
                    await self.opened.wait()
            self.opened.clear()
            if self.pages or self.newcomers:
                self._tell(await asyncio.to_thread(self.watch.poll))

    def _tell(self, messages: list[Message]) -> None:
        """Tells open pages what is new, and newcomers all that is known."""
        for page in list(self.pages) if messages else []:
            if page.qsize() < MOST_WAITING:
                page.put_nowait(messages)
            else:
                self.pages.discard(page)
                page.put_nowait(None)
        newcomers, self.newcomers = self.newcomers, []
        for page in newcomers:
            page.put_nowait(self.watch.snapshot())
            self.pages.add(page)

    async def events(self) -> AsyncIterator[str]:
        """Yields server-sent events: first all that is known, then what changes."""
        page: Page = asyncio.Queue()
        self.newcomers.append(page)
        self.opened.set()
        try:
            while (messages := await page.get()) is not None:
                yield f"data: {json_text(messages)}\n\n"
        finally:
            self.pages.discard(page)
            self.newcomers = [other for other in self.newcomers if other is not page]

    def end(self) -> None:
        """Ends the events of all open pages."""
        for page in (*self.pages, *self.newcomers):
            page.put_nowait(None)


class Server(uvicorn.Server):
    """A server that ends the events of open pages when it is told to end."""

    def __init__(self, config: uvicorn.Config, feed: Feed) -> None:
        super().__init__(config)
        self.feed = feed

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the events, then waits for the connections."""
        self.feed.end()
        await super().shutdown(sockets)


def make_app(feed: Feed, access: Access, is_local: bool = True) -> FastAPI:
    """The application of the page, for those who know the token."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(feed.follow())
        yield
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following

    app = guarded_app(access, feed.watch.html, is_local)
    app.router.lifespan_context = lifespan

    @app.get("/events", dependencies=[Depends(access.check)])
    async def events() -> StreamingResponse:
        headers = {"cache-control": "no-store"}
        return StreamingResponse(feed.events(), media_type="text/event-stream", headers=headers)

    return app


def write_page(watch: Watch, out: Path) -> None:
    """Writes the page as one file, as the runs are now."""
    watch.poll()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(watch.html(watch.snapshot()), encoding="utf-8")


def serve(watch: Watch, host: str, port: int, every_s: float) -> None:
    """Serves the page until Ctrl-C."""
    access = Access(program_name("search_r1.pages.watch"))
    feed = Feed(watch, every_s)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        app = make_app(feed, access, host in LOOPBACK)
        address = address_of(host, listener.getsockname()[1])
        sys.stdout.write(f"Runs: {address}?token={access.token}\n")
        sys.stdout.flush()
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=END_S)
        with suppress(KeyboardInterrupt):
            Server(config, feed).run(sockets=[listener])


def price(text: str) -> float:
    """The price that a text tells. Raises ValueError, which argparse reports."""
    number = float(text)
    if not math.isfinite(number) or number < 0:
        raise ValueError
    return number


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = command_parser("search_r1.pages.watch", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, help="write the page to this file, and serve nothing")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve at (default: this machine alone)"
    )
    parser.add_argument("--port", type=int, default=0, help="port (default: a free one)")
    parser.add_argument(
        "--every", type=float, default=2.0, metavar="S", help="seconds between looks (default: 2)"
    )
    parser.add_argument(
        "--device-hour-price", type=price, metavar="X", help="price of an hour of one device"
    )
    parser.add_argument("--search-price", type=price, metavar="X", help="price of a search")
    parser.add_argument(
        "--million-tokens-price", type=price, metavar="X", help="of tokens that the policy writes"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serves or writes the page; returns the exit status."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.every < SHORTEST_S:
        parser.error(f"--every {args.every:g}: expected at least {SHORTEST_S:g} seconds")
    prices = Prices(args.device_hour_price, args.search_price, args.million_tokens_price)
    try:
        watch = Watch(args.runs, prices)
        if args.out is None:
            serve(watch, args.host, args.port, args.every)
        else:
            write_page(watch, args.out)
            sys.stdout.write(f"{args.out} ({args.out.stat().st_size / 1e6:.1f} MB)\n")
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
