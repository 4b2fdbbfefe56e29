"""A small run of the closed world, whose shipped base model searches."""

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from search_r1.launch import free_port
from search_r1.search.engines import bm25
from search_r1.world.__main__ import main as make_world
from tests.e2e.runs import arguments, metrics, start, train
from tests.processes import PATIENCE_S, wait_for
from tests.retrieval import retrieval_server
from verl.rollout.vllm_server import VLLMServer
from verl.workers.config import ModelConfig, RolloutConfig

pytestmark = pytest.mark.cpu_engine

BASE = Path(__file__).parents[2] / "data" / "closed_world" / "base"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    sizes = {
        "train-people": 20,
        "test-people": 20,
        "spare-people": 0,
        "train-questions": 60,
        "test-questions": 16,
    }
    make_world(["--out", str(folder), *(f"--{key}={value}" for key, value in sizes.items())])
    bm25.build(folder / "corpus.jsonl", folder / "bm25")
    return folder


def settings(folder, world, url, steps):
    return arguments(
        folder,
        BASE,
        data__train_files=world / "train.parquet",
        data__val_files=world / "test.parquet",
        data__train_batch_size=8,
        actor_rollout_ref__rollout__n=4,
        actor_rollout_ref__rollout__temperature=0.7,
        actor_rollout_ref__actor__ppo_mini_batch_size=32,
        actor_rollout_ref__actor__ppo_max_token_len_per_gpu=1024,
        actor_rollout_ref__actor__optim__lr=1e-4,
        retriever__url=url,
        retriever__max_retries=1,
        reward__otc_grpo=0.5,
        trainer__total_training_steps=steps,
        trainer__save_freq=1,
    )


def test_a_retriever_that_dies_mid_step_loses_nothing(tmp_path, world):
    port = free_port()
    with retrieval_server(world, port=port) as (url, server):
        run = start("grpo", settings(tmp_path, world, url, 500))
        wait_for(lambda: len(metrics(tmp_path)) >= 3 or run.poll() is not None, PATIENCE_S)
        server.kill()
        output, _ = run.communicate(timeout=PATIENCE_S)
    assert run.returncode != 0
    for part in ("trajectories failed", url, "run the same command again to resume"):
        assert part in output, output[-3000:]
    before = [line["training/global_step"] for line in metrics(tmp_path)]

    with retrieval_server(world, port=port) as (url, _):
        status, output = train("grpo", settings(tmp_path, world, url, before[-1] + 2))
    assert status == 0 and f"resuming after step {before[-1]}" in output, output[-3000:]
    lines = metrics(tmp_path)
    assert [line["training/global_step"] for line in lines] == [
        *before,
        before[-1] + 1,
        before[-1] + 2,
    ]
    for line in lines[1:]:
        assert line["env/number_of_valid_search"] > 0 and line["rollout/context_violations"] == 0
        # of right answers, by the searches of their group
        assert line["reward/otc_grpo"] <= line["reward/em"]
        # T = 0.7, several turns, after 0, 1, 2... updates
        assert line["rollout/logprob_diff_mean"] <= 1e-5
        assert line["rollout/logprob_diff_max"] <= 1e-3
    every_parameter_moved(BASE, tmp_path / "run/hf")
    vllm_reads_what_transformers_reads(tmp_path / "run/hf")


def every_parameter_moved(before, after):
    old = dict(AutoModelForCausalLM.from_pretrained(before).named_parameters())
    new = dict(AutoModelForCausalLM.from_pretrained(after).named_parameters())
    assert old.keys() == new.keys() and not [
        name for name in old if torch.equal(old[name], new[name])
    ]


def vllm_reads_what_transformers_reads(path):
    prompt = AutoTokenizer.from_pretrained(path)("Question: Where does Dupsel live?\n")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(path)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[
        0, len(prompt) :
    ].tolist()

    async def generate():
        rollout = RolloutConfig(
            dtype="float32", load_format="auto", cpu_threads=1, cpu_kvcache_gb=0.2
        )
        model = ModelConfig(path=str(path))
        server = VLLMServer(
            rollout, model, max_model_len=128, device="cpu", replica_rank=0, num_replicas=1
        )
        await server.start()
        try:
            sampling = {
                "temperature": 0.0,
                "top_p": 1.0,
                "top_k": -1,
                "max_tokens": 8,
                "stop": [],
                "seed": None,
            }
            sampling["log_probs"] = False
            return await server.generate("r0", prompt, sampling)
        finally:
            await server.shutdown()

    assert asyncio.run(generate()).token_ids == expected
