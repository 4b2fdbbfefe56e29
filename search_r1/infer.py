"""`python -m search_r1.infer MODEL [QUESTION] [key=value ...]`: asks a model, and shows it think.

The agent loop, the prompts and the search are those of training. MODEL is what it is for
`search_r1.evaluate`. Without QUESTION you are asked for one question after the other. With
--questions the questions of a file (JSONL, CSV or parquet with a column `question`) are answered
into the file --out; questions that it answers already are not asked again.
"""

import argparse
import asyncio
import copy
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from omegaconf import DictConfig
from tqdm import tqdm

from search_r1.data.rows import read_rows
from search_r1.data.shapes import normalise
from search_r1.evaluate import add_model_flags, given_overrides
from search_r1.launch import composed, prepare_and_serve
from search_r1.program import command_parser
from search_r1.session import InferenceSession, answer_of
from verl.agent import AgentLoop, Source, Trajectory, TrajectoryFailed
from verl.trainer.compose import as_plain
from verl.trainer.config import PPOConfig, validate
from verl.utils.errors import ConfigError, DataError, ModelError, listed
from verl.utils.model_names import weights_of
from verl.utils.run_folder import claim
from verl.utils.wording import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLORS = {
    "think": "\033[90m",
    "search": "\033[36m",
    "answer": "\033[1;32m",
    "observation": "\033[33m",
}
PLAIN = "\033[0m"
Show = Callable[[str, str], None]
"""`show(source, text)` is called for each part of a trajectory when it is written."""
MAX_UNDER_WAY = 64
"""The number of questions of a file that are asked at the same time."""


