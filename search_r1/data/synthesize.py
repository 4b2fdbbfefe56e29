"""Makes training files of a corpus alone: a language model asks what its passages answer.

    python -m search_r1.data.synthesize --corpus_path C.jsonl --url http://127.0.0.1:8001/v1 \\
        --model NAME --retriever_url http://127.0.0.1:8000/retrieve --out DIR

The model stands behind an OpenAI-compatible endpoint, whose key is read from $OPENAI_API_KEY. It
writes a question and an answer for each passage. They are kept if the answer stands in the passage
and not in the question, and if the search server, asked with the question, finds the passage or
another one with the answer. The same command goes on where it was stopped.
"""

import argparse
import asyncio
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from search_r1.data.drawn import add_drawing_flags, parse_drawing
from search_r1.data.made import is_current, making
from search_r1.data.prepare import TEST, TRAIN, write_split
from search_r1.data.rows import training_row
from search_r1.partial import started
from search_r1.program import command_parser
from search_r1.prompts import build_prompt
from search_r1.rewards.matching import normalize_answer, stands_in
from search_r1.search.client import RetrievalClient, RetrieverConfig, SearchError, check_server
from search_r1.search.errors import RetrieverError
from search_r1.search.index.corpus import Corpus
from search_r1.search.index.files import locked
from search_r1.search.index.manifest import fingerprint
from search_r1.search.serve import positive
from verl.utils.endpoint import (
    Endpoint,
    EndpointConfig,
    EndpointFailed,
    check_endpoint,
    said_in,
)
from verl.utils.errors import DataError

PROMPT = """Passage:
{passage}

Write a question that this passage answers. It will be read without the passage, by somebody who
has to search for it: name what it is about, and do not speak of a passage or a text. The answer is
a name, a date, a number or another short phrase that is copied from the passage, and that the
question does not contain. Reply with two lines and nothing else:
Question: ...
Answer: ...
If the passage has no fact to ask for, reply with NONE."""
SOURCE = "synthesized"
ASKED = "asked.jsonl"
"""The file in `--out` of what came of each passage that was asked about."""
REPLY = re.compile(r"Question:[ \t]*(\S.*)\n+Answer:[ \t]*(\S.*)")
NOTHING = "NONE"
MAX_ANSWER_WORDS = 10
"""Longer answers are hardly ever matched."""
MAX_TOKENS = 512
AT_A_TIME = 1024
"""Passages that are handed to the endpoint together."""
Question = dict[str, Any]
"""What came of a passage: its `id` and, if a question was kept, `question`, `answer` and
`gold_ids`; otherwise `rejected`, the reason."""


