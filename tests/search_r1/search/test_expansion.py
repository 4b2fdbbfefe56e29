"""Expanded documents and queries: the formulas by hand, the commands, and what they refuse."""

import hashlib
import json
import math
import random
from collections import Counter
from fractions import Fraction

import httpx
import pytest

from search_r1.search import expand_neighbours, index_builder
from search_r1.search.engines import bm25
from search_r1.search.engines.bm25 import BM25Retriever
from search_r1.search.engines.bm25.analysis import Analyzer
from search_r1.search.engines.bm25.expansions import Expansions
from search_r1.search.engines.bm25.feedback import (
    Feedback,
    Rm3Retriever,
    interpolated,
    relevance_model,
)
from search_r1.search.engines.bm25.postings import K1, B
from search_r1.search.engines.load import load
from search_r1.search.errors import CorpusError, RetrieverError
from search_r1.search.retrieval_server import parse_arguments
from tests.retrieval import retrieval_server, write_corpus, write_lines

ROWS = [
    {"id": 0, "contents": "tide harbour harbour boat"},
    {"id": "1", "contents": "tide moon moon moon"},
    {"id": "2", "contents": "moon crater"},
    {"id": "3", "contents": "bread oven"},
    {"id": "4", "contents": "bread butter"},
]
UNCHANGED = "a51f7d592487876dae829da0f9cd6bec12af2e9310c99f142aa2f8ca90c5a11b"
"""SHA-256 of the index of `many_rows`, made by the builder before it knew of expansions."""
RANKING_BEFORE = [(190, 2.6868973), (296, 2.6444385), (111, 2.3464460), (114, 2.2962737)]


def many_rows():
    """300 documents of unequal words, one of which holds a word more often than a code can say."""
    rng = random.Random(7)
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnr"]
    weights = [1 / (i + 1) for i in range(len(words))]
    texts = [" ".join(rng.choices(words, weights, k=3 + i % 40)) for i in range(300)]
    texts[5] += " bal" * 300
    return [{"id": str(i), "contents": text} for i, text in enumerate(texts)]


def test_without_expansions_the_index_is_what_it_was_to_the_byte(tmp_path):
    """All files but idf.npy, whose logarithms may differ in the last bit from machine to machine;
    the ranking is compared instead."""
    path = write_corpus(tmp_path, many_rows())
    digest = hashlib.sha256()
    for file in sorted((tmp_path / "bm25").iterdir()):
        if file.name != "idf.npy":
            digest.update(file.name.encode() + b"\n" + file.read_bytes())
    assert digest.hexdigest() == UNCHANGED
    ranking = BM25Retriever(tmp_path / "bm25", path).rank("bal dem gor kur", 4)
    assert [position for position, _ in ranking] == [position for position, _ in RANKING_BEFORE]
    scores = [score for _, score in RANKING_BEFORE]
    assert [score for _, score in ranking] == pytest.approx(scores, rel=1e-6)


def expanded_index(folder, rows, lines, own_weight):
    path = write_lines(folder / "corpus.jsonl", rows)
    file = write_lines(folder / "expansions.jsonl", lines)
    bm25.build(path, folder / "bm25", Expansions(file, own_weight))
    return BM25Retriever(folder / "bm25", path)


def test_an_added_word_counts_as_a_part_of_one_of_the_documents_own(tmp_path):
    """BM25 of the occurrences and lengths tf + added / m and len + added words / m, with the
    rarity that words have in the texts."""
    lines = [
        {"id": "0", "terms": ["moon", "sea breeze", "moon"]},
        {"id": 2, "text": "Rocks, tides."},
    ]
    engine = expanded_index(tmp_path, ROWS, lines, own_weight=2)
    analyze = Analyzer()
    own = [Counter(analyze(row["contents"])) for row in ROWS]
    added = [Counter(), *(Counter() for _ in ROWS[1:])]
    added[0] = Counter(analyze("moon sea breeze moon"))
    added[2] = Counter(analyze("rocks tides"))
    lengths = [a.total() + b.total() / 2 for a, b in zip(own, added, strict=True)]
    assert lengths == [6, 4, 3, 2, 2]
    average = sum(lengths) / len(lengths)
    expected = {}
    for number, length in enumerate(lengths):
        score = 0.0
        for stem in analyze("moon tide rocks"):
            having = sum(stem in words for words in own)
            having = having or sum(stem in words for words in added)
            occurrences = own[number][stem] + added[number][stem] / 2
            idf = math.log(1 + (len(ROWS) - having + 0.5) / (having + 0.5))
            norm = K1 * (1 - B + B * length / average)
            score += idf * occurrences / (occurrences + norm)
        if score:
            expected[number] = score
    found = dict(engine.rank("moon tide rocks", 5))
    assert found == pytest.approx(expected, rel=1e-5) and set(found) == {0, 1, 2}


