"""Natural Questions with the search prompt: train.parquet and test.parquet, as the paper trains on.

python scripts/data_process/nq_search.py --local_dir data/nq_search
"""

import sys

from search_r1.data.benchmarks import command

if __name__ == "__main__":
    sys.exit(command(__doc__ or "", "nq", "data/nq_search", ("train", "test"), "search"))
