"""The collapse watch: it detects that a policy collapses, from the metrics of training steps.

It does so before the reward falls.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from verl.utils.config import Config
from verl.utils.tracking import STEP


class TrainingCollapsed(RuntimeError):
    """The collapse watch raised an alarm that ends the run."""


class Bound(Config):
    """Limits that a metric of a healthy run does not pass.

    All limits that are given count. A value that is not finite is always out of bounds.
    """

    below: float | None = None
    """Fall below this."""
    above: float | None = None
    """Rise above this."""
    falls_to: float | None = Field(default=None, gt=0, lt=1)
    """Fall below this share of its reference."""
    rises_to: float | None = Field(default=None, gt=1)
    """Rise above this multiple of its reference."""
    falls_by: PositiveFloat | None = None
    """Fall by more than this from its reference; for metrics that can be negative."""

    @model_validator(mode="after")
    def _limits_something(self) -> "Bound":
        if all(limit is None for limit in self.model_dump().values()):
            raise ValueError(f"name a limit: {', '.join(Bound.model_fields)}")
        return self

    def broken(self, value: float, reference: float | None) -> str | None:
        """The limit that `value` passes, in words; None if it is within bounds.

        Without a reference (too little history) only `below` and `above` count. With a reference
        that is not positive, `falls_to` and `rises_to` have no meaning and do not count.
        """
        if not math.isfinite(value):
            return "is not finite"
        if self.below is not None and value < self.below:
            return f"is below {self.below:g}"
        if self.above is not None and value > self.above:
            return f"is above {self.above:g}"
        if reference is None:
            return None
        if self.falls_by is not None and value < reference - self.falls_by:
            return f"fell by more than {self.falls_by:g}"
        if reference > 0 and self.falls_to is not None and value < reference * self.falls_to:
            return f"fell below {self.falls_to:g} of its reference"
        if reference > 0 and self.rises_to is not None and value > reference * self.rises_to:
            return f"rose above {self.rises_to:g} times its reference"
        return None


class CollapseWatchConfig(Config):
    """When an alarm is raised, and what happens then.

    A collapse shows in several signals at once before it shows in the reward, so one signal alone
    raises no alarm.
    """

    signals: dict[str, Bound | None] = {}
    """Metrics of a training step and their bounds (below, above: values; falls_to, rises_to:
    multiples of the reference; falls_by: difference to it); null: not watched."""
    min_signals: PositiveInt = 2
    """Signals that must be out of bounds in one step."""
    patience: PositiveInt = 3
    """The number of such steps in a row that raises an alarm; also the number of healthy steps in a
    row before there can be another alarm."""
    min_history: PositiveInt = 1
    """Healthy values a signal needs before it has a reference."""
    window: PositiveInt = 20
    """The reference is the median of this many last healthy values."""
    response: Literal["continue", "stop", "roll_back"] = "continue"
    """On an alarm, after its message and a snapshot: go on; end the run; or restore the newest
    healthy checkpoint."""
    lr_factor: float = Field(default=0.5, gt=0, le=1)
    """The factor by which roll_back multiplies the learning rates."""
    max_roll_backs: PositiveInt = 3
    """After this many roll-backs the next alarm stops the run."""

    @property
    def active(self) -> dict[str, Bound]:
        """The signals that are watched."""
        return {name: bound for name, bound in self.signals.items() if bound is not None}


@dataclass(frozen=True)
class Signal:
    """A metric that is out of its bounds."""

    name: str
    since: int
    """First step of this violation."""
    value: float
    reference: float | None
    violation: str


@dataclass(frozen=True)
class Alarm:
    """A collapse: the signals that are out of bounds, in the order in which they left them."""

    step: int
    signals: tuple[Signal, ...]

    @property
    def since(self) -> int:
        """The step in which the first signal left its bounds."""
        return self.signals[0].since

    def message(self) -> str:
        """The alarm in words, a line for every signal."""
        first = self.signals[0]
        lines = [f"collapse at step {self.step}: {first.name} moved first, at step {first.since}"]
        for s in self.signals:
            reference = "" if s.reference is None else f" (reference {s.reference:.4g})"
            lines.append(
                f"  {s.name} = {s.value:.4g}{reference} {s.violation}, since step {s.since}"
            )
        return "\n".join(lines)


class CollapseWatch:
    """Judges one training step after the other.

    A collapse is reported once: there is no second alarm before `patience` healthy steps in a row.
    A step is healthy with fewer than `min_signals` signals out of bounds.
    """

    def __init__(self, config: CollapseWatchConfig) -> None:
        self.config = config
        self.bounds = config.active
        self.history: dict[str, list[float]] = {}
        self.since: dict[str, int] = {}
        self.ill_steps = self.healthy_steps = 0
        self.armed = True

    def observe(self, step: int, metrics: Mapping[str, float]) -> Alarm | None:
        """Takes the metrics of a step, and returns an alarm if it completes a collapse.

        A metric that is absent counts as neither healthy nor out of bounds, and since when it has
        been out of bounds is kept. A step that has fewer than `min_signals` of the watched metrics
        is ignored.
        """
        seen = {name: float(metrics[name]) for name in self.bounds if name in metrics}
        if len(seen) < self.config.min_signals:
            return None
        violations = self._violations(step, seen)
        if len(violations) >= self.config.min_signals:
            self.ill_steps = self.ill_steps + 1
            self.healthy_steps = 0
        else:
            self._healthy(seen)
        if not self.armed or self.ill_steps < self.config.patience:
            return None
        self.armed = False
        signals = [
            Signal(n, self.since[n], seen[n], self._reference(n), text)
            for n, text in violations.items()
        ]
        return Alarm(step, tuple(sorted(signals, key=lambda s: s.since)))

    def _violations(self, step: int, seen: Mapping[str, float]) -> dict[str, str]:
        texts = {
            name: self.bounds[name].broken(value, self._reference(name))
            for name, value in seen.items()
        }
        violations = {name: text for name, text in texts.items() if text is not None}
        for name in seen:
            if name in violations:
                self.since.setdefault(name, step)
            else:
                self.since.pop(name, None)
        return violations

    def _healthy(self, seen: Mapping[str, float]) -> None:
        self.ill_steps = 0
        self.healthy_steps = self.healthy_steps + 1
        self.armed = self.armed or self.healthy_steps >= self.config.patience
        if not self.armed:
            return
        for name, value in seen.items():
            if math.isfinite(value):
                self.history[name] = [*self.history.get(name, []), value][-self.config.window :]

    def _reference(self, name: str) -> float | None:
        # Learning moves every signal (entropy falls tenfold, length doubles), so the reference is
        # that of a window. Only healthy steps enter it, or a collapse would become its own
        # reference. On recorded runs a window of 5 steps missed a collapse that took 10 steps, and
        # one of 20 decided like the whole history.
        history = self.history.get(name, [])
        return median(history) if len(history) >= self.config.min_history else None

    def state_dict(self) -> dict[str, Any]:
        """The state that later decisions depend on, as plain values."""
        return {
            "history": {name: list(values) for name, values in self.history.items()},
            "since": dict(self.since),
            "ill_steps": self.ill_steps,
            "healthy_steps": self.healthy_steps,
            "armed": self.armed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`, which may be that of other signals.

        Signals that are new start without a history, and those that are no longer watched are
        forgotten.
        """
        window = self.config.window
        self.history = {
            name: values[-window:]
            for name, values in state["history"].items()
            if name in self.bounds
        }
        self.since = {name: step for name, step in state["since"].items() if name in self.bounds}
        self.ill_steps = state["ill_steps"]
        self.healthy_steps = state["healthy_steps"]
        self.armed = state["armed"]


def replay(path: Path, config: CollapseWatchConfig) -> list[Alarm]:
    """The alarms that a run would have raised, from its metrics.jsonl.

    For a step that a resumed run wrote again, the last values count. A null in the file stands for
    a number that was not finite.
    """
    steps: dict[int, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        row = {key: math.nan if value is None else value for key, value in json.loads(line).items()}
        steps.setdefault(int(row[STEP]), {}).update(row)
    watch = CollapseWatch(config)
    alarms = [watch.observe(step, steps[step]) for step in sorted(steps)]
    return [alarm for alarm in alarms if alarm is not None]
