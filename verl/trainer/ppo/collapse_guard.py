"""The response of a run to a collapse: it keeps the state, and goes on, stops or rolls back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl.trainer.config import PPOConfig
from verl.trainer.ppo.checkpoints import Checkpoints
from verl.trainer.ppo.collapse import Alarm, CollapseWatch, TrainingCollapsed
from verl.utils.checkpoint_storage import CheckpointError
from verl.utils.tracking import Tracking, truncate_metrics


class CollapseGuard:
    """Watches the metrics of every step, and answers an alarm as `trainer.collapse_watch` says."""

    def __init__(self, config: PPOConfig, checkpoints: Checkpoints, tracking: Tracking) -> None:
        self.config = config.trainer.collapse_watch
        self.max_staleness = config.async_training.max_staleness
        self.checkpoints = checkpoints
        self.tracking = tracking
        self.watch = CollapseWatch(self.config)

    @property
    def rolls_back(self) -> bool:
        """Whether an alarm sends the run back to a checkpoint."""
        return self.config.response == "roll_back"

    @property
    def changes_the_run(self) -> bool:
        """Whether an alarm ends the run or sends it back."""
        return self.config.response != "continue"

    def observe(self, step: int, metrics: Mapping[str, float]) -> Alarm | None:
        """Returns an alarm if this step completes a collapse."""
        alarm = self.watch.observe(step, metrics)
        if self.rolls_back:
            moved = min(self.watch.since.values(), default=step + 1)
            # a step's trajectories were rolled out by the weights of the step before, or older ones
            self.checkpoints.suspect(moved - 1 - self.max_staleness)
        return alarm

    def respond(self, alarm: Alarm, state: dict[str, Any]) -> int | None:
        """Saves the state of the run at the alarm, and does what `response` says.

        Returns the step to roll back to, or None to go on. Raises TrainingCollapsed when the run
        must end, or when there is no checkpoint to roll back to. `state`: the driver's.
        """
        rolled_back = len(self.checkpoints.roll_backs())
        name = f"step_{alarm.step}" + (f"-{rolled_back}" if rolled_back else "")
        folder = self.tracking.run_dir / "alarms" / name
        self.tracking.message(
            f"{alarm.message()}\nresponse: {self.config.response}; the state is in {folder}"
        )
        self.tracking.alert(f"collapse at step {alarm.step}", alarm.message())
        self._keep(alarm, state, folder)
        if self.config.response == "continue":
            return None
        if self.config.response == "stop" or rolled_back >= self.config.max_roll_backs:
            raise TrainingCollapsed(
                f"{alarm.message()}\nafter {rolled_back} roll-backs; the state is in {folder}"
            )
        healthy = self.checkpoints.rewind(alarm.step, self.config.lr_factor)
        if healthy is None:
            raise TrainingCollapsed(f"{alarm.message()}\nno checkpoint is old enough to be healthy")
        run_dir = str(self.tracking.run_dir)
        truncate_metrics(run_dir, healthy, moved_to=folder / "metrics.jsonl")
        return healthy

    def _keep(self, alarm: Alarm, state: dict[str, Any], folder: Path) -> None:
        """Writes the state at the alarm. A full disk does not prevent the response."""
        try:
            self.checkpoints.snapshot(folder, state)
            (folder / "alarm.txt").write_text(alarm.message() + "\n")
        except (CheckpointError, OSError) as error:
            self.tracking.message(f"the state of the alarm could not be written: {error}")

    def state_dict(self) -> dict[str, Any]:
        """The state that later alarms depend on, as plain values."""
        return self.watch.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`."""
        self.watch.load_state_dict(state)
