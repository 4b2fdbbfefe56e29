"""Speed of the actor's update against a bare PyTorch loop: same model, same packed tokens, one
process, taking turns.

    python scripts/bench/update.py [--shape tiny] [--rows 12] [--repeats 5] [--peak-tflops 989]

The bare loop is the plain Hugging Face model (no FSDP, no masks to count, no metrics), a clipped
loss in five lines, and AdamW. On a CPU the times are CPU seconds of one thread, which other
processes disturb less. With --peak-tflops (989: bfloat16 on a Hopper card) the model FLOPs
utilisation (MFU) is reported as well.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from verl.protocol import DataProto
from verl.trainer.sft import start_process_group
from verl.workers.actor import ActorWorker
from verl.workers.attention import choose_attention
from verl.workers.config import ActorConfig, FSDPConfig, ModelConfig, OptimConfig, RolloutConfig
from verl.workers.forward import pack
from verl.workers.update import Budget, micro_batches

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
    "tiny": (256, 704, 8, 4, 2, 8_192, True),
    "0.5B": (896, 4_864, 24, 14, 2, 151_936, True),
    "1.5B": (1_536, 8_960, 28, 12, 2, 151_936, True),
    "3B": (2_048, 11_008, 36, 16, 2, 151_936, True),
}
LOW = 225
HIGH = 923
TRAINED = 0.25
"""Lengths of real trajectories (docs/results/algorithms.md), and the share of their tokens that is
trained on."""


def hf_config(shape: str) -> Qwen2Config:
    hidden, inter, layers, heads, kv, vocab, tied = SHAPES[shape]
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=inter,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )


def batch_of(rows: int, vocab: int) -> DataProto:
    """Trajectories with one observation each."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(LOW, HIGH + 1, (rows,), generator=g)
    prompt = LOW // 4
    width = int(lengths.max()) - prompt
    column = torch.arange(width).expand(rows, -1)
    real = column < (lengths - prompt)[:, None]
    trained = real & ((column % 40) < 40 * TRAINED)
    zeros = torch.zeros(rows, width)
    return DataProto.from_dict(
        {
            "prompts": torch.randint(0, vocab, (rows, prompt), generator=g),
            "responses": torch.randint(0, vocab, (rows, width), generator=g),
            "attention_mask": torch.cat([torch.ones(rows, prompt), real], dim=1).long(),
            "response_mask": trained.long(),
            "advantages": torch.randn(rows, 1, generator=g).expand(rows, width).contiguous(),
            "old_log_probs": zeros - 9,
            "mini_batch": torch.zeros(rows, dtype=torch.long),
        },
        meta_info={"num_mini_batches": {"mini_batch": 1}},
    )


def bare_loop(
    path: str, data: DataProto, budget: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    """A function that takes one optimizer step."""
    config = hf_config_of(path)
    attention = choose_attention(config, device.type == "cuda", dtype)
    model = (
        AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention).to(device).eval()
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    parts = micro_batches(data.batch["attention_mask"].sum(1).tolist(), Budget(budget))
    rows = [data[part].to(device) for part in parts]
    packed = [pack(part) for part in rows]
    count = int(data.batch["response_mask"].sum())

    def step() -> None:
        for part, row in zip(packed, rows, strict=True):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(**part.inputs, logits_to_keep=part.chosen_at).logits[0]
            log_p = logits.float().log_softmax(-1).gather(-1, part.labels[:, None])[:, 0]
            mask = part.response_mask
            ratio = (log_p - row.batch["old_log_probs"][mask]).exp()
            gain = row.batch["advantages"][mask]
            loss = -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain).sum() / count
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def hf_config_of(path: str) -> Qwen2Config:
    return Qwen2Config.from_pretrained(path)


def framework(path: str, data: DataProto, budget: int, dtype: str) -> Callable[[], None]:
    """The same step through the actor, on one rank."""
    actor = ActorConfig(
        ppo_max_token_len_per_gpu=budget,
        optim=OptimConfig(lr=1e-6),
        fsdp_config=FSDPConfig(model_dtype="float32", dtype=dtype),  # pyright: ignore
    )
    worker = ActorWorker(
        ModelConfig(path=path, enable_gradient_checkpointing=False), actor, RolloutConfig(), 1000
    )

    def step() -> None:
        metrics = worker.update_actor(data)
        assert metrics["optimizer_steps"] == 1

    return step


def seconds(step: Callable[[], None], device: torch.device) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def flops(config: Qwen2Config, data: DataProto) -> float:
    """Forward and backward: 6 per matrix entry and token (the head only for trained tokens), and
    causal attention."""
    hidden = config.hidden_size
    inter = config.intermediate_size
    layers = config.num_hidden_layers
    kv = hidden * config.num_key_value_heads // config.num_attention_heads
    lengths = data.batch["attention_mask"].sum(1).double()
    block = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inter
    head = config.vocab_size * hidden * float(data.batch["response_mask"].sum())
    # 2 products x 2 FLOPs, half of them masked, x 3 / 6
    attention = layers * hidden * float(lengths.square().sum())
    return 6 * (layers * block * float(lengths.sum()) + head + attention)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--rows", type=int, default=12, help="trajectories per optimizer step")
    parser.add_argument("--budget", type=int, default=4096, help="tokens per micro-batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float)
    args = parser.parse_args()
    start_process_group(threads=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    config = hf_config(args.shape)
    data = batch_of(args.rows, config.vocab_size)
    tokens = int(data.batch["attention_mask"].sum())
    with tempfile.TemporaryDirectory() as path:
        with device:
            torch.manual_seed(0)
            model = Qwen2ForCausalLM(config)
        model.save_pretrained(path)
        del model
        steps = {
            "bare loop": bare_loop(path, data, args.budget, device, getattr(torch, dtype)),
            "actor": framework(path, data, args.budget, dtype),
        }
    for step in steps.values():
        seconds(step, device)
    times = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    lines = [
        f"{args.shape}: {args.rows} trajectories, {tokens} tokens a step, {dtype}, {device.type}"
    ]
    figures: dict[str, object] = {}
    for name, taken in times.items():
        rate = tokens / statistics.median(taken)
        mfu = flops(config, data) / statistics.median(taken) / 1e12
        of = f", MFU {mfu / args.peak_tflops:.1%}" if args.peak_tflops else ""
        lines.append(
            f"{name:10} {rate:10,.0f} tokens/s ({min(taken):.3f} to {max(taken):.3f} s){of}"
        )
        figures[name] = f"{rate:,.0f} tokens/s{of}"
    ratios = [bare / ours for bare, ours in zip(times["bare loop"], times["actor"], strict=True)]
    lines.append(
        f"actor / bare loop: {statistics.median(ratios):.3f} ({min(ratios):.3f} to "
        f"{max(ratios):.3f})"
    )
    sys.stdout.write("\n".join(lines) + "\n")
    figures["actor / bare loop"] = round(statistics.median(ratios), 3)
    sys.stdout.write(f"RESULT {json.dumps(figures)}\n")


if __name__ == "__main__":
    main()
