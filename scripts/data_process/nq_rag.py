"""Natural Questions with the passages of one retrieval in the prompt: train.parquet and
test.parquet.

python scripts/data_process/nq_rag.py --local_dir data/nq_rag --retriever_url
http://127.0.0.1:8000/retrieve
"""

import sys

from search_r1.data.benchmarks import command

if __name__ == "__main__":
    sys.exit(command(__doc__ or "", "nq", "data/nq_rag", ("train", "test"), "rag"))