def test_added_words_of_no_number_leave_the_scores_as_they_are(tmp_path):
    """Occurrences and lengths are divided by what they were multiplied by, those that no code
    holds too."""
    rows = many_rows()
    (tmp_path / "plain").mkdir()
    path = write_corpus(tmp_path / "plain", rows)
    plain = BM25Retriever(tmp_path / "plain" / "bm25", path)
    expanded = expanded_index(tmp_path, rows, [{"id": "0", "terms": []}], own_weight=4)
    for query in ("bal dem gor kur", "bal", "kum kun"):
        assert expanded.rank(query, 300) == plain.rank(query, 300)


def test_the_relevance_model_is_that_of_the_formula():
    """Two documents with scores 3 and 1: P(w|R) ~ 3 P(w|d1) + P(w|d2), scaled to 1 over the words
    that are kept, then half of it beside half of the query's own."""
    documents = [([1, 2, 2, 9], 3.0), ([2, 3], 1.0)]
    model = relevance_model(documents, lambda word: word != 9, terms=2)
    first = 3 * Fraction(2, 4) + Fraction(1, 2)
    second = 3 * Fraction(1, 4)
    total = first + second
    assert model == pytest.approx({2: float(first / total), 1: float(second / total)})
    assert list(model) == [2, 1]
    weights = interpolated({1: 2, 5: 1}, model, original_weight=0.5)
    assert weights == pytest.approx(
        {
            1: 0.5 * 2 / 3 + 0.5 * float(second / total),
            5: 0.5 * 1 / 3,
            2: 0.5 * float(first / total),
        }
    )
    assert interpolated({1: 2, 5: 1}, {}, 0.5) == pytest.approx({1: 2 / 3, 5: 1 / 3})
    assert relevance_model([], lambda word: True, terms=2) == {}


def test_rm3_finds_what_shares_no_word_with_the_query(tmp_path):
    """ "harbour" finds document 0, whose words tide and boat then find document 1."""
    path = write_corpus(tmp_path, ROWS)
    plain = BM25Retriever(tmp_path / "bm25", path)
    assert [position for position, _ in plain.rank("harbour", 5)] == [0]
    engine = Rm3Retriever(plain, Feedback(documents=1, terms=3, max_df=0.5))
    (hits,) = engine.search(["harbour"], 5)
    assert [document["id"] for document, _ in hits] == [0, "1"]
    scorer = plain.scorer
    numbers = {word: scorer.vocabulary[word] for word in plain.analyze("harbour tide boat")}
    harbour, tide, boat = numbers.values()
    weights = {harbour: 0.5 + 0.5 * 0.5, tide: 0.5 * 0.25, boat: 0.5 * 0.25}
    assert engine.expand({harbour: 1}, plain.rank("harbour", 1)) == pytest.approx(weights)
    singles = {word: dict(plain.rank(word, 5)) for word in ("harbour", "tide", "boat")}
    expected = (
        weights[harbour] * singles["harbour"][0]
        + weights[tide] * singles["tide"][0]
        + weights[boat] * singles["boat"][0]
    )
    assert hits[0][1] == pytest.approx(expected, rel=1e-5)


def test_rm3_leaves_common_words_out_and_needs_a_first_hit(tmp_path):
    path = write_corpus(tmp_path, ROWS)
    plain = BM25Retriever(tmp_path / "bm25", path)
    strict = Rm3Retriever(plain, Feedback(documents=1, max_df=0.2))
    tide = plain.scorer.vocabulary[plain.analyze("tide")[0]]
    harbour = plain.scorer.vocabulary["harbour"]
    assert tide not in strict.expand({harbour: 1}, plain.rank("harbour", 1))
    assert strict.search(["", "unheard of", "the"], 3) == [[], [], []]


