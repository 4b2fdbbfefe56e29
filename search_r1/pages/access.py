"""Who may open a page that a command serves: whoever has the token of the printed address."""

import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

from verl.utils.addresses import bracketed

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANY_ADDRESS = ("0.0.0.0", "::")
COOKIE = "search_r1_token"


@dataclass(frozen=True)
class Access:
    """The token of a page, and whom it lets in."""

    program: str
    """Who printed the address, for the message to those who lack it."""
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))

    def is_known(self, given: str) -> bool:
        """Whether `given` is the token."""
        return secrets.compare_digest(given.encode(), self.token.encode())

    def check(self, request: Request) -> None:
        """Refuses whoever does not know the token."""
        if not self.is_known(request.cookies.get(cookie_of(request), "")):
            raise HTTPException(401, f"open the address with the token that {self.program} printed")


def guarded_app(access: Access, html: Callable[[], str], is_local: bool) -> FastAPI:
    """An application with one page, for those who know the token.

    The browser gets it as a cookie that it sends to no page of another site. `is_local`: only this
    machine's own names are served, so that no other name can be made to lead here. What is added
    to the application needs `Depends(access.check)`.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if is_local:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]"])

    @app.get("/")
    def page(request: Request) -> Response:
        if access.is_known(request.query_params.get("token", "")):
            response = HTMLResponse(html())
            response.set_cookie(cookie_of(request), access.token, httponly=True, samesite="strict")
            return response
        access.check(request)
        return HTMLResponse(html())

    return app


def cookie_of(request: Request) -> str:
    """The name of the cookie: browsers keep one set of cookies for all ports of a host."""
    return f"{COOKIE}_{request.url.port or 80}"


def address_of(host: str, port: int) -> str:
    """The address at which a browser finds what listens on `host`.

    >>> address_of("::1", 8000), address_of("127.0.0.1", 8000)
    ('http://[::1]:8000/', 'http://127.0.0.1:8000/')
    """
    name = socket.gethostname() if host in ANY_ADDRESS else host
    return f"http://{bracketed(name)}:{port}/"
