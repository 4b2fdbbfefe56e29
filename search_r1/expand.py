"""Asks a language model for words by which each document could be searched, for `--expansions`.

python -m search_r1.expand --index_path INDEX/bm25 --corpus_path C.jsonl --out expansions.jsonl \\
    --url http://127.0.0.1:8001/v1 --model NAME

The model stands behind an OpenAI-compatible endpoint, whose key is read from $OPENAI_API_KEY. The
same command goes on where it was stopped: what is done stands in OUT.part until all is. The
settings of a finished file stand in OUT.made_from, so that the same command does nothing again.
"""

import argparse
import asyncio
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any

from tqdm import tqdm

from search_r1.partial import finish, is_finished, started
from search_r1.program import command_parser
from search_r1.search.engines.bm25.analysis import words
from search_r1.search.engines.bm25.retriever import BM25Retriever
from search_r1.search.errors import RetrieverError
from search_r1.search.expand_neighbours import add_index_flags, load_plain
from search_r1.search.index.files import locked
from search_r1.search.serve import positive, share
from verl.utils.endpoint import (
    Endpoint,
    EndpointConfig,
    EndpointFailed,
    check_endpoint,
    said_in,
)

PROMPT = """Passage:
{passage}

People search a collection for this passage by words. Which words could they use that it does not
contain: synonyms, other names, abbreviations written out, the broader term? Write at most {terms}
of them, the most specific first, separated by commas, and nothing else."""
MAX_TOKENS_PER_TERM = 16
AT_A_TIME = 1024
"""Documents that are handed to the endpoint together, and so held in memory."""


class Writer:
    """Asks for the words of documents and appends them to a file, a line a document."""

    def __init__(self, args: argparse.Namespace, bm25: BM25Retriever, file: IO[str]) -> None:
        self.args = args
        self.bm25 = bm25
        self.file = file
        self.endpoint = Endpoint(EndpointConfig(url=args.url, max_concurrent=args.max_concurrent))

    async def write_all(self, documents: Iterator[dict[str, Any]], bar: "tqdm[Any]") -> None:
        """Writes a line for each document. Raises EndpointFailed when one gets no usable reply."""
        try:
            while batch := list(itertools.islice(documents, AT_A_TIME)):
                async with asyncio.TaskGroup() as group:
                    for document in batch:
                        group.create_task(self.write(document, bar))
        except* EndpointFailed as failures:
            raise EndpointFailed(str(failures.exceptions[0])) from failures
        finally:
            await self.endpoint.close()

    async def write(self, document: dict[str, Any], bar: "tqdm[Any]") -> None:
        """Writes the line of one document."""
        prompt = PROMPT.format(passage=document["contents"], terms=self.args.terms)
        body = {
            "model": self.args.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0.0,
            "max_tokens": MAX_TOKENS_PER_TERM * self.args.terms,
        }
        proposed = await self.endpoint.post("/chat/completions", body, read_terms)
        terms = self.missing(document["contents"], proposed[: self.args.terms])
        row = {"id": str(document["id"]), "terms": terms}
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()
        bar.update()

    def missing(self, contents: str, proposed: Sequence[str]) -> list[str]:
        """The words of the proposed terms that the document lacks and that are not too common.

        Words that are nowhere in the corpus are kept: a query may have them.
        """
        analyze = self.bm25.analyze
        known = set(analyze(contents))
        kept = list[str]()
        for word in words(" ".join(proposed)):
            stem = analyze[word]
            if stem is not None and stem not in known and self.is_rare(stem):
                known.add(stem)
                kept.append(word)
        return kept

    def is_rare(self, stem: str) -> bool:
        """Whether no more than the share `--max_df` of the documents has a stem."""
        number = self.bm25.scorer.vocabulary[stem]
        return number < 0 or self.bm25.is_rare(number, self.args.max_df)


def read_terms(reply: Any) -> list[str]:
    """The terms in a reply, none where it has no words. Raises ValueError as `said_in` does."""
    return [term.strip() for term in re.split(r"[,;\n]", said_in(reply)) if words(term)]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = command_parser("search_r1.expand", __doc__)
    add_index_flags(parser)
    add = parser.add_argument
    add("--url", required=True, help="base address of the endpoint, such as http://HOST:8001/v1")
    add("--model", required=True, help="name of the model at the endpoint")
    add("--terms", type=positive, default=10, help="most terms per document (default: 10)")
    add(
        "--max_df",
        type=share,
        default=0.1,
        help="words that a larger share of the documents has are left out (default: 0.1)",
    )
    add(
        "--max_concurrent",
        type=positive,
        default=EndpointConfig().max_concurrent,
        help=f"most requests at a time (default: {EndpointConfig().max_concurrent})",
    )
    return parser.parse_args(argv)


def expand(args: argparse.Namespace) -> int:
    """Asks for the words of all documents that have none yet; returns the number of documents.

    A file that is finished stays. Raises RetrieverError for a bad index, a file with other settings
    or an endpoint that does not answer, EndpointFailed when a document gets no usable reply.
    """
    bm25 = load_plain(args)
    settings = {
        "corpus": bm25.fingerprint,
        "model": args.model,
        "terms": args.terms,
        "max_df": args.max_df,
        "prompt": PROMPT,
    }
    if is_finished(args.out, settings):
        return len(bm25)
    if problem := check_endpoint(EndpointConfig(url=args.url)):
        raise RetrieverError(f"--url: {problem}")
    part = args.out.with_name(args.out.name + ".part")
    with locked(part):
        done = {row["id"] for row in started(part, settings)}
        with (
            part.open("a", encoding="utf-8") as file,
            tqdm(total=len(bm25), initial=len(done), desc="documents") as bar,
        ):
            documents = (bm25.corpus[position] for position in range(len(bm25)))
            left = (document for document in documents if str(document["id"]) not in done)
            asyncio.run(Writer(args, bm25, file).write_all(left, bar))
        finish(part, args.out, settings)
    return len(bm25)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the file and returns the exit status."""
    args = parse_arguments(argv)
    try:
        count = expand(args)
    except RetrieverError as error:
        sys.exit(f"error: {error}")
    except EndpointFailed as error:
        sys.exit(f"error: {error}; what is done is kept, the same command goes on")
    sys.stdout.write(f"{args.out}: words for {count} documents\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
