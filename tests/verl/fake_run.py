"""The driver's side of checkpoints, over roles that only write down what they are asked."""

from pathlib import Path

from verl.trainer.config import TrainerConfig
from verl.trainer.ppo.checkpoints import Checkpoints
from verl.utils.checkpoint_storage import CheckpointError


class Role:
    """A learning rate, and the calls; `fails` when it starts to write, or when it ends
    (`finishes_badly`)."""

    def __init__(self) -> None:
        self.lr = 1.0
        self.calls = []
        self.fails = self.finishes_badly = False

    def save_checkpoint(self, path, asynchronous):
        self.calls.append("save")
        if self.fails:
            raise CheckpointError("no room at the start")
        Path(path).mkdir(exist_ok=True)
        (Path(path) / "lr").write_text(str(self.lr))

    def finish_checkpoint(self):
        self.calls.append("finish")
        if self.finishes_badly:
            raise CheckpointError("no room at the end")

    def load_checkpoint(self, path):
        self.lr = float((Path(path) / "lr").read_text())

    def scale_lr(self, factor):
        self.lr *= factor


class Run:
    """What one start of the driver has; another one on the same folder is what follows a crash."""

    def __init__(self, root: Path, **config) -> None:
        self.actor = Role()
        self.critic = Role()
        self.said = []
        settings = TrainerConfig(
            experiment_name="run", default_local_dir=str(root), best_metric="em", **config
        )
        self.checkpoints = Checkpoints(
            settings, {"actor": self.actor, "critic": self.critic}, self.said.append
        )

    def save(self, *numbers: int) -> "Run":
        for step in numbers:
            self.checkpoints.save(step, {"step": step})
            self.checkpoints.complete()
        return self


def rewind(checkpoints, alarm, before, lr_factor):
    checkpoints.suspect(before)
    return checkpoints.rewind(alarm, lr_factor)
