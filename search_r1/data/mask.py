"""Makes training files of a corpus alone: a masked name, date or number is to be searched for.

    python -m search_r1.data.mask --index_path INDEX/bm25 --corpus_path C.jsonl --out DIR

A question is a sentence of a passage in which a span is replaced by [MASK]; the answer is the span
(retrieval-augmented mask prediction, MaskSearch, arXiv 2505.20285). Spans are found by rules:
dates, years, numbers of three digits and more, and capitalised names that are the title of a
passage. A sentence is taken only if BM25 finds another passage with the span by what is left of it,
so that the answer is there without the sentence itself. `gold_ids` are those passages.
"""

import argparse
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from search_r1.data.drawn import add_drawing_flags, parse_drawing
from search_r1.data.made import is_current, making
from search_r1.data.prepare import TEST, TRAIN, write_split
from search_r1.data.rows import training_row
from search_r1.program import command_parser
from search_r1.prompts import build_prompt
from search_r1.search.engines.bm25.retriever import BM25Retriever
from search_r1.search.errors import RetrieverError
from verl.utils.errors import DataError

MASK = "[MASK]"
SOURCE = "masked"
DEPTH = 20
"""Passages that BM25 finds, among which another one must hold the span."""
WORDS = range(8, 61)
"""Words that a sentence may have."""
MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
YEAR = r"(?:1\d|20)\d\d"
DATE = re.compile(rf"\b(?:\d{{1,2}} {MONTH}|{MONTH}(?: \d{{1,2}},)?) {YEAR}\b|\b{YEAR}\b")
NUMBER = re.compile(r"(?<![\w.,])\d[\d.,]*\d(?![\w])(?: ?%| percent)?")
DIGITS_OF_A_NUMBER = 3
"""Shorter numbers stand in too many passages by chance."""
CAPITALISED = re.compile(r"\b[A-Z][\w’'-]*(?: (?:(?:of|the|de|van|von|and) )?[A-Z][\w’'-]*)*")
SENTENCE_END = re.compile(r"(?<=[a-z0-9)”\"][.!?])\s+(?=[A-Z“\"])")
NOTE = re.compile(r"\s*\([^()]*\)$")


class Question(NamedTuple):
    """A masked sentence."""

    passage: str
    """The id of the passage that it was taken from."""
    text: str
    span: str
    gold_ids: list[str]
    """Other passages that hold the span, the best by BM25 first."""


def title_and_text(passage: dict[str, Any]) -> tuple[str, str]:
    """The title of a passage, without quotes and a note in brackets, and its text."""
    title, line_break, text = passage["contents"].partition("\n")
    if not line_break:
        return "", title
    return NOTE.sub("", title.strip().strip('"')), text


def spans_of(sentence: str, titles: set[str]) -> list[str]:
    """The salient spans of a sentence, each once: dates and years, numbers, names."""
    dates = DATE.findall(sentence)
    rest = DATE.sub(" ", sentence)
    numbers = [
        number
        for number in NUMBER.findall(rest)
        if sum(character.isdigit() for character in number) >= DIGITS_OF_A_NUMBER
    ]
    names = [name for run in CAPITALISED.findall(rest) if (name := name_in(run, titles))]
    return list(dict.fromkeys([*dates, *numbers, *names]))


def name_in(run: str, titles: set[str]) -> str | None:
    """The longest part of a run of capitalised words that is a title, None without one."""
    words = run.removesuffix("'s").removesuffix("’s").split(" ")
    for length in range(len(words), 0, -1):
        for start in range(len(words) - length + 1):
            name = " ".join(words[start : start + length])
            if name in titles:
                return name
    return None


def whole(span: str) -> re.Pattern[str]:
    """Matches a span where it is not a part of a longer word or number."""
    return re.compile(rf"(?<!\w){re.escape(span)}(?!\w|[.,]\d)")


