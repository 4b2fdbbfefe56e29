"""`python -m search_r1.world.base --out DIR`: builds the base model of the closed world, from random weights.

Stages of supervised fine-tuning (traces.py): reading one, two, three passages, then questions of one to three hops,
each until the words copied out of passages are right often enough; then the poor policy, for a number of steps.
"""

import argparse
import logging
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from search_r1.world.generate import FIRST, SECOND
from search_r1.world.tokenizer import train_tokenizer, training_texts
from search_r1.world.traces import POOR, READING, Piece, PolicyMix, TraceWriter, encode_trace
from verl.trainer.sft import Example, SFTConfig, SFTTrainer, start_process_group
from verl.workers.config import FSDPConfig, ModelConfig, OptimConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    name: str
    num_passages: int
    hops: tuple[int, ...]
    mix: PolicyMix
    drill: float
    """Share of drills."""
    until: float
    """Ends when the running share of copied words that are right exceeds this..."""
    max_steps: int
    """... or after this many steps."""


READING_STAGES = (
    Stage("one passage", 1, (1,), READING, 0.25, 0.85, 400),
    Stage("two passages", 2, (1,), READING, 0.25, 0.9, 240),
    Stage("three passages, three hops", 3, (1, 2, 3), READING, 0.1, 0.985, 200),
)
POOR_STAGES = (Stage("poor policy", 3, (1, 2, 3), POOR, 0.0, 2.0, 170),)
"""At a lower rate that decays: the reading settles while the policy is spoiled."""


def random_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Four layers of width 128. The head starts as a copy of the embedding: that eases copying."""
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=False,
        bos_token_id=None,
    )  # fmt: skip
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id  # pyright: ignore
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    return model


def examples(stage: Stage, rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> Iterator[Example]:
    """Endless rows of a stage; `watch_mask` marks the words copied out of passages."""
    writers = [TraceWriter(rng, stage.mix, n, stage.hops) for n in range(1, stage.num_passages + 1)]
    while True:
        writer = writers[-1] if rng.random() < 0.75 else rng.choice(writers)
        draw: Callable[[], list[Piece]] = writer.drill if rng.random() < stage.drill else writer
        row = encode_trace(draw(), tokenizer)
        yield {"input_ids": row["input_ids"], "loss_mask": row["loss_mask"], "watch_mask": row["read_mask"]}


def run_stage(stage: Stage, trainer: SFTTrainer, rows: Iterator[Example]) -> float:
    """The running share of copied words that were right at its end."""
    right = 0.0
    progress = tqdm(range(stage.max_steps), desc=stage.name, disable=dist.get_rank() > 0)
    for _ in progress:
        metrics = trainer.step([next(rows) for _ in range(trainer.config.train_batch_size)])
        right = 0.9 * right + 0.1 * metrics["watched"]
        progress.set_postfix(loss=f"{metrics['loss']:.3f}", read=f"{right:.3f}")
        if right > stage.until:
            break
    progress.close()
    return right


def train(stages: Sequence[Stage], start: str, out: str, optim: OptimConfig, seed: int, rng: random.Random) -> None:
    """Runs `stages` on the model in `start` and writes it to `out`."""
    tokenizer = AutoTokenizer.from_pretrained(start)
    config = SFTConfig(
        model=ModelConfig(path=start, enable_gradient_checkpointing=False), output=out, train_batch_size=48,
        micro_batch_size_per_gpu=12, seed=seed, total_training_steps=sum(s.max_steps for s in stages),
        optim=optim, fsdp=FSDPConfig(dtype="float32"),
    )  # fmt: skip
    trainer = SFTTrainer(config)
    for stage in stages:
        began = time.monotonic()
        right = run_stage(stage, trainer, examples(stage, rng, tokenizer))
        logger.info("%s: reading %.3f, %.0f s", stage.name, right, time.monotonic() - began)
    trainer.save(out)


def build(out: Path, seed: int, reading: Sequence[Stage] = READING_STAGES, poor: Sequence[Stage] = POOR_STAGES) -> None:
    """Trains the tokenizer and the model, and writes both. The process group must exist."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(training_texts(random.Random(0)), [*FIRST, *SECOND])
    with tempfile.TemporaryDirectory() as start, tempfile.TemporaryDirectory() as reader:
        random_model(tokenizer).save_pretrained(start)
        tokenizer.save_pretrained(start)
        warmup = 50 / sum(s.max_steps for s in reading)
        optim = OptimConfig(lr=1e-3, betas=(0.9, 0.99), lr_warmup_steps_ratio=warmup)
        train(reading, start, reader, optim, seed, rng)
        optim = OptimConfig(lr=7e-4, betas=(0.9, 0.99), lr_scheduler_type="cosine")
        train(poor, reader, str(out), optim, seed, rng)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m search_r1.world.base", description="Build the base model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and traces (default: 0)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: all cores)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start_process_group(args.threads)
    try:
        build(args.out, args.seed)
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
