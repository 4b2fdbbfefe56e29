"""Dense retrieval with FAISS indexes; passages are embedded in shards that can be resumed."""

import errno
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from tqdm import tqdm

from search_r1.search.engine import Hits
from search_r1.search.engines.encoder import Encoder
from search_r1.search.errors import CorpusError, RetrieverError
from search_r1.search.index.corpus import Corpus
from search_r1.search.index.files import building, replacing
from search_r1.search.index.manifest import MANIFEST, read_manifest, write_manifest
from search_r1.search.index.reader import CorpusReader

INDEX = "faiss.index"
TYPES = {
    "Flat": "Flat",
    "Flat-F16": "SQfp16",
    "Flat-SQ8": "SQ8",
    "HNSW": "HNSW32",
    "IVF-Flat": "IVF{nlist},Flat",
    "IVF-SQ8": "IVF{nlist},SQ8",
    "IVF-PQ": "IVF{nlist},PQ{bytes}",
}
"""Strings of FAISS's index factory, by type. Users may give any other such string instead."""
TRAINING_POINTS = 39
"""Vectors per centroid that k-means needs."""
GPU_TYPES = ("Flat", "IVF-Flat", "IVF-SQ8", "IVF-PQ")
"""The `TYPES` that FAISS supports on GPUs."""
PASSAGES_AT_A_TIME = 512
"""Number of passages that are passed to the encoder together."""
QUERIES_PER_PRODUCT = 8
"""Number of queries from which an exact search multiplies matrices.

This takes a tenth of the time of one query after the other (docs/results/retrieval.md). FAISS 1.15
by itself does so only from 128,000 queries on, that is, never."""
faiss.cvar.distance_compute_blas_threshold = QUERIES_PER_PRODUCT


