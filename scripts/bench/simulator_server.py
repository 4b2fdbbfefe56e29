"""Plays the language model of a simulated search engine in a closed world:

    python scripts/bench/simulator_server.py data/closed_world/corpus.jsonl [--port 8124]
    search-r1 serve --retriever_name simulated --simulated_model closed_world \\
        --simulated_url http://127.0.0.1:8124/v1

It knows the corpus by heart. Asked by the engine's own prompts, it writes the passages that share
most words with the query as useful ones, and passages that mention nobody of the query as noise.
"""

import argparse
import re
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

from search_r1.search.engines.simulated import NOISY_PROMPT, USEFUL_PROMPT
from search_r1.search.index.corpus import Corpus
from search_r1.search.noise import rng_of

MODEL = "closed_world"
WORD = re.compile(r"\w+")


class ChatRequest(BaseModel):
    """What is read of a request."""

    messages: list[dict[str, str]]


class Wanted(NamedTuple):
    """What a prompt asks for."""

    query: str
    topk: int
    is_noisy: bool


class Passage(NamedTuple):
    """A passage of the corpus, and its words."""

    title: str
    text: str
    words: frozenset[str]


def pattern_of(prompt: str) -> re.Pattern[str]:
    """Recognises what a prompt became when number and query were written into it."""
    text = re.escape(prompt)
    text = text.replace(re.escape("{topk}"), r"(?P<topk>\d+)")
    return re.compile(text.replace(re.escape("{query}"), "(?P<query>.*)"))


PATTERNS = {False: pattern_of(USEFUL_PROMPT), True: pattern_of(NOISY_PROMPT)}


def read_prompt(prompt: str) -> Wanted:
    """What a prompt asks for. Raises HTTPException for a prompt that is not the engine's own."""
    for is_noisy, pattern in PATTERNS.items():
        if found := pattern.fullmatch(prompt):
            return Wanted(found["query"], int(found["topk"]), is_noisy)
    raise HTTPException(400, "expected one of the prompts of search_r1/search/engines/simulated.py")


class World:
    """The passages of a closed world."""

    def __init__(self, path: Path) -> None:
        corpus = Corpus.of_lines(path)
        self.passages = [to_passage(corpus[i]["contents"]) for i in range(len(corpus))]
        self.titles = {passage.title for passage in self.passages}

    def write(self, wanted: Wanted) -> str:
        """The answer to a prompt."""
        chosen = self.noisy(wanted) if wanted.is_noisy else self.useful(wanted)
        return "\n".join(f"<passage>\n{p.title}\n{p.text}\n</passage>" for p in chosen)

    def useful(self, wanted: Wanted) -> list[Passage]:
        """The passages that share most words with the query, those about what it names first."""
        words = set(WORD.findall(wanted.query))
        ranked = sorted(
            self.passages, key=lambda p: (p.title in words, len(p.words & words)), reverse=True
        )
        return ranked[: wanted.topk]

    def noisy(self, wanted: Wanted) -> list[Passage]:
        """Passages that mention nothing that the query names, the same ones for one query."""
        named = self.titles.intersection(WORD.findall(wanted.query))
        shuffled = self.passages.copy()
        rng_of(wanted.query, 0).shuffle(shuffled)
        return list(islice((p for p in shuffled if not p.words & named), wanted.topk))


def to_passage(contents: str) -> Passage:
    """A line of the corpus."""
    title, _, text = contents.partition("\n")
    return Passage(title.strip('"'), text, frozenset(WORD.findall(contents)))


def app_of(world: World) -> FastAPI:
    """The two routes of the protocol that the engine uses."""
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"data": [{"id": MODEL}]}

    @app.post("/v1/chat/completions")
    def chat(request: ChatRequest) -> dict[str, Any]:
        wanted = read_prompt(request.messages[0]["content"])
        message = {"role": "assistant", "content": world.write(wanted)}
        return {"choices": [{"message": message, "finish_reason": "stop"}]}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path, help="corpus.jsonl of the world")
    parser.add_argument("--port", type=int, default=8124, help="default: 8124")
    args = parser.parse_args()
    app = app_of(World(args.corpus))
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
