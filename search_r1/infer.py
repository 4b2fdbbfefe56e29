"""`python -m search_r1.infer MODEL [QUESTION] [key=value ...]`: ask, and watch the model think,
search and answer.

The loop, prompts and search of training. MODEL as in `search_r1.evaluate`. Without QUESTION it asks
you for one after the other; with --questions it answers a file of them (JSONL, CSV, parquet with
`question`) into --out, where questions that are answered already are not asked again.
"""

import argparse
import asyncio
import copy
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from search_r1.data.rows import read_rows
from search_r1.data.shapes import normalise
from search_r1.evaluate import given_overrides
from search_r1.launch import composed, surroundings
from search_r1.rewards.matching import last_answer
from verl.agent import Completion, Source, Trajectory, TrajectoryFailed
from verl.rollout.openai_engine import OpenAIEngine
from verl.rollout.router import Router
from verl.rollout.vllm_server import VLLMServer
from verl.trainer.checks import environment_problems
from verl.trainer.compose import as_plain
from verl.trainer.config import PPOConfig, build_agent, build_tokenizer, validate
from verl.utils.errors import ConfigError, DataError, ModelError, listed
from verl.utils.model_names import weights_of
from verl.utils.run_folder import claim

COLORS = {
    "think": "\033[90m",
    "search": "\033[36m",
    "answer": "\033[1;32m",
    "observation": "\033[33m",
}
PLAIN = "\033[0m"
Show = Callable[[str, str], None]
"""`show(source, text)`: called for each piece as it comes."""


class Asker:
    """A model ready to be asked. Belongs to one event loop."""

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.tokenizer = build_tokenizer(config)
        self.agent = build_agent(config, self.tokenizer)
        self.server: VLLMServer | None = None
        self.engines: Any = None
        """A Router or an OpenAIEngine, once started."""

    async def start(self) -> None:
        """Builds the engine. Raises ConfigError when something that is needed is not there."""
        model = self.config.actor_rollout_ref.model
        rollout = self.config.actor_rollout_ref.rollout
        if problems := environment_problems(
            self.config, self.agent, rollout.tensor_model_parallel_size
        ):
            raise ConfigError(problems)
        if rollout.name == "openai":
            self.engines = OpenAIEngine(rollout.endpoint, model.path, self.tokenizer)
            return
        device = self.config.device
        gpus = (
            [str(i) for i in range(rollout.tensor_model_parallel_size)] if device == "cuda" else []
        )
        self.server = VLLMServer(
            rollout,
            model,
            max_model_len=self.config.max_model_len,
            device=device,
            replica_rank=0,
            num_replicas=1,
            visible_devices=gpus,
            seed=self.config.trainer.seed,
        )
        await self.server.start()
        self.engines = Router(
            [SimpleNamespace(generate=SimpleNamespace(remote=self.server.generate))]
        )

    async def ask(self, question: str, show: Show | None = None) -> Trajectory:
        """The trajectory of a question. Raises TrajectoryFailed when a search or the endpoint fails
        for good."""
        session = f"{time.monotonic_ns()}"
        sampling = self.config.actor_rollout_ref.rollout.val_kwargs
        known: list[int] = []

        async def generate(
            prompt_ids: list[int], *, max_tokens: int, stop: Sequence[str] = ()
        ) -> Completion:
            if show and known and prompt_ids[: len(known)] == known:
                show(Source.OBSERVATION, self.tokenizer.decode(prompt_ids[len(known) :]))
            params = {
                **sampling.params(),
                "max_tokens": max_tokens,
                "stop": list(stop),
                "seed": None,
            }
            completion = await self.engines.generate(session, prompt_ids, params)
            known[:] = prompt_ids + completion.token_ids
            if show:
                show(
                    Source.MODEL,
                    self.tokenizer.decode(completion.token_ids, skip_special_tokens=True),
                )
            return completion

        row = {"extra_info": {"question": question}, "data_source": "infer"}
        try:
            return await self.agent.run([], row, generate)
        finally:
            self.engines.forget(session)

    async def close(self) -> None:
        await self.agent.close()
        if self.server is not None:
            await self.server.shutdown()
        elif isinstance(self.engines, OpenAIEngine):
            await self.engines.close()


def answer_of(trajectory: Trajectory, tokenizer: Any) -> str | None:
    """The last answer that the model gave itself."""
    return last_answer(
        [tokenizer.decode(s.token_ids) for s in trajectory.segments if s.source is Source.MODEL]
    )


def show_colored(source: str, text: str, out: Any = None) -> None:
    """Writes a piece, in colours where a terminal reads them (and NO_COLOR is not set)."""
    out = sys.stdout if out is None else out
    if out.isatty() and "NO_COLOR" not in os.environ:
        if source == Source.OBSERVATION:
            text = f"{COLORS['observation']}{text}{PLAIN}"
        for tag in ("think", "search", "answer"):
            text = text.replace(f"<{tag}>", f"{COLORS[tag]}<{tag}>").replace(
                f"</{tag}>", f"</{tag}>{PLAIN}"
            )
    out.write(text)
    out.flush()


async def ask_aloud(asker: Asker, questions: Iterator[str]) -> None:
    """One question after the other, shown as they are answered."""
    for question in questions:
        began = time.perf_counter()
        try:
            trajectory = await asker.ask(question, show_colored)
        except TrajectoryFailed as error:
            sys.stdout.write(f"\n[failed: {error.args[0]}]\n")
            continue
        answer = answer_of(trajectory, asker.tokenizer)
        facts = (
            f"{trajectory.info['searches']} searches, {time.perf_counter() - began:.1f} s, "
            f"{trajectory.stop_reason}"
        )
        sys.stdout.write(f"\n[{'no answer' if answer is None else 'answer: ' + answer}; {facts}]\n")


