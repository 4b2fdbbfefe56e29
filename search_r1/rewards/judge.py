"""A language model as judge, behind an OpenAI-compatible endpoint.

If the judge cannot be reached or gives no verdict, the reward is not 0: the trajectory fails, and
is counted as failed.
"""

import re
from typing import Any

from pydantic import PositiveFloat

from search_r1.rewards.episode import Episode
from verl.utils.endpoint import Endpoint, EndpointConfig

PROMPT = """You compare an answer with the accepted answers of a question.

Question: {question}
Accepted answers: {golds}
Answer: {answer}

Does the answer mean the same as one of the accepted answers? Reply with one word, yes or no."""
VERDICT = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


class JudgeConfig(EndpointConfig):
    url: str = "http://127.0.0.1:8001/v1"
    """Base address of the endpoint, to which `/chat/completions` is added."""
    model: str = ""
    """Name of the model at the endpoint."""
    timeout_s: PositiveFloat = 30.0
    """Seconds per request."""


class Judge:
    """Asks the judge about answers. It belongs to one event loop."""

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self.endpoint = Endpoint(config)

    async def __call__(self, e: Episode) -> float:
        """Asks about an answer: 1 for yes, 0 for no. Without an answer 0, and nobody is asked.

        Raises EndpointFailed when there is no verdict.
        """
        if e.answer is None:
            return 0.0
        text = PROMPT.format(question=e.question, golds="; ".join(e.golds), answer=e.answer)
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0.0,
        }
        return await self.endpoint.post("/chat/completions", body, read_verdict)


def read_verdict(reply: Any) -> float:
    """The verdict in a reply: 1 for yes, 0 for no. Raises ValueError for neither."""
    text = str(reply["choices"][0]["message"]["content"])
    verdict = VERDICT.search(text)
    if verdict is None:
        raise ValueError(f"no verdict in {text[:80]!r}")
    return float(verdict.group(1).lower() == "yes")
