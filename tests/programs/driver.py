"""A driver that trains nothing: `driver.py BEHAVIOUR FOLDER`, started by a supervisor.

It notes each of its starts in the folder, then does what the name of its behaviour says.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from verl.trainer.supervise import LOST, Stop, follow_supervisor


class Driver:
    """One start of the driver; each public method without arguments is a behaviour."""

    def __init__(self, folder: Path) -> None:
        own = follow_supervisor()
        self._folder = folder
        with (folder / "starts").open("a") as file:
            file.write(f"{own}\n")
        self._start = len((folder / "starts").read_text().split())
        """The number of this start, from 1."""

    def _checkpoint(self, step: int) -> None:
        (self._folder / "pending").write_text(str(step))
        os.replace(self._folder / "pending", self._folder / "latest_checkpointed_iteration.txt")

    def _ready(self) -> None:
        (self._folder / "ready").touch()

    def _start_descendant(self) -> None:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])

    def is_killed_after_a_checkpoint(self) -> None:
        if self._start == 1:
            self._checkpoint(7)
            self.is_killed()

    def is_killed(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def aborts_three_times(self) -> None:
        """Only the third time with a checkpoint."""
        if self._start < 3:
            os.abort()
        if self._start == 3:
            self._checkpoint(2)
            os.abort()

    def is_lost(self) -> None:
        sys.exit(LOST)

    def is_lost_but_progresses(self) -> None:
        """Five times, with a checkpoint before each loss."""
        if self._start < 6:
            self._checkpoint(self._start // 2)
            self.is_lost()

    def exits_1(self) -> None:
        sys.exit(1)

    def exits_2(self) -> None:
        sys.exit(2)

    def exits_137(self) -> None:
        sys.exit(137)

    def finishes_its_step(self) -> None:
        """When asked to stop, within a second."""
        self._train_until_stopped(seconds_of_a_step=1)

    def has_a_long_step(self) -> None:
        self._train_until_stopped(seconds_of_a_step=600)

    def _train_until_stopped(self, seconds_of_a_step: float) -> None:
        with Stop() as stop:
            self._ready()
            try:
                while not stop.requested:
                    time.sleep(0.01)
                (self._folder / "noted").touch()
                time.sleep(seconds_of_a_step)
            except KeyboardInterrupt:
                sys.exit(130)
            self._checkpoint(3)
        sys.exit(128 + stop.requested)

    def ignores_signals(self) -> None:
        """Notes them, while a descendant works on."""
        self._start_descendant()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self._note_signal())
        self._ready()
        while True:
            time.sleep(1)

    def _note_signal(self) -> None:
        with (self._folder / "got").open("a") as file:
            file.write("x")

    def works_with_a_descendant(self) -> None:
        self._start_descendant()
        self._ready()
        time.sleep(3600)

    def is_killed_beside_a_descendant(self) -> None:
        """The first time; the second works without one."""
        if self._start == 1:
            self._start_descendant()
            self._ready()
            self.is_killed()
        time.sleep(3600)


if __name__ == "__main__":
    getattr(Driver(Path(sys.argv[2])), sys.argv[1])()
