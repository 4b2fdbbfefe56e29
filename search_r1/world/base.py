"""Builds the base model of the closed world: `python -m search_r1.world.base --out DIR`.

The model begins with random weights and is fine-tuned in stages on traces (traces.py). It learns to
recall facts from a list, then to read them out of passages in clean traces; both stages last until
enough of the copied words are right. Then it goes on reading at a decaying learning rate, and
finally learns the poor policy from which reinforcement learning starts.

With `--arithmetic` it is the base for questions about years, in which a program calculates. With
`--deep` it is the base for questions of up to six hops, whose contexts are folded.
"""

import argparse
import logging
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2ForCausalLM

from search_r1.world.arithmetic_traces import (
    CLEAN,
    POOR_ARITHMETIC,
    ArithmeticWriter,
    YearRecallWriter,
)
from search_r1.world.deep_traces import CLEAN_DEEP, POOR_DEEP, DeepTraceWriter
from search_r1.world.model import grown_model, random_model
from search_r1.world.names import FIRST, SECOND
from search_r1.world.tokenizer import (
    EOS,
    SUMMARY_TAGS,
    Writer,
    poor_traces,
    train_tokenizer,
    training_texts,
)
from search_r1.world.traces import (
    POOR,
    READING,
    PolicyMix,
    RecallWriter,
    TraceSegment,
    TraceWriter,
    encode_trace,
)
from verl.trainer.sft import Example, SFTConfig, SFTTrainer, start_process_group
from verl.utils.places import shipped
from verl.workers.config import FSDPConfig, ModelConfig, OptimConfig

logger = logging.getLogger(__name__)


Draw = Callable[[], list[TraceSegment]]
SHIPPED = shipped("data/closed_world/base")
"""The base of the closed world."""
TURN_ENDS = ("</answer>", "</search>")
GIVEN = ("prompt", "observation", "finding")
"""The kinds of segments behind which a turn begins."""


@dataclass(frozen=True)
class Stage:
    name: str
    traces: Writer
    until: float
    """The stage ends when the running share of copied words that are right exceeds this, ..."""
    max_steps: int
    """... and at the latest after this many steps."""
    rows: int = 48
    """Rows of a step."""


READING_STAGES = (
    Stage("recall", RecallWriter, 0.95, 500),
    Stage("reading", lambda rng: TraceWriter(rng, READING), 0.965, 450),
)
SETTLED_STAGES = (Stage("reading, settled", lambda rng: TraceWriter(rng, READING), 2.0, 140),)
POOR_STAGES = (Stage("poor policy", lambda rng: TraceWriter(rng, POOR), 2.0, 170),)


@dataclass(frozen=True)
class Task:
    """What a base model is made for, beside the stages of its training."""

    questions: Writer
    """Clean traces, by which it is asked what it has learned."""
    texts: Writer
    """Traces that its tokenizer is trained on."""
    numbers: bool = False
    """Whether its tokenizer has ids for pairs of digits."""
    tags: tuple[str, ...] = ()
    """Further tags of its tokenizer."""
    ends: tuple[str, ...] = TURN_ENDS
    """What ends an action."""
    start: Path | None = None
    """Folder of the base that the model begins as; null: with random weights."""


NAMES = Task(lambda rng: TraceWriter(rng, PolicyMix()), poor_traces)
ARITHMETIC = Task(
    lambda rng: ArithmeticWriter(rng, CLEAN),
    lambda rng: ArithmeticWriter(rng, POOR_ARITHMETIC),
    numbers=True,
    ends=(*TURN_ENDS, "</python>"),
)
ARITHMETIC_STAGES = (
    (
        Stage("recall", YearRecallWriter, 0.95, 500),
        Stage("reading", ARITHMETIC.questions, 0.975, 450),
    ),
    (Stage("reading, settled", ARITHMETIC.questions, 2.0, 140),),
    (Stage("poor policy", ARITHMETIC.texts, 2.0, 170),),
)
"""Reading, settled reading and the poor policy."""


