"""Tells an address of the user's that a run has collapsed or ended."""

import logging
import os
from dataclasses import dataclass

import httpx

from verl.utils.addresses import direct

logger = logging.getLogger(__name__)
TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Webhook:
    """An address that takes `{"text": ...}` by POST, as the webhooks of chat services do."""

    url: str

    def tell(self, run: str, title: str, text: str) -> None:
        """Sends a message. One that cannot be delivered is logged, and the run goes on.

        The address is not logged, because it lets everybody who knows it write to the channel.
        """
        body = {"text": f"{run}: {title}\n{text}"}
        logging.getLogger("httpx").setLevel(logging.WARNING)  # at INFO it logs every address
        try:
            with httpx.Client(mounts=direct(self.url), timeout=TIMEOUT_S) as client:
                client.post(self.url, json=body).raise_for_status()
        except httpx.HTTPStatusError as error:
            logger.warning("alert not delivered: status %d", error.response.status_code)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            logger.warning("alert not delivered: %s", type(error).__name__)


def webhook_of(variable: str | None) -> Webhook | None:
    """The webhook whose address the environment variable holds; None where it holds none."""
    url = os.environ.get(variable, "") if variable else ""
    return Webhook(url) if url else None