class Writer:
    """Asks for a question about each passage, and appends what came of it to a file."""

    def __init__(self, args: argparse.Namespace, file: IO[str]) -> None:
        self.model = args.model
        self.file = file
        self.endpoint = Endpoint(EndpointConfig(url=args.url, max_concurrent=args.max_concurrent))
        self.search = RetrievalClient(RetrieverConfig(url=args.retriever_url, topk=args.topk))

    async def write_all(self, passages: Sequence[dict[str, Any]]) -> list[Question]:
        """Writes a line for each passage, and returns them in the order of the passages.

        Raises EndpointFailed or SearchError for the first passage that gets no usable reply; what
        has finished is written.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.write(passage)) for passage in passages]
        except* (EndpointFailed, SearchError) as failures:
            raise failures.exceptions[0] from failures
        return [task.result() for task in tasks]

    async def write(self, passage: dict[str, Any]) -> Question:
        """Writes the line of one passage."""
        question = {"id": str(passage["id"]), **await self.ask(passage)}
        self.file.write(json.dumps(question, ensure_ascii=False) + "\n")
        self.file.flush()
        return question

    async def ask(self, passage: dict[str, Any]) -> Question:
        """A question about a passage, or why there is none."""
        contents = passage["contents"]
        message = {"role": "user", "content": PROMPT.format(passage=contents)}
        body = {
            "model": self.model,
            "messages": [message],
            "temperature": 0.0,
            "max_tokens": MAX_TOKENS,
        }
        reply = (await self.endpoint.post("/chat/completions", body, said_in)).strip()
        if reply == NOTHING:
            return {"rejected": "nothing to ask"}
        matched = REPLY.fullmatch(reply)
        if matched is None:
            return {"rejected": "no question and answer in the reply"}
        question, answer = matched.group(1).strip(), matched.group(2).strip()
        if reason := misfit(question, answer, contents):
            return {"rejected": reason}
        found = await self.search.search(question)
        golds = [
            hit.id
            for hit in found
            if hit.id == str(passage["id"]) or stands_in(answer, f"{hit.title}\n{hit.text}")
        ]
        if not golds:
            return {"rejected": "not found by its question"}
        gold_ids = list(dict.fromkeys([*golds, str(passage["id"])]))
        return {"question": question, "answer": answer, "gold_ids": gold_ids}

    async def close(self) -> None:
        """Closes the connections."""
        await self.endpoint.close()
        await self.search.close()


def misfit(question: str, answer: str, passage: str) -> str | None:
    """Why a question and its answer cannot be used, whatever is found; None if they can."""
    if len(answer.split()) > MAX_ANSWER_WORDS:
        return "answer too long"
    if not stands_in(answer, passage):
        return "answer not in the passage"
    if stands_in(answer, question):
        return "answer in the question"
    return None


def passages_in(corpus: Corpus, seed: int) -> Iterator[dict[str, Any]]:
    """Yields the passages of a corpus in random order."""
    for position in random.Random(seed).sample(range(len(corpus)), len(corpus)):
        yield corpus[position]


def distinct(questions: Sequence[Question]) -> list[Question]:
    """The questions that were kept, without those that are asked a second time."""
    kept: dict[str, Question] = {}
    for question in questions:
        if "question" in question:
            kept.setdefault(normalize_answer(question["question"]), question)
    return list(kept.values())


async def collect(
    args: argparse.Namespace, corpus: Corpus, done: dict[str, Question], file: IO[str]
) -> list[Question]:
    """What came of the passages, in their order, until `--count` questions are kept.

    `done`: what came of passages of an earlier start, by id. Raises DataError when the corpus gives
    fewer questions, EndpointFailed, SearchError.
    """
    writer = Writer(args, file)
    passages = passages_in(corpus, args.seed)
    questions: list[Question] = []
    kept: list[Question] = []
    try:
        with tqdm(total=args.count, desc="questions") as bar:
            while (missing := args.count - len(kept)) > 0:
                batch = list(islice(passages, min(missing, AT_A_TIME)))
                if not batch:
                    raise DataError(
                        f"{corpus.path}: only {len(kept)} questions were kept, --count asks for "
                        f"{args.count} ({rejections(questions)})"
                    )
                new = [passage for passage in batch if str(passage["id"]) not in done]
                written = {question["id"]: question for question in await writer.write_all(new)}
                known = done | written
                questions += [known[str(passage["id"])] for passage in batch]
                kept = distinct(questions)
                bar.update(len(kept) - bar.n)
                bar.set_postfix(passages=len(questions), refresh=False)
    finally:
        await writer.close()
    return questions


def rejections(questions: Sequence[Question]) -> str:
    """How many passages gave no question, by reason, the most frequent first."""
    counts = Counter(question["rejected"] for question in questions if "rejected" in question)
    asked = sum("question" in question for question in questions)
    if repeated := asked - len(distinct(questions)):
        counts["asked before"] = repeated
    listed = ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common())
    return f"{len(questions):,} passages; rejected: {listed or 'none'}"


def to_row(question: Question, template: str, index: int) -> dict[str, Any]:
    """The training row of a question."""
    return training_row(
        question["question"],
        [question["answer"]],
        SOURCE,
        build_prompt(question["question"], template),
        index=index,
        id=question["id"],
        gold_ids=question["gold_ids"],
    )


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = command_parser("search_r1.data.synthesize", __doc__)
    add = parser.add_argument
    add("--corpus_path", type=Path, required=True, help="JSONL, one passage a line")
    add("--url", required=True, help="base address of the endpoint, such as http://HOST:8001/v1")
    add("--model", required=True, help="name of the model at the endpoint")
    add("--retriever_url", required=True, help="search server, such as http://HOST:8000/retrieve")
    add("--topk", type=positive, default=3, help="passages that a search finds (default: 3)")
    add(
        "--max_concurrent",
        type=positive,
        default=EndpointConfig().max_concurrent,
        help=f"most requests at a time (default: {EndpointConfig().max_concurrent})",
    )
    add_drawing_flags(parser, "passages")
    return parse_drawing(parser, argv)


def synthesize(
    args: argparse.Namespace, settings: dict[str, Any], corpus: Corpus
) -> list[Question]:
    """Asks for questions until there are enough, and returns what came of the passages.

    What is done stands in a file in `--out`, also after an error. Raises RetrieverError when the
    endpoint or the server does not answer, or another process is at it, and as `collect` does.
    """
    if problem := check_endpoint(EndpointConfig(url=args.url)):
        raise RetrieverError(f"--url: {problem}")
    if problem := check_server(args.retriever_url):
        raise RetrieverError(f"--retriever_url: {problem}")
    asked = args.out / ASKED
    with locked(asked):
        done = {question["id"]: question for question in started(asked, settings)}
        with asked.open("a", encoding="utf-8") as file:
            return asyncio.run(collect(args, corpus, done, file))


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the files, unless they are up to date, and returns the exit status."""
    args = parse_arguments(argv)
    try:
        corpus = Corpus.of_lines(args.corpus_path)
        asked = {
            "corpus": fingerprint(args.corpus_path),
            "model": args.model,
            "topk": args.topk,
            "prompt": PROMPT,
        }
        chosen = {
            "count": args.count,
            "test_size": args.test_size,
            "template": args.template,
            "seed": args.seed,
        }
        if not args.overwrite and is_current(args.out, asked | chosen, (TRAIN, TEST)):
            sys.stdout.write(f"{args.out}: already made from {args.corpus_path}\n")
            return 0
        questions = synthesize(args, asked, corpus)
    except (DataError, RetrieverError) as error:
        sys.exit(f"error: {error}")
    except (EndpointFailed, SearchError) as error:
        sys.exit(f"error: {error}; what is done is kept, the same command goes on")
    rows = [
        to_row(question, args.template, index) for index, question in enumerate(distinct(questions))
    ]
    with making(args.out, asked | chosen) as folder:
        write_split(folder, rows, args.test_size)
    train = args.count - args.test_size
    sys.stdout.write(
        f"{args.out}: {train} training and {args.test_size} test questions of "
        f"{rejections(questions)}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
