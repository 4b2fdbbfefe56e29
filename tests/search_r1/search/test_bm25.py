"""BM25: the formula, Anserini's analysis, and agreement with Lucene itself."""

import json
import math
import random
from collections import Counter, defaultdict

import numba
import numpy as np
import pytest

from search_r1.search import index_builder
from search_r1.search.engines import bm25
from search_r1.search.engines.bm25 import BM25Retriever, arrays, compiled
from search_r1.search.engines.bm25 import index as bm25_index
from search_r1.search.engines.bm25 import postings as bm25_postings
from search_r1.search.engines.bm25 import score as bm25_score
from search_r1.search.engines.bm25.analysis import Analyzer
from search_r1.search.engines.bm25.index import length_bytes, length_of_bytes
from search_r1.search.errors import CorpusError
from search_r1.search.index.reader import CorpusReader
from tests.retrieval import write_corpus, write_lines

ROWS = [
    {"id": "0", "contents": '"Torvel"\nTorvel lies in Marna. It has a harbour.'},
    {"id": "1", "contents": '"Ada Marin"\nAda Marin was born in Torvel.'},
    {"id": "2", "contents": '"Bo Keld"\nBo Keld sails. Bo Keld was born at sea.'},
    {"id": "3", "contents": '"Marna"\nMarna is a country of hills.'},
]


def test_scores_are_lucenes_bm25(tmp_path):
    """score = sum over query terms of log(1 + (N - n + .5) / (n + .5)) * tf / (tf + k1 (1 - b + b
    len / avg))."""
    analyze = Analyzer()
    tokens = [analyze(row["contents"]) for row in ROWS]
    average = sum(map(len, tokens)) / len(tokens)
    expected = []
    for document in tokens:
        score = 0.0
        for term in analyze("born Torvel born"):
            n = sum(term in d for d in tokens)
            tf = document.count(term)
            length = 1 - bm25_postings.B + bm25_postings.B * len(document) / average
            score += (
                math.log(1 + (len(tokens) - n + 0.5) / (n + 0.5))
                * tf
                / (tf + bm25_postings.K1 * length)
            )
        expected.append(score)
    path = write_corpus(tmp_path, ROWS)
    (hits,) = BM25Retriever(tmp_path / "bm25", path).search(["born Torvel born"], 4)
    got = {document["id"]: score for document, score in hits}
    assert got == pytest.approx({str(i): s for i, s in enumerate(expected) if s > 0}, rel=1e-5)


def test_queries_without_a_known_word_find_nothing(tmp_path):
    path = write_corpus(tmp_path, ROWS)
    assert BM25Retriever(tmp_path / "bm25", path).search(["the ?", "", "zyx", "Torvel"], 1)[:3] == [
        [],
        [],
        [],
    ]


def test_analysis_is_anserinis():
    """What Anserini's DefaultEnglishAnalyzer makes of these, read off a run of it."""
    analyze = Analyzer()
    text = (
        "The U.S.A. won't stop John's 3.14 and 1,000 a_b foo:bar x-y naïve 東京タワー "
        "dogs' o’clock T's"
    )
    expected = "u.s.a|won't|stop|john|3.14|1,000|a_b|foo:bar|x|y|naïv|東|京|タワー|dog|o’clock|t"
    assert "|".join(analyze(text)) == expected
    text = (
        "can't I'm e.g. i.e. user@site.com http://a.b/c?d=e 10:30 #1 C++ AT&T 5th 1990s "
        "rock'n'roll us"
    )
    expected = "can't|i'm|e.g|i.|user|site.com|http|a.b|c|d|e|10|30|1|c|t|5th|1990|rock'n'rol|us"
    assert "|".join(analyze(text)) == expected
    text = "漢's a.漢 漢.漢 東京’s rock ひ.b x.ひ 1.漢"
    expected = "漢|s|漢|漢|漢|東|京|s|rock|ひ|b|x|ひ|1|漢"
    assert "|".join(analyze(text)) == expected
    assert analyze("possibly assembly incredibly nobly technology apologies archaeology") == (
        ["possibl", "assembl", "incred", "nobli", "technolog", "apolog", "archaeolog"]
    )


def test_lengths_are_kept_as_lucene_keeps_them():
    lengths = np.array([0, 1, 23, 24, 39, 40, 41, 42, 55, 56, 57, 59, 60, 120, 1000])
    assert length_of_bytes()[length_bytes(lengths)].tolist() == [
        0,
        1,
        23,
        24,
        39,
        40,
        40,
        42,
        54,
        56,
        56,
        56,
        60,
        120,
        984,
    ]


