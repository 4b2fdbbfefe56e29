"""ReMax: a greedy trajectory of each prompt is rolled out beside the others, and only compared."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r1.rewards.compose import SearchReward
from search_r1.rewards.config import SearchRewardConfig
from tests.configs import composed
from tests.verl.drawn import JUNK, masks, normal, with_junk
from tests.verl.fake_roles import GROUP, PROMPTS, ROWS, SMALL, make_processes, trainer_over
from verl.agent import AgentLoop, Segment, Source, Trajectory
from verl.rollout.agent_worker import Failure, Job
from verl.trainer.config import AlgorithmConfig, validate
from verl.trainer.driver import check_trainable
from verl.trainer.ppo.advantage import compute_advantage
from verl.trainer.ppo.batching import build_batch
from verl.trainer.ppo.core_algos import compute_remax_outcome_advantage
from verl.trainer.ppo.greedy import GREEDY, greedy_metrics, with_greedy_scores
from verl.utils.errors import ConfigError

REMAX = "algorithm.adv_estimator=remax"


@pytest.fixture(autouse=True)
def validation(monkeypatch):
    """Finds the same whatever it is given."""
    monkeypatch.setattr("verl.trainer.ppo.validation.score", lambda *_: ({}, []))


def make_trainer(folder, *overrides, scores=None, greedy=None):
    """A trainer by ReMax, and what its roles and engines are asked."""
    place = f"trainer.default_local_dir={folder}"
    config = validate(composed("grpo", *SMALL, place, REMAX, *overrides))
    processes = make_processes(config, scores)
    processes.rollout.greedy = greedy or {}
    return trainer_over(config, processes), processes


def events(processes, *names):
    return [event for event in processes.said if event[0] in names]


def said(score, num_tokens=2):
    """A trajectory in which the policy said so many tokens."""
    segments = [Segment(Source.MODEL, [5] * num_tokens, [-1.0] * num_tokens)] if num_tokens else []
    return Trajectory([1], segments, reward={"score": score} if num_tokens else {})


@given(masks(), st.integers(0, 99), st.sampled_from(JUNK))
@settings(max_examples=60, deadline=None)
def test_the_advantage_is_the_return_minus_the_greedy_score(mask, seed, junk):
    """The twin goes through rows of plain floats."""
    rewards = normal(mask, seed)
    greedy = normal(mask, seed + 1)[:, 0]
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    for row, bits in enumerate(mask.tolist()):
        for t, is_own in enumerate(bits):
            later = [x for x, m in zip(rewards[row, t:].tolist(), bits[t:], strict=True) if m]
            expected[row, t] = math.fsum(later) - greedy[row].item() if is_own else 0.0
    dirty = with_junk(rewards, mask, junk)
    advantages, returns = compute_remax_outcome_advantage(dirty, mask, greedy)
    torch.testing.assert_close(advantages, expected, atol=1e-9, rtol=0)
    by_greedy = torch.where(mask.bool(), advantages + greedy[:, None], 0.0)
    torch.testing.assert_close(returns, by_greedy, atol=1e-9, rtol=0)


@pytest.mark.parametrize("greedy", [0.0, 0.9, -3.0])
def test_no_baseline_makes_the_estimate_biased(greedy):
    """The mean over all samples of a policy with three answers is the gradient by its logits."""
    logits = torch.tensor([0.2, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([0.9, 0.3, -1.0], dtype=torch.float64)
    (true,) = torch.autograd.grad((logits.softmax(0) * rewards).sum(), logits)
    mask = torch.ones(3, 1)
    baseline = torch.full((3,), greedy, dtype=torch.float64)
    advantages, _ = compute_remax_outcome_advantage(rewards[:, None], mask, baseline)
    estimate = (logits.softmax(0).detach() * advantages[:, 0] * logits.log_softmax(0)).sum()
    (found,) = torch.autograd.grad(estimate, logits)
    torch.testing.assert_close(found, true, atol=1e-12, rtol=0)


def test_each_prompt_is_compared_with_its_own_greedy_trajectory(tmp_path):
    """Two questions of four samples each, and a greedy trajectory each, under the same weights."""
    trainer, processes = make_trainer(
        tmp_path, "trainer.total_training_steps=1", greedy={0: 0.25, 1: 1.0}
    )
    trainer.fit()
    assert events(processes, "submit rollout", "submit greedy") == [
        ("submit rollout", (0, 1), 0),
        ("submit greedy", (0, 1), 0),
    ]
    (batch,) = processes.roles["actor"].batches
    assert len(batch) == PROMPTS * GROUP, "the greedy trajectories are not trained on"
    scores = batch.batch["token_level_scores"].sum(1)
    number = (batch.batch["prompts"][:, -1] - 1).tolist()
    expected = scores - torch.tensor([{0: 0.25, 1: 1.0}[n] for n in number])
    assert torch.equal(batch.batch["advantages"], expected[:, None].expand(-1, 4))
    (line,) = trainer.logged
    assert line["greedy/score"] == 0.625 and line["greedy/model_tokens"] == 2 * 4
    assert line["greedy/model_tokens_share"] == pytest.approx(2 / (2 + PROMPTS * GROUP))


def test_one_trajectory_of_a_prompt_is_enough(tmp_path):
    one = [
        "actor_rollout_ref.rollout.n=1",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}",
    ]
    scores = {number: [float(number)] for number in range(ROWS)}
    trainer, processes = make_trainer(
        tmp_path, *one, "trainer.total_training_steps=1", scores=scores, greedy={0: 0.5, 1: 0.5}
    )
    trainer.fit()
    (batch,) = processes.roles["actor"].batches
    assert sorted(batch.batch["advantages"][:, 0].tolist()) == [-0.5, 0.5]


def test_ahead_of_the_training_the_greedy_ones_go_with_their_batch(tmp_path):
    """Each batch of prompts has its greedy trajectories under way with it, and both settle."""
    stale = ["async_training.max_staleness=1", "algorithm.rollout_correction.rollout_is=token"]
    trainer, processes = make_trainer(tmp_path, *stale, "async_training.partial_rollout=false")
    trainer.fit()
    submitted = events(processes, "submit rollout", "submit greedy")
    assert [event[1:] for event in submitted[::2]] == [event[1:] for event in submitted[1::2]]
    assert len(submitted) == 6
    drained = events(processes, "drain")
    assert [event[1] for event in drained] == [0, 2, 2, 0], "a batch, and its greedy trajectories"


def test_a_resumed_run_draws_the_same_prompts(tmp_path):
    trainer, _ = make_trainer(tmp_path)
    trainer.batches.queue.next_batch(10)
    assert trainer.batches.state_dict()["drawn"] == 1


def test_a_prompt_whose_greedy_trajectory_failed_is_not_trained_on():
    jobs = [Job(uid, f"{uid}{i}", {}, [1]) for uid in "ab" for i in range(2)]
    results = [said(1.0), Failure("down", 1), said(0.5), said(0.0)]
    found = with_greedy_scores(jobs, results, [Failure("on fire", 3), said(0.75)])
    lost = Failure("the greedy trajectory of this prompt failed: on fire", 3)
    assert found[:2] == [lost, Failure("down", 1)]
    assert [trajectory.greedy_score for trajectory in found[2:]] == [0.75, 0.75]


def test_a_greedy_trajectory_without_a_word_scores_nothing():
    silent = said(0.0, num_tokens=0)
    (found,) = with_greedy_scores([Job("a", "a0", {}, [1])], [said(1.0)], [silent])
    assert found.greedy_score == 0.0
    assert greedy_metrics([silent], [found])["greedy/model_tokens"] == 0.0
    assert greedy_metrics([], [found]) == {}


@pytest.mark.parametrize("estimator", ["remax", "tree_grpo"])
def test_what_belongs_to_a_trajectory_belongs_to_all_of_its_rows(estimator):
    """The first trajectory goes on in a second row, where its context was written anew."""
    trajectories = [said(1.0), said(0.0), said(0.25)]
    trajectories[0].rewrite([7, 8])
    trajectories[0].segments.append(Segment(Source.MODEL, [6], [-1.0]))
    for trajectory, greedy in zip(trajectories, (0.5, 0.5, 2.0), strict=True):
        trajectory.greedy_score = greedy
    jobs = [Job("a", f"a{i}", {"data_source": "d"}, [1], tree=i // 2) for i in range(3)]
    data = build_batch(
        jobs,
        trajectories,
        pad_token_id=0,
        num_mini_batches={"mini_batch": 1},
        world_size=1,
        state_masking=True,
    )
    data = data.with_tensors(token_level_rewards=data.batch["token_level_scores"])
    data, _ = compute_advantage(data, AlgorithmConfig(adv_estimator=estimator))
    found = {}
    for number, advantages in zip(
        data.batch["trajectory"].tolist(), data.batch["advantages"], strict=True
    ):
        found.setdefault(number, set()).update(x for x in advantages.tolist() if x)
    if estimator == "remax":
        assert found == {0: {0.5}, 1: {-0.5}, 2: {-1.75}}
    else:
        inter = torch.tensor([1.0, 0.0, 0.25])
        inter = (inter - inter.mean()) / inter.std()
        intra = 0.5**0.5
        assert list(found[0]) == pytest.approx([inter[0].item() + intra], abs=1e-5)
        assert list(found[2]) == pytest.approx([inter[2].item()], abs=1e-5)


def test_it_is_greedy_and_has_no_log_probs():
    assert GREEDY.params() == {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "log_probs": False}
    assert GREEDY.n == 1


def test_other_estimators_roll_out_nothing_greedy(tmp_path):
    trainer, processes = make_trainer(
        tmp_path, "algorithm.adv_estimator=rloo", "trainer.total_training_steps=1"
    )
    trainer.fit()
    assert events(processes, "submit greedy") == [] and "greedy/score" not in trainer.logged[0]
    assert "greedy_scores" not in processes.roles["actor"].batches[0].batch


def test_a_gain_of_information_that_the_greedy_trajectory_is_not_paid_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"information_gain\.weight with adv_estimator=remax"):
        make_trainer(tmp_path, "algorithm.information_gain.weight=0.5")


def test_a_reward_that_compares_trajectories_is_refused(tmp_path):
    config = validate(composed("grpo", *SMALL, REMAX, f"trainer.default_local_dir={tmp_path}"))
    agent = AgentLoop(None, None)
    tokenizer = SimpleNamespace()
    check_trainable(config, agent, SearchReward(SearchRewardConfig(), tokenizer))
    with pytest.raises(ConfigError, match=r"adv_estimator=remax: the reward compares"):
        check_trainable(config, agent, SearchReward(SearchRewardConfig(otc_grpo=1.0), tokenizer))

    class Own:
        def score_groups(self, groups):
            pass

    with pytest.raises(ConfigError, match=r"adv_estimator=remax: the reward compares"):
        check_trainable(config, agent, Own())
