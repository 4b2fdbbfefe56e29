"""The rollout loop of the original, over vLLM; beside_original.py starts it in its checkout.

Plays a batch for every line on its standard input, and writes what came of it. The loop is
LLMGenerationManager.run_llm_loop as it stands in the checkout. What it calls to generate is here:
the engine of this environment, sampled from as the original does.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from search_r1.llm_agent.generation import (  # pyright: ignore
    GenerationConfig,
    LLMGenerationManager,
)
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams, TokensPrompt

from verl import DataProto  # pyright: ignore


class Engine:
    """Generates for a batch, as the original's worker group does."""

    def __init__(self, given: dict[str, Any], pad: int) -> None:
        self.llm = LLM(given["model"], **given["engine"])
        self.pad = pad
        self.longest = given["max_response_length"]
        self.sampling = SamplingParams(
            temperature=1.0,
            max_tokens=self.longest,
            stop=given["stop"],
            include_stop_str_in_output=True,
        )
        self.generated = 0

    def generate_sequences(self, batch: Any) -> Any:
        """`responses` [B, max_response_length] of the unpadded rows of `input_ids`."""
        ids, mask = batch.batch["input_ids"], batch.batch["attention_mask"].bool()
        prompts: list[Any] = [
            TokensPrompt(prompt_token_ids=row[kept].tolist())
            for row, kept in zip(ids, mask, strict=True)
        ]
        outputs = self.llm.generate(prompts, self.sampling, use_tqdm=False)
        responses = torch.full((len(prompts), self.longest), self.pad)
        for row, output in zip(responses, outputs, strict=True):
            sampled = list(output.outputs[0].token_ids)
            self.generated += len(sampled)
            row[: len(sampled)] = torch.tensor(sampled)
        return DataProto.from_dict({"responses": responses})


def left_padded(prompts: list[list[int]], pad: int) -> Any:
    """The batch that the original's trainer hands to the loop."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = (ids != pad).long()
    positions = (mask.cumsum(1) - 1) * mask
    return DataProto.from_dict(
        {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    )


def play(manager: Any, engine: Engine, prompts: list[list[int]]) -> dict[str, Any]:
    """Seconds of one batch, its texts, its searches, and how many tokens were generated."""
    batch = left_padded(prompts, engine.pad)
    before = engine.generated
    began = time.perf_counter()
    output = manager.run_llm_loop(batch, batch.batch["input_ids"].clone())
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "texts": manager.tokenizer.batch_decode(
            output.batch["responses"], skip_special_tokens=True
        ),
        "searches": sum(output.meta_info["valid_search_stats"]),
        "generated": engine.generated - before,
    }


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    engine = Engine(given, tokenizer.pad_token_id)
    config = GenerationConfig(**given["loop"], num_gpus=1)
    manager = LLMGenerationManager(tokenizer, engine, config)
    for _ in sys.stdin:
        result = play(manager, engine, given["prompts"])
        sys.stdout.write(f"result {json.dumps(result)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