def words(seed, count):
    rng = random.Random(seed)
    return " ".join(
        rng.choices(
            [f"{rng.choice('bdfgklmnprstvz')}{v}{c}" for v in "aeiou" for c in "lmnrst"], k=count
        )
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rows = [{"id": str(i), "contents": f'"T{i}"\n{words(i, 5 + i % 90)}'} for i in range(400)]
    return write_lines(tmp_path_factory.mktemp("corpus") / "c.jsonl", rows)


def test_blocks_change_nothing(corpus, tmp_path, monkeypatch):
    bm25.build(corpus, tmp_path / "one")
    monkeypatch.setattr(bm25_postings, "BLOCK", 1000)
    bm25.build(corpus, tmp_path / "many")
    one, many = (
        {p.name: p.read_bytes() for p in (tmp_path / kind).iterdir()} for kind in ("one", "many")
    )
    assert one == many


class Exhaustive:
    """Every document scored, with Lucene's arithmetic: 32-bit scores of words, added in 64 bits."""

    def __init__(self, path):
        analyze = Analyzer()
        documents = [Counter(analyze(json.loads(line)["contents"])) for line in path.open()]
        lengths = np.array([document.total() for document in documents])
        self.occurrences = defaultdict(lambda: np.zeros(len(documents), np.float32))
        for i, document in enumerate(documents):
            for stem, n in document.items():
                self.occurrences[stem][i] = n
        kept = length_of_bytes()[length_bytes(lengths)]
        one = np.float32(1)
        k1 = np.float32(0.9)
        b = np.float32(0.4)
        average = np.float32(lengths.sum() / np.count_nonzero(lengths))
        self.inverse = one / (k1 * ((one - b) + b * kept / average))
        self.count = np.count_nonzero(lengths)

    def rank(self, query, topk):
        scores = np.zeros(len(self.inverse))
        for stem, occurrences in Counter(Analyzer()(query)).items():
            tf = self.occurrences[stem]
            n = np.count_nonzero(tf)
            idf = np.float32(math.log1p((self.count - n + 0.5) / (n + 0.5)))
            weight = np.float32(occurrences) * idf
            scores += weight - weight / (np.float32(1) + tf * self.inverse)
        rounded = scores.astype(np.float32)
        best = np.argsort(-rounded, kind="stable")[:topk]
        return [(int(i), float(rounded[i])) for i in best if rounded[i] > 0]


def texts(rng, count, vocabulary, longest):
    """Documents and queries in which words are as unequal as in language, many documents being
    alike."""
    weights = 1 / np.arange(1, vocabulary + 1)
    for _ in range(count):
        chosen = rng.choice(vocabulary, rng.integers(0, longest), p=weights / weights.sum())
        yield " ".join(f"w{number}" for number in chosen)


@pytest.mark.parametrize(
    ("documents", "vocabulary", "longest", "one_in"),
    [
        (1, 3, 4, 256),
        (40, 5, 6, 256),
        (700, 200, 12, 4),
        (700, 200, 12, 10**9),
        (5000, 2000, 30, 40),
    ],
)
def test_skipping_changes_nothing(tmp_path, monkeypatch, documents, vocabulary, longest, one_in):
    """Ranking and scores are exactly those of scoring every document, whatever is skipped."""
    monkeypatch.setattr(bm25_index, "FREQUENT", one_in)
    rng = np.random.default_rng(documents + one_in)
    rows = [
        {"id": i, "contents": text}
        for i, text in enumerate(texts(rng, documents, vocabulary, longest))
    ]
    # more occurrences than a posting's code can hold
    rows[0]["contents"] = "w0 w1 w2 " + "w2 " * 300
    path = write_corpus(tmp_path, rows)
    retriever = BM25Retriever(tmp_path / "bm25", path, threads=2)
    exhaustive = Exhaustive(path)
    queries = [
        *texts(rng, 40, vocabulary, 9),
        "w0",
        "w2",
        f"w{vocabulary - 1}",
        "unknown",
        "w0 w0 w0 unknown w1",
    ]
    # more words than are bounded by range
    queries.append(" ".join(f"w{number}" for number in range(vocabulary)))
    rankings = [exhaustive.rank(query, 1000) for query in queries]
    for topk in (1, 3, 50, 1000):
        expected = [ranking[:topk] for ranking in rankings]
        assert [retriever.rank(query, topk) for query in queries] == expected
        batch = retriever.scorer.rank([retriever.analyze(query) for query in queries], topk)
        assert batch == expected


def test_a_word_that_few_documents_have_looks_at_their_ranges_only(tmp_path):
    rows = [{"id": i, "contents": "common" if i else "rare common"} for i in range(5000)]
    path = write_corpus(tmp_path, rows)
    scorer = BM25Retriever(tmp_path / "bm25", path, threads=1).scorer
    query = arrays.new_query(
        np.array([scorer.vocabulary["rare"]], np.int32), np.array([9.0], np.float32)
    )
    _, beyond = bm25_score.prepare(scorer.postings, query)
    bounds = scorer.rooms[0].bounds
    bm25_score.bound_ranges(scorer.postings, query, beyond, bounds)
    assert np.flatnonzero(bounds).tolist() == [0]


def test_an_index_of_an_older_format_is_refused_and_built_again(tmp_path):
    path = write_corpus(tmp_path, ROWS)
    manifest = tmp_path / "bm25" / "manifest.json"
    old = json.loads(manifest.read_text()) | {"parameters": {"k1": 0.9, "b": 0.4}}
    manifest.write_text(json.dumps(old))
    with pytest.raises(
        CorpusError, match=r"older format; build it again: python -m .*index_builder"
    ):
        BM25Retriever(tmp_path / "bm25", path)
    assert index_builder.main(["--corpus_path", str(path), "--save_dir", str(tmp_path)]) == 0
    assert len(BM25Retriever(tmp_path / "bm25", path)) == 4


def test_without_a_folder_for_compiled_code_it_is_compiled_at_every_start(monkeypatch, caplog):
    def no_folder(*args, **options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function 'add': no locator available")
        return numba.njit(*args, **options)

    monkeypatch.setattr(compiled, "njit", no_folder)
    add = compiled.compiled(lambda a, b: a + b)
    assert add(1, 2) == 3
    assert "set NUMBA_CACHE_DIR" in caplog.text


def test_ranking_and_scores_agree_with_lucene(corpus, tmp_path):
    lucene = pytest.importorskip("search_r1.search.engines.lucene")
    pytest.importorskip("pyserini", reason="the extra `lucene` is not installed")
    bm25.build(corpus, tmp_path / "bm25")
    lucene.build(CorpusReader(corpus), tmp_path / "lucene", threads=1)
    ours = BM25Retriever(tmp_path / "bm25", corpus)
    theirs = lucene.LuceneRetriever(tmp_path / "lucene", None)
    assert len(theirs) == len(ours) == 400
    queries = [words(1000 + i, 1 + i % 6) for i in range(50)]
    for a, b in zip(ours.search(queries, 10), theirs.search(queries, 10), strict=True):
        assert [s for _, s in a] == pytest.approx([s for _, s in b], rel=1e-4)
        assert {d["id"] for d, s in a if s > a[-1][1] * 1.001} <= {d["id"] for d, _ in b}


def test_a_lucene_index_without_stored_passages_takes_them_from_the_corpus(corpus, tmp_path):
    """As with the published wiki-18 index, whose ids are line numbers; `--retriever_name bm25`
    serves it."""
    lucene = pytest.importorskip("search_r1.search.engines.lucene")
    pytest.importorskip("pyserini", reason="the extra `lucene` is not installed")
    from search_r1.search.engines.load import load
    from search_r1.search.retrieval_server import parse_arguments

    java = lucene.start_jvm()
    (tmp_path / "source").mkdir()
    write_lines(tmp_path / "source" / "c.jsonl", [eval(line) for line in corpus.open()])
    flags = [
        "-collection",
        "JsonCollection",
        "-generator",
        "DefaultLuceneDocumentGenerator",
        "-quiet",
    ]
    places = ["-input", str(tmp_path / "source"), "-index", str(tmp_path / "bm25"), "-threads", "1"]
    java("io.anserini.index.IndexCollection").main([*flags, *places])
    command = ["--retriever_name", "bm25", "--index_path", str(tmp_path / "bm25"), "--corpus_path"]
    engine = load(parse_arguments([*command, str(corpus)]))
    assert engine.name == "lucene"
    (hits,) = engine.search([words(7, 3)], 3)
    assert len(hits) == 3 and all(d["contents"].startswith(f'"T{d["id"]}"') for d, _ in hits)
    other = write_lines(
        tmp_path / "other.jsonl", [{"id": f"x{i}", "contents": "y"} for i in range(400)]
    )
    with pytest.raises(CorpusError, match=r"holds document 'x\d+', not"):
        load(parse_arguments([*command, str(other)])).search([words(7, 3)], 3)
