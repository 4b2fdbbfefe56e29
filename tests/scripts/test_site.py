"""The site of the documentation: its navigation, its pages, and the examples for those who move."""

import asyncio
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from search_r1.data.prepare import main as prepare
from verl.agent import Completion, context_digest
from verl.trainer.compose import as_plain, composed, read_command_line
from verl.trainer.config import PPOConfig, validate

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def loaded(path: Path) -> ModuleType:
    """A file of Python as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stage = loaded(ROOT / "scripts/docs/stage.py")


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_every_page_is_in_the_navigation_once():
    pages = [uri for uri in stage.sources().values() if uri.endswith(".md")]
    named = [page for page in stage.navigation() if not page.startswith("api/")]
    assert sorted(named) == sorted(pages)


def test_every_documented_module_exists_and_is_named_by_the_overview():
    overview = stage.turned((DOCS / "api.md").read_text(), "docs/api.md", modules())
    for module in modules():
        assert importlib.util.find_spec(module) is not None
        assert f"](api/{module}.md)" in overview, module


def modules() -> list[str]:
    return stage.documented_modules()


def test_links_of_laid_out_pages_lead_to_what_was_laid_out(tmp_path):
    stage.stage(tmp_path / "pages")
    broken = []
    for page in (tmp_path / "pages").rglob("*.md"):
        for link in stage.LINK.findall(page.read_text()):
            if not (page.parent / link).exists():
                broken.append(f"{page.name}: {link}")
    assert broken == []
    assert "](cli.md)" in (tmp_path / "pages/index.md").read_text()
    assert "](index.md#on-a-cluster)" in (tmp_path / "pages/tutorial.md").read_text()
    copied = (tmp_path / "pages/source/NOTICE.txt").read_text()
    assert copied == (ROOT / "NOTICE").read_text()


def test_lists_and_tables_begin_after_an_empty_line():
    """GitHub shows them anyway; the site's Markdown makes them part of the paragraph."""
    begin = re.compile(r"(?:[-*]|\d+\.) \S|\|")
    wrong = []
    for path, uri in stage.sources().items():
        if not uri.endswith(".md"):
            continue
        text = re.sub(r"^```.*?^```$", "", (ROOT / path).read_text(), flags=re.DOTALL | re.M)
        for before, line in pairwise(text.splitlines()):
            goes_on = not before.strip() or before[0] == " " or begin.match(before)
            if begin.match(line) and not goes_on:
                wrong.append(f"{path}: {line[:60]}")
    assert wrong == []


