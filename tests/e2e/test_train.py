"""The real command from prompt to checkpoint: Ray, FSDP, vLLM, HTTP."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from search_r1 import export
from tests.documented_metrics import undocumented
from tests.e2e.runs import arguments, metrics, train
from tests.models import make_tiny_qwen2
from verl.trainer.console import LOG
from verl.utils.model_names import ready_model

pytestmark = pytest.mark.cpu_engine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_qwen2(tmp_path_factory.mktemp("model"), tied=True)


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """A reward that varies even with random weights: the length of the response."""
    path = tmp_path_factory.mktemp("reward") / "reward.py"
    path.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    assert data_source == 'tiny' and extra_info['hops'] == 1\n"
        "    return {'score': len(solution_str) / 100, 'letters': len(solution_str)}\n"
    )
    return path


def assert_console_is_quiet(output, log):
    """The first line says what will be done; what engines say while they start is in the log."""
    first, *others = output.splitlines()
    assert re.search(
        r"GRPO of \S+ \(\S+ [MB] parameters\) on [\d,]+ questions of \S+: "
        r"2 steps of 12 trajectories, 1 process on CPU; run folder \S+$",
        first,
    )
    assert not [line for line in others if "pid=" in line or "WARNING" in line]
    assert "(VLLMServer pid=" in log.read_text()


def test_grpo_trains_exports_and_resumes(tmp_path, model, retriever, reward):
    shared = {
        "retriever__url": retriever,
        "trainer__save_freq": 2,
        "trainer__max_ckpt_to_keep": 1,
        "trainer__best_metric": "null",
        "custom_reward_function__path": reward,
        "actor_rollout_ref__rollout__temperature": 0.7,
        "actor_rollout_ref__actor__optim__lr": 1e-3,
    }
    status, output = train(
        "grpo", arguments(tmp_path, model, trainer__total_training_steps=2, **shared)
    )
    assert status == 0, output[-3000:]
    assert_console_is_quiet(output, tmp_path / "run" / LOG)
    lines = metrics(tmp_path)
    assert [line["training/global_step"] for line in lines] == [0, 1, 2]
    assert undocumented(name for line in lines for name in line) == []
    for line in lines[1:]:
        assert line["rollout/context_violations"] == 0
        assert line["rollout/logprob_diff_max"] <= 1e-3  # tied head, T = 0.7
        assert line["actor/optimizer_steps"] == 2  # 4 prompts x 3 / 6
        assert line["training/policy_version"] == line["training/global_step"]
    record = json.loads((tmp_path / "run/trajectories/train_000001.jsonl").open().readline())
    assert record["segments"][0]["source"] == "model" and "score" in record["reward"]

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run/hf")
    initial = AutoModelForCausalLM.from_pretrained(model)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run/hf")) == exported.config.vocab_size
    for (name, after), before in zip(
        exported.named_parameters(), initial.parameters(), strict=True
    ):
        assert not torch.equal(after, before), name
    from_shards = tmp_path / "from_shards"
    assert export.main([str(tmp_path / "run" / "latest"), "--out", str(from_shards)]) == 0
    for name, tensor in AutoModelForCausalLM.from_pretrained(from_shards).named_parameters():
        assert torch.equal(tensor, exported.get_parameter(name)), name
    assert ready_model(str(tmp_path / "run")) == str(tmp_path / "run" / "hf")

    shared["actor_rollout_ref__actor__optim__lr"] = 5e-4
    status, output = train(
        "grpo", arguments(tmp_path, model, trainer__total_training_steps=3, **shared)
    )
    assert status == 0 and "resuming after step 2" in output, output[-3000:]
    told = [
        change
        for line in output.splitlines()
        if (change := line.partition("changed since global_step_2: ")[2])
    ]
    assert told == [
        "actor_rollout_ref.actor.optim.lr: 0.001 -> 0.0005",
        "trainer.total_training_steps: 2 -> 3",
    ]
    assert [line["actor/lr"] for line in metrics(tmp_path)[1:]] == [1e-3, 1e-3, 5e-4]
    assert [line["training/global_step"] for line in metrics(tmp_path)] == [0, 1, 2, 3]
    assert [p.name for p in (tmp_path / "run").glob("global_step_*")] == ["global_step_3"]


def test_ppo_on_two_fsdp_ranks_with_a_custom_reward(tmp_path, model, retriever, reward):
    more = {
        "retriever__url": retriever,
        "trainer__n_gpus_per_node": 2,
        "actor_rollout_ref__rollout__num_agent_workers": 2,
        "critic__ppo_mini_batch_size": 12,
        "trainer__total_training_steps": 2,
        "trainer__critic_warmup": 1,
        "trainer__save_hf": "false",
        "custom_reward_function__path": reward,
    }
    status, output = train("ppo", arguments(tmp_path, model, **more))
    assert status == 0, output[-3000:]
    lines = metrics(tmp_path)
    assert undocumented(name for line in lines for name in line) == []
    warmup, step = lines[1:]
    assert "actor/pg_loss" not in warmup and warmup["critic/grad_norm"] > 0
    # 12 trajectories by 6 and by 12
    assert step["actor/optimizer_steps"] == 2 and step["critic/optimizer_steps"] == 1
    assert (
        step["actor/grad_norm"] > 0
        and step["critic/kl_coeff"] == 0.001
        and step["reward/letters"] > 0
    )
    assert step["rollout/logprob_diff_max"] <= 1e-3


def test_a_reward_that_raises_ends_the_run_with_its_line_and_no_traceback_of_ours(tmp_path, model):
    (tmp_path / "mine.py").write_text(
        "def compute_score(solution_str, **kwargs):\n    return {}['nothing']\n"
    )
    more = {"max_turns": None, "custom_reward_function__path": tmp_path / "mine.py"}
    status, output = train(
        "toy", ["--config-dir", "tests/e2e", *arguments(tmp_path, model, **more)]
    )
    assert status == 1
    message = next(line for line in output.splitlines() if line.startswith("error: "))
    assert "compute_score of" in message and "mine.py raised KeyError: 'nothing' at" in message
    assert "line 2 (`return {}['nothing']`), for tiny, question" in message
    assert "Traceback" not in output.split("error: ", 1)[1]


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        # survival and a reward that raises are runs of the library alone as well
        pytest.param(
            "toy", ["--config-dir", "tests/e2e"], id="library alone", marks=pytest.mark.slow
        ),
        pytest.param(
            "grpo",
            [
                "agent._target_=tests.e2e.toy.SingleTurn",
                "reward._target_=tests.e2e.toy.CountE",
            ],
            id="beside the stock configuration",
        ),
    ],
)
def test_a_task_without_search_trains(tmp_path, model, config, flags):
    more = {"max_turns": None, "trainer__total_training_steps": 2, "trainer__save_hf": "false"}
    status, output = train(config, [*flags, *arguments(tmp_path, model, **more)])
    assert status == 0, output[-3000:]
    assert metrics(tmp_path)[1]["toy/count"] == 12


ACTOR = "actor_rollout_ref__actor"
VARIANTS = {
    "rloo, CISPO, likelihood kept, dynamic sampling, filters, folded contexts": {
        "agent__context__fold_at": 106,
        "agent__context__max_summary_length": 8,
        "algorithm__adv_estimator": "rloo",
        f"{ACTOR}__policy_loss__loss_mode": "cispo",
        f"{ACTOR}__policy_loss__llds_coef": 0.1,
        "algorithm__filter_groups__enable": "true",
        "algorithm__filter_groups__max_num_gen_batches": 3,
        "algorithm__loss_filters": "[zero_variance]",
    },
    "turn-level credit, GSPO, corrected top-p": {
        "actor_rollout_ref__rollout__top_p": 0.8,
        "algorithm__rollout_correction__rollout_is": "token",
        "algorithm__adv_estimator": "turn_level",
        f"{ACTOR}__policy_loss__loss_mode": "gspo",
        f"{ACTOR}__loss_agg_mode": "seq-mean-token-mean",
    },
    "REINFORCE++ baseline, LoRA, checkpointed activations": {
        "algorithm__adv_estimator": "reinforce_plus_plus_baseline",
        "actor_rollout_ref__model__lora_rank": 4,
        "actor_rollout_ref__model__enable_gradient_checkpointing": "true",
        f"{ACTOR}__optim__lr": 1e-2,
        f"{ACTOR}__fsdp_config__optimizer_offload": "true",
        "trainer__total_training_steps": 2,
    },
}


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=[pytest.mark.slow] if number else [])
        for number, name in enumerate(VARIANTS)
    ],
)
def test_other_algorithms_train(tmp_path, model, retriever, reward, variant):
    shared = {
        "retriever__url": retriever,
        "custom_reward_function__path": reward,
        "trainer__total_training_steps": 1,
    }
    status, output = train("grpo", arguments(tmp_path, model, **{**shared, **VARIANTS[variant]}))
    assert status == 0, output[-3000:]
    line = metrics(tmp_path)[-1]
    assert undocumented(line) == []
    assert line["actor/optimizer_steps"] == 2 and line["rollout/context_violations"] == 0
    if "dynamic" in variant:
        assert (
            1 <= line["training/num_gen_batches"] <= 3
            and line["rollout/filtered/zero_variance"] == 0
        )
        assert line["actor/likelihood_loss"] >= 0
        assert line["rows/mean"] > 1 and line["env/folds"] > 0
        assert line["rollout/logprob_diff_max"] <= 1e-3, "in every row"
    elif "LoRA" in variant:  # the engine samples from the merged weights of the first update
        assert "M trained, attention packed" in output and line["rollout/logprob_diff_max"] <= 1e-3
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "run/hf").num_parameters() > 0
    else:  # the sampler gave its tokens more than the trainer does: all that it left out
        assert line["rollout_corr/kl"] > 0.01 and line["rollout_corr/is_weight/mean"] < 0.99