def test_rm3_with_all_weight_on_the_query_ranks_as_bm25(tmp_path):
    path = write_corpus(tmp_path, many_rows())
    plain = BM25Retriever(tmp_path / "bm25", path, threads=2)
    same = Rm3Retriever(plain, Feedback(original_weight=1))
    queries = ["bal dem", "gor kur kur unheard", "fim"] * 10
    for a, b in zip(plain.search(queries, 5), same.search(queries, 5), strict=True):
        assert [document["id"] for document, _ in a] == [document["id"] for document, _ in b]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2: not JSON"),
        ("[]", 'line 2: expected an object with "id" and either "terms"'),
        ('{"terms": ["a"]}', 'line 2: expected an object with "id"'),
        ('{"id": "1", "terms": "a"}', "line 2: expected"),
        ('{"id": "1", "terms": ["a", 1]}', "line 2: expected"),
        ('{"id": "1", "terms": ["a"], "text": "b"}', "line 2: expected"),
        ('{"id": 0, "text": "b"}', "line 2: id '0' occurs a second time"),
        ('{"id": "9", "text": "b"}', r"line 2: .*corpus.jsonl has no document '9' \(1 such"),
    ],
)
def test_a_bad_file_of_expansions_is_named_with_its_line(tmp_path, line, message):
    """And the index that was there stays."""
    path = write_corpus(tmp_path, ROWS)
    file = tmp_path / "e.jsonl"
    file.write_text('{"id": "0", "terms": ["sea"]}\n' + line + "\n")
    with pytest.raises(CorpusError, match=rf"e\.jsonl, {message}"):
        bm25.build(path, tmp_path / "bm25", Expansions(file))
    assert len(BM25Retriever(tmp_path / "bm25", path)) == len(ROWS)


def built(folder, *flags):
    return index_builder.main(
        ["--corpus_path", str(folder / "corpus.jsonl"), "--save_dir", str(folder), *flags]
    )


def test_the_manifest_says_by_what_an_index_was_expanded(tmp_path, capsys):
    """It is built again for other expansions, for another weight, and without any."""
    path = write_corpus(tmp_path, ROWS)
    file = write_lines(tmp_path / "e.jsonl", [{"id": "0", "terms": ["sea"]}])
    flags = ["--expansions", str(file)]
    outcomes = []
    for given in ([], flags, flags, [*flags, "--own_weight", "2"], []):
        assert built(tmp_path, *given) == 0
        said = capsys.readouterr().out
        manifest = json.loads((tmp_path / "bm25" / "manifest.json").read_text())
        expansion = manifest.get("document_expansion", {})
        outcomes.append(("already built" in said, expansion.get("own_weight")))
        assert (
            BM25Retriever(tmp_path / "bm25", path).settings.get("document_expansion", {})
            == expansion
        )
    assert outcomes == [(True, None), (False, 4), (True, 4), (False, 2), (False, None)]


def test_only_bm25_expands_documents(tmp_path):
    write_corpus(tmp_path, ROWS)
    file = write_lines(tmp_path / "e.jsonl", [{"id": "0", "terms": ["sea"]}])
    with pytest.raises(SystemExit, match="--expansions is for --retrieval_method bm25, not e5"):
        built(tmp_path, "--retrieval_method", "e5", "--expansions", str(file))
    with pytest.raises(SystemExit, match="no such file of expansions"):
        built(tmp_path, "--expansions", str(tmp_path / "absent.jsonl"))


def test_the_server_expands_queries_and_says_so(tmp_path):
    expanded_index(tmp_path, ROWS, [{"id": "3", "terms": ["flour"]}], own_weight=4)
    flags = ["--query_expansion", "rm3", "--feedback_docs", "1", "--max_df", "0.5"]
    with retrieval_server(tmp_path, *flags) as (url, _):
        (found,) = httpx.post(url, json={"queries": ["harbour"]}).json()["result"]
        assert [document["id"] for document in found] == [0, "1"]
        health = httpx.get(url.replace("/retrieve", "/health")).json()
    assert health["retriever"] == "bm25+rm3"
    assert health["query_expansion"] == {
        "method": "rm3",
        "documents": 1,
        "terms": 10,
        "max_df": 0.5,
        "original_weight": 0.5,
    }
    assert health["document_expansion"]["file"] == "expansions.jsonl"
    assert health["document_expansion"]["own_weight"] == 4


