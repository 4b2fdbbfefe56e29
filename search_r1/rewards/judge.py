"""A language model as judge, behind an OpenAI-compatible endpoint.

A judgement that cannot be had is no zero: the trajectory fails, and is counted among those that did.
"""

import asyncio
import os
import random
import re

import httpx
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from search_r1.rewards.episode import Episode
from verl.utils.config import Config

PROMPT = """You compare an answer with the accepted answers of a question.

Question: {question}
Accepted answers: {golds}
Answer: {answer}

Does the answer mean the same as one of the accepted answers? Reply with one word, yes or no."""
VERDICT = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


class JudgeConfig(Config):
    url: str = "http://127.0.0.1:8001/v1"
    """Base address of the endpoint; `/chat/completions` is added."""
    model: str = ""
    """Name of the model there."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key, where one is needed."""
    timeout_s: PositiveFloat = 30.0
    """Seconds per request."""
    max_retries: NonNegativeInt = 4
    """Further attempts after errors, time-outs and replies without a verdict."""
    backoff_s: PositiveFloat = 0.5
    """Wait before the first further attempt; doubled each time, with jitter."""
    max_concurrent: PositiveInt = 32
    """Requests at a time, per process."""


class JudgeFailed(Exception):
    """No verdict after all attempts; the message names endpoint and cause."""


class Judge:
    """Belongs to one event loop."""

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        key = os.environ.get(config.api_key_env)
        self.http = httpx.AsyncClient(
            timeout=config.timeout_s, headers={"Authorization": f"Bearer {key}"} if key else {}
        )
        self.slots = asyncio.Semaphore(config.max_concurrent)

    async def __call__(self, e: Episode) -> float:
        """1 if the judge says yes, 0 if no or if there is no answer. Raises JudgeFailed without a verdict."""
        if e.answer is None:
            return 0.0
        text = PROMPT.format(question=e.question, golds="; ".join(e.golds), answer=e.answer)
        body = {"model": self.config.model, "messages": [{"role": "user", "content": text}], "temperature": 0.0}
        cause = ""
        for attempt in range(self.config.max_retries + 1):
            try:
                async with self.slots:
                    answer = await self.http.post(f"{self.config.url}/chat/completions", json=body)
                if answer.status_code == 200:
                    reply = str(answer.json()["choices"][0]["message"]["content"])
                    if verdict := VERDICT.search(reply):
                        return float(verdict.group(1).lower() == "yes")
                    cause = f"no verdict in {reply[:80]!r}"
                else:
                    cause = f"status {answer.status_code}: {answer.text[:200]}"
                    if answer.status_code in (400, 401, 403, 404):
                        break
            except (httpx.TransportError, ValueError, KeyError, IndexError, TypeError) as error:
                cause = f"{type(error).__name__} {error}".strip()
            if attempt < self.config.max_retries:
                await asyncio.sleep(self.config.backoff_s * 2**attempt * random.uniform(0.5, 1.0))
        raise JudgeFailed(f"judge at {self.config.url}: {cause}")
