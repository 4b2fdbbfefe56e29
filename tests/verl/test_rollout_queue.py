"""Rolling ahead: order, age, what is under way and what a checkpoint resumes with, over a rollout
that writes down."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.trainer.ppo.gate import GateConfig
from verl.trainer.ppo.rollout_queue import RolloutQueue
from verl.utils.dataset import ResumableSampler
from verl.utils.schedule import weight_at

ROWS = 7
BATCH = 3
SEED = 5


class Rollout:
    """A batch is (row numbers, seed, version of the weights when it was submitted)."""

    def __init__(self) -> None:
        self.version = 0
        self.submitted = []
        self.under_way = []
        self.drained = []

    def submit(self, rows, prompts, sampling, seed):
        assert [row["training_step"] for row in rows] == [self.version + 1] * len(rows)
        rows = [row["number"] for row in rows]
        assert prompts == [[row] for row in rows]
        self.submitted.append((rows, seed, self.version))
        self.under_way.append(self.submitted[-1])
        return self.submitted[-1]

    def collect(self, batch):
        self.seen_under_way = len(self.under_way)
        self.under_way.remove(batch)
        return batch, []

    def drain(self, batches):
        self.drained.append(list(batches))


class Questions:
    rows = tuple({"number": number} for number in range(ROWS))
    prompt_ids = tuple([number] for number in range(ROWS))

    def __len__(self) -> int:
        return len(self.rows)


def ahead(
    staleness: int, partial: bool = True, questions: type = Questions, **data: object
) -> tuple[RolloutQueue, Rollout]:
    rollout = Rollout()
    usual = {"source_weights": {}, "gate": GateConfig()}
    config = SimpleNamespace(
        data=SimpleNamespace(
            train_batch_size=BATCH,
            shuffle_train_dataloader=True,
            **usual | data,
        ),
        trainer=SimpleNamespace(seed=SEED),
        actor_rollout_ref=SimpleNamespace(rollout=None),
        uses_greedy=False,
        async_training=SimpleNamespace(max_staleness=staleness, partial_rollout=partial),
    )
    return RolloutQueue(config, questions(), rollout), rollout


def expected(count: int) -> list[tuple[list[int], int]]:
    """Rows and seed of the first batches: the order of the sampler, whatever the staleness."""
    order = ResumableSampler(ROWS, SEED, shuffle=True)
    return [(order.take(BATCH), SEED + 1_000_000 * number) for number in range(1, count + 1)]


def train(source: RolloutQueue, rollout: Rollout, steps: int, total: int, done: int = 0):
    """(rows, seed) of the batches that `steps` steps train on, and their ages."""
    batches = []
    ages = []
    for step in range(done, done + steps):
        rolled = source.next_batch(total - step)
        rows, seed, version = rolled.jobs
        assert rolled.rows == rows
        batches.append((rows, seed))
        ages.append(rollout.version - version)
        source.drain_before_sync()
        rollout.version += 1
    return batches, ages


@given(staleness=st.integers(0, 4), total=st.integers(1, 12))
@settings(deadline=None)
def test_order_age_and_number_under_way(staleness, total):
    source, rollout = ahead(staleness)
    for step in range(total):
        (batch,), ages = train(source, rollout, 1, total, step)
        assert batch == expected(step + 1)[-1]
        assert ages == [min(step, staleness)], "as old as allowed, never older"
        assert rollout.seen_under_way == min(staleness + 1, total - step)
    assert len(rollout.submitted) == total and rollout.under_way == [], (
        "nothing is rolled out that no step will see"
    )


@given(
    staleness=st.integers(0, 4), after=st.integers(0, 4), total=st.integers(1, 10), data=st.data()
)
@settings(deadline=None)
def test_a_resumed_run_sees_exactly_the_batches_not_yet_returned(staleness, after, total, data):
    done = data.draw(st.integers(0, total))
    source, rollout = ahead(staleness)
    first, _ = train(source, rollout, done, total)
    state = source.state_dict()
    assert state["drawn"] == done
    resumed, rollout = ahead(after)
    resumed.load_state_dict(state)
    rest, ages = train(resumed, rollout, total - done, total, done)
    assert first + rest == expected(total) and max(ages, default=0) <= after
    source.load_state_dict(state)  # a roll back, in the same process
    assert train(source, source.rollout, total - done, total, done)[0] == rest


@given(
    staleness=st.integers(0, 3),
    after=st.integers(1, 9),
    done=st.integers(0, 12),
)
@settings(deadline=None)
def test_another_batch_size_goes_on_with_the_next_question(staleness, after, done):
    """Row after row as if nothing had changed, and seeds of rollouts that were not used yet."""
    source, rollout = ahead(staleness)
    before, _ = train(source, rollout, done, 99)
    resumed, rollout = ahead(0)
    resumed.config.data.train_batch_size = after
    resumed.load_state_dict(source.state_dict())
    rest, _ = train(resumed, rollout, 12, 99)
    seen = [row for rows, _ in before + rest for row in rows]
    order = ResumableSampler(ROWS, SEED, shuffle=True)
    assert seen == order.take(len(seen)) and resumed.sampler.drawn == done + 12
    seeds = [seed for _, seed in before + rest]
    assert seeds == [SEED + 1_000_000 * number for number in range(1, done + 13)]


@given(sizes=st.lists(st.integers(0, 20), max_size=9), shuffle=st.booleans())
def test_an_epoch_has_every_row_once_however_it_is_divided(sizes, shuffle):
    order = ResumableSampler(ROWS, SEED, shuffle)
    seen = [row for size in sizes for row in order.take(size)]
    assert (order.epoch, order.position) == divmod(len(seen), ROWS)
    for start in range(0, len(seen) - ROWS + 1, ROWS):
        assert sorted(seen[start : start + ROWS]) == list(range(ROWS))
    other = ResumableSampler(ROWS, SEED, shuffle)
    other.load_state_dict(order.state_dict())
    assert seen + other.take(5) == ResumableSampler(ROWS, SEED, shuffle).take(len(seen) + 5)


class Sources(Questions):
    """Five questions of one source, two of another."""

    rows = tuple({"number": n, "data_source": "ab"[n % 3 == 2]} for n in range(ROWS))


CURRICULUM = {
    "source_weights": {"a": 1.0, "b": [(2, 0.0), (6, 2.0)]},
    "gate": GateConfig(rest_solved=2, rest_unsolved=1),
}


def train_with_a_gate(source: RolloutQueue, rollout: Rollout, steps: int, total: int, done: int):
    """The rows and versions of `steps` steps, whose scores depend on row and step."""
    seen = []
    for step in range(done, done + steps):
        rolled = source.next_batch(total - step)
        seen.append(rolled.jobs)
        for row in rolled.rows:
            source.sampler.gate.observe(row, [float(row % 2), float((row + step) % 3 == 0)])
        rollout.version += 1
    return seen


@given(staleness=st.integers(0, 3), total=st.integers(1, 14), data=st.data())
@settings(deadline=None)
def test_weights_and_a_gate_are_resumed_exactly_also_with_batches_under_way(staleness, total, data):
    """Batches under way were drawn at earlier steps, and before later scores."""
    done = data.draw(st.integers(0, total))
    source, rollout = ahead(staleness, questions=Sources, **CURRICULUM)
    train_with_a_gate(source, rollout, done, total, 0)
    state = json.loads(json.dumps(source.state_dict()))
    undisturbed = train_with_a_gate(source, rollout, total - done, total, done)
    resumed, rollout = ahead(staleness, questions=Sources, **CURRICULUM)
    rollout.version = done
    resumed.load_state_dict(state)
    rest = train_with_a_gate(resumed, rollout, total - done, total, done)
    assert [batch[:2] for batch in rest] == [batch[:2] for batch in undisturbed]
    assert resumed.state_dict() == source.state_dict()


def test_a_batch_is_mixed_for_the_step_at_which_it_is_handed_out():
    source, rollout = ahead(1, questions=Sources, **CURRICULUM)
    train_with_a_gate(source, rollout, 8, 99, 0)
    shares = [sum(row % 3 == 2 for row in rows) for rows, _, _ in rollout.submitted]
    weights = [
        weight_at(CURRICULUM["source_weights"]["b"], version + 1)
        for *_, version in (rollout.submitted)
    ]
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - BATCH * weight / (1 + weight)) < 1
    assert shares[0] == 0 and shares[-1] == 2


def test_a_bare_place_in_one_order_is_a_state():
    source, rollout = ahead(0)
    source.load_state_dict({"epoch": 0, "position": 6, "drawn": 2})
    assert train(source, rollout, 2, 9)[0] == expected(4)[2:]


def test_several_batches_in_a_step_keep_order_and_age():
    """algorithm.filter_groups draws again within a step: the first is 2 versions old, what follows
    is younger."""
    source, rollout = ahead(2)
    train(source, rollout, 2, 10)
    taken = [source.next_batch(8).jobs for _ in range(4)]
    assert [(rows, seed) for rows, seed, _ in taken] == expected(6)[2:]
    assert [rollout.version - version for *_, version in taken] == [2, 1, 0, 0]


@pytest.mark.parametrize("partial", [True, False])
def test_only_whole_rollouts_are_waited_for_before_new_weights(partial):
    source, rollout = ahead(2, partial)
    source.next_batch(10)
    source.drain_before_sync()
    assert rollout.drained == ([] if partial else [rollout.submitted[1:3]])
