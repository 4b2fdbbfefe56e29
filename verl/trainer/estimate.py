"""`python -m verl.trainer.estimate`: the GPU memory of a configuration, before it runs."""

import sys

from verl.estimate.report import main

if __name__ == "__main__":
    sys.exit(main())
