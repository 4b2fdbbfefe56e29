"""What a run has cost, and how long it will still take, from its metrics alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from search_r1.pages.metrics_file import STEP_SECONDS, Row

RECENT = 10
"""Steps whose mean time is taken for that of the next ones."""


@dataclass(frozen=True)
class Prices:
    """Prices in a currency that is the user's; None where there is none."""

    device_hour: float | None = None
    search: float | None = None
    million_tokens: float | None = None
    """Of tokens that the policy generated."""

    def of(self, device_hours: float, searches: float, tokens: float) -> float | None:
        """What these amounts cost, as far as they have prices; None where nothing has one."""
        parts = [
            (self.device_hour, device_hours),
            (self.search, searches),
            (self.million_tokens, tokens / 1e6),
        ]
        priced = [price * amount for price, amount in parts if price is not None]
        return sum(priced) if priced else None


def seconds_per_step(rows: Sequence[Row]) -> float | None:
    """Mean seconds of the newest training steps; None before the first one."""
    recent = [row[STEP_SECONDS] or 0.0 for row in rows[-RECENT:]]
    return sum(recent) / len(recent) if recent else None


def cost_of(rows: Sequence[Row], prices: Prices) -> dict[str, float | None]:
    """Amounts and money of these training steps. Validations count by their time alone.

    Device-hours are those of `perf/throughput`: tokens over tokens per second and device. Tokens
    and searches are means of a trajectory times the trajectories.
    """
    device_hours = sum(device_seconds(row) for row in rows) / 3600
    generated = total(rows, "rollout/model_tokens")
    searches = total(rows, "env/number_of_valid_search")
    return {
        "hours": sum(row[STEP_SECONDS] or 0.0 for row in rows) / 3600,
        "device_hours": device_hours,
        "generated_tokens": generated,
        "trained_tokens": sum(row.get("state_tokens/total") or 0.0 for row in rows),
        "searches": searches,
        "money": prices.of(device_hours, searches, generated),
    }


def device_seconds(row: Row) -> float:
    """Seconds of a step times its devices; those of one device where they are unknown."""
    tokens = row.get("perf/total_num_tokens")
    throughput = row.get("perf/throughput")
    return tokens / throughput if tokens and throughput else row[STEP_SECONDS] or 0.0


def total(rows: Sequence[Row], mean_of_trajectory: str) -> float:
    """The sum over all trajectories of a metric that is their mean."""
    return sum(
        (row.get(mean_of_trajectory) or 0.0) * (row.get("training/num_trajectories") or 0.0)
        for row in rows
    )