def typed() -> Iterator[str]:
    """What the user types, until an empty line or the end of the input."""
    while True:
        try:
            question = input("question> ").strip()
        except EOFError:
            return
        if not question:
            return
        yield question


async def ask_file(asker: Asker, path: Path, out: Path) -> None:
    """Answers the questions of a file that `out` lacks, and writes each as it is answered. Raises
    DataError.

    Also where the answers in `out` are another model's, or were asked for otherwise.
    """
    questions = read_questions(path)
    section = asker.config.actor_rollout_ref
    agent = asker.config.agent
    made_of = {
        "model": section.model.path,
        "weights": weights_of(section.model.path),
        "sampling": section.rollout.val_kwargs.model_dump(),
        "agent": {key: value for key, value in agent.items() if key != "retriever"},
        "topk": agent.get("retriever", {}).get("topk"),
    }
    claim(out.with_suffix(".meta.json"), made_of, "set of answers")
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    done = {json.loads(line)["question"] for line in lines}
    todo = [question for question in questions if question not in done]
    slots = asyncio.Semaphore(64)
    failed = 0

    async def one(question: str) -> tuple[str, Trajectory | TrajectoryFailed]:
        async with slots:
            try:
                return question, await asker.ask(question)
            except TrajectoryFailed as error:
                return question, error

    with (
        out.open("a", encoding="utf-8") as file,
        tqdm(total=len(questions), initial=len(questions) - len(todo)) as bar,
    ):
        for coming in asyncio.as_completed([one(question) for question in todo]):
            question, result = await coming
            if isinstance(result, Trajectory):
                file.write(json.dumps(answer_record(question, result, asker.tokenizer)) + "\n")
                file.flush()
                bar.update()
            failed += not isinstance(result, Trajectory)
    if failed:
        raise DataError(
            f"{failed} questions failed and are not in {out}; run again to ask them once more"
        )


def read_questions(path: Path) -> list[str]:
    """The different questions of a file, in any form that `search_r1.data.prepare` reads, with or
    without answers.

    Raises DataError listing the rows without one.
    """
    questions: list[str] = []
    problems: list[str] = []
    for place, record in read_rows(path):
        if isinstance(record, str):
            problems.append(f"{place}: {record}")
            continue
        read = normalise(record)
        question = (record if isinstance(read, str) else read).get("question")
        if isinstance(question, str) and question.strip():
            questions.append(question)
        else:
            problems.append(f"{place}: no question")
    if problems:
        raise DataError(listed(problems))
    return list(dict.fromkeys(questions))


def answer_record(question: str, trajectory: Trajectory, tokenizer: Any) -> dict[str, Any]:
    segments = [
        {"source": str(s.source), "text": tokenizer.decode(s.token_ids)}
        for s in trajectory.segments
    ]
    return {
        "question": question,
        "answer": answer_of(trajectory, tokenizer),
        "stop_reason": trajectory.stop_reason,
        "searches": trajectory.info["searches"],
        "segments": segments,
    }


async def serve(config: PPOConfig, work: Callable[[Asker], Awaitable[None]]) -> None:
    asker = Asker(config)
    try:
        await asker.start()
        await work(asker)
    finally:
        await asker.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m search_r1.infer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="folder, checkpoint, hub name, or name at the endpoint"
    )
    parser.add_argument(
        "question",
        metavar="QUESTION",
        nargs="?",
        help="in quotes; without it you are asked for one",
    )
    parser.add_argument(
        "--endpoint", metavar="URL", help="base address of an OpenAI-compatible API, such as .../v1"
    )
    parser.add_argument(
        "--config-name", default="grpo", help="configuration to start from (default: grpo)"
    )
    parser.add_argument("--questions", type=Path, metavar="FILE", help="questions to answer")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where their answers go, JSONL")
    args, overrides = parser.parse_known_args(argv)
    if (
        args.question and "=" in args.question.split(" ")[0]
    ):  # an override in the place of the question
        args.question, overrides = None, [args.question, *overrides]
    if (args.questions is None) != (args.out is None):
        parser.error("--questions and --out go together")
    files = [path.resolve() if path else None for path in (args.questions, args.out)]
    try:
        config, _ = composed(
            args.config_name, [*given_overrides(args.model, args.endpoint), *overrides]
        )
        # what is wrong is told before anything is made or started
        answering(copy.deepcopy(config), None)
        with surroundings(config, overrides) as server:
            asked = answering(config, server.url if server else None)
            if files[0] and files[1]:
                source = files[0]
                out = files[1]
                asyncio.run(serve(asked, lambda asker: ask_file(asker, source, out)))
            else:
                questions = iter([args.question]) if args.question else typed()
                asyncio.run(serve(asked, lambda asker: ask_aloud(asker, questions)))
    except (ConfigError, DataError, ModelError) as error:
        sys.exit(f"error: {error}")
    return 0


def answering(config: DictConfig, url: str | None) -> PPOConfig:
    """The validated configuration: weights from disk, the prompt's template named, nothing of a
    training needed."""
    if url:
        config.retriever.url = url
    config.template = config.template or config.setup.template
    config.actor_rollout_ref.rollout.load_format = "auto"
    config.data.train_files = config.data.val_files = []
    return validate(as_plain(config))


if __name__ == "__main__":
    sys.exit(main())
