"""Training questions of several sets with the search prompt: train.parquet.

python scripts/data_process/qa_search_train_merge.py --local_dir data/nq_hotpotqa_train
--data_sources nq,hotpotqa
"""

import sys

from search_r1.data.benchmarks import command

if __name__ == "__main__":
    sys.exit(command(__doc__ or "", "nq,hotpotqa", "data/nq_hotpotqa_train", ("train",), "search"))
