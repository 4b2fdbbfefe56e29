"""The driver's side of checkpoints: they are written in the background, and rolled back to.

A checkpoint gets its final name once it is complete.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verl.trainer.config import TrainerConfig
from verl.utils import run_folder
from verl.utils.checkpoint_storage import CheckpointError, old_format

TRAINER = "trainer.json"
PICKLED_TRAINER = "trainer.pt"


def read_state(folder: Path) -> dict[str, Any]:
    """Reads the driver's state from the checkpoint `folder`.

    Raises CheckpointError naming the file that cannot be used.
    """
    path = folder / TRAINER
    if not path.exists() and (folder / PICKLED_TRAINER).exists():
        raise CheckpointError(old_format(folder / PICKLED_TRAINER))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the driver's part of the checkpoint cannot be read ({error})"
        ) from error


class Checkpoints:
    """Saves and restores the trained roles together with the state of the driver.

    A checkpoint that cannot be written (a full disk) is reported and given up; the run goes on, and
    the checkpoint before it stays.
    """

    def __init__(
        self, config: TrainerConfig, roles: dict[str, Any], message: Callable[[str], None]
    ) -> None:
        self.config = config
        self.root = Path(config.default_local_dir)
        self.message = message
        self.roles = {name: roles[name] for name in ("actor", "critic") if name in roles}
        self.pending: int | None = None
        self.suspect_from: int | None = None
        """A roll-back would go to the newest checkpoint before this step, so that is kept."""
        self.failure: Exception | None = None
        """Why the last checkpoint was given up."""
        self.newest = 0
        self.scores: dict[int, float] = {}
        self.awaited: int | None = None
        """The step whose score is still to come. Its checkpoint is kept until then."""

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copies the whole state and starts to write it. Training may go on when this returns."""
        self.complete()
        self.pending = step
        self.failure = None
        try:
            self._write(run_folder.pending_folder(self.root, step), state, self.config.async_save)
        except (CheckpointError, OSError) as error:
            self._give_up(self._finished() or error)

    def suspect(self, step: int) -> None:
        """Keeps the newest checkpoint before `step`, because a roll-back would go to it."""
        self.suspect_from = step

    def await_score(self, step: int) -> None:
        """Keeps the checkpoint of `step` until `score` says how good its policy is."""
        self.awaited = step

    def exists(self, step: int) -> bool:
        """Whether there is a complete checkpoint of `step`."""
        return run_folder.folder_of(self.root, step).is_dir()

    def snapshot(self, folder: Path, state: dict[str, Any]) -> None:
        """Writes the whole state to a folder that is not resumed from automatically.

        Raises CheckpointError or OSError.
        """
        self.complete()
        self._write(folder, state, asynchronous=False)

    def _write(self, folder: Path, state: dict[str, Any], asynchronous: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps({**state, "roll_backs": len(self.roll_backs())})
        (folder / TRAINER).write_text(content, encoding="utf-8")
        for name, role in self.roles.items():
            role.save_checkpoint(str(folder / name), asynchronous)

    def complete(self, must_succeed: bool = False) -> None:
        """Waits for the checkpoint under way, and makes it the one to resume from.

        Old checkpoints that need not be kept are deleted. A checkpoint that failed is given up.
        With `must_succeed`, raises the CheckpointError or OSError of the last checkpoint if it
        failed.
        """
        if self.pending is not None:
            self._complete(self.pending)
        if must_succeed and self.failure is not None:
            raise self.failure

    def _complete(self, step: int) -> None:
        try:
            if error := self._finished():
                raise error
            run_folder.complete(self.root, step)
        except (CheckpointError, OSError) as error:
            self._give_up(error)
            return
        self.pending = None
        self.newest = step
        self._rank(step)
        needed = [step for step in (self._healthy(), self.awaited) if step is not None]
        try:
            run_folder.prune(self.root, self.config.max_ckpt_to_keep, needed)
        except OSError as error:
            self.message(f"old checkpoints could not be deleted: {error}")

    def _finished(self) -> CheckpointError | None:
        """Waits until no role is writing any more; returns the error of the first that failed."""
        errors: list[CheckpointError] = []
        for role in self.roles.values():
            try:
                role.finish_checkpoint()
            except CheckpointError as error:
                errors.append(error)
        return errors[0] if errors else None

    def _give_up(self, error: Exception) -> None:
        step = self.pending
        self.pending = None
        self.failure = error
        assert step is not None
        self.message(
            f"checkpoint of step {step} FAILED, training goes on and the one before stays: {error}"
        )
        try:
            run_folder.discard(self.root, step)
        except OSError as error:
            self.message(f"what was written of it could not be deleted: {error}")

    def score(self, step: int, metrics: dict[str, float]) -> None:
        """Records the value of `trainer.best_metric` for the policy of `step`."""
        self.awaited = None
        name = self.config.best_metric
        if name is not None and name in metrics:
            self.scores[step] = metrics[name]
            self._rank(step)

    def _rank(self, step: int) -> None:
        """Marks the checkpoint of `step` as the best if it is complete, scored and the best."""
        name = self.config.best_metric
        if name is None or step not in self.scores or not self.exists(step):
            return
        try:
            run_folder.mark_best(self.root, step, name, self.scores[step])
        except OSError as error:
            self.message(
                f"the checkpoint of step {step} could not be compared with the best: {error}"
            )

    def load(self, step: int) -> dict[str, Any]:
        """Restores the roles as they were after `step`, and returns the saved state of the driver.

        Learning rates are the configured ones, multiplied by the factors of all roll-backs,
        including those after the checkpoint was written.
        """
        folder = run_folder.folder_of(self.root, step)
        for name, role in self.roles.items():
            role.load_checkpoint(str(folder / name))
        state = read_state(folder)
        factor = math.prod(
            entry["lr_factor"] for entry in self._rolled_back_since(state) if entry["to"] >= step
        )
        if factor != 1:
            for role in self.roles.values():
                role.scale_lr(factor)
        self.newest = step
        return state

    def roll_backs(self) -> list[dict[str, float]]:
        """Reads the roll-backs of this run folder: `alarm` and `to` (steps), `lr_factor`."""
        path = self.root / run_folder.ROLL_BACKS
        return json.loads(path.read_text()) if path.exists() else []

    def rewind(self, alarm: int, lr_factor: float) -> int | None:
        """Makes the newest checkpoint before `suspect_from` the one to resume from.

        Returns its step, or None if there is no such checkpoint.
        """
        self.complete()
        step = self._healthy()
        if step is None:
            return None
        self.scores = {scored: value for scored, value in self.scores.items() if scored <= step}
        entries = [*self.roll_backs(), {"alarm": alarm, "to": step, "lr_factor": lr_factor}]
        # in this order, so that a crash in between loses the factor and does not apply it twice
        run_folder.name_latest(self.root, step)
        run_folder.write_atomically(self.root / run_folder.ROLL_BACKS, json.dumps(entries))
        return step

    def _healthy(self) -> int | None:
        """The step that a roll-back would go to, None if there is none.

        Checkpoints that an earlier roll-back gave up do not count. They may still be there, because
        training may have passed their steps without replacing them.
        """
        if self.suspect_from is None:
            return None
        found = [
            s
            for s in run_folder.steps(self.root)
            if s < self.suspect_from and not self._given_up(s)
        ]
        return max(found, default=None)

    def _given_up(self, step: int) -> bool:
        state = read_state(run_folder.folder_of(self.root, step))
        return any(entry["to"] < step for entry in self._rolled_back_since(state))

    def _rolled_back_since(self, state: dict[str, Any]) -> list[dict[str, float]]:
        """The roll-backs that happened after a checkpoint with this state was written."""
        return self.roll_backs()[state["roll_backs"] :]
