"""Time per query of BM25 by number of passages, from 100,000 to 10 million, over synthetic
passages.

    python scripts/bench/retrieval_zipf.py --passages 100000 1000000 10000000

Word frequencies follow Zipf's law (as Mandelbrot wrote it), 45 different words a passage; words are
independent of each other, so nothing clusters, which is the hardest case for skipping. Postings are
drawn directly, because the text of 10 million passages would take hours to analyse. A query is five
to eight words of one passage, drawn evenly. Passages are served as empty texts, so a search is
analysis, scoring and reading three lines.

`ms` is wall time, `CPU ms` that of the searching thread, which other processes on the machine
disturb less.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
from numba import njit

from search_r1.search.engines import bm25
from search_r1.search.engines.bm25 import index as bm25_index
from search_r1.search.index.files import building
from search_r1.search.index.manifest import fingerprint, read_manifest, write_manifest
from search_r1.search.index.reader import OFFSETS

WORDS = 300_000
WORDS_PER_PASSAGE = 45
HIGHEST_SHARE = 0.3
SAMPLED = 2000
REPEATS = 0.25
"""Chance that a word that occurred in a passage occurs once more."""


def shares() -> np.ndarray:
    """Share of the passages that each word is in: most frequent first, together
    WORDS_PER_PASSAGE."""
    raw = 1 / (np.arange(1, WORDS + 1) + 8.0) ** 1.05
    low = 1e-6
    high = 1e3
    while high / low > 1 + 1e-9:
        middle = (low * high) ** 0.5
        if np.minimum(HIGHEST_SHARE, raw * middle).sum() < WORDS_PER_PASSAGE:
            low = middle
        else:
            high = middle
    return np.minimum(HIGHEST_SHARE, raw * low)


@njit(cache=True)
def draw_postings(share, length_bytes, sampled, documents, codes, sampled_documents, sampled_words):
    """Fills the postings word by word; (starts, number of sampled pairs of passage and word)."""
    np.random.seed(0)
    starts = np.zeros(share.shape[0] + 1, np.int64)
    filled = 0
    pairs = 0
    for word in range(share.shape[0]):
        scale = np.log(1.0 - share[word])
        document = -1
        while True:
            document += 1 + int(np.log(1.0 - np.random.random()) / scale)
            if document >= length_bytes.shape[0]:
                break
            count = 1
            while count < 200 and np.random.random() < REPEATS:
                count += 1
            documents[filled] = document
            codes[filled] = (count << 8) | length_bytes[document]
            filled += 1
            if sampled[document]:
                sampled_documents[pairs] = document
                sampled_words[pairs] = word
                pairs += 1
        starts[word + 1] = filled
    return starts, pairs


def build(index: Path, count: int) -> None:
    """Writes an index of `count` passages, its corpus, and `queries.json`."""
    corpus = index.with_name("corpus.jsonl")
    index.parent.mkdir(parents=True, exist_ok=True)
    lines = [b'{"id": %d, "contents": ""}\n' % i for i in range(count)]
    corpus.write_bytes(b"".join(lines))
    offsets = np.concatenate([[0], np.cumsum([len(line) for line in lines])[:-1]])
    del lines
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(65, 15, count), 20, 160).astype(np.int32)
    sampled = np.zeros(count, dtype=bool)
    sampled[rng.choice(count, SAMPLED, replace=False)] = True
    room = int(WORDS_PER_PASSAGE * count * 1.02) + 1000
    documents = np.zeros(room, dtype=np.int32)
    codes = np.zeros(room, dtype=np.uint16)
    pairs = [np.zeros(SAMPLED * 4 * WORDS_PER_PASSAGE, dtype=np.int64) for _ in range(2)]
    starts, found = draw_postings(
        shares(), bm25_index.length_bytes(lengths), sampled, documents, codes, *pairs
    )
    words_of: dict[int, list[int]] = {}
    for document, word in zip(pairs[0][:found].tolist(), pairs[1][:found].tolist(), strict=True):
        words_of.setdefault(document, []).append(word)
    queries = [
        " ".join(
            f"w{word:06d}"
            for word in rng.choice(words, min(len(words), rng.integers(5, 9)), replace=False)
        )
        for words in words_of.values()
    ]
    index.with_name("queries.json").write_text(json.dumps(queries))
    with building(index) as folder:
        np.save(folder / OFFSETS, offsets)
        np.save(folder / "posting_documents.npy", documents[: starts[-1]])
        np.save(folder / "posting_codes.npy", codes[: starts[-1]])
        bm25_index.write_vocabulary({f"w{number:06d}": number for number in range(WORDS)}, folder)
        none = np.zeros(0, dtype=np.int64)
        bm25_index.write_statistics(folder, starts, none, none, lengths)
        write_manifest(
            folder,
            engine="bm25",
            parameters=bm25.PARAMETERS,
            corpus=fingerprint(corpus),
            documents=count,
        )


def measure(
    retriever: bm25.BM25Retriever, queries: list[str], topk: int, batch: int
) -> tuple[float, float]:
    """(wall milliseconds, CPU milliseconds) per query, the best of three passes."""
    best = []
    for _ in range(3):
        wall = time.perf_counter()
        cpu = time.thread_time()
        for start in range(0, len(queries), batch):
            retriever.search(queries[start : start + batch], topk)
        best.append((time.perf_counter() - wall, time.thread_time() - cpu))
    return min(w for w, _ in best) * 1000 / len(queries), min(c for _, c in best) * 1000 / len(
        queries
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passages", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--topk", type=int, nargs="+", default=[3, 10, 100])
    parser.add_argument("--work", type=Path, default=Path("runs/bench/zipf"))
    args = parser.parse_args()
    sys.stdout.write(
        "| passages | index MB | passages asked for | batch | ms | CPU ms "
        "|\n|---|---|---|---|---|---|\n"
    )
    for count in args.passages:
        index = args.work / str(count) / "bm25"
        if not index.exists():
            build(index, count)
        size = sum(read_manifest(index)["files"].values()) / 1e6
        retriever = bm25.BM25Retriever(index, index.with_name("corpus.jsonl"), threads=1)
        queries = json.loads(index.with_name("queries.json").read_text())
        for topk in args.topk:
            for batch in (1, 64):
                wall, cpu = measure(retriever, queries, topk, batch)
                sys.stdout.write(
                    f"| {count} | {size:.0f} | {topk} | {batch} | {wall:.3f} | {cpu:.3f} |\n"
                )
                sys.stdout.flush()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(f"peak memory with mapped pages: {peak:.0f} MB\n")


if __name__ == "__main__":
    main()
