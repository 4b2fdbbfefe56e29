"""Does evaluation keep the engine busy? Its tokens/s against a bare vLLM run over the same prompts.

    python scripts/bench/evaluation.py [--layers 4] [--width 256] [--questions 512] [--seqs 64]
    [--repeats 3]

A random model writes turns of 32 to 96 tokens: two searches, answered at once with passages from
memory, and an answer. The bare run gets the context of every turn as a prompt of its own, all at
once, and writes as many tokens: no turn waits for the one before it. Same threads, same precision,
prefix caching in both; the start of the engines and of the agent workers is not counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MAX_TURN_TOKENS = 96
SEARCHES = 2
BARE = "bare"


def make_model(folder: str, layers: int, width: int) -> None:
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "closed_world" / "base")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=4096,
    )
    config.eos_token_id = tokenizer.eos_token_id
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def evaluate_once(
    folder: str, repeat: int, questions: int, seqs: int
) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of an evaluation without the engine's start, and its records."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from verl.trainer.evaluation import evaluate
    from verl.trainer.main_eval import rollout_of
    from verl.trainer.preparation import load_val_set, prepare

    settings = [
        "experiment=closed_world/grpo",
        f"actor_rollout_ref.model.path={folder}",
        f"max_turns={SEARCHES}",
        "agent._target_=scripts.bench.instant_loop.InstantLoop",
        f"data.max_response_length={MAX_TURN_TOKENS}",
        f"data.val_files={folder}/questions.parquet",
        f"data.train_files={folder}/questions.parquet",
        f"trainer.default_local_dir={folder}/run{repeat}",
        "actor_rollout_ref.rollout.load_format=auto",
        "actor_rollout_ref.rollout.val_kwargs.temperature=1",
        "data.max_prompt_length=1024",
        f"actor_rollout_ref.rollout.max_num_seqs={seqs}",
    ]
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        raw: Any = OmegaConf.to_container(compose("grpo", settings), resolve=True)
    config, tokenizer, _, _ = prepare(raw)
    path = Path(folder) / f"run{repeat}" / "evaluation.jsonl"
    path.parent.mkdir()
    with rollout_of(config) as rollout:
        val_set = load_val_set(config, tokenizer)
        began = time.perf_counter()
        evaluate(config, val_set, rollout, tokenizer, path)
        seconds = time.perf_counter() - began
    records = [json.loads(line) for line in path.open()]
    assert len(records) == questions
    return seconds, records


def calls_of(records: list[dict[str, Any]]) -> list[tuple[list[int], int]]:
    """(context, tokens written) of every turn."""
    calls = []
    for record in records:
        context = list(record["prompt_ids"])
        for segment in record["segments"]:
            if segment["source"] == "model":
                calls.append((list(context), len(segment["token_ids"])))
            context += segment["token_ids"]
    return calls


def bare(folder: str, seqs: int) -> None:
    """Prints the seconds over calls.json; in a process of its own."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    from vllm import LLM, SamplingParams

    calls = json.loads((Path(folder) / "calls.json").read_text())
    engine = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024 + MAX_TURN_TOKENS,
        enable_prefix_caching=True,
        max_num_seqs=seqs,
        max_num_batched_tokens=8192,
        kv_cache_memory_bytes=2**30,
        block_size=32,
        enable_chunked_prefill=False,
        disable_log_stats=True,
    )
    params = [SamplingParams(temperature=1, max_tokens=n, ignore_eos=True) for _, n in calls]
    prompts: Any = [{"prompt_token_ids": ids} for ids, _ in calls]
    began = time.perf_counter()
    engine.generate(prompts, params, use_tqdm=False)
    sys.stdout.write(f"\n{BARE} {time.perf_counter() - began}\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument(
        "--seqs", type=int, default=64, help="largest batch of both engines (default: 64)"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        return bare(args.bare, args.seqs)
    sys.path.insert(0, str(ROOT))
    from instant_loop import write_questions

    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, args.layers, args.width)
        write_questions(f"{folder}/questions.parquet", args.questions)
        speeds: dict[str, list[float]] = {"evaluation": [], BARE: []}
        for repeat in range(args.repeats):
            seconds, records = evaluate_once(folder, repeat, args.questions, args.seqs)
            calls = calls_of(records)
            tokens = sum(n for _, n in calls)
            speeds["evaluation"].append(tokens / seconds)
            (Path(folder) / "calls.json").write_text(json.dumps(calls))
            command = [sys.executable, __file__, "--bare", folder, "--seqs", str(args.seqs)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = next(line for line in out.splitlines() if line.startswith(f"{BARE} "))
            speeds[BARE].append(tokens / float(found.removeprefix(f"{BARE} ")))
    middle = {name: statistics.median(values) for name, values in speeds.items()}
    rounded = {name: [round(v) for v in values] for name, values in speeds.items()}
    sys.stdout.write(
        f"tokens/s of each repeat: {rounded}\nratio: {middle['evaluation'] / middle[BARE]:.3f} "
        "(goal .9)\n"
    )


if __name__ == "__main__":
    main()