class Masker:
    """Makes questions of the passages of an index."""

    def __init__(self, bm25: BM25Retriever) -> None:
        self.bm25 = bm25
        passages = (bm25.corpus[position] for position in range(len(bm25)))
        self.titles = {title_and_text(passage)[0] for passage in passages} - {""}

    def questions(self, seed: int) -> Iterator[Question]:
        """Yields at most one question of each passage, passages and sentences in random order."""
        rng = random.Random(seed)
        for position in rng.sample(range(len(self.bm25)), len(self.bm25)):
            if question := self.question_of(position, rng):
                yield question

    def question_of(self, position: int, rng: random.Random) -> Question | None:
        """The first question of a passage that can be answered, None without one."""
        passage = self.bm25.corpus[position]
        _, text = title_and_text(passage)
        candidates = [
            (sentence, span)
            for sentence in SENTENCE_END.split(text)
            if len(sentence.split()) in WORDS
            for span in spans_of(sentence, self.titles)
        ]
        rng.shuffle(candidates)
        for sentence, span in candidates:
            masked = whole(span).sub(MASK, sentence)
            is_masked = MASK in masked  # not where the span is a part of a longer number
            if is_masked and (golds := self.holders(masked, span, position)):
                return Question(str(passage["id"]), masked, span, golds)
        return None

    def holders(self, masked: str, span: str, position: int) -> list[str]:
        """The ids of the other passages that the masked sentence finds and that hold the span."""
        pattern = whole(span)
        found = [other for other, _ in self.bm25.rank(masked.replace(MASK, " "), DEPTH)]
        others = [self.bm25.corpus[other] for other in found if other != position]
        return [str(other["id"]) for other in others if pattern.search(other["contents"])]


def to_row(question: Question, template: str, index: int) -> dict[str, Any]:
    """The training row of a question."""
    text = f"{question.text}\nWhat does {MASK} stand for?"
    return training_row(
        text,
        [question.span],
        SOURCE,
        build_prompt(text, template),
        index=index,
        id=question.passage,
        gold_ids=question.gold_ids,
    )


def rows_of(bm25: BM25Retriever, count: int, template: str, seed: int) -> list[dict[str, Any]]:
    """The rows of so many questions. Raises DataError where the corpus gives fewer."""
    rows = list[dict[str, Any]]()
    questions = Masker(bm25).questions(seed)
    with tqdm(total=count, desc="questions") as bar:
        for index, question in zip(range(count), questions, strict=False):
            rows.append(to_row(question, template, index))
            bar.update()
    if len(rows) < count:
        raise DataError(
            f"{bm25.corpus.path}: only {len(rows)} passages have a span that another passage holds "
            f"too, --count asks for {count}"
        )
    return rows


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = command_parser("search_r1.data.mask", __doc__)
    add = parser.add_argument
    add("--index_path", type=Path, required=True, help="BM25 index of the corpus")
    add("--corpus_path", type=Path, help="the corpus, where the index holds no copy of it")
    add_drawing_flags(parser, "passages and spans")
    return parse_drawing(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the files, unless they are up to date, and returns the exit status."""
    args = parse_arguments(argv)
    try:
        bm25 = BM25Retriever(args.index_path, args.corpus_path)
        inputs = {
            "corpus": bm25.fingerprint,
            "expansion": bm25.settings,
            "count": args.count,
            "test_size": args.test_size,
            "template": args.template,
            "seed": args.seed,
        }
        if not args.overwrite and is_current(args.out, inputs, (TRAIN, TEST)):
            sys.stdout.write(f"{args.out}: already made from {bm25.corpus.path}\n")
            return 0
        rows = rows_of(bm25, args.count, args.template, args.seed)
    except (DataError, RetrieverError) as error:
        sys.exit(f"error: {error}")
    with making(args.out, inputs) as folder:
        write_split(folder, rows, args.test_size)
    train = args.count - args.test_size
    sys.stdout.write(f"{args.out}: {train} training and {args.test_size} test questions\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
