"""The checkpoints of a run, as its driver sees them: written in the background, named when whole, rolled back to."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from verl.trainer.config import TrainerConfig
from verl.utils import run_folder
from verl.utils.checkpoint import CheckpointError

TRAINER = "trainer.pt"
ROLL_BACKS = "roll_backs.json"


class Checkpoints:
    """Saves and restores the trained roles together with the state of the driver.

    A checkpoint that cannot be written (a full disk) is reported and given up: the run goes on with the one before.
    """

    def __init__(self, config: TrainerConfig, roles: dict[str, Any], message: Callable[[str], None]) -> None:
        self.config, self.root, self.message = config, Path(config.default_local_dir), message
        self.roles = {name: roles[name] for name in ("actor", "critic") if name in roles}
        self.pending: int | None = None
        self.newest = 0
        self.scores: dict[int, float] = {}

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copies everything, and starts writing it; training may go on when this returns."""
        self.complete()
        self.pending = step
        try:
            self._write(run_folder.pending_folder(self.root, step), state, self.config.async_save)
        except (CheckpointError, OSError) as error:
            self._give_up(self._finished() or error)
        if not self.config.async_save:
            self.complete()

    def snapshot(self, folder: Path, state: dict[str, Any]) -> None:
        """Writes everything to a folder that no run resumes from by itself. Raises CheckpointError or OSError."""
        self.complete()
        self._write(folder, state, asynchronous=False)

    def _write(self, folder: Path, state: dict[str, Any], asynchronous: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / TRAINER)
        for name, role in self.roles.items():
            role.save_checkpoint(str(folder / name), asynchronous)

    def complete(self, must_succeed: bool = False) -> None:
        """Waits for the checkpoint under way, makes it the one to resume from, and deletes what is not to be kept.

        Raises CheckpointError with `must_succeed`, else a checkpoint that failed is given up.
        """
        if self.pending is None:
            return
        step = self.pending
        try:
            if error := self._finished():
                raise error
            run_folder.complete(self.root, step)
        except (CheckpointError, OSError) as error:
            self._give_up(error)
            if must_succeed:
                raise
            return
        self.pending, self.newest = None, step
        self._rank(step)
        run_folder.prune(self.root, self.config.max_ckpt_to_keep)

    def _finished(self) -> CheckpointError | None:
        """Waits until no role writes any more; what the first to fail says."""
        errors: list[CheckpointError] = []
        for role in self.roles.values():
            try:
                role.finish_checkpoint()
            except CheckpointError as error:
                errors.append(error)
        return errors[0] if errors else None

    def _give_up(self, error: Exception) -> None:
        step, self.pending = self.pending, None
        assert step is not None
        self.message(f"checkpoint of step {step} FAILED, training goes on and the one before stays: {error}")
        run_folder.discard(self.root, step)

    def score(self, step: int, metrics: dict[str, float]) -> None:
        """Notes how good the policy of `step` is, by `trainer.best_metric`."""
        name = self.config.best_metric
        if name is not None and name in metrics:
            self.scores[step] = metrics[name]
            self._rank(step)

    def _rank(self, step: int) -> None:
        """Calls the checkpoint the best if it is, once it is whole and scored."""
        name = self.config.best_metric
        if name is not None and step in self.scores and run_folder.folder_of(self.root, step).is_dir():
            run_folder.mark_best(self.root, step, name, self.scores[step])

    def load(self, step: int) -> dict[str, Any]:
        """Restores the roles as they were after `step`; what `save` was given as the driver's state.

        Learning rates that a roll back lowered since then stay lowered.
        """
        folder = run_folder.folder_of(self.root, step)
        for name, role in self.roles.items():
            role.load_checkpoint(str(folder / name))
        factor = math.prod(entry["lr_factor"] for entry in self.roll_backs() if entry["to"] >= step)
        if factor != 1:
            for role in self.roles.values():
                role.scale_lr(factor)
        self.newest = step
        return torch.load(folder / TRAINER, weights_only=False)

    def roll_backs(self) -> list[dict[str, float]]:
        """What was rolled back in this run folder: `alarm` and `to` (steps), `lr_factor`."""
        path = self.root / ROLL_BACKS
        return json.loads(path.read_text()) if path.exists() else []

    def rewind(self, alarm: int, before: int, lr_factor: float) -> int | None:
        """The newest checkpoint older than the step `before`, now the one to resume from; None if there is none."""
        self.complete()
        folder = run_folder.find_before(self.root, before)
        if folder is None:
            return None
        step = run_folder.step_of(folder)
        entries = [*self.roll_backs(), {"alarm": alarm, "to": step, "lr_factor": lr_factor}]
        run_folder.write_atomically(self.root / ROLL_BACKS, json.dumps(entries))
        run_folder.name_latest(self.root, step)
        return step