@pytest.mark.parametrize(
    "flags",
    [
        ["--retriever_name", "e5"],
        ["--retriever_name", "oracle"],
        ["--retriever_name", "noisy", "--noisy_of", "bge"],
        ["--retriever_name", "hybrid", "--hybrid_of", "lucene", "e5"],
    ],
)
def test_queries_of_other_engines_are_not_expanded(tmp_path, flags):
    args = parse_arguments([*flags, "--index_path", "x", "--query_expansion", "rm3"])
    with pytest.raises(RetrieverError, match="--query_expansion rm3 is for the engine bm25, not"):
        load(args)


def test_a_lucene_index_is_not_served_with_expanded_queries(tmp_path):
    (tmp_path / "segments_1").touch()
    args = parse_arguments(["--index_path", str(tmp_path), "--query_expansion", "rm3"])
    with pytest.raises(RetrieverError, match="is an index of Lucene, whose queries"):
        load(args)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--feedback_docs", "0", "must be at least 1"),
        ("--feedback_terms", "0", "must be at least 1"),
        ("--original_weight", "1.5", "is a share, from 0 to 1"),
        ("--max_df", "-1", "is a share, from 0 to 1"),
        ("--query_expansion", "rm4", "invalid choice"),
    ],
)
def test_bad_parameters_are_refused(flag, value, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([flag, value])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--feedback_terms", "5"], "--feedback_terms has no effect without --query_expansion rm3"),
        (["--noise", "0.5"], "--noise has no effect without --retriever_name noisy"),
        (
            ["--retriever_name", "simulated", "--noise", "0.5"],
            "--noise has no effect without --retriever_name noisy",
        ),
        (["--noisy_of", "e5"], "--noisy_of has no effect without --retriever_name noisy"),
        (["--hybrid_of", "e5", "e5"], "--hybrid_of has no effect without --retriever_name hybrid"),
        (["--questions", "q"], "--questions has no effect without --retriever_name oracle"),
        (
            ["--simulated_timeout_s", "9"],
            "--simulated_timeout_s has no effect without --retriever_name simulated",
        ),
    ],
)
def test_flags_that_nothing_reads_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(flags)
    assert message in capsys.readouterr().err


def test_the_weight_of_a_document_needs_words_to_weigh_it_against(capsys):
    with pytest.raises(SystemExit):
        index_builder.parse_arguments(["--corpus_path", "c.jsonl", "--own_weight", "3"])
    assert "--own_weight has no effect without --expansions" in capsys.readouterr().err


def test_neighbours_give_the_words_that_a_document_lacks(tmp_path):
    """Document 3 is like 4 alone, whose butter it lacks; 0 and 1 share the tide."""
    path = write_corpus(tmp_path, ROWS)
    out = tmp_path / "made" / "e.jsonl"
    command = ["--index_path", str(tmp_path / "bm25"), "--corpus_path", str(path), "--out"]
    limits = ["--max_df", "0.5", "--terms", "2", "--neighbours", "1"]
    assert expand_neighbours.main([*command, str(out), *limits]) == 0
    first = out.read_bytes()
    assert [json.loads(line) for line in first.splitlines()] == [
        {"id": "0", "terms": ["moon"]},
        {"id": "1", "terms": ["crater"]},
        {"id": "2", "terms": ["tide"]},
        {"id": "3", "terms": ["butter"]},
        {"id": "4", "terms": ["oven"]},
    ]
    assert expand_neighbours.main([*command, str(out), *limits]) == 0
    assert out.read_bytes() == first
    assert built(tmp_path, "--expansions", str(out)) == 0
    assert [p for p, _ in BM25Retriever(tmp_path / "bm25", path).rank("butter", 5)] == [4, 3]
    with pytest.raises(SystemExit, match="its documents are expanded already"):
        expand_neighbours.main([*command, str(out), *limits])