def chain_traces(rng: random.Random) -> DeepTraceWriter:
    """Makes what draws long traces with short observations: in them most is to choose the fact that
    comes next."""
    return DeepTraceWriter(rng, CLEAN_DEEP, num_passages=1, is_noisy=False)


DEEP = Task(
    lambda rng: DeepTraceWriter(rng, CLEAN_DEEP),
    lambda rng: DeepTraceWriter(rng, POOR_DEEP),
    tags=tuple(SUMMARY_TAGS),
    ends=(*TURN_ENDS, "</summary>", EOS),
    start=SHIPPED,
)
DEEP_STAGES = (
    (Stage("chains", chain_traces, 0.975, 200),),
    (Stage("reading, settled", DEEP.questions, 2.0, 200, rows=32),),
    (Stage("poor policy", DEEP.texts, 2.0, 100, rows=32),),
)
"""The same for the model that the base of the closed world becomes: it can recall already."""


MADE_FOR = {
    "names": ((READING_STAGES, SETTLED_STAGES, POOR_STAGES), NAMES),
    "arithmetic": (ARITHMETIC_STAGES, ARITHMETIC),
    "deep": (DEEP_STAGES, DEEP),
}
"""Stages and task by what a base is made for."""


def examples(draw: Draw, tokenizer: PreTrainedTokenizerFast) -> Iterator[Example]:
    """Yields training rows without end; `watch_mask` marks the facts copied out of passages."""
    while True:
        row = encode_trace(draw(), tokenizer)
        yield {
            "input_ids": row["input_ids"],
            "loss_mask": row["loss_mask"],
            "watch_mask": row["read_mask"],
        }


def run_stage(stage: Stage, trainer: SFTTrainer, rows: Iterator[Example]) -> float:
    """Trains a stage; returns the running share of copied words that were right at its end."""
    right = 0.0
    progress = tqdm(range(stage.max_steps), desc=stage.name, disable=dist.get_rank() > 0)
    for _ in progress:
        metrics = trainer.step([next(rows) for _ in range(stage.rows)])
        right = 0.9 * right + 0.1 * metrics["watched"]
        progress.set_postfix(loss=f"{metrics['loss']:.3f}", read=f"{right:.3f}")
        if right > stage.until:
            break
    progress.close()
    return right


def train(
    stages: Sequence[Stage],
    start: str,
    out: str,
    optim: OptimConfig,
    seed: int,
    rng: random.Random,
    asked: int,
    task: Task = NAMES,
) -> None:
    """Trains the model in `start` through `stages` and writes it to `out`.

    Then asks it `asked` fresh questions to show what it has learned.
    """
    tokenizer = AutoTokenizer.from_pretrained(start)
    config = SFTConfig(
        model=ModelConfig(path=start, enable_gradient_checkpointing=False),
        output=out,
        train_batch_size=48,
        max_token_len_per_gpu=2048,
        seed=seed,
        total_training_steps=sum(s.max_steps for s in stages),
        optim=optim,
        fsdp=FSDPConfig(dtype="float32"),
    )
    trainer = SFTTrainer(config)
    for stage in stages:
        began = time.monotonic()
        right = run_stage(stage, trainer, examples(stage.traces(rng), tokenizer))
        logger.info(
            "%s: %.3f of the copied words right, %.0f s",
            stage.name,
            right,
            time.monotonic() - began,
        )
    trainer.save(out)
    if dist.get_rank() == 0:
        logger.info(
            "%.3f of fresh questions answered when given the gold passages",
            answered(out, asked, task=task),
        )


