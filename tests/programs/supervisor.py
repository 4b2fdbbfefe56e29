"""Supervises the driver beside this file: `supervisor.py BEHAVIOUR FOLDER MAX_RESTARTS`."""

import logging
import sys
from pathlib import Path

from verl.trainer.supervise import supervise

DRIVER = Path(__file__).with_name("driver.py")


def main(behaviour: str, folder: str, max_restarts: str) -> int:
    """Runs the driver in `folder`, and returns the exit status of the run."""
    logging.basicConfig(format="%(message)s")
    command = [sys.executable, str(DRIVER), behaviour, folder]
    return supervise(command, folder, int(max_restarts), pause_s=0.01, grace_s=2.0, tell=tell)


def tell(title: str, text: str) -> None:
    """Writes what is told of the run on the console."""
    sys.stderr.write(f"told: {title}: {text}\n")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
