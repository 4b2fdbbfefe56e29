"""A client of OpenAI-compatible HTTP endpoints, with retries, time-outs and limited concurrency."""

import asyncio
import os
import random
from collections.abc import Callable
from typing import Any, TypeVar

import httpx
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from verl.utils.addresses import direct
from verl.utils.config import Config

HOPELESS = frozenset({400, 401, 403, 404, 405, 413, 422})
"""HTTP statuses that the same request would get again, so that it is not retried."""
T = TypeVar("T")


class EndpointConfig(Config):
    url: str = ""
    """Base address, such as http://127.0.0.1:8001/v1."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key, where one is needed."""
    timeout_s: PositiveFloat = 60.0
    """Seconds per request."""
    max_retries: NonNegativeInt = 4
    """Further attempts after errors, time-outs and replies that cannot be read."""
    backoff_s: PositiveFloat = 0.5
    """Seconds to wait before the first further attempt; doubled each time, with jitter. A server's
    Retry-After takes precedence."""
    max_concurrent: PositiveInt = 32
    """Most requests at a time, per process."""


class EndpointFailed(Exception):
    """No usable reply after all attempts; the message names endpoint and cause."""


class Endpoint:
    """A client of one endpoint. It may be used in one event loop only."""

    def __init__(self, config: EndpointConfig) -> None:
        self.config = config
        self.http = httpx.AsyncClient(
            timeout=config.timeout_s, headers=headers(config), mounts=direct(config.url)
        )
        self.slots = asyncio.Semaphore(config.max_concurrent)

    async def post(self, path: str, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """Posts `body` and returns what `read` makes of the JSON reply.

        If `read` raises ValueError, KeyError, IndexError or TypeError, the reply counts as unusable
        and the request is retried. Raises EndpointFailed after the last attempt.
        """
        cause = ""
        for attempt in range(self.config.max_retries + 1):
            wait = self.config.backoff_s * 2**attempt * random.uniform(0.5, 1.0)
            try:
                async with self.slots:
                    reply = await self.http.post(f"{self.config.url.rstrip('/')}{path}", json=body)
                if reply.status_code == 200:
                    return read(reply.json())
                cause = f"status {reply.status_code}: {reply.text[:200]}"
                if reply.status_code in HOPELESS:
                    break
                wait = retry_after(reply) or wait
            except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
                cause = f"{type(error).__name__} {error}".strip()
            if attempt < self.config.max_retries:
                await asyncio.sleep(wait)
        raise EndpointFailed(f"{self.config.url}{path}: {cause}")

    async def close(self) -> None:
        await self.http.aclose()


def said_in(reply: Any) -> str:
    """The text of a chat reply, without the thoughts that may precede it.

    Raises ValueError for a reply that is no text, or whose thought is cut off.
    """
    said = reply["choices"][0]["message"]["content"]
    if not isinstance(said, str):
        raise ValueError(f"expected a text, got {said!r}")
    if "<think>" in said and "</think>" not in said:
        raise ValueError(
            f"a thought that is cut off ({said[:80]!r}): take a model that thinks less"
        )
    return said.rpartition("</think>")[2]


def headers(config: EndpointConfig) -> dict[str, str]:
    key = os.environ.get(config.api_key_env)
    return {"Authorization": f"Bearer {key}"} if key else {}


def retry_after(reply: httpx.Response) -> float | None:
    """Seconds that the server asks to wait, if it gives a number; at most a minute."""
    text = reply.headers.get("retry-after", "")
    return min(60.0, float(text)) if text.replace(".", "", 1).isdigit() else None


def check_endpoint(config: EndpointConfig) -> str | None:
    """Asks the endpoint for its models, and returns what is wrong with it.

    None if it lists them or does not support listing.
    """
    try:
        with httpx.Client(mounts=direct(config.url), headers=headers(config), timeout=10) as client:
            status = client.get(f"{config.url.rstrip('/')}/models").status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"{config.url} does not answer ({type(error).__name__} {error})"
    if status in (401, 403):
        return f"{config.url} refuses the key in ${config.api_key_env} (status {status})"
    return None