def answered(path: str | Path, count: int = 300, seed: int = 1, task: Task = NAMES) -> float:
    """Measures whether a model can read: the share of `count` fresh questions it answers right.

    The model gets a row of a clean trace up to its last turn, where the gold passage is at any rank
    among distractors, and continues it greedily. Where a program follows, that must be right, and
    where the row ends with a summary or a finding, these.
    """
    model: Any = Qwen2ForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ends = tokenizer.convert_tokens_to_ids(list(task.ends))
    writer = task.questions(random.Random(seed))
    right = 0
    for _ in range(count):
        segments = writer()
        last = max(i for i, segment in enumerate(segments) if segment.kind in GIVEN)
        ids = torch.tensor([encode_trace(segments[: last + 1], tokenizer)["input_ids"]])
        mask = torch.ones_like(ids)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=64, do_sample=False, eos_token_id=ends
        )
        right += tokenizer.decode(out[0, ids.shape[1] :]).endswith(
            next_action(segments[last + 1 :])
        )
    return right / count


def next_action(segments: Sequence[TraceSegment]) -> str:
    """The end of the first turn in a trace, behind its thought, if it has one."""
    turn = "".join(s.text for s in takewhile(lambda s: s.kind != "result", segments))
    return turn[max(0, turn.find("</think>")) :]


def tokenizer_of(task: Task) -> PreTrainedTokenizerFast:
    """Trains the tokenizer of a task."""
    texts = training_texts(random.Random(0), writer=task.texts)
    return train_tokenizer(texts, [*FIRST, *SECOND], task.numbers, task.tags)


def build(
    out: Path,
    seed: int,
    reading: Sequence[Stage] = READING_STAGES,
    settled: Sequence[Stage] = SETTLED_STAGES,
    poor: Sequence[Stage] = POOR_STAGES,
    asked: int = 300,
    task: Task = NAMES,
    keep_reader: Path | None = None,
) -> None:
    """Trains the tokenizer and the model, and writes both. The process group must exist.

    After each part of the training the model is asked `asked` fresh questions to show its progress.
    What reads well, before it becomes the poor policy, is written to `keep_reader`.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tokenizer = tokenizer_of(task)
    warmup = min(1.0, 50 / sum(s.max_steps for s in reading))
    constant = OptimConfig(lr=1e-3, betas=(0.9, 0.99), lr_warmup_steps_ratio=warmup)
    decaying = OptimConfig(lr=7e-4, betas=(0.9, 0.99), lr_scheduler_type="cosine")
    with tempfile.TemporaryDirectory() as folder:
        start, reader, settled_reader = (
            f"{folder}/{name}" for name in ("start", "reader", "settled")
        )
        model = grown_model(task.start, tokenizer) if task.start else random_model(tokenizer)
        model.save_pretrained(start)
        tokenizer.save_pretrained(start)
        train(reading, start, reader, constant, seed, rng, asked, task)
        train(settled, reader, settled_reader, decaying, seed, rng, asked, task)
        if keep_reader is not None:
            shutil.copytree(settled_reader, keep_reader, dirs_exist_ok=True)
        train(poor, settled_reader, str(out), decaying, seed, rng, asked, task)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m search_r1.world.base", description="Build the base model."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights and traces (default: 0)"
    )
    parser.add_argument(
        "--threads", type=int, default=None, help="CPU threads (default: all cores)"
    )
    parser.add_argument(
        "--arithmetic", action="store_true", help="the base for worlds with arithmetic"
    )
    parser.add_argument("--deep", action="store_true", help="the base for deep questions")
    parser.add_argument(
        "--keep-reader", type=Path, help="folder for the model before it becomes the poor policy"
    )
    args = parser.parse_args(argv)
    if args.arithmetic and args.deep:
        parser.error("--arithmetic, --deep: one of them, no base is made for both")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start_process_group(args.threads)
    try:
        kind = "arithmetic" if args.arithmetic else "deep" if args.deep else "names"
        stages, task = MADE_FOR[kind]
        build(args.out, args.seed, *stages, task=task, keep_reader=args.keep_reader)
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
