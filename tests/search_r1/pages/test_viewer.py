"""The file of the viewer: what is in it, whatever the records hold, and over how many pages."""

import base64
import gzip
import json
import re

import pytest

from search_r1.pages import viewer
from search_r1.pages.html import IMPORT, asset, json_text, packed, script_of, source_hash
from search_r1.pages.records import read_entries
from search_r1.pages.viewer import MODULES, STYLES, main, pages_of
from tests.search_r1.pages.made_records import HOSTILE, sample, write, write_run


def blocks(html: str) -> dict[str, str]:
    """The data of a page, by the name of their block."""
    found = re.findall(r'<script type="application/gzip\+base64" id="([\w-]+)">([\w+/=]*)<', html)
    return {name: gzip.decompress(base64.b64decode(text)).decode() for name, text in found}


def test_a_page_holds_every_entry_and_no_text_outside_of_its_blocks(tmp_path):
    out = tmp_path / "page.html"
    assert main([str(write_run(tmp_path / HOSTILE.replace("/", "")[:40])), "--out", str(out)]) == 0
    html = out.read_text()
    data = blocks(html)
    index = json.loads(data["index"])
    lines = data["chunk-0"].split("\n")
    assert len(index) == len(lines) == 11
    assert json.loads(lines[index[5]["at"]])["step"] == 2
    assert [entry["name"] for entry in index if "problem" in entry] == [
        "train_000002:4",
        "train_000002:5",
    ]
    assert HOSTILE not in html and "onerror" not in html


def test_the_policy_of_a_page_names_its_own_script_and_allows_nothing_else(tmp_path):
    out = tmp_path / "page.html"
    main([str(write_run(tmp_path / "run")), "--out", str(out)])
    html = out.read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None and "default-src 'none'" in policy[1]
    script = html.split('<script type="module">')[1].split("</script>")[0]
    style = html.split("<style>")[1].split("</style>")[0]
    assert source_hash(script) in policy[1] and source_hash(style) in policy[1]
    assert "unsafe" not in policy[1] and "http" not in policy[1]
    assert not re.search(r"https?://|//cdn", script + style)


def test_the_modules_are_one_script(tmp_path):
    """Each imports only from modules before it, and no two have a name in common."""
    names: list[str] = []
    for place, name in enumerate(MODULES):
        text = asset(name)
        for statement in IMPORT.findall(text):
            imported = re.search(r'"\./([\w.]+)"', statement)
            assert imported is not None and imported[1] in MODULES[:place], statement
        names += re.findall(r"^(?:export )?(?:async )?(?:function|const|let) (\w+)", text, re.M)
    assert sorted(set(names)) == sorted(names)
    script = script_of(MODULES)
    assert not re.search(r"^(import|export) ", script, re.M)
    assert "innerHTML" not in script and "</script" not in script
    assert all(asset(name) for name in STYLES)


def test_large_results_go_on_in_further_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(viewer, "CHUNK", 1)
    path = write(tmp_path / "x.jsonl", [sample(f"q{n}", "a", uid=f"{n}") for n in range(7)])
    sizes = [len(page.index) for page in pages_of(read_entries(path), size=2000)]
    assert len(sizes) > 1 and sum(sizes) == 7
    paths = viewer.build(path, tmp_path / "page.html", size=2000)
    assert [p.name for p in paths][:2] == ["page.html", "page-2.html"] and len(paths) == len(sizes)
    about = json.loads(blocks(paths[1].read_text())["about"])
    assert about["page"] == 2 and about["pages"] == [p.name for p in paths]


@pytest.mark.parametrize("text", ["plain", "Zürich 🙂", "half a pair \ud83d", "</script>"])
def test_any_text_can_be_packed(text):
    line = gzip.decompress(base64.b64decode(packed(json_text({"text": text})))).decode()
    assert json.loads(line) == {"text": text}


def test_where_there_is_nothing_to_show_the_command_says_so(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    run = write_run(tmp_path / "run")
    assert main([str(run), "--step", "99"]) == 1
    assert "no trajectory records" in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_null_to_a_browser():
    value = {"a": [float("nan"), 1.5, (float("-inf"),)], "b": "NaN"}
    assert json_text(value) == '{"a":[null,1.5,[null]],"b":"NaN"}'
