"""Stand-ins for the model and the retriever: a tokenizer of real size, turns of text, passages, an
engine, a server.

Everything is drawn from one seed. Words are made of syllables and occur as often as Zipf's law
says, so that text takes about as many tokens per word as English does in a vocabulary of 150,000.
"""

import asyncio
import bisect
import itertools
import json
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from search_r1.prompts import build_prompt
from verl.agent import Completion, Row, context_digest
from verl.utils.tokenizer import encode_text

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2's tokenizer cuts text before it merges."""
SYLLABLES = [
    "".join(pair)
    for pair in itertools.product("bdfgklmnprstvz", ("a", "e", "i", "o", "u", "an", "er"))
]
WORDS_PER_TURN = (20, 400)
WORDS_PER_PASSAGE = 100
"""As in the published wiki-18."""
PASSAGES = 3
ANSWER_SHARE = 0.12
"""Of the turns that may search; with four searches a trajectory then has 3.9 turns."""


class Words:
    """Random text over `count` words."""

    def __init__(self, count: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.words = [self._word(number) for number in range(count)]
        weights = 1 / np.arange(1, count + 1)
        self.cumulative = np.cumsum(weights / weights.sum()).tolist()

    @staticmethod
    def _word(number: int) -> str:
        """The number, written in syllables."""
        parts = []
        while number or not parts:
            number, digit = divmod(number, len(SYLLABLES))
            parts.append(SYLLABLES[digit])
        return "".join(parts)

    def text(self, count: int) -> str:
        """So many words."""
        places = (bisect.bisect_left(self.cumulative, self.rng.random()) for _ in range(count))
        return " ".join(self.words[min(place, len(self.words) - 1)] for place in places)


def make_tokenizer(folder: Path, vocabulary: int, words: Words) -> Any:
    """A byte-level BPE tokenizer of `vocabulary` entries, as Qwen2's is built, trained on the words
    and saved."""
    model = Tokenizer(BPE())
    model.pre_tokenizer = Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [Split(Regex(QWEN_SPLIT), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    model.decoder = ByteLevelDecoder()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=vocabulary,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    protocol = build_prompt("", "search") + " <search> </search> <answer> </answer> Doc 1(Title: "
    texts = itertools.chain([protocol] * 3, (f" {word}" for word in words.words))
    model.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


class World:
    """What an engine and a retriever would say, drawn beforehand."""

    def __init__(self, tokenizer: Any, words: Words, size: int = 64) -> None:
        self.tokenizer = tokenizer
        self.words = words
        rng = words.rng
        lengths = [rng.randint(*WORDS_PER_TURN) for _ in range(size)]
        self.searches = [
            self._turn(f"<think> {words.text(n)} </think>\n<search> {words.text(6)} ", n)
            for n in lengths
        ]
        self.answers = [
            self._turn(f"<think> {words.text(n)} </think>\n<answer> {words.text(2)} ", n)
            for n in lengths
        ]
        self.passages = [self._passage(number) for number in range(size)]

    def _turn(self, text: str, length: int) -> tuple[list[int], list[float]]:
        """Ids and log-probs of a turn, the tag closed that it opened last."""
        closing = "</search>" if "<search>" in text else "</answer>"
        ids = encode_text(self.tokenizer, text + closing)
        return ids, [-((length + place) % 97) / 31 for place in range(len(ids))]

    def _passage(self, number: int) -> dict[str, Any]:
        contents = f'"{self.words.text(3)}"\n{self.words.text(WORDS_PER_PASSAGE)}'
        return {"document": {"id": str(number), "contents": contents}, "score": 10 - number / 64}

    def found(self, query: str) -> list[dict[str, Any]]:
        """The passages that answer a query, as the server's contract has them."""
        first = zlib.crc32(query.encode())
        return [self.passages[(first + offset) % len(self.passages)] for offset in range(PASSAGES)]

    def rows(self, count: int) -> list[Row]:
        """Questions as the training files have them."""
        return [self._row(number) for number in range(count)]

    def _row(self, number: int) -> Row:
        question = self.words.text(12)
        return {
            "data_source": ("nq", "hotpotqa")[number % 2],
            "prompt": [{"role": "user", "content": build_prompt(question, "search")}],
            "ability": "fact-reasoning",
            "reward_model": {"style": "rule", "ground_truth": {"target": [self.words.text(2)]}},
            "extra_info": {"question": question, "split": "train", "index": number},
        }


class FakeEngine:
    """Answers at once, as an engine and as the Router of an agent worker."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def generate(
        self, session: str, prompt_ids: list[int], sampling: dict[str, Any]
    ) -> Completion:
        """A search, or an answer, as session and context decide; cut at the limit of the turn."""
        digest = context_digest(prompt_ids)
        chance = zlib.crc32(session.encode(), digest)
        answers = chance % 1000 < 1000 * ANSWER_SHARE
        pool = self.world.answers if answers else self.world.searches
        ids, log_probs = pool[chance // 1000 % len(pool)]
        limit = sampling["max_tokens"]
        reason = "stop" if len(ids) <= limit else "length"
        return Completion(ids[:limit], log_probs[:limit], reason, None, 0, digest)

    def forget(self, session: str) -> None:
        """Does nothing: there is no cache."""


async def serve(world: World, port: int) -> None:
    """Answers every request to the retriever's contract; written on sockets, to be fast."""
    known = {number: json.dumps(passage) for number, passage in enumerate(world.passages)}

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            lines = head.lower().split(b"\r\n")
            length = next(
                int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length")
            )
            queries = json.loads(await reader.readexactly(length))["queries"]
            results = [
                [known[int(hit["document"]["id"])] for hit in world.found(query)]
                for query in queries
            ]
            joined = ", ".join(f"[{', '.join(hits)}]" for hits in results)
            body = f'{{"result": [{joined}]}}'.encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
            writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)

    server = await asyncio.start_server(connection, "127.0.0.1", port)
    async with server:
        await server.serve_forever()