class Reading:
    """Shows the segments of a trajectory in the order in which they are written."""

    def __init__(self, show: Show, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.show = show
        self.tokenizer = tokenizer
        self.num_shown = 0

    def __call__(self, trajectory: Trajectory) -> None:
        """Shows what is new."""
        for segment in trajectory.segments[self.num_shown :]:
            is_said = segment.source is Source.MODEL
            text = self.tokenizer.decode(segment.token_ids, skip_special_tokens=is_said)
            self.show(segment.source, str(text))
        self.num_shown = len(trajectory.segments)


def call_tags(agent: AgentLoop) -> list[str]:
    """Names of the tags that call the tools of a loop."""
    dialect = getattr(agent, "dialect", None)
    return ["search"] if dialect is None else list(dialect.call_tags)


def show_colored(
    source: str, text: str, out: IO[str] | None = None, call_tags: Sequence[str] = ("search",)
) -> None:
    """Writes a part of a trajectory, in colours if `out` is a terminal and NO_COLOR is not set."""
    stream: IO[str] = sys.stdout if out is None else out
    if stream.isatty() and "NO_COLOR" not in os.environ:
        if source == Source.OBSERVATION:
            text = f"{COLORS['observation']}{text}{PLAIN}"
        for tag in ("think", *call_tags, "answer"):
            color = COLORS.get(tag, COLORS["search"])
            text = text.replace(f"<{tag}>", f"{color}<{tag}>")
            text = text.replace(f"</{tag}>", f"</{tag}>{PLAIN}")
    stream.write(text)
    stream.flush()


async def ask_aloud(session: InferenceSession, questions: Iterator[str]) -> None:
    """Asks one question after the other, and shows each trajectory as it is written."""
    show = partial(show_colored, call_tags=call_tags(session.agent))
    for question in questions:
        began = time.perf_counter()
        try:
            trajectory = await session.ask(question, Reading(show, session.tokenizer))
        except TrajectoryFailed as error:
            sys.stdout.write(f"\n[failed: {error.args[0]}]\n")
            continue
        answer = answer_of(trajectory, session.tokenizer)
        searches = counted(trajectory.info.get("searches", 0), "search", "searches")
        facts = f"{searches}, {time.perf_counter() - began:.1f} s, {trajectory.stop_reason}"
        sys.stdout.write(f"\n[{'no answer' if answer is None else 'answer: ' + answer}; {facts}]\n")


def prompt_user() -> Iterator[str]:
    """Asks the user for questions, until an empty line or the end of the input."""
    while True:
        try:
            question = input("question> ").strip()
        except EOFError:
            return
        if not question:
            return
        yield question


async def ask_file(session: InferenceSession, path: Path, out: Path) -> None:
    """Answers the questions of a file that `out` lacks; writes each answer when it is there.

    Raises DataError when some questions failed, or when `out` holds answers of another model or of
    other settings.
    """
    questions = read_questions(path)
    claim(out.with_suffix(".meta.json"), identity(session.config), "set of answers")
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    answered = {json.loads(line)["question"] for line in lines}
    todo = [question for question in questions if question not in answered]
    failed = 0
    with (
        out.open("a", encoding="utf-8") as file,
        tqdm(total=len(questions), initial=len(questions) - len(todo)) as bar,
    ):
        async for question, result in ask_all(session, todo):
            if isinstance(result, TrajectoryFailed):
                failed += 1
                continue
            record = answer_record(question, result, session.tokenizer)
            file.write(json.dumps(record) + "\n")
            file.flush()
            bar.update()
    if failed:
        raise DataError(
            f"{failed} questions failed and are not in {out}; run again to ask them once more"
        )


def identity(config: PPOConfig) -> dict[str, Any]:
    """What answers must have in common to stand in one file: the model and its settings."""
    section = config.actor_rollout_ref
    agent = config.agent
    return {
        "model": section.model.path,
        "weights": weights_of(section.model.path),
        "sampling": section.rollout.val_kwargs.model_dump(),
        "agent": {key: value for key, value in agent.items() if key != "retriever"},
        "topk": agent.get("retriever", {}).get("topk"),
    }


async def ask_all(
    session: InferenceSession, questions: Sequence[str]
) -> AsyncIterator[tuple[str, Trajectory | TrajectoryFailed]]:
    """Yields each question with its trajectory or failure, in the order in which they finish."""
    slots = asyncio.Semaphore(MAX_UNDER_WAY)

    async def ask(question: str) -> tuple[str, Trajectory | TrajectoryFailed]:
        async with slots:
            try:
                return question, await session.ask(question)
            except TrajectoryFailed as error:
                return question, error

    for coming in asyncio.as_completed([ask(question) for question in questions]):
        yield await coming


def read_questions(path: Path) -> list[str]:
    """Reads the distinct questions of a file. Raises DataError listing the rows without one.

    The file may have any form that `search_r1.data.prepare` reads, with or without answers.
    """
    questions: list[str] = []
    problems: list[str] = []
    for location, record in read_rows(path):
        if isinstance(record, str):
            problems.append(f"{location}: {record}")
            continue
        read = normalise(record)
        question = (record if isinstance(read, str) else read).get("question")
        if isinstance(question, str) and question.strip():
            questions.append(question)
        else:
            problems.append(f"{location}: no question")
    if problems:
        raise DataError(listed(problems))
    return list(dict.fromkeys(questions))


def answer_record(
    question: str, trajectory: Trajectory, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Any]:
    """The record of one answered question, a line of the file of answers."""
    segments = [
        {"source": str(s.source), "text": tokenizer.decode(s.token_ids)}
        for s in trajectory.segments
    ]
    return {
        "question": question,
        "answer": answer_of(trajectory, tokenizer),
        "stop_reason": trajectory.stop_reason,
        "searches": trajectory.info.get("searches", 0),
        "segments": segments,
    }


async def run_session(
    config: PPOConfig, work: Callable[[InferenceSession], Awaitable[None]]
) -> None:
    """Starts a session, awaits `work` with it, and always closes it."""
    session = InferenceSession(config)
    try:
        await session.start()
        await work(session)
    except (ConfigError, DataError):
        raise
    except Exception:
        session.show_log()
        raise
    finally:
        await session.close()


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = command_parser("search_r1.infer", __doc__)
    add_model_flags(parser)
    parser.add_argument(
        "question",
        metavar="QUESTION",
        nargs="?",
        help="in quotes; without it you are asked for one",
    )
    parser.add_argument("--questions", type=Path, metavar="FILE", help="questions to answer")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where their answers go, JSONL")
    return parser


def read_command_line(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parses the flags, with full paths of files, and the overrides. Exits if they are wrong."""
    parser = make_parser()
    args, overrides = parser.parse_known_args(argv)
    if args.question and "=" in args.question.split(" ")[0]:
        # The first argument after the model is an override, not a question.
        overrides = [args.question, *overrides]
        args.question = None
    if (args.questions is None) != (args.out is None):
        parser.error("--questions and --out go together")
    if args.questions is not None:
        args.questions = args.questions.resolve()
        args.out = args.out.resolve()
    return args, overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Asks as the command line says; returns the exit status."""
    args, overrides = read_command_line(argv)
    if args.questions is not None:
        work = partial(ask_file, path=args.questions, out=args.out)
    else:
        questions = iter([args.question]) if args.question else prompt_user()
        work = partial(ask_aloud, questions=questions)
    try:
        given = given_overrides(args.model, args.endpoint)
        config, _ = composed(args.config_name, [*given, *overrides])
        # Reports a wrong configuration before anything is made or started.
        config_for_answering(copy.deepcopy(config), None)
        with prepare_and_serve(config, overrides) as server:
            asked = config_for_answering(config, server.url if server else None)
            asyncio.run(run_session(asked, work))
    except (ConfigError, DataError, ModelError) as error:
        sys.exit(f"error: {error}")
    return 0


def config_for_answering(config: DictConfig, url: str | None) -> PPOConfig:
    """Changes `config` so that it needs nothing of a training, and validates it.

    The engine reads its weights from disk, a prompt template is always set, there are no data
    files, and `url`, if given, becomes the address of the retriever.
    """
    if url:
        config.retriever.url = url
    config.template = config.template or config.setup.template
    config.actor_rollout_ref.rollout.load_format = "auto"
    config.data.train_files = config.data.val_files = []
    return validate(as_plain(config))


if __name__ == "__main__":
    sys.exit(main())
