"""A gate before training questions from which the present policy learns nothing.

A group whose trajectories all solve the question, or of which none does, has no advantage where
they are compared with each other. Its question rests: it is passed over when its turn comes, so
many times, and then asked again, because the policy has changed since.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from pydantic import FiniteFloat, NonNegativeInt

from verl.utils.config import Config


class GateConfig(Config):
    """Passing over questions that the policy has always or never solved in their last group."""

    rest_solved: NonNegativeInt = 0
    """How many times a question is passed over after all trajectories of its group solved it; 0: it
    is not."""
    rest_unsolved: NonNegativeInt = 0
    """How many times a question is passed over after no trajectory of its group solved it; 0: it is
    not."""
    metric: str = "score"
    """Which number of the reward says so: score, or a component that every trajectory has."""
    solved_at: FiniteFloat = 1.0
    """The least value of it with which a trajectory has solved its question."""

    @property
    def is_on(self) -> bool:
        """Whether any question is ever passed over."""
        return self.rest_solved > 0 or self.rest_unsolved > 0


class Gate:
    """Remembers which questions rest, by their row numbers."""

    def __init__(self, config: GateConfig) -> None:
        self.config = config
        self.resting: dict[int, int] = {}
        """How many times each resting question is still to be passed over."""
        self.counts: Counter[str] = Counter()
        """What was counted since the last `take_metrics`."""

    def passes_over(self, number: int) -> bool:
        """Whether a question rests now that its turn has come, which is one of its rests."""
        left = self.resting.get(number, 0)
        if left == 0:
            return False
        self.counts["gate/passed_over"] += 1
        if left == 1:
            del self.resting[number]
        else:
            self.resting[number] = left - 1
        return True

    def end_common_rests(self, numbers: Sequence[int]) -> None:
        """Ends at once the rests that all of `numbers` have left, if every one of them rests.

        So many passes over them would find no question to ask.
        """
        if not all(number in self.resting for number in numbers):
            return
        common = min(self.resting[number] for number in numbers)
        for number in numbers:
            left = self.resting.pop(number) - common
            if left:
                self.resting[number] = left
        self.counts["gate/passed_over"] += common * len(numbers)

    def observe(self, number: int, values: Sequence[float]) -> None:
        """Lets a question rest if all of `values`, those of its group, say so, or none does.

        A single value, which is left where the others failed, says nothing.
        """
        if len(values) < 2:
            return
        solved = sum(value >= self.config.solved_at for value in values)
        rest = 0
        if solved == len(values):
            self.counts["gate/solved"] += 1
            rest = self.config.rest_solved
        elif solved == 0:
            self.counts["gate/unsolved"] += 1
            rest = self.config.rest_unsolved
        if rest:
            self.resting[number] = rest

    def take_metrics(self) -> dict[str, float]:
        """Returns how many questions rest, and what was counted since the last call."""
        names = ("gate/solved", "gate/unsolved", "gate/passed_over")
        taken = {name: float(self.counts[name]) for name in names}
        self.counts.clear()
        return {**taken, "gate/resting": float(len(self.resting))}

    def state_dict(self) -> dict[str, int]:
        """The rests that are left, by row number as a text, as JSON has keys."""
        return {str(number): left for number, left in self.resting.items()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues from a `state_dict`; without a gate nothing rests."""
        resting = state if self.config.is_on else {}
        self.resting = {int(number): left for number, left in resting.items()}
        self.counts.clear()
