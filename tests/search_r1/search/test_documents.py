"""Documents: grouped from the passages of a corpus, opened and searched over real HTTP."""

import asyncio
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_r1.launch import free_port
from search_r1.search.client import RetrievalClient, SearchError, check_documents
from search_r1.search.client.config import RetrieverConfig
from search_r1.search.errors import CorpusError, RetrieverError
from search_r1.search.index import groups
from search_r1.search.index.corpus import Corpus
from search_r1.search.index.groups import Groups
from search_r1.search.retrieval_server import load_documents, parse_arguments
from search_r1.search.server.app import create_app
from search_r1.search.server.service import ServerSettings
from search_r1.search.store import DocumentStore, StoreLimits, page_starts, sentences_with
from tests.processes import until, wait_for
from tests.retrieval import retrieval_server, serving, wait_until_ready, write_corpus, write_lines
from tests.search_r1.search.echo import Engine

ROWS = [
    {
        "id": "0",
        "contents": '"Ada Marin"\nAda Marin was born in Torvel. She sailed.',
        "source": "a",
    },
    {"id": "1", "contents": '"Torvel"\nTorvel lies in Marna.', "source": "b"},
    {"id": "2", "contents": '"Ada Marin"\nIn 1901 she\nleft Torvel! Bo did not.', "source": "a"},
    {"id": 3, "contents": "No title, and no source."},
]
ADA = "Ada Marin was born in Torvel. She sailed.\nIn 1901 she\nleft Torvel! Bo did not.\n"
HTTP = httpx.Client(timeout=60)


def store_of(folder, field="title", rows=ROWS, **limits):
    corpus = Corpus.of_lines(write_lines(folder / "c.jsonl", rows))
    return DocumentStore(corpus, field, StoreLimits(**limits))


@pytest.fixture
def store(tmp_path):
    return store_of(tmp_path, page_chars=30, max_matches=2)


# Which passages make a document


@pytest.mark.parametrize(
    ("field", "name", "ids"),
    [
        ("id", "2", ["2"]),
        ("id", " 3 ", ["3"]),
        ("title", "Ada Marin", ["0", "2"]),
        ("title", '"Ada Marin"', ["0", "2"]),
        ("title", "3", ["3"]),
        ("source", "a", ["0", "2"]),
        ("source", "3", ["3"]),
        ("id", "Ada Marin", None),
        ("title", "ada marin", None),
        ("source", "0", None),
        ("id", "", None),
    ],
)
def test_a_document_is_what_says_the_same_in_the_field(tmp_path, field, name, ids):
    opened = store_of(tmp_path, field).open(name, 1)
    assert [p.id for p in opened.passages] == (ids or [])
    assert opened.error == (None if ids else "unknown_document")


def test_every_passage_names_the_document_that_it_is_found_in(tmp_path):
    for field in ("id", "title", "source", "nothing"):
        store = store_of(tmp_path, field)
        for row in ROWS:
            shown = store.open(store.name_of(row), 1).passages
            assert str(row["id"]) in [p.id for p in shown]


def test_documents_whose_names_share_their_bits_are_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "hash_of", lambda name: 7)
    store = store_of(tmp_path)
    assert [p.id for p in store.open("Torvel", 1).passages] == ["1"]
    assert store.open("Bo", 1).error == "unknown_document"


def table_file(folder):
    (found,) = folder.glob("*.documents-*")
    return found


def test_the_table_is_made_once_and_anew_for_another_corpus(tmp_path, monkeypatch):
    store_of(tmp_path)
    kept = table_file(tmp_path)
    assert isinstance(store_of_same(tmp_path).groups.names.base, np.memmap)
    made = kept.stat().st_mtime_ns
    assert store_of_same(tmp_path).open("Torvel", 1).pages == 1 and kept.stat().st_mtime_ns == made
    kept.write_bytes(kept.read_bytes()[:-9])
    assert store_of_same(tmp_path).open("Torvel", 1).pages == 1, "a damaged one is made again"
    other = [{"id": i, "contents": f'"T{i}"\nx'} for i in range(4)]
    write_lines(tmp_path / "c.jsonl", other)
    past = (tmp_path / "c.jsonl").stat().st_mtime - 100
    os.utime(tmp_path / "c.jsonl", (past, past))  # put there with its old time
    assert store_of_same(tmp_path).open("T3", 1).pages == 1


