"""Trajectories that branch off a turn of another one: what is given again, what is drawn, counted
and refused."""

import asyncio
from contextlib import contextmanager
from contextvars import ContextVar

import pytest
import torch

from tests.configs import composed
from tests.verl.drawn import JUNK
from tests.verl.fake_agent import SAMPLING, make_worker
from tests.verl.fake_roles import SMALL, make_processes, trainer_over
from verl.agent import (
    AgentLoop,
    Completion,
    Segment,
    Source,
    Trajectory,
    TrajectoryFailed,
    context_digest,
)
from verl.rollout.agent_worker import Failure, Job
from verl.rollout.branches import Prefix, Tape, Trees, branch_places
from verl.rollout.job import make_jobs
from verl.trainer.config import validate
from verl.trainer.driver import check_trainable
from verl.trainer.ppo.batch_source import branch_metrics
from verl.trainer.ppo.batching import build_batch
from verl.trainer.ppo.core_algos import (
    compute_grpo_outcome_advantage,
    compute_tree_grpo_outcome_advantage,
)
from verl.utils.errors import ConfigError
from verl.workers.config import BranchesConfig, RolloutConfig, SamplingConfig, ValSamplingConfig

BRANCHES = "actor_rollout_ref.rollout.branches"
TREE = "algorithm.adv_estimator=tree_grpo"
QUESTION = 7
_answers: ContextVar = ContextVar("answers", default=None)


class Engine:
    """Says a number that it never said before, in a turn of one token."""

    def __init__(self):
        self.calls = []

    async def generate(self, session, prompt_ids, sampling):
        await asyncio.sleep(0)
        self.calls.append((session, list(prompt_ids), sampling["seed"]))
        number = 100 + len(self.calls)
        return Completion([number], [-0.5], "stop", None, 3, context_digest(prompt_ids))

    def forget(self, session):
        pass


class Asking(AgentLoop):
    """Asks the environment after every one of its `turns` but the last.

    Its answers are numbers that were never given before, too. The first `failures` runs fail.
    """

    can_branch = True

    def __init__(self, turns=4, failures=0):
        self.turns = turns
        self.failures = failures
        self.asked = []

    @contextmanager
    def answering(self, give, tell):
        token = _answers.set((give, tell))
        try:
            yield
        finally:
            _answers.reset(token)

    async def run(self, prompt_ids, row, generate):
        trajectory = Trajectory(list(prompt_ids))
        for turn in range(self.turns):
            context = trajectory.token_ids
            trajectory.add_completion(await generate(context, max_tokens=5))
            if self.failures:
                self.failures -= 1
                raise TrajectoryFailed("on fire", num_calls=1)
            if turn + 1 < self.turns:
                # the same question after every turn: the order alone tells its answers apart
                trajectory.add_observation([self.ask("what now")])
        return trajectory

    def ask(self, key):
        answers = _answers.get()
        given = None if answers is None else answers[0](key)
        if given is None:
            self.asked.append(key)
            given = 500 + len(self.asked)
        if answers is not None:
            answers[1](key, given)
        return given


def roll_out(tmp_path, agent, branches, n, places=8, seed=11):
    """The jobs of one prompt, their results, and the engine."""
    worker = make_worker(tmp_path, 0, max_under_way=places)
    worker.agent = agent
    worker.engines = Engine()
    sampling = RolloutConfig(n=n, branches=branches)
    jobs = make_jobs([{"name": "q", "data_source": "d"}], [[QUESTION]], sampling, seed)
    results = asyncio.run(worker.run(jobs, SAMPLING))
    return jobs, results, worker.engines


@pytest.mark.parametrize("places", [1, 8])
def test_a_branch_begins_with_turns_of_its_tree_and_nothing_is_asked_twice(tmp_path, places):
    """Two trees of five. One place is enough: what waits for a trajectory holds none."""
    agent = Asking()
    branches = BranchesConfig(rounds=2, per_round=2)
    jobs, results, engine = roll_out(tmp_path, agent, branches, 10, places)
    assert [job.tree for job in jobs] == [0] * 5 + [1] * 5
    for job, trajectory in zip(jobs, results, strict=True):
        assert trajectory.context_violations == 0 and len(trajectory.turns) == 4
        if not job.begins_from:
            assert trajectory.shared_turns == 0
            continue
        shared = 2 * trajectory.shared_turns
        assert 2 <= shared <= 6, "turns and their answers; the last turn is always its own"
        parents = [r for j, r in zip(jobs, results, strict=True) if j.session in job.begins_from]
        begun_from = [p for p in parents if p.segments[:shared] == trajectory.segments[:shared]]
        assert begun_from, "log-probs and versions are those with which the turns were sampled"
        earlier = [segment for parent in parents for segment in parent.segments]
        assert trajectory.segments[shared] not in earlier, "then it goes on by itself"
    turns = sum(len(r.turns) for r in results)
    shared_turns = sum(r.shared_turns for r in results)
    assert len(engine.calls) == turns - shared_turns
    assert len(agent.asked) == 3 * len(results) - shared_turns


