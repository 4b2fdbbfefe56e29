"""Writes demonstrations of the protocol for training questions, without a model.

    python -m search_r1.data.demonstrate --questions train.parquet \\
        --retriever_url http://127.0.0.1:8000/retrieve --out traces.jsonl [--count 900]

A demonstration searches with the question itself, says which passage holds a gold answer, and
answers. Questions whose passages hold none are left out. It is a cold start for a small model that
does not know the protocol: `method=traces finetune.traces=traces.jsonl`.
"""

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from search_r1.program import command_parser
from search_r1.prompts import format_passages
from search_r1.rewards.matching import gold_answers, stands_in
from search_r1.search.client import RetrievalClient, RetrieverConfig, SearchError, check_server
from search_r1.search.client.answers import Passage
from search_r1.search.index.files import replacing
from search_r1.search.serve import positive
from search_r1.trajectory import required_question
from verl.agent import Row
from verl.utils.dataset import read_questions
from verl.utils.errors import DataError

SEARCHES = "<think> I have to search for this. </think>\n<search> {question} </search>"
FINDS = "\n\n<information>{passages}</information>\n\n"
ANSWERS = "<think> Doc {number} says it. </think>\n<answer> {answer} </answer>"
AT_A_TIME = 64
"""Questions that are searched for together."""


def demonstration(
    question: str, answers: Sequence[str], passages: Sequence[Passage]
) -> dict[str, Any] | None:
    """The trace of a question; None if no passage holds a gold answer.

    >>> found = [Passage("7", '"Nile"', "A river of Egypt.", 1.0)]
    >>> trace = demonstration("Where is the Nile?", ["Sudan", "Egypt"], found)
    >>> trace["response"].rpartition("</information>")[2]
    '\\n\\n<think> Doc 1 says it. </think>\\n<answer> Egypt </answer>'
    """
    for number, passage in enumerate(passages, 1):
        for answer in answers:
            if stands_in(answer, f"{passage.title}\n{passage.text}"):
                shown = format_passages([(each.title, each.text) for each in passages])
                response = SEARCHES.format(question=question) + FINDS.format(passages=shown)
                response += ANSWERS.format(number=number, answer=answer)
                return {
                    "question": question,
                    "golden_answers": list(answers),
                    "response": response,
                }
    return None


async def demonstrations(rows: Sequence[Row], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The traces of `rows`, in their order, until there are `--count`. Raises SearchError."""
    client = RetrievalClient(RetrieverConfig(url=args.retriever_url, topk=args.topk))
    traces: list[dict[str, Any]] = []
    try:
        with tqdm(total=args.count, desc="demonstrations") as bar:
            for start in range(0, len(rows), AT_A_TIME):
                batch = rows[start : start + AT_A_TIME]
                questions = [required_question(row) for row in batch]
                found = await asyncio.gather(*map(client.search, questions))
                for question, row, passages in zip(questions, batch, found, strict=True):
                    answers = gold_answers(row["reward_model"]["ground_truth"])
                    trace = demonstration(question, answers, passages)
                    traces += [trace] if trace else []
                bar.update(min(args.count, len(traces)) - bar.n)
                if len(traces) >= args.count:
                    break
    finally:
        await client.close()
    return traces[: args.count]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = command_parser("search_r1.data.demonstrate", __doc__)
    add = parser.add_argument
    add("--questions", type=Path, nargs="+", required=True, help="parquet files of questions")
    add("--retriever_url", required=True, help="search server, such as http://HOST:8000/retrieve")
    add("--topk", type=positive, default=3, help="passages that a search finds (default: 3)")
    add("--out", type=Path, required=True, help="JSONL to write, for finetune.traces")
    add("--count", type=positive, default=900, help="most demonstrations (default: 900)")
    add("--seed", type=int, default=0, help="draws the questions (default: 0)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the file and returns the exit status."""
    args = parse_arguments(argv)
    if problem := check_server(args.retriever_url):
        sys.exit(f"error: --retriever_url: {problem}")
    try:
        _, rows = read_questions([str(path) for path in args.questions])
        random.Random(args.seed).shuffle(rows)
        traces = asyncio.run(demonstrations(rows, args))
        if not traces:
            raise DataError("no search for a question found one of its answers")
    except (DataError, SearchError) as error:
        sys.exit(f"error: {error}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.out) as pending:
        lines = (json.dumps(trace, ensure_ascii=False) + "\n" for trace in traces)
        pending.write_text("".join(lines), encoding="utf-8")
    sys.stdout.write(f"{args.out}: {len(traces):,} demonstrations\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
