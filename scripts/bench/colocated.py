"""A short GRPO run of a random model in which trainer and engine share one GPU: what sync, sleep
and update take.

    python scripts/bench/colocated.py [--shape 0.5B] [--steps 5] [--prompts 32] [--group 8]

The real command (`verl.trainer.main_ppo`) in bfloat16 over float32 masters. Every trajectory
searches twice, and what it finds is there at once (instant_loop.py): no retriever is needed, and no
time of one counts. Reported are medians; update_weights is wake-up and CUDA IPC transfer. Neither
the first step counts, which compiles, nor the last, which validates and saves. Model and checkpoint
(14 bytes per parameter in all) lie in --dir while it runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from instant_loop import write_questions
from transformers import AutoTokenizer, Qwen2ForCausalLM
from update import SHAPES, hf_config

ROOT = Path(__file__).resolve().parents[2]
SEARCHES = 2
TURN_TOKENS = 128
TIMES = ("update_weights", "sleep", "gen", "old_log_prob", "ref", "update_actor", "step")
FIGURES = {
    "perf/throughput": "tokens/s",
    "rollout/logprob_diff_mean": "nats between engine and trainer",
}


def make_model(folder: Path, shape: str, device: str) -> None:
    """Random weights, under the closed world's tokenizer: its ids are the first of the shape's
    vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "closed_world" / "base")
    config = hf_config(shape)
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()  # trainer and engine need it


def overrides(folder: Path, args: argparse.Namespace, device: str) -> list[str]:
    """Of `--config-name grpo`."""
    files = folder / "questions.parquet"
    main = "actor_rollout_ref"
    settings = {
        "agent._target_": "scripts.bench.instant_loop.InstantLoop",
        "max_turns": SEARCHES,
        "reward.em": 0,
        "reward.random": 1,  # rewards that differ, so that something is learned
        "data.train_files": files,
        "data.val_files": files,
        "data.val_data_num": 1,
        "data.train_batch_size": args.prompts,
        "data.max_response_length": TURN_TOKENS,
        "data.max_prompt_length": 1024,
        f"{main}.model.path": folder,
        f"{main}.model.enable_gradient_checkpointing": "true",
        f"{main}.actor.ppo_mini_batch_size": args.prompts * args.group,
        f"{main}.actor.ppo_max_token_len_per_gpu": args.budget,
        f"{main}.actor.optim.lr": 1e-6,
        f"{main}.actor.fsdp_config.dtype": "bfloat16",
        f"{main}.ref.fsdp_config.dtype": "bfloat16",
        f"{main}.ref.fsdp_config.model_dtype": "bfloat16",
        f"{main}.rollout.n": args.group,
        f"{main}.rollout.dtype": "bfloat16",
        f"{main}.rollout.gpu_memory_utilization": args.engine_share,
        f"{main}.rollout.num_agent_workers": 4,
        f"{main}.rollout.log_prob_max_token_len_per_gpu": 2 * args.budget,
        "trainer.device": device,
        "trainer.n_gpus_per_node": 1,
        "trainer.total_training_steps": args.steps + 2,
        "trainer.val_before_train": "false",
        "trainer.test_freq": -1,
        "trainer.save_freq": -1,
        "trainer.save_hf": "false",
        "trainer.logger": "[console]",
        "trainer.rollout_data_freq": -1,
        "trainer.experiment_name": "colocated",
        "trainer.default_local_dir": folder / "run",
    }
    return [f"{key}={value}" for key, value in settings.items()]


def train(folder: Path, args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """The metrics of the steps that count. Exits with the status of a run that failed, whose output
    is then shown."""
    make_model(folder, args.shape, device)
    write_questions(folder / "questions.parquet", args.prompts)
    command = [
        sys.executable,
        "-m",
        "verl.trainer.main_ppo",
        "--config-name",
        "grpo",
        *overrides(folder, args, device),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.stdout.write(done.stdout[-6000:])
        sys.exit(done.returncode)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()][1:-1]


def report(lines: list[dict[str, Any]]) -> str:
    """Medians, with the smallest and the largest value."""
    rows = [(f"timing_s/{name}", "s") for name in TIMES] + list(FIGURES.items())
    text = []
    for key, unit in rows:
        values = [line[key] for line in lines]
        text.append(
            f"{key:26} {statistics.median(values):12,.4g} {unit} ({min(values):,.4g} to "
            f"{max(values):,.4g})"
        )
    return "\n".join(text) + "\n"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="0.5B")
    parser.add_argument("--steps", type=int, default=5, help="training steps that count")
    parser.add_argument("--prompts", type=int, default=32, help="prompts per step")
    parser.add_argument("--group", type=int, default=8, help="trajectories per prompt")
    parser.add_argument("--budget", type=int, default=16384, help="tokens per micro-batch")
    parser.add_argument(
        "--engine-share", type=float, default=0.5, help="rollout.gpu_memory_utilization"
    )
    parser.add_argument("--dir", default="runs", help="where the model and the run lie meanwhile")
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="cpu: a rehearsal, with --shape tiny",
    )
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: scripts/bench/colocated.py needs a CUDA device, and torch sees none")
    os.makedirs(args.dir, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="colocated-", dir=args.dir) as folder:
        lines = train(Path(folder).resolve(), args, args.device)
    count = args.prompts * args.group
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    tokens = statistics.median(line["perf/total_num_tokens"] for line in lines)
    sys.stdout.write(
        f"{args.shape} on one {gpu}: {count} trajectories, {tokens:,.0f} tokens a step\n"
    )
    sys.stdout.write(report(lines))
    medians = {key: statistics.median(line[key] for line in lines) for key in FIGURES}
    medians |= {
        name: statistics.median(line[f"timing_s/{name}"] for line in lines) for name in TIMES
    }
    sys.stdout.write(
        f"RESULT {json.dumps({key: round(value, 4) for key, value in medians.items()})}\n"
    )


if __name__ == "__main__":
    main()