def test_trees_of_one_prompt_do_not_mix(tmp_path):
    _, results, _ = roll_out(tmp_path, Asking(), BranchesConfig(rounds=3), 8)
    begins = [[r.segments[0] for r in results[start : start + 4]] for start in (0, 4)]
    assert all(segment == of_tree[0] for of_tree in begins for segment in of_tree)
    assert begins[0][0] != begins[1][0]


def test_what_is_drawn_follows_from_the_seed(tmp_path):
    branches = BranchesConfig(rounds=3, per_round=3)
    drawn = [
        [r.shared_turns for r in roll_out(tmp_path, Asking(9), branches, 10, seed=seed)[1]]
        for seed in (3, 3, 4)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_calls_of_a_branch_have_seeds_of_their_own(tmp_path):
    _, _, engine = roll_out(tmp_path, Asking(), BranchesConfig(rounds=4), 5)
    seeds = [seed for _, _, seed in engine.calls]
    assert len(set(seeds)) == len(seeds)


def test_without_a_turn_to_branch_off_it_begins_at_the_prompt(tmp_path):
    """Trajectories of one turn have none after which they went on."""
    _, results, engine = roll_out(tmp_path, Asking(turns=1), BranchesConfig(rounds=2), 3)
    assert [r.shared_turns for r in results] == [0, 0, 0] and len(engine.calls) == 3


def test_a_tree_goes_on_without_a_trajectory_that_failed(tmp_path):
    """It failed twice. What was to branch off it begins at the prompt, and the third off that."""
    _, results, _ = roll_out(tmp_path, Asking(failures=2), BranchesConfig(rounds=2), 3)
    failed, second, third = results
    assert failed == Failure("on fire", 1)
    assert second.shared_turns == 0 and third.shared_turns > 0
    assert third.segments[0] == second.segments[0]


def test_an_agent_whose_contexts_do_not_follow_is_told_so(tmp_path):
    class Whimsical(Asking):
        def ask(self, key):
            self.asked.append(key)
            return 500 + len(self.asked)

    with pytest.raises(RuntimeError, match="turn 2 was said in another context"):
        roll_out(tmp_path, Whimsical(), BranchesConfig(rounds=6), 7)


def completion(ids, context):
    return Completion(ids, [0.0] * len(ids), "stop", None, 0, context_digest(context))


def tape_of(*contexts):
    tape = Tape()
    tape.completions = [completion([1], context) for context in contexts]
    return tape


def test_places_that_trajectories_share_are_drawn_once():
    """Of b the first turn is that of a. After the last turn of each there is nothing to go on."""
    a = tape_of([7], [7, 1], [7, 1, 2])
    b = tape_of([7], [7, 1], [7, 1, 3])
    c = tape_of([7])
    assert branch_places([a, b, c]) == [Prefix(a, 1), Prefix(a, 2), Prefix(b, 2)]
    assert branch_places([c]) == branch_places([]) == []


def test_a_tape_gives_answers_in_their_order_up_to_the_branch():
    tape = tape_of([7], [7, 1], [7, 1, 2])
    tape.responses = [(1, "a", "first"), (1, "b", "other"), (2, "a", "second"), (3, "a", "later")]
    branch = Tape(Prefix(tape, 2))
    assert branch.num_shared == 2
    assert [branch.give("a") for _ in range(3)] == ["first", "second", None]
    assert branch.give("b") == "other" and branch.give("c") is None


async def test_a_branch_waits_for_all_that_it_may_begin_with():
    trees = Trees({"a", "b"})
    waiting = asyncio.ensure_future(trees.prefix(("a", "b"), 0))
    trees.end("a", tape_of([7], [8]))
    trees.end("elsewhere", tape_of([7], [9]))
    await asyncio.sleep(0)
    assert not waiting.done()
    trees.end("b", None)
    assert await waiting == Prefix(trees.tapes["a"], 1)


def test_the_jobs_of_a_group_are_its_trees_in_their_rounds():
    sampling = RolloutConfig(n=6, branches=BranchesConfig(rounds=2, per_round=1))
    jobs = make_jobs([{}], [[QUESTION]], sampling, None)
    sessions = [job.session for job in jobs]
    assert [list(job.begins_from) for job in jobs] == [
        *([], sessions[:1], sessions[:2]),
        *([], sessions[3:4], sessions[3:5]),
    ]
    for plain in (SamplingConfig(n=2), ValSamplingConfig(n=2)):
        jobs = make_jobs([{}], [[QUESTION]], plain, None)
        assert [(job.tree, job.begins_from) for job in jobs] == [(0, ()), (1, ())]


def trajectory_of(score, *turns, shared=0):
    """A trajectory that says these tokens, an answer of the environment between any two turns."""
    segments = []
    for number, turn in enumerate(turns):
        if number:
            segments.append(Segment(Source.OBSERVATION, [9]))
        segments.append(Segment(Source.MODEL, list(turn), [-1.0] * len(turn)))
    return Trajectory([QUESTION], segments, reward={"score": score}, shared_turns=shared)


def test_tokens_that_are_shared_are_told_from_those_that_were_sampled():
    trajectories = [
        trajectory_of(1.0, [1, 2, 3], [4, 5], [6]),
        trajectory_of(0.0, [1, 2, 3], [4, 5], [8, 8], shared=2),
        trajectory_of(0.0, [1, 2, 3], [9], shared=1),
    ]
    assert branch_metrics(trajectories) == {
        "branches/generated_tokens": 6 + 2 + 1,
        "branches/shared_tokens": 5 + 3,
        "branches/shared_tokens_share": 8 / 17,
        "branches/shared_turns": 1.5,
    }
    assert branch_metrics(trajectories[:1])["branches/shared_tokens_share"] == 0.0


def twin(scores, index, trees):
    """Tree-GRPO over plain floats."""

    def standard(members, own):
        mean = sum(members) / len(members)
        spread = sum((x - mean) ** 2 for x in members) / (len(members) - 1)
        return (own - mean) / (spread**0.5 + 1e-6)

    advantages = []
    for row, score in enumerate(scores):
        group = [j for j in range(len(scores)) if index[j] == index[row]]
        tree = [j for j in group if trees[j] == trees[row]]
        advantage = 0.0
        for members in (group, tree):
            if len(members) > 1:
                advantage += standard([scores[j] for j in members], score)
        advantages.append(advantage)
    return advantages


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("junk", JUNK)
def test_tree_grpo_twin(seed, junk):
    """Trees of two groups have the same numbers; what stands where the policy did not write is
    nothing."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1]]).expand(12, 3)
    index = torch.randint(0, 2, (12,), generator=generator).numpy()
    trees = torch.randint(0, 3, (12,), generator=generator)
    dirty = torch.where(mask.bool(), rewards, junk)
    advantages, returns = compute_tree_grpo_outcome_advantage(dirty, mask, index, trees)
    scores = (rewards[:, 0] + rewards[:, 2]).tolist()
    expected = torch.tensor(twin(scores, index, trees.tolist()), dtype=torch.float64)
    expected = torch.where(mask.bool(), expected[:, None], 0.0)
    torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(advantages, returns)


def test_one_tree_or_trees_of_one_are_grpo():
    rewards = torch.tensor([[1.0], [0.0], [0.0], [0.5]])
    mask = torch.ones(4, 1)
    index = torch.zeros(4, dtype=torch.long).numpy()
    plain, _ = compute_grpo_outcome_advantage(rewards, mask, index)

    def by_trees(*trees):
        return compute_tree_grpo_outcome_advantage(rewards, mask, index, torch.tensor(trees))[0]

    torch.testing.assert_close(by_trees(0, 1, 2, 3), plain)
    torch.testing.assert_close(by_trees(5, 5, 5, 5), 2 * plain)
    # a tree that all scores the same is compared with the other one alone
    torch.testing.assert_close(by_trees(0, 1, 1, 0)[1:3], plain[1:3])


def test_a_turn_that_several_trajectories_begin_with_has_the_sum_of_their_gradients():
    """Every trajectory is trained whole, so the shared turn stands in each row, unmasked."""
    trajectories = [
        trajectory_of(1.0, [1, 2], [3]),
        trajectory_of(0.0, [1, 2], [4], shared=1),
        trajectory_of(0.0, [1, 2], [5], shared=1),
    ]
    jobs = [Job("a", f"a{i}", {"data_source": "d"}, [QUESTION]) for i in range(3)]
    data = build_batch(
        jobs,
        trajectories,
        pad_token_id=0,
        num_mini_batches={"mini_batch": 1},
        world_size=1,
        state_masking=True,
    )
    batch = data.batch
    assert batch["trees"].tolist() == [0, 0, 0]
    assert batch["response_mask"].tolist() == [[1, 1, 0, 1]] * 3
    advantages, _ = compute_tree_grpo_outcome_advantage(
        batch["token_level_scores"],
        batch["response_mask"],
        data.non_tensor_batch["uid"],
        batch["trees"],
    )
    log_prob_of_shared_turn = torch.zeros(2, requires_grad=True)
    own = torch.zeros(3, 2)
    log_probs = torch.cat([log_prob_of_shared_turn.expand(3, 2), own], dim=1)
    (-(log_probs * advantages)).sum().backward()
    gradient = log_prob_of_shared_turn.grad
    assert gradient is not None
    torch.testing.assert_close(gradient, -advantages[:, :2].sum(0))
    torch.testing.assert_close(gradient, torch.zeros(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([TREE], r"tree_grpo needs .*branches\.rounds >= 1"),
        ([f"{BRANCHES}.per_round=2"], r"per_round=2 has no effect with rounds=0"),
        ([TREE, f"{BRANCHES}.rounds=2"], r"n=4 is no multiple of the 3 trajectories of a tree"),
        (
            [
                f"{BRANCHES}.rounds=1",
                "async_training.max_staleness=1",
                "algorithm.rollout_correction.rollout_is=token",
            ],
            r"branches with async_training\.max_staleness=1",
        ),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, overrides, reason):
    place = f"trainer.default_local_dir={tmp_path}"
    with pytest.raises(ConfigError, match=reason):
        validate(composed("grpo", *SMALL, place, *overrides))


def test_an_agent_that_cannot_branch_is_refused(tmp_path):
    place = f"trainer.default_local_dir={tmp_path}"
    config = validate(composed("grpo", *SMALL, place, f"{BRANCHES}.rounds=1"))
    check_trainable(config, Asking(), lambda trajectory, row: {})
    with pytest.raises(ConfigError, match=r"rollout\.branches: trajectories of this agent cannot"):
        check_trainable(config, AgentLoop(None, None), lambda trajectory, row: {})


@pytest.mark.parametrize("rounds", [0, 1])
def test_the_trainer_compares_trees_and_says_what_they_cost(tmp_path, monkeypatch, rounds):
    monkeypatch.setattr("verl.trainer.ppo.validation.score", lambda *_: ({}, []))
    place = f"trainer.default_local_dir={tmp_path}"
    wanted = [TREE, f"{BRANCHES}.rounds=1"] if rounds else []
    config = validate(composed("grpo", *SMALL, place, "trainer.total_training_steps=1", *wanted))
    scores = {number: [0.0, 1.0, 0.0, 0.0] for number in range(6)}
    processes = make_processes(config, scores)
    trainer = trainer_over(config, processes)
    trainer.fit()
    (line,) = trainer.logged
    (batch,) = processes.roles["actor"].batches
    assert sorted(batch.batch["trees"].tolist()) == (
        [0, 0, 0, 0, 1, 1, 1, 1] if rounds else [0, 0, 1, 1, 2, 2, 3, 3]
    )
    assert ("branches/generated_tokens" in line) == bool(rounds)
    if rounds:
        found = sorted({round(x, 3) for x in batch.batch["advantages"][:, 0].tolist()})
        inter = torch.tensor([0.0, 1.0, 0.0, 0.0])
        inter = (inter - inter.mean()) / inter.std()
        intra = 0.5 / torch.tensor([0.0, 1.0]).std()
        expected = [inter[0] - intra, inter[0], inter[1] + intra]
        assert found == pytest.approx([x.item() for x in expected], abs=1e-3)
