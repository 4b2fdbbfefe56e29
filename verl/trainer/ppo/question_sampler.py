"""Which training questions the next batch asks: by the weights of sources, past those that rest."""

import random
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import ceil
from typing import Any

from verl.agent import Row
from verl.trainer.config import PPOConfig
from verl.trainer.ppo.gate import Gate
from verl.utils.dataset import ResumableSampler, rows_by_source
from verl.utils.errors import DataError
from verl.utils.schedule import Weight, weight_at

ALL = ""
"""The name of the one order of all questions, where sources have no weights."""


class QuestionSampler:
    """Draws row numbers, batch after batch, in an order that can be resumed.

    Without `data.source_weights` there is one order of all questions. With them each source has an
    order of its own, and a batch takes from each as many as its weight says at the training step.
    Questions that the gate holds back are passed over in their order. Raises DataError when weights
    and questions have other sources.
    """

    def __init__(self, config: PPOConfig, rows: Sequence[Row]) -> None:
        data = config.data
        self.seed = config.trainer.seed
        self.weights = data.source_weights
        self.gate = Gate(data.gate)
        self.drawn = 0
        """How many batches were drawn."""
        self.waiting: list[int] = []
        """Drawn before the run was resumed, but not trained on: the next batches begin with
        them."""
        if self.weights:
            check_sources(self.weights, rows)
            self.numbers = rows_by_source(rows)
        else:
            self.numbers = {ALL: list(range(len(rows)))}
        self.orders = {
            source: ResumableSampler(
                len(numbers),
                f"{self.seed}/{source}" if self.weights else self.seed,
                data.shuffle_train_dataloader,
            )
            for source, numbers in self.numbers.items()
        }

    def draw(self, count: int, step: int) -> list[int]:
        """The row numbers of the next batch, `count` of them, for a training step."""
        self.drawn += 1
        batch = self.waiting[:count]
        self.waiting = self.waiting[count:]
        missing = count - len(batch)
        if not self.weights:
            return batch + self._take(ALL, missing)
        rng = random.Random(f"{self.seed}/mixture/{self.drawn}")
        weights = {source: weight_at(w, step) for source, w in self.weights.items()}
        places = share_out(missing, weights, rng.random())
        mixed = [number for source, n in places.items() for number in self._take(source, n)]
        rng.shuffle(mixed)  # because consecutive questions form a mini-batch
        return batch + mixed

    def _take(self, source: str, count: int) -> list[int]:
        """The next `count` rows of a source that do not rest."""
        numbers = self.numbers[source]
        taken: list[int] = []
        while len(taken) < count:
            self.gate.end_common_rests(numbers)
            places = self.orders[source].take(count - len(taken))
            candidates = [numbers[place] for place in places]
            taken += [number for number in candidates if not self.gate.passes_over(number)]
        return taken

    @property
    def epoch(self) -> int:
        """The number of completed passes over the questions.

        It is that of the source that has the fewest, of those that anything was taken from.
        """
        begun = [order for order in self.orders.values() if order.epoch or order.position]
        return min((order.epoch for order in begun), default=0)

    def state_dict(self) -> dict[str, Any]:
        """All that the next batches depend on, as values that JSON can express."""
        return {
            "drawn": self.drawn,
            "waiting": list(self.waiting),
            "orders": {source: order.state_dict() for source, order in self.orders.items()},
            "resting": self.gate.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`.

        A bare place in one order, with nothing under way and nothing that rests, is a state, too.
        """
        self.drawn = state["drawn"]
        self.waiting = list(state.get("waiting", []))
        orders = state.get("orders", {ALL: state})
        for source, order in self.orders.items():
            order.load_state_dict(orders[source])
        self.gate.load_state_dict(state.get("resting", {}))


def check_sources(weights: Mapping[str, Weight], rows: Sequence[Row]) -> None:
    """Raises DataError unless exactly the sources of the questions have weights."""
    sources = rows_by_source(rows).keys()
    listed = ", ".join(sorted(sources))
    if unknown := sorted(weights.keys() - sources):
        raise DataError(
            f"data.source_weights: no training question has the data_source "
            f"{', '.join(unknown)}; there are {listed}"
        )
    if missing := sorted(sources - weights.keys()):
        raise DataError(
            f"data.source_weights: no weight for {', '.join(missing)}; name every data_source of "
            f"the training questions ({listed}), with 0 for one that is to be left out"
        )


def share_out(count: int, weights: Mapping[str, float], offset: float) -> dict[str, int]:
    """How many of `count` places each source gets, in proportion to its weight.

    The places lie at offset, offset + 1, ... on a line that the sources divide among them
    (systematic sampling). So each gets its exact share rounded up or down, and with a uniform
    `offset` in [0, 1) its exact share on average.

    >>> share_out(4, {"a": 1.0, "b": 0.0, "c": 2.0}, offset=0.5)
    {'a': 1, 'b': 0, 'c': 3}
    """
    edges = list(accumulate(weights.values()))
    places: dict[str, int] = {}
    taken = 0
    for source, edge in zip(weights, edges, strict=True):
        before = ceil(edge / edges[-1] * count - offset)
        places[source] = before - taken
        taken = before
    return places
