"""The HTML page: whole, self-contained, with every name in it; and the published rows that stand
beside ours."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from search_r1.evaluation.page import page
from search_r1.evaluation.summary import summarize
from search_r1.evaluation.table import PUBLISHED
from tests.search_r1.evaluation.records import passage, record

VOID = {"meta", "br", "path", "use", "rect", "circle", "link", "img"}


class Checker(HTMLParser):
    """Collects text and resources; every element must be closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.resources = []
        self.figures = 0

    def handle_starttag(self, tag, attrs):
        self.resources += [
            v
            for k, v in attrs
            if k in ("src", "href", "xlink:href") and v and not v.startswith("#")
        ]
        self.figures += tag == "svg"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    assert checker.open == [] and checker.resources == []
    assert "url(http" not in html and "@import" not in html
    return checker


def test_a_page_of_several_results():
    one = summarize(
        [
            record(str(i), [("x", [passage("1")])] * (i % 3), em=float(i % 2), source=s)
            for i in range(6)
            for s in "AB"
        ]
    )
    two = summarize(
        [record("x", [], source="A"), record("y", [], em=1.0, source="only <here>")],
        {"A: x": 1.0, "only <here>: y": 0.0},
    )
    found = check(page({"PPO & <b>": one, "direct": two}, "A <title>"))
    assert found.figures == 3
    for name in ("PPO & <b>", "direct", "only <here>", "A <title>", "over search"):
        assert name in found.text
    cells = re.sub(r"\s+", " ", found.text)
    assert "0.500" in cells


def test_a_page_of_one_set_and_of_many_results():
    single = summarize([record("x", [], gold=())])
    assert check(page({"alone": single})).figures == 3
    many = {
        f"method number {i}": summarize([record("x", [], source=f"set{s}") for s in range(8)])
        for i in range(10)
    }
    assert check(page(many)).figures == 3


@pytest.mark.parametrize(
    "row",
    json.loads(Path(PUBLISHED).read_text()),
    ids=lambda row: f"{row['model']} {row['method']}",
)
def test_published_averages_are_those_of_their_sets(row):
    values = list(row["em"].values())
    if None in values or row["average"] is None or "note" in row:
        assert row.get("note") or None in values or row["average"] is None
    else:
        assert row["average"] == pytest.approx(sum(values) / 7, abs=0.0011)
    assert row["kind"] in ("paper", "reproduction") and row["source"] and len(values) == 7
