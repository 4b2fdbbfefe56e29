"""Test questions of the paper's seven sets with the search prompt: test.parquet.

python scripts/data_process/qa_search_test_merge.py --local_dir data/nq_hotpotqa_train
"""

import sys

from search_r1.data.benchmarks import SIZES, command

if __name__ == "__main__":
    sys.exit(command(__doc__ or "", ",".join(SIZES), "data/nq_hotpotqa_train", ("test",), "search"))