@dataclass(frozen=True)
class EmbeddingShards:
    """The embeddings of a corpus in files of `size` passages.

    Every file is complete, so that an interrupted run continues after the last one.
    """

    folder: Path
    size: int = 16384

    def prepare(self, identity: dict[str, Any]) -> None:
        """Keeps existing shards if they are of the same corpus and model, and else removes them."""
        mark = self.folder / MANIFEST
        text = json.dumps({**identity, "shard_size": self.size}, indent=1)
        if not (mark.is_file() and mark.read_text() == text):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            mark.write_text(text)

    def fill(self, documents: Iterable[dict[str, Any]], encoder: Encoder, batch_size: int) -> int:
        """Embeds the documents that have no embedding yet; returns the number of all documents."""
        done = len(self.files())
        count = 0
        vectors = list[np.ndarray]()
        texts = list[str]()
        for document in documents:
            if count >= done * self.size:
                texts.append(document["contents"])
            count += 1
            if len(texts) == PASSAGES_AT_A_TIME or (texts and count % self.size == 0):
                vectors.append(encoder.encode_passages(texts, batch_size))
                texts = []
            if vectors and count % self.size == 0:
                self._write(count // self.size - 1, vectors)
                vectors = []
        if texts:
            vectors.append(encoder.encode_passages(texts, batch_size))
        if vectors:
            self._write(count // self.size, vectors)
        return count

    def _write(self, number: int, vectors: list[np.ndarray]) -> None:
        shard = self.folder / f"{number:05d}.npy"
        with replacing(shard) as pending, pending.open("wb") as file:
            np.save(file, np.concatenate(vectors))

    def files(self) -> list[Path]:
        """The shards in the order of the corpus."""
        return sorted(self.folder.glob("[0-9]*.npy"))

    def __iter__(self) -> Iterator[np.ndarray]:
        return (np.load(path, mmap_mode="r") for path in self.files())


def build(
    reader: CorpusReader,
    index: Path,
    encoder: Encoder,
    shards: EmbeddingShards,
    faiss_type: str = "Flat",
    batch_size: int = 512,
) -> int:
    """Writes a FAISS index to the folder `index`, whole or not at all.

    Returns the number of documents. The caller removes the shards. Raises CorpusError for a bad
    corpus, RetrieverError for a type that is unknown or does not suit the corpus.
    """
    settings = {
        "model": encoder.name,
        "prefixes": list(encoder.prefixes),
        "dimension": encoder.dimension,
    }
    with building(index) as folder:
        shards.prepare({**settings, "corpus": reader.fingerprint()})
        count = shards.fill(reader.store(folder), encoder, batch_size)
        write_index(make_index(shards, count, encoder.dimension, faiss_type), folder / INDEX)
        write_manifest(
            folder,
            engine="dense",
            parameters={**settings, "faiss_type": faiss_type},
            corpus=reader.fingerprint(),
            documents=count,
        )
    return count


def make_index(shards: EmbeddingShards, count: int, dimension: int, faiss_type: str) -> Any:
    """Makes an inner-product index: trains it if its type needs that, then adds every shard.

    Raises RetrieverError when FAISS does not know the type or cannot train it on so few passages.
    """
    nlist = max(1, min(int(4 * math.sqrt(count)), count // TRAINING_POINTS))
    description = TYPES.get(faiss_type, faiss_type).format(
        nlist=nlist, bytes=max(1, dimension // 8)
    )
    try:
        index = faiss.index_factory(dimension, description, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise RetrieverError(
            f"--faiss_type {faiss_type}: none of {', '.join(TYPES)}, nor does FAISS know it"
        ) from error
    if not index.is_trained:
        try:
            index.train(training_sample(shards, count, nlist))
        except RuntimeError as error:
            raise RetrieverError(
                f"--faiss_type {faiss_type} cannot be trained on {count} passages: use Flat"
            ) from error
    for shard in tqdm(shards, total=len(shards.files()), desc="adding", unit="shards"):
        index.add(np.ascontiguousarray(shard))
    return index


def training_sample(shards: EmbeddingShards, count: int, nlist: int) -> np.ndarray:
    """Draws a sample of the embeddings, twice as large as k-means with `nlist` centroids needs."""
    share = min(1.0, 2 * TRAINING_POINTS * max(nlist, 256) / count)
    rng = np.random.default_rng(0)
    return np.concatenate([shard[rng.random(len(shard)) < share] for shard in shards])


def write_index(index: Any, path: Path) -> None:
    """Writes a FAISS index. Raises RuntimeError or OSError when there is no room for it.

    If there is no room for the last bytes, which are written when the file is closed, FAISS only
    prints a line. Therefore the file is read back, which maps it and costs little.
    """
    faiss.write_index(index, str(path))
    try:
        read_index(path)
    except CorpusError as error:
        raise OSError(
            errno.ENOSPC, "FAISS could not write the end of the file", str(path)
        ) from error


class DenseRetriever:
    """A FAISS index, mapped into memory if FAISS can do that, or divided over all GPUs."""

    def __init__(
        self,
        index: Path,
        corpus: Path | None,
        encoder: Encoder,
        name: str,
        gpu: bool = False,
        nprobe: int = 64,
        ef_search: int = 128,
    ) -> None:
        """Loads an index from a folder of the index builder, or from a published FAISS file.

        The rows of a FAISS file must be the lines of the corpus. Raises CorpusError when index,
        corpus and encoder do not belong together, or something is damaged.
        """
        self.name = name
        self.encoder = encoder
        if index.is_dir():
            self.corpus, self.index = read_built(index, corpus, encoder)
        elif corpus is None:
            raise CorpusError(f"{index} needs its corpus: name the file with --corpus_path")
        else:
            self.index = read_index(index)
            self.corpus = Corpus.of_lines(corpus)
        if self.index.ntotal != len(self.corpus):
            raise CorpusError(
                f"{index} has {self.index.ntotal} vectors, {corpus} has {len(self.corpus)} "
                "documents"
            )
        if self.index.d != encoder.dimension:
            raise CorpusError(
                f"{index} holds vectors of {self.index.d} numbers, {encoder.name} makes "
                f"{encoder.dimension}"
            )
        set_depth(self.index, nprobe, ef_search)
        self.sign = 1.0 if self.index.metric_type == faiss.METRIC_INNER_PRODUCT else -1.0
        if gpu:
            self.index = to_gpus(self.index)

    def __len__(self) -> int:
        return len(self.corpus)

    def search(self, queries: Sequence[str], topk: int) -> list[Hits]:
        """Searches all queries by one call of the encoder and one of the index."""
        scores, positions = self.index.search(self.encoder.encode_queries(queries), topk)
        return [self.to_hits(*row) for row in zip(positions, scores, strict=True)]

    def to_hits(self, positions: np.ndarray, scores: np.ndarray) -> Hits:
        """The documents of a query. FAISS pads the positions with -1 when it finds fewer."""
        return [
            (self.corpus[int(position)], self.sign * float(score))
            for position, score in zip(positions, scores, strict=True)
            if position >= 0
        ]


def read_built(index: Path, corpus: Path | None, encoder: Encoder) -> tuple[Corpus, Any]:
    """Reads corpus and index of a folder of the index builder.

    Raises CorpusError when something is damaged, or it was built with another encoder.
    """
    manifest = read_manifest(index)
    documents = Corpus.of_index(index, manifest, corpus)
    vectors = read_index(index / INDEX)
    if (built := manifest["parameters"]["model"]) != encoder.name:
        raise CorpusError(f"{index} was built with {built}, --retriever_model is {encoder.name}")
    return documents, vectors


def read_index(path: Path) -> Any:
    """Reads a FAISS index. Raises CorpusError when the file is missing, cut short, or no index."""
    if not path.is_file():
        raise CorpusError(f"{path}: no such index")
    with path.open("rb") as file:
        is_ivf = file.read(2) == b"Iw"
    flags = faiss.IO_FLAG_MMAP if is_ivf else faiss.IO_FLAG_MMAP_IFC
    try:
        return faiss.read_index(str(path), flags | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError as error:
        raise CorpusError(
            f"{path}: damaged or no FAISS index ({str(error).splitlines()[0]})"
        ) from error


def set_depth(index: Any, nprobe: int, ef_search: int) -> None:
    """Sets how much of an approximate index is searched for each query."""
    kind: Any = faiss.downcast_index(index)
    if hasattr(kind, "nprobe"):
        kind.nprobe = min(nprobe, kind.nlist)
    elif hasattr(kind, "hnsw"):
        kind.hnsw.efSearch = ef_search


def to_gpus(index: Any) -> Any:
    """Copies the index to the GPUs, in half precision, its vectors divided over all of them.

    Raises RetrieverError if FAISS is the build for the CPU or sees no GPU, or if the index has a
    type other than `GPU_TYPES` or does not fit into the memory.
    """
    if not hasattr(faiss, "StandardGpuResources"):  # which only the build for GPUs has
        raise RetrieverError(
            "--faiss_gpu: this FAISS is the build for the CPU: pip uninstall faiss-cpu, then "
            "pip install -e '.[dense-gpu]' in the project's folder (both builds fill the same "
            "folder)"
        )
    if faiss.get_num_gpus() == 0:
        raise RetrieverError("--faiss_gpu: FAISS sees no GPU (CUDA_VISIBLE_DEVICES, nvidia-smi)")
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = True
    options.shard = True
    try:
        return faiss.index_cpu_to_all_gpus(index, co=options)
    except RuntimeError as error:
        kind = type(faiss.downcast_index(index)).__name__
        cause = str(error).strip().splitlines()[-1]
        raise RetrieverError(
            f"--faiss_gpu: FAISS cannot put this index, {kind} of {index.ntotal} vectors, on the "
            f"GPUs ({cause}); the types that it can: {', '.join(GPU_TYPES)}; leave --faiss_gpu "
            "out, or build one of them (index_builder --faiss_type)"
        ) from error
