"""Serves a small model of the closed world as an OpenAI-compatible endpoint, for findings:

    python scripts/bench/reader_server.py data/closed_world/deep/reader [--port 8123]

The model is given what the user says, without a template, and says what follows, greedily. Requests
that wait are answered together, as one batch.
"""

import argparse
import asyncio
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl.utils.tokenizer import encode_text

MOST_TOGETHER = 32


class ChatRequest(BaseModel):
    """What is read of a request; `temperature` is taken for 0, whatever it says."""

    messages: list[dict[str, str]]
    max_tokens: int = 64


class Reader:
    """A model that goes on from texts."""

    def __init__(self, path: str) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(path)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.waiting: asyncio.Queue[tuple[ChatRequest, asyncio.Future[str]]] = asyncio.Queue()

    async def answer(self, request: ChatRequest) -> str:
        """Waits until the request was answered in some batch."""
        answered = asyncio.get_running_loop().create_future()
        await self.waiting.put((request, answered))
        return await answered

    async def serve(self) -> None:
        """Answers what waits, for ever."""
        while True:
            batch = [await self.waiting.get()]
            while not self.waiting.empty() and len(batch) < MOST_TOGETHER:
                batch.append(self.waiting.get_nowait())
            texts = await asyncio.to_thread(self.continued, [request for request, _ in batch])
            for (_, answered), text in zip(batch, texts, strict=True):
                if not answered.done():  # whoever asked may have gone
                    answered.set_result(text)

    @torch.inference_mode()
    def continued(self, requests: list[ChatRequest]) -> list[str]:
        """What follows each text, padded on the left to the longest."""
        ids = [encode_text(self.tokenizer, said(request)) for request in requests]
        width = max(map(len, ids))
        pad = self.tokenizer.pad_token_id
        out = self.model.generate(
            torch.tensor([[pad] * (width - len(row)) + row for row in ids]),
            attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
            max_new_tokens=max(request.max_tokens for request in requests),
            do_sample=False,
            pad_token_id=pad,
        )
        return [
            self.tokenizer.decode(row[width:][: request.max_tokens], skip_special_tokens=True)
            for row, request in zip(out, requests, strict=True)
        ]


def said(request: ChatRequest) -> str:
    """The text of a request."""
    return "".join(message["content"] for message in request.messages)


def app_of(reader: Reader) -> FastAPI:
    """The two routes of the protocol that a client of findings uses."""
    app = FastAPI()
    tasks: list[asyncio.Task[None]] = []

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"data": [{"id": "reader"}]}

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest) -> dict[str, Any]:
        if not tasks:
            tasks.append(asyncio.create_task(reader.serve()))
        content = await reader.answer(request)
        message = {"role": "assistant", "content": content}
        return {"choices": [{"message": message, "finish_reason": "stop"}]}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--port", type=int, default=8123, help="default: 8123")
    args = parser.parse_args()
    torch.set_num_threads(1)  # beside a training that takes all cores
    uvicorn.run(app_of(Reader(args.model)), host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
