"""Dense indexes at real size: recall of the exact top 10, time per query, size and build time of
every FAISS type.

    python scripts/bench/dense_scale.py --sample e5_flat_sample.index [--vectors 1000000] [TYPE ...]

The vectors are synthetic: a mixture of clusters with the mean and the covariance of a real sample,
a FAISS file of embeddings, whose vectors are in the index too. So they crowd around their mean as
those of a real encoder do; what they cannot show is how real questions lie to real passages. Each
type leaves its rows in --rows and is not measured again. Vectors and indexes lie in --work (for a
million of 768 numbers: 3 GB, and up to 3.4 GB for the largest index).
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from search_r1.search.engines import dense
from search_r1.search.engines.dense import EmbeddingShards
from search_r1.search.index.corpus import save_whole

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
SHARD = 50_000
PASSAGES_PER_CLUSTER = 50
WITHIN = 0.4
"""Share of the variance that is within the clusters."""
DEPTHS: dict[str, list[int]] = {
    "HNSW": [32, 64, 128, 256],
    "IVF-Flat": [16, 64, 256],
    "IVF-SQ8": [16, 64, 256],
    "IVF-PQ": [16, 64, 256],
}
"""efSearch of HNSW, nprobe of the others; types without an entry are scanned whole."""
TOPK = 10
REPEATS = 5
QUERY_SEED = 1 << 20
"""Apart from the seeds of the centres and of the shards."""


class Mixture:
    """Clusters whose points have, over all, the mean and covariance of a sample of unit vectors."""

    def __init__(self, sample: np.ndarray, clusters: int) -> None:
        self.mean = sample.mean(0)
        _, scales, self.axes = np.linalg.svd(sample - self.mean, full_matrices=False)
        self.scales = scales / np.sqrt(len(sample))
        rng = np.random.default_rng(0)
        self.centres = np.sqrt(1 - WITHIN) * self._normal(rng, clusters)

    def _normal(self, rng: np.random.Generator, count: int) -> np.ndarray:
        draws = rng.standard_normal((count, len(self.scales)), dtype=np.float32)
        return draws * self.scales.astype(np.float32)

    def draw(self, seed: int, count: int) -> np.ndarray:
        """Unit vectors, float32 [count, dimension]."""
        rng = np.random.default_rng(seed)
        cluster = rng.integers(len(self.centres), size=count)
        place = self.centres[cluster] + np.sqrt(WITHIN) * self._normal(rng, count)
        vectors = self.mean + place @ self.axes
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.ascontiguousarray(vectors / norms, dtype=np.float32)


def read_sample(path: Path) -> np.ndarray:
    """The vectors of a flat FAISS index, float32 [n, dimension]."""
    index = faiss.read_index(str(path))
    return index.reconstruct_n(0, index.ntotal)


def write_vectors(
    shards: EmbeddingShards, mixture: Mixture, sample: np.ndarray, count: int
) -> None:
    """Writes the sample and synthetic vectors, `count` in all, as shards of the index builder."""
    shards.folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, count, SHARD)):
        path = shards.folder / f"{number:05d}.npy"
        if path.exists():
            continue
        vectors = mixture.draw(seed=1 + number, count=min(SHARD, count - start))
        if number == 0:
            vectors[: len(sample)] = sample
        save_whole(path, vectors)


def exact_neighbours(shards: Iterable[np.ndarray], queries: np.ndarray) -> np.ndarray:
    """Places of the TOPK largest inner products, [queries, TOPK]."""
    scores = np.empty((len(queries), 0), dtype=np.float32)
    places = np.empty((len(queries), 0), dtype=np.int64)
    start = 0
    for shard in shards:
        scores = np.concatenate([scores, queries @ shard.T], axis=1)
        new = np.broadcast_to(np.arange(start, start + len(shard)), (len(queries), len(shard)))
        places = np.concatenate([places, new], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :TOPK]
        scores = np.take_along_axis(scores, best, axis=1)
        places = np.take_along_axis(places, best, axis=1)
        start += len(shard)
    return places


def milliseconds_per_query(index: Any, queries: np.ndarray, batch: int) -> float:
    """Median over REPEATS batches, after one that is not counted."""
    times = []
    for repeat in range(REPEATS + 1):
        first = repeat * batch % max(1, len(queries) - batch)
        began = time.perf_counter()
        index.search(queries[first : first + batch], TOPK)
        times.append((time.perf_counter() - began) / batch)
    return float(np.median(times[1:])) * 1000


def measure(
    kind: str, shards: EmbeddingShards, queries: np.ndarray, exact: np.ndarray, work: Path
) -> Iterator[Row]:
    """Builds the index of a type and yields a row for every search depth."""
    dimension = queries.shape[1]
    count = sum(len(shard) for shard in shards)
    path = work / f"{kind}.index"
    began = time.perf_counter()
    faiss.write_index(dense.make_index(shards, count, dimension, kind), str(path))
    build_s = time.perf_counter() - began
    index = dense.read_index(path)
    for depth in DEPTHS.get(kind, [0]):
        dense.set_depth(index, nprobe=depth, ef_search=depth)
        _, found = index.search(queries, TOPK)
        shared = [len(set(a) & set(b)) / TOPK for a, b in zip(found, exact, strict=True)]
        yield {
            "type": kind,
            "depth": depth,
            "vectors": count,
            "recall": float(np.mean(shared)),
            "ms_alone": milliseconds_per_query(index, queries, 1),
            "ms_in_64": milliseconds_per_query(index, queries, 64),
            "megabytes": path.stat().st_size / 1e6,
            "build_s": build_s,
            "threads": faiss.omp_get_max_threads(),
        }
    path.unlink()


def read_rows(path: Path, vectors: int) -> list[Row]:
    """The rows of indexes of so many vectors."""
    rows = [json.loads(line) for line in path.open()] if path.exists() else []
    return [row for row in rows if row["vectors"] == vectors]


def table(rows: list[Row]) -> str:
    """Markdown; times also as shares of the exact scan in float32."""
    lines = [
        "| type | depth | recall@10 | ms alone | ms in batches of 64 | of Flat | MB | build s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    flat = next((row["ms_in_64"] for row in rows if row["type"] == "Flat"), None)
    for row in rows:
        share = f"{row['ms_in_64'] / flat:.3f}" if flat else "-"
        lines.append(
            f"| {row['type']} | {row['depth'] or '-'} | {row['recall']:.3f} | "
            f"{row['ms_alone']:.2f} | "
            f"{row['ms_in_64']:.2f} | {share} | {row['megabytes']:,.0f} | {row['build_s']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*", metavar="TYPE", help=f"of {', '.join(dense.TYPES)}")
    parser.add_argument("--sample", type=Path, required=True, help="flat FAISS file of embeddings")
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--work", type=Path, default=Path("runs/bench/dense"))
    parser.add_argument("--rows", type=Path, default=ROOT / "docs/results/dense_scale.jsonl")
    args = parser.parse_args()
    if unknown := sorted(set(args.types) - set(dense.TYPES)):
        parser.error(f"unknown types: {', '.join(unknown)}; there are {', '.join(dense.TYPES)}")
    sample = read_sample(args.sample)
    if len(sample) > min(SHARD, args.vectors):
        parser.error(
            f"--sample has {len(sample)} vectors, more than --vectors or a shard of {SHARD}"
        )
    mixture = Mixture(sample, clusters=max(1, args.vectors // PASSAGES_PER_CLUSTER))
    shards = EmbeddingShards(args.work / f"{args.sample.stem}-{args.vectors}", SHARD)
    write_vectors(shards, mixture, sample, args.vectors)
    queries = mixture.draw(seed=QUERY_SEED, count=args.queries)
    exact = exact_neighbours(shards, queries)
    done = {row["type"] for row in read_rows(args.rows, args.vectors)}
    for kind in args.types or dense.TYPES:
        if kind in done:
            continue
        rows = list(measure(kind, shards, queries, exact, args.work))
        with args.rows.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    sys.stdout.write(table(read_rows(args.rows, args.vectors)))


if __name__ == "__main__":
    main()
