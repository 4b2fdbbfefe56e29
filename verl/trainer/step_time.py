"""`python -m verl.trainer.step_time`: the seconds of a training step, before it runs."""

import sys

from verl.estimate.step_time import main

if __name__ == "__main__":
    sys.exit(main())
