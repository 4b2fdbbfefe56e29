"""A local OpenAI-compatible server that plays scripted transcripts."""

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response

Turn = str | Response
SIDE = "Read the passages below"


class Player:
    """Answers the k-th request about a question with the k-th turn of its script.

    The last turn is repeated for ever. A script belongs to the question that contains its key. A
    turn that is a Response is sent as it is, `HANG` never. Text is cut as the protocol does: at
    `max_tokens` words, and before the first stop string.
    """

    HANG = Response(headers={"x-hang": "1"})

    def __init__(
        self, scripts: dict[str, Sequence[Turn]], finding: str = "Ada Marin was born in Torvel."
    ) -> None:
        self.scripts = scripts
        self.finding = finding
        self.models_status = 200
        self.requests: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.side: list[dict[str, Any]] = []
        self.app = FastAPI()
        self.app.add_api_route("/v1/models", self._models)
        self.app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"])
        self.app.add_api_route("/v1/completions", self._completions, methods=["POST"])

    async def _models(self) -> Response:
        return Response(json.dumps({"data": []}), self.models_status)

    async def _chat(self, request: Request) -> Any:
        body = await request.json()
        first = body["messages"][0]["content"]
        return await self._reply(
            body, first, lambda text: {"message": {"role": "assistant", "content": text}}
        )

    async def _completions(self, request: Request) -> Any:
        body = await request.json()
        return await self._reply(body, body["prompt"], lambda text: {"text": text})

    async def _reply(
        self, body: dict[str, Any], first: str, shape: Callable[[str], dict[str, Any]]
    ) -> Any:
        if first.startswith(SIDE):
            self.side.append(body)
            return {"choices": [{**shape(self.finding), "finish_reason": "stop"}]}
        key = next(key for key in self.scripts if key in first)
        script = self.scripts[key]
        turn = script[min(len(self.requests[key]), len(script) - 1)]
        self.requests[key].append(body)
        if turn is self.HANG:
            await asyncio.sleep(30)
        if isinstance(turn, Response):
            return turn
        places = [place for stop in body.get("stop", ()) if (place := turn.find(stop)) >= 0]
        text = turn[: min(places)] if places else turn
        words = text.split(" ")
        if len(words) > body["max_tokens"]:
            return {
                "choices": [
                    {**shape(" ".join(words[: body["max_tokens"]])), "finish_reason": "length"}
                ]
            }
        return {"choices": [{**shape(text), "finish_reason": "stop"}]}
