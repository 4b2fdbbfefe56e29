"""What the roles with an optimizer have in common."""

from verl.single_controller.decorator import Dispatch, register
from verl.single_controller.worker import Worker
from verl.utils.checkpoint import Checkpointer
from verl.workers.fsdp_model import TrainState


class TrainedWorker(Worker):
    """One rank of a trained role: saves, loads and changes its training state."""

    def set_state(self, state: TrainState) -> None:
        """Sets the training state, and makes its checkpointer. A collective."""
        self.state = state
        self.checkpointer = Checkpointer(state)

    @register(Dispatch.ONE_TO_ALL)
    def scale_lr(self, factor: float) -> None:
        self.state.scale_lr(factor)

    @register(Dispatch.ONE_TO_ALL)
    def save_checkpoint(self, path: str, asynchronous: bool = False) -> None:
        """Writes the training state, with `asynchronous` in the background.

        In the background it is complete only after `finish_checkpoint`.
        """
        self.checkpointer.save(path, asynchronous)

    @register(Dispatch.ONE_TO_ALL)
    def finish_checkpoint(self) -> None:
        """Waits for the checkpoint that is being written. Raises CheckpointError if it failed."""
        self.checkpointer.finish()

    @register(Dispatch.ONE_TO_ALL)
    def load_checkpoint(self, path: str) -> None:
        self.checkpointer.load(path)
