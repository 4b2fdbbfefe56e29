import math

import pytest
import torch

from verl.protocol import DataProto
from verl.trainer.ppo.metrics import (
    compute_data_metrics,
    compute_throughput_metrics,
    explained_variance,
    host_metrics,
    staleness_metrics,
)
from verl.workers.memory import peak_memory

NAN = math.nan


def batch(critic=True):
    """Two trajectories, P = 2, R = 4: `. p | m o m .` with score 1 and `p p | m m o m` with score
    0."""
    tensors = {
        "prompts": torch.zeros(2, 2, dtype=torch.long),
        "responses": torch.zeros(2, 4, dtype=torch.long),
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]),
        "response_mask": torch.tensor([[1, 0, 1, 0], [1, 1, 0, 1]]),
        "turns": torch.tensor([[0, -1, 1, -1], [0, 0, -1, 1]]),
        "token_level_scores": torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]),
        "token_level_rewards": torch.tensor([[-0.1, 0.0, 1.0, 0.0], [0.0, -0.2, 0.0, 0.0]]),
        "advantages": torch.tensor([[2.0, NAN, 1.0, NAN], [-1.0, -1.0, NAN, -1.0]]),
        "returns": torch.tensor([[1.0, NAN, 1.0, NAN], [0.0, 0.0, NAN, 0.0]]),
        "old_log_probs": torch.tensor([[-1.0, NAN, -2.0, NAN], [-1.0, -1.0, NAN, -1.0]]),
        "rollout_log_probs": torch.tensor([[-1.0, 0.0, -2.5, 0.0], [-0.5, -1.0, 0.0, -1.0]]),
    }
    if critic:
        tensors["values"] = torch.tensor([[0.5, NAN, 0.5, NAN], [0.0, 0.0, NAN, 0.0]])
    return DataProto.from_dict(tensors)


def test_data_metrics_by_hand():
    expected = {
        "critic/score": (0.5, 1, 0),
        "critic/rewards": (0.35, 0.9, -0.2),
        "critic/advantages": (0.0, 2, -1),
        "critic/returns": (0.4, 1, 0),
        "critic/values": (0.2, 0.5, 0),
        "prompt_length": (1.5, 2, 1),
        "response_length": (3.5, 4, 3),
        "response_length_model": (2.5, 3, 2),
        "response_length_observation": (1, 1, 1),
    }
    stats = {
        f"{name}/{stat}": value
        for name, row in expected.items()
        for stat, value in zip(("mean", "max", "min"), row, strict=True)
    }
    assert compute_data_metrics(batch(), max_length=4) == pytest.approx(
        {
            **stats,
            "critic/score/std": 0.5,
            "critic/advantages/std": 1.6**0.5,  # of 2, 1 and three times -1
            "actor/positive_log_prob": -1.5,  # of -1 and -2
            "response_length/clip_ratio": 0.5,
            "state_tokens/total": 5,
            "state_tokens/coverage": 5 / 7,
            "rollout/logprob_diff_mean": 0.2,  # .5 and .5 on 2 of 5 tokens
            "rollout/logprob_diff_max": 0.5,
            # residuals .5 .5 0 0 0 are half the returns: a quarter of their variance remains
            "critic/vf_explained_var": pytest.approx(0.75, abs=1e-4),
        }
    )


def test_without_critic():
    names = compute_data_metrics(batch(critic=False), max_length=4)
    assert not {name for name in names if "value" in name or "vf_" in name}


def test_explained_variance_bounds():
    returns = torch.tensor([1.0, 2.0, 3.0, NAN])
    mask = torch.tensor([1, 1, 1, 0])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.full((4,), 2.0), returns, mask) == pytest.approx(0, abs=1e-4)


def test_throughput():
    timing = {"timing_s/gen": 3.0, "timing_s/update_actor": 1.5, "timing_s/step": 5.0}
    assert compute_throughput_metrics(batch(), timing, n_gpus=2) == {
        "perf/total_num_tokens": 10,
        "perf/time_per_step": 5.0,
        "perf/throughput": 1.0,
        "perf/timer_coverage": 0.9,
    }


def test_memory_of_the_machine_is_what_is_not_available(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  4000000 kB\nMemFree:  1 kB\nMemAvailable:  1000000 kB\n")
    assert host_metrics(meminfo) == {"perf/cpu_memory_used_gb": 3.072}
    assert host_metrics(tmp_path / "none") == {}
    meminfo.write_text("MemTotal:  4000000 kB\nsomething else\n")
    assert host_metrics(meminfo) == {}


def test_peak_memory_is_of_a_gpu_alone_and_begins_anew(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2e9)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3e9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", calls.append)
    assert peak_memory(torch.device("cpu")) == {} and calls == []
    card = torch.device("cuda", 0)
    assert peak_memory(card) == {"max_memory_allocated_gb": 2.0, "max_memory_reserved_gb": 3.0}
    assert calls == [card]


def test_observations_are_not_sampled_even_where_they_are_trained_on():
    everything = batch()
    everything = everything.with_tensors(response_mask=everything.batch["attention_mask"][:, 2:])
    for name in (
        "response_length_model/mean",
        "response_length_observation/mean",
        "rollout/logprob_diff_max",
    ):
        assert compute_data_metrics(everything, 4)[name] == compute_data_metrics(batch(), 4)[name]


def test_staleness_counts_tokens_of_the_policy_by_their_age():
    """Ages at version 7: 0, 0, 2 and 3; what the observation and the padding carry does not
    count."""
    turns = torch.tensor([[0, -1, 1], [0, 0, -1]])
    versions = torch.tensor([[7, 0, 5], [7, 4, -1]])
    found = staleness_metrics(DataProto.from_dict({"turns": turns, "policy_versions": versions}), 7)
    assert found == pytest.approx(
        {
            "training/staleness/mean": 1.25,
            "training/staleness/max": 3,
            "training/staleness/share_0": 0.5,
            "training/staleness/share_1": 0.0,
            "training/staleness/share_2": 0.25,
            "training/staleness/share_3": 0.25,
        }
    )