def store_of_same(folder):
    return DocumentStore(Corpus.of_lines(folder / "c.jsonl"), "title")


def test_a_folder_that_cannot_be_written_is_served_all_the_same(tmp_path, monkeypatch):
    def refuse(path, values):
        raise PermissionError(path)

    monkeypatch.setattr(groups, "save_whole", refuse)
    assert store_of(tmp_path).open("Torvel", 1).pages == 1
    assert not list(tmp_path.glob("*.documents-*"))


def test_a_field_of_any_name_has_a_file_of_its_own(tmp_path):
    rows = [{**row, "../source url": row.get("source")} for row in ROWS]
    assert len(store_of(tmp_path, "../source url", rows).open("a", 1).passages) == 2
    assert table_file(tmp_path).parent == tmp_path


def test_a_bad_line_is_named(tmp_path):
    with pytest.raises(CorpusError, match="document 1: expected an object"):
        store_of(tmp_path, rows=[ROWS[0], {"id": 1}])


@pytest.mark.parametrize("kind", ["built", "unbuilt", "none"])
def test_the_corpus_is_that_of_the_index_or_of_the_flag(tmp_path, kind):
    corpus = write_corpus(tmp_path, ROWS)
    index = tmp_path / ("bm25" if kind == "built" else "elsewhere")
    flags = ["--index_path", str(index), "--documents", "title"]
    flags += [] if kind == "none" else ["--corpus_path", str(corpus)]
    args = parse_arguments(flags)
    if kind == "none":
        with pytest.raises(RetrieverError, match="--documents needs the corpus"):
            load_documents(args)
    else:
        assert load_documents(args).open("Torvel", 1).title == '"Torvel"'


# Pages


@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 30))
def test_pages_are_the_text_and_none_is_longer_than_allowed(text, page_chars):
    bounds = [*page_starts(text, page_chars), len(text)]
    lengths = [end - start for start, end in pairwise(bounds)]
    assert bounds[0] == 0 and max(lengths) <= page_chars
    assert min(lengths) > 0 or bounds == [0, 0]
    assert all(length * 2 > page_chars for length in lengths[:-1])


def test_the_pages_of_a_document_join_to_its_passages(store):
    first = store.open("Ada Marin", 1)
    pages = [store.open("Ada Marin", n) for n in range(1, first.pages + 1)]
    assert (first.title, first.pages) == ('"Ada Marin"', 3)
    assert "".join(p.text for p in pages) == ADA
    assert [[s.id for s in p.passages] for p in pages] == [["0"], ["0", "2"], ["2"]]
    for page in pages:
        bounds = [(s.start, s.end) for s in page.passages]
        assert bounds[0][0] == 0 and bounds[-1][1] == len(page.text)
    second = pages[1]
    (_, middle), (start, _) = [(s.start, s.end) for s in second.passages]
    assert middle == start and second.text[start:].startswith("In 1901")


def test_a_page_that_is_not_there_says_how_many_there_are(store):
    answer = store.open("Ada Marin", 4)
    assert (answer.error, answer.pages, answer.text) == ("no_such_page", 3, "")


LINE = "the ship left Torvel on day 123456 of that year. "