def test_the_site_is_built_strictly(tmp_path):
    """What CI does with `bash scripts/docs.sh`, where its environment was made."""
    builder = ROOT / os.environ.get("DOCS_VENV", ".venv-docs") / "bin" / "mkdocs"
    if not builder.exists():
        pytest.skip("no environment for the site: bash scripts/docs.sh makes one")
    pages = tmp_path / "pages"
    stage.stage(pages)
    with (pages / "api.md").open("a") as page:
        page.write("\n[nowhere](metrics.md#there-is-no-such-heading)\n")
    settings = (ROOT / "scripts/docs/mkdocs.yml").read_text()
    for there, here in (
        ("../../build/docs_pages", pages),
        ("../../build/docs", tmp_path / "site"),
        ("paths: [../..]", f"paths: [{ROOT}]"),
        ("extensions: [doctests.py]", f"extensions: [{ROOT}/scripts/docs/doctests.py]"),
    ):
        assert there in settings
        settings = settings.replace(there, str(here))
    (tmp_path / "mkdocs.yml").write_text(settings)
    command = [str(builder), "build", "--strict", "--config-file", str(tmp_path / "mkdocs.yml")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert done.returncode == 1 and len(warnings) == 1, done.stderr[-3000:]
    assert "there-is-no-such-heading" in warnings[0], warnings


def test_the_explained_trajectory_is_up_to_date_and_is_a_real_one():
    trajectory = loaded(ROOT / "scripts/docs/trajectory.py")
    assert trajectory.PAGE.read_text() == trajectory.page(), "python scripts/docs/trajectory.py"
    shown = json.loads(trajectory.SHOWN.read_text())
    named = trajectory.facts(shown)
    written = [s for s in shown["record"]["segments"] if s["source"] == "model"]
    for segment in written:
        assert "".join(trajectory.token_texts(segment)) == segment["text"]
        assert segment["advantages"] == pytest.approx(
            [named["advantage"]] * len(segment["mask"]), abs=1e-3
        )
    assert shown["command"] in (DOCS / "tutorial.md").read_text()


def compositions() -> list[tuple[str, str]]:
    """The training commands of the pages for those who move, each with its page."""
    pages = ("from_search_r1.md", "from_verl.md", "from_skyrl.md")
    lines = [
        (page, line)
        for page in pages
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if re.search(r"train_grpo\.sh|main_ppo", line) and "_target_" not in line
    ]
    assert len(lines) >= 6
    return lines


@pytest.mark.parametrize(("page", "line"), compositions())
def test_training_commands_of_the_pages_compose(page, line):
    config = configuration(line)
    rollout = config.actor_rollout_ref.rollout
    if "experiment" in line or "compat" in line:
        assert config.data.train_batch_size == 512 and rollout.n == 5 and rollout.name == "vllm"


def configuration(line: str) -> PPOConfig:
    words = shlex.split(line)
    given = [w for w in words[words.index("bash") + 2 if "bash" in words else 3 :] if w != "--cfg"]
    read = read_command_line([word for word in given if word != "job"], "grpo")
    return validate(as_plain(composed(read.config_name, read.overrides)))


def test_what_skyrls_example_trains_is_what_the_page_says():
    (line,) = [line for page, line in compositions() if page == "from_skyrl.md"]
    config = configuration(line)
    assert list(config.num_mini_batches.values()) == [2], "512 prompts in mini-batches of 256"
    assert config.agent["max_turns"] == 3
    correction = config.algorithm.rollout_correction
    assert (correction.rollout_is, correction.rollout_is_threshold) == ("token", 2.0)


def test_questions_of_skyrl_become_training_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "data_source": "searchR1_nq",
            "prompt": [{"role": "user", "content": f"Answer. Question: {question}?"}],
            "ability": "fact-reasoning",
            "env_class": "search",
            "reward_spec": {"ground_truth": {"target": [answer]}, "style": "rule"},
            "extra_info": {"index": 0, "question": f"{question}?", "split": "train"},
        }
        for question, answer in (("Where is Torvel", "Marna"), ("Who sails", "Bo"))
    ]
    (tmp_path / "skyrl").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), "skyrl/train.parquet")
    (script,) = [block for block in blocks("from_skyrl.md", "python") if "parquet" in block]
    exec(script, {})
    (command,) = [block for block in blocks("from_skyrl.md", "bash") if "data prepare" in block]
    monkeypatch.setattr(sys, "argv", shlex.split(command)[2:])
    prepare()
    (row,) = pq.read_table("data/mine/train.parquet").to_pylist()
    assert row["reward_model"]["ground_truth"]["target"] == ["Marna"]
    assert "Question: Where is Torvel?" in row["prompt"][0]["content"]


def defined(page: str, name: str) -> Any:
    """What an example of a page defines under a name."""
    (script,) = [block for block in blocks(page, "python") if re.search(rf"\b{name}\b", block)]
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(script, namespace)
    return namespace[name]


def test_the_ported_reward_scores():
    compute_score = defined("from_search_r1.md", "compute_score")
    arguments = ("nq", "<think> t </think> <answer> torvel </answer>", {"target": ["Torvel"]}, {})
    assert compute_score(*arguments) == 1.0


@pytest.mark.parametrize(
    ("page", "name", "arguments", "text", "error"),
    [
        ("from_verl.md", "Population", {"city": "Torvel"}, "52000", ""),
        ("from_verl.md", "Population", {"city": "Ys"}, "no such city", "unknown_city"),
        ("from_skyrl.md", "Lookup", {"argument": "mayor"}, "the head of a city", ""),
        ("from_skyrl.md", "Lookup", {"argument": "x"}, "no such word", "unknown_word"),
    ],
)
def test_the_ported_tools_answer(page, name, arguments, text, error):
    tool_class = defined(page, name)
    tool = tool_class(tool_class.Config())
    response = asyncio.run(tool.call(arguments))
    assert (response.text, response.error) == (text, error)
    assert arguments.keys() == tool.parameters["properties"].keys()


def test_the_ported_loop_makes_a_trajectory():
    async def generate(prompt_ids, *, max_tokens, stop=(), images=()):
        return Completion([7, 8], [-0.5, -0.25], "stop", None, 0, context_digest(prompt_ids))

    loop_class = defined("from_verl.md", "OneTurn")
    trajectory = asyncio.run(loop_class(None, None).run([1, 2, 3], {}, generate))
    assert trajectory.response_ids == [7, 8] and trajectory.response_mask == [1, 1]
