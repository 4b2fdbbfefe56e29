"""Rolling ahead: order, age, what is under way and what a checkpoint resumes with, over a rollout
that writes down."""

from itertools import islice
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.trainer.ppo.rollout_queue import RolloutQueue
from verl.utils.dataset import ResumableSampler

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


def ahead(staleness: int, partial: bool = True) -> tuple[RolloutQueue, Rollout]:
    rollout = Rollout()
    config = SimpleNamespace(
        data=SimpleNamespace(train_batch_size=BATCH, shuffle_train_dataloader=True),
        trainer=SimpleNamespace(seed=SEED),
        actor_rollout_ref=SimpleNamespace(rollout=None),
        uses_greedy=False,
        async_training=SimpleNamespace(max_staleness=staleness, partial_rollout=partial),
    )
    return RolloutQueue(config, Questions(), rollout), rollout


def expected(count: int) -> list[tuple[list[int], int]]:
    """Rows and seed of the first batches: the order of the sampler, whatever the staleness."""
    rows = islice(ResumableSampler(ROWS, BATCH, SEED, shuffle=True), count)
    return [(batch, SEED + 1_000_000 * (place + 1)) for place, batch in enumerate(rows)]


def train(source: RolloutQueue, rollout: Rollout, steps: int, total: int, done: int = 0):
    """(rows, seed) of the batches that `steps` steps train on, and their ages."""
    batches = []
    ages = []
    for step in range(done, done + steps):
        rows, seed, version = source.next_batch(total - step).jobs
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
    before=st.integers(1, 9),
    after=st.integers(1, 9),
    drawn=st.integers(0, 12),
    shuffle=st.booleans(),
)
@settings(deadline=None)
def test_another_batch_size_goes_on_with_the_next_question(before, after, drawn, shuffle):
    """Row after row as if nothing had changed, and seeds of rollouts that were not used yet."""
    sampler, resumed = (ResumableSampler(ROWS, size, SEED, shuffle) for size in (before, after))
    seen = [row for batch in islice(sampler, drawn) for row in batch]
    resumed.load_state_dict(sampler.state_dict())
    seen += [row for batch in islice(resumed, 12) for row in batch]
    one_by_one = islice(ResumableSampler(ROWS, 1, SEED, shuffle), len(seen))
    assert seen == [row for (row,) in one_by_one] and resumed.drawn == drawn + 12


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
