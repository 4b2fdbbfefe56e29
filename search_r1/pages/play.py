"""The playground: ask a model in the browser, and watch it think, search and read.

    python -m search_r1.pages.play MODEL [--beside MODEL] [key=value ...]

The loop is that of training. What the model has said, and what its searches have found, can be
edited, and it goes on from there. Two models answer the same question side by side. The page is
served on this machine alone unless --host says otherwise. Whoever opens it needs the token in the
printed address.
"""

import argparse
import copy
import secrets
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from search_r1.evaluate import add_model_flags, given_overrides
from search_r1.infer import config_for_answering
from search_r1.launch import composed, free_port, prepare_and_serve
from search_r1.pages.access import LOOPBACK, Access, address_of, guarded_app
from search_r1.pages.html import TRAJECTORY_MODULES, json_text, packed, page_html
from search_r1.program import command_parser
from verl.utils.errors import ConfigError, DataError, ModelError
from verl.utils.processes import dying_with_this

MODULES = (
    *TRAJECTORY_MODULES,
    "events.js",
    "edit.js",
    "play.js",
)
STYLES = ("base.css", "trajectory.css", "play.css")
END_S = 10.0
"""Seconds that a model has to end by itself."""


@dataclass(frozen=True)
class Model:
    """A model of the playground: a process that answers on a socket."""

    name: str
    """The name under which it is shown."""
    socket: Path
    process: "subprocess.Popen[bytes]"

    def client(self) -> httpx.AsyncClient:
        """A client of the process. Answers may take any time, because people wait for tokens."""
        transport = httpx.AsyncHTTPTransport(uds=str(self.socket))
        return httpx.AsyncClient(transport=transport, base_url="http://model", timeout=None)

    async def state(self) -> str:
        """`loading`, `ready` or `ended`."""
        if self.process.poll() is not None:
            return "ended"
        try:
            async with self.client() as client:
                return "ready" if (await client.get("/ready")).is_success else "loading"
        except httpx.HTTPError:
            return "loading"


@contextmanager
def serving(models: Sequence[str], flags: Sequence[str], folder: Path) -> Iterator[list[Model]]:
    """Starts a process for each model, and ends them all when the block ends.

    Relative paths in names and flags begin at `folder`.
    """
    with tempfile.TemporaryDirectory(prefix="search-r1-play-") as sockets, ExitStack() as stack:
        started = []
        for number, name in enumerate(models):
            path = Path(sockets, f"{number}.sock")
            command = [sys.executable, "-m", "search_r1.pages.play_model", name]
            process = subprocess.Popen(
                [*command, "--socket", str(path), *flags],
                cwd=folder,
                preexec_fn=dying_with_this(),
            )
            stack.callback(end, process)
            started.append(Model(short_name(name), path, process))
        yield started


def short_name(model: str) -> str:
    """The last two parts of a path or of a name on the hub.

    >>> short_name("/home/me/runs/first/best/"), short_name("Qwen/Qwen3-4B")
    ('first/best', 'Qwen/Qwen3-4B')
    """
    return "/".join(Path(model).parts[-2:])


def end(process: "subprocess.Popen[bytes]") -> None:
    """Asks a process to end, and kills it when it does not."""
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def make_app(models: Sequence[Model], token: str, is_local: bool = True) -> FastAPI:
    """The application of the page, for those who know the token.

    `is_local`: only this machine's own names are served.
    """
    access = Access("the playground", token)
    app = guarded_app(access, lambda: html_of(models), is_local)
    known = [Depends(access.check)]

    @app.get("/models", dependencies=known)
    async def states() -> JSONResponse:
        return JSONResponse([{"name": m.name, "state": await m.state()} for m in models])

    @app.post("/models/{number}/ask", dependencies=known)
    async def ask(number: int, request: Request) -> Response:
        if not 0 <= number < len(models):
            raise HTTPException(404, f"there are {len(models)} models")
        return await passed_on(models[number], await request.body())

    return app


async def passed_on(model: Model, body: bytes) -> Response:
    """The answer of a model, as it comes."""
    client = model.client()
    headers = {"content-type": "application/json"}
    try:
        request = client.build_request("POST", "/ask", content=body, headers=headers)
        answer = await client.send(request, stream=True)
    except httpx.HTTPError as error:
        await client.aclose()
        raise HTTPException(503, f"{model.name}: {await model.state()}") from error

    async def chunks() -> AsyncIterator[bytes]:
        try:
            async for chunk in answer.aiter_bytes():
                yield chunk
        except httpx.HTTPError:
            yield b'event: failed\ndata: {"message": "the model has ended; see the console"}\n\n'
        finally:
            await answer.aclose()
            await client.aclose()

    return StreamingResponse(
        chunks(), status_code=answer.status_code, media_type=answer.headers.get("content-type")
    )


def html_of(models: Sequence[Model]) -> str:
    """The page."""
    about = {"models": [model.name for model in models]}
    blocks = {"about": packed(json_text(about))}
    return page_html("Playground", MODULES, STYLES, blocks, connects=True)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = command_parser("search_r1.pages.play", __doc__)
    add_model_flags(parser)
    parser.add_argument("--beside", metavar="MODEL", help="another model, asked the same questions")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve at (default: this machine alone)"
    )
    parser.add_argument("--port", type=int, help="port to serve at (default: a free one)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serves the playground until Ctrl-C; returns the exit status."""
    args, overrides = make_parser().parse_known_args(argv)
    here = Path.cwd()
    models = [name for name in (args.model, args.beside) if name]
    flags = ["--config-name", args.config_name]
    flags += ["--endpoint", args.endpoint] if args.endpoint else []
    token = secrets.token_urlsafe(24)
    port = args.port or free_port()
    try:
        given = given_overrides(models[0], args.endpoint)
        config, _ = composed(args.config_name, [*given, *overrides])
        # Reports a wrong configuration before anything is made or started.
        config_for_answering(copy.deepcopy(config), None)
        with prepare_and_serve(config, overrides) as server, ExitStack() as stack:
            retriever = [f"retriever.url={server.url}"] if server else []
            running = stack.enter_context(serving(models, [*flags, *overrides, *retriever], here))
            app = make_app(running, token, args.host in LOOPBACK)
            sys.stdout.write(f"Playground: {address_of(args.host, port)}?token={token}\n")
            sys.stdout.flush()
            uvicorn.run(app, host=args.host, port=port, log_level="warning")
    except (ConfigError, DataError, ModelError) as error:
        sys.exit(f"error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