def test_a_document_of_10_mb_in_one_line_or_in_many(tmp_path):
    count = 10_000_000 // len(LINE)
    rows = [{"id": "one", "contents": '"Log"\n' + LINE * count, "part": "one"}]
    rows += [
        {"id": i, "contents": f'"Log {i}"\n{LINE * 20}'.rstrip(), "part": "many"}
        for i in range(count // 20)
    ]
    store = store_of(tmp_path, "part", rows)
    for name in ("one", "many"):
        last = store.open(name, store.open(name, 1).pages)
        assert last.text.strip().endswith("of that year.") and last.error is None
        assert last.pages >= 5000 and len(last.model_dump_json()) < 4000
        found = store.find(name, "DAY 123456")
        assert len(found.matches) == 5 and found.more and not found.cut
        assert len(found.model_dump_json()) < 4000
        assert store.find(name, "day " * 2000 + "day 7").error == "no_match"


def test_what_is_longer_than_allowed_is_cut_and_says_so(tmp_path):
    store = store_of(tmp_path, page_chars=30, max_document_chars=60)
    opened = store.open("Ada Marin", 1)
    assert opened.cut and opened.pages == 2 and not store.open("Torvel", 1).cut
    assert store.open("Ada Marin", 2).text == ADA[30:60]
    assert store.find("Ada Marin", "did").model_dump(include={"error", "cut"}) == {
        "error": "no_match",
        "cut": True,
    }
    exact = store_of(tmp_path, max_document_chars=len(ADA))
    assert not exact.open("Ada Marin", 1).cut


def test_a_title_is_cut_and_a_single_line_is_none(tmp_path):
    rows = [{"id": 1, "contents": "x" * 5000 + "\nshort"}, {"id": 2, "contents": "y" * 5000}]
    store = store_of(tmp_path, "id", rows)
    assert (store.open("1", 1).title, store.open("2", 1).title) == ("x" * 300, "")
    assert store.open("2", 1).pages == 3


# Finding


def test_find_gives_sentences_with_their_pages(store):
    found = store.find("Ada Marin", "TORVEL")
    assert [(m.page, m.id, m.text) for m in found.matches] == [
        (1, "0", "Ada Marin was born in Torvel."),
        (3, "2", "left Torvel!"),
    ]
    assert (found.error, found.more, found.pages) == (None, False, 3)


def test_white_space_is_one_and_matches_are_bounded(store):
    across = store.find("Ada Marin", " 1901  she left ")
    assert [m.text for m in across.matches] == ["In 1901 she left Torvel!"]
    some = store.find("Ada Marin", "s")
    assert len(some.matches) == 2 and some.more
    assert store.find("Ada Marin", "Rome").error == "no_match"
    assert store.find("Ada Marin", " \n").error == "no_match"
    assert store.find("nobody", "Rome").error == "unknown_document"


def test_a_sentence_without_end_is_cut_around_the_match():
    ((at, sentence),) = sentences_with("needle", "x" * 9000 + " needle " + "y" * 9000, 5)
    assert at == 9001 and len(sentence) <= 306 and "needle" in sentence


@given(st.text(max_size=60), st.text(min_size=1, max_size=3))
def test_every_sentence_that_is_found_holds_the_text(text, wanted):
    """The capital I with a dot has a lower case of two characters: places must not move."""
    for at, sentence in sentences_with(wanted, text, 9):
        words = "".join(wanted.split()).lower()
        assert at < len(text)
        assert words.replace("i̇", "i") in "".join(sentence.split()).lower().replace("i̇", "i")


# Over HTTP


def serve_store(store, engine=None, **settings):
    return serving(create_app(lambda: engine or Engine(), ServerSettings(**settings), store))


def post(base, endpoint, **body):
    return HTTP.post(f"{base}/{endpoint}", json=body)


def figure(base, name):
    _, _, following = HTTP.get(f"{base}/metrics").text.partition(f"\nretrieval_{name} ")
    return float(following.split("\n")[0] or 0)


def test_the_server_process_opens_and_finds_in_every_worker(tmp_path):
    write_corpus(tmp_path, ROWS)
    flags = ["--documents", "title", "--page_chars", "30", "--workers", "2", "--token", "secret"]
    with retrieval_server(tmp_path, *flags) as (url, _):
        base = url.removesuffix("/retrieve")
        # each connection may be another worker's, and one of them may still be loading
        wait_for(lambda: all(httpx.get(f"{base}/health").is_success for _ in range(24)))
        assert HTTP.get(f"{base}/health").json()["documents"] == "title"
        assert post(base, "open", document="Torvel").status_code == 401
        head = {"Authorization": "Bearer secret"}
        body = {"document": "Ada Marin", "page": 2}
        opened = HTTP.post(f"{base}/open", json=body, headers=head).json()
        assert opened["text"] == "She sailed.\nIn 1901 she\nleft " and opened["pages"] == 3
        body = {"document": "Ada Marin", "text": "1901"}
        found = HTTP.post(f"{base}/find", json=body, headers=head).json()
        assert [m["id"] for m in found["matches"]] == ["2"]
        body = {"queries": ["born", "hills"], "return_scores": True, "name_documents": True}
        (hits, none) = HTTP.post(url, json=body, headers=head).json()["result"]
        assert hits[0]["document_id"] == "Ada Marin" and hits[0]["document"] == ROWS[0]
        assert none == []
    assert table_file(tmp_path).exists()


def test_refusals_name_the_field_and_outcomes_are_counted(store):
    with serve_store(lambda: store, max_query_chars=20, max_body_bytes=500) as base:
        wait_until_ready(f"{base}/health")
        for endpoint, body, field in [
            ("open", {}, "document"),
            ("open", {"document": 7}, "document"),
            ("open", {"document": "7", "page": 0}, "page"),
            ("open", {"document": "7", "page": "2"}, "page"),
            ("open", {"document": "7", "page": True}, "page"),
            ("open", {"document": "7", "page": 1 << 40}, "page"),
            ("open", {"document": "x" * 21}, "document"),
            ("find", {"document": "7"}, "text"),
            ("find", {"document": "7", "text": "x" * 21}, "text"),
        ]:
            answer = post(base, endpoint, **body)
            assert answer.status_code == 422 and field in answer.json()["detail"][0]["loc"]
        lone = HTTP.post(f"{base}/open", content=b'{"document": "\\ud800"}')
        assert lone.status_code == 422
        assert post(base, "open", document="x" * 600).status_code == 413
        assert post(base, "open", document="Torvel").json()["error"] is None
        assert post(base, "open", document="Rome").json()["error"] == "unknown_document"
        assert figure(base, 'reads_total{endpoint="open",outcome="ok"}') == 1
        assert figure(base, 'reads_total{endpoint="open",outcome="unknown_document"}') == 1
        assert figure(base, "read_seconds_count") == 2 and figure(base, "reads_waiting") == 0


class GatedStore(DocumentStore):
    """Opens nothing before it is opened itself; fails on one name."""

    def __init__(self, store):
        self.__dict__.update(store.__dict__)
        self.opened = threading.Event()
        self.asked = []

    def open(self, document, page):
        self.asked.append(document)
        assert self.opened.wait(60)
        if document == "torn":
            raise CorpusError("line 3: not JSON")
        return super().open(document, page)


def test_reads_beyond_the_room_are_refused_and_searches_go_on(store):
    gated = GatedStore(store)
    with serve_store(lambda: gated, max_batch_size=2) as base, ThreadPoolExecutor(4) as pool:
        wait_until_ready(f"{base}/health")
        reads = [pool.submit(post, base, "open", document="Torvel") for _ in range(2)]
        wait_for(lambda: figure(base, "reads_waiting") == 2)
        refused = post(base, "open", document="Torvel")
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
        assert post(base, "find", document="Torvel", text="x").status_code == 429
        assert post(base, "retrieve", queries=["a"]).status_code == 200
        gated.opened.set()
        assert [read.result().status_code for read in reads] == [200, 200]
        assert post(base, "open", document="Torvel").status_code == 200


def test_a_read_that_hangs_ends_in_time_and_leaves_the_line(store):
    gated = GatedStore(store)
    with serve_store(lambda: gated, request_timeout_s=0.5) as base, ThreadPoolExecutor(4) as pool:
        wait_until_ready(f"{base}/health")
        reads = [pool.submit(post, base, "open", document=name) for name in "ab"]
        assert [read.result().status_code for read in reads] == [504, 504]
        assert figure(base, "reads_waiting") == 0
        gated.opened.set()
        wait_for(lambda: post(base, "open", document="Torvel").status_code == 200)
        assert set(gated.asked) & {"a", "b"} == {gated.asked[0]}, "what waited in vain is not read"


async def test_a_client_that_goes_away_takes_its_read_along(store):
    gated = GatedStore(store)
    with serve_store(lambda: gated) as base:
        client = RetrievalClient(RetrieverConfig(url=f"{base}/retrieve"))
        await asyncio.to_thread(wait_until_ready, f"{base}/health")
        tasks = [asyncio.create_task(client.open(name)) for name in "abc"]
        await until(lambda: figure(base, "reads_waiting") == 3)
        for task in tasks:
            task.cancel()
        await until(lambda: figure(base, "reads_waiting") == 0)
        gated.opened.set()
        assert (await client.open("Torvel")).pages == 1 and len(gated.asked) == 2
        await client.close()


def test_a_document_that_cannot_be_read_fails_alone(store, caplog):
    gated = GatedStore(store)
    gated.opened.set()
    with serve_store(lambda: gated) as base:
        wait_until_ready(f"{base}/health")
        torn = post(base, "open", document="torn")
        assert torn.status_code == 500 and "line 3" in torn.json()["detail"]
        assert figure(base, 'errors_total{kind="read"}') == 1
        assert post(base, "open", document="Torvel").status_code == 200
    assert "CorpusError" in caplog.text


def test_nothing_is_answered_before_the_store_is_loaded_and_one_that_cannot_be_ends_it(store):
    gate = threading.Event()

    def load():
        assert gate.wait(60)
        return store

    with serve_store(load) as base:
        for endpoint, body in [("open", {"document": "a"}), ("retrieve", {"queries": ["a"]})]:
            early = post(base, endpoint, **body)
            assert early.status_code == 503 and early.headers["Retry-After"]
        gate.set()
        wait_until_ready(f"{base}/health")
        assert post(base, "open", document="Torvel").status_code == 200


# The client


def client(url, **kwargs):
    return RetrievalClient(RetrieverConfig(url=url, **kwargs))


async def test_the_client_asks_another_replica_and_cuts_what_no_server_takes(store):
    dead = f"http://127.0.0.1:{free_port()}/retrieve"
    with serve_store(lambda: store) as base:
        await asyncio.to_thread(wait_until_ready, f"{base}/health")
        c = client([dead, f"{base}/retrieve"], max_retries=1, backoff_s=60)
        opened = [await c.open("Ada Marin", page) for page in (1, 2, 10**30)]
        assert [o.error for o in opened] == [None, None, "no_such_page"]
        assert (await c.open("x\ud83d" * 9999)).error == "unknown_document"
        assert (await c.find("Ada Marin", "y" * 9999)).error == "no_match"
        assert set(c.errors) <= {"connection"}
        await c.close()


async def test_a_server_without_documents_is_rejected_and_named_before_the_start():
    with serving(create_app(Engine, ServerSettings())) as base:
        await asyncio.to_thread(wait_until_ready, f"{base}/health")
        url = f"{base}/retrieve"
        c = client(url)
        with pytest.raises(SearchError, match="404") as caught:
            await c.open("7")
        assert caught.value.kind == "rejected"
        problem = await asyncio.to_thread(check_documents, url)
        assert problem and "404" in problem and "--documents id" in problem
        await c.close()


async def test_attempts_deadline_and_contract_are_those_of_searches(store):
    gated = GatedStore(store)
    with serve_store(lambda: gated) as base:
        await asyncio.to_thread(wait_until_ready, f"{base}/health")
        c = client(f"{base}/retrieve", timeout_s=0.3)
        with pytest.raises(SearchError, match=r"0\.3 s") as caught:
            await c.open("Torvel")
        assert caught.value.kind == "timeout" and c.errors == {"timeout": 1}
        gated.opened.set()
        c.config = RetrieverConfig(url=c.config.url)
        assert (await c.open("Torvel")).pages == 1
        c.http.post = answered(httpx.Response(200, json={"pages": 1}))
        with pytest.raises(SearchError, match="OpenResponse") as caught:
            await c.open("Torvel")
        assert caught.value.kind == "contract"
        await c.close()


def answered(response):
    async def post(*_, **__):
        return response

    return post


async def test_closing_fails_what_is_being_opened(store):
    gated = GatedStore(store)
    with ExitStack() as stack:
        stack.callback(gated.opened.set)
        base = stack.enter_context(serve_store(lambda: gated))
        await asyncio.to_thread(wait_until_ready, f"{base}/health")
        c = client(f"{base}/retrieve")
        running = asyncio.create_task(c.open("Torvel"))
        await until(lambda: gated.asked)
        await c.close()
        (error,) = await asyncio.gather(running, return_exceptions=True)
        assert type(error).__name__ == "Closed" and not c.tasks
        gated.opened.set()


def test_the_table_is_ordered_by_name_and_line(tmp_path):
    rows = [{"id": i, "contents": f'"{i % 7}"\nx'} for i in range(100)]
    corpus = Corpus.of_lines(write_lines(tmp_path / "c.jsonl", rows))
    made = Groups.of_corpus(corpus, "title")
    for title in range(7):
        assert list(made.lines_of(str(title))) == [i for i in range(100) if i % 7 == title]
    assert json.loads((tmp_path / "c.jsonl").read_text().splitlines()[0])["id"] == 0
