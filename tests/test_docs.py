"""The configuration reference is what the models say."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from tests import documented_metrics
from verl.trainer.compose import check_overrides
from verl.utils.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAM = re.compile(
    r"train_(?:ppo|grpo)\.sh|evaluate|infer|main_ppo|estimate|step_time|search-r1 (?:train|ask)"
)
"""What takes overrides."""
OVERRIDE = re.compile(r"[+~]{0,2}[a-z_]+(?:\.\w+)*=.+")


def test_configuration_reference_is_up_to_date():
    command = [sys.executable, "scripts/config_reference.py", "--check"]
    done = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, "run: python scripts/config_reference.py\n" + done.stderr


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_every_documented_key_is_in_the_configuration(name):
    """Hydra refuses to override a key that the YAML lacks."""
    keys = re.findall(
        r"^\| `([\w.]+)` \|", (ROOT / "docs" / "configuration.md").read_text(), re.MULTILINE
    )
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        config = OmegaConf.to_container(compose(name), resolve=False)

    def missing(key):
        node = config
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                return True
            node = node[part]
        return False

    assert len(keys) > 140 and not [key for key in keys if missing(key)]


UNDOCUMENTED = {
    *("max_turns", "do_search", "template", "method_suffix"),
    *("agent._target_", "agent.retriever", "reward._target_"),
}
"""Keys of the configuration that have no row: top-level ones, and what names and links sections."""


def documented_defaults():
    """What the page says of every key: (whether it is a link, its text)."""
    lines = (ROOT / "docs" / "configuration.md").read_text().splitlines()
    rows = [
        re.match(r"\| `([\w.]+)` \| .+? \| (as |)`?(required|.*?)`? \| ", line) for line in lines
    ]
    return {row[1]: (bool(row[2]), row[3]) for row in rows if row}


def test_documented_defaults_are_what_hydra_composes():
    """Hydra reads them back: each is written as a command line would have it."""
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        config = compose("grpo", ["~experiment", "~algo", "~method"])
    composed = OmegaConf.to_container(config, resolve=False)
    documented = documented_defaults()
    found = set(UNDOCUMENTED)

    def compare(section, prefix):
        for name, value in section.items():
            key = f"{prefix}{name}"
            if key in documented:
                found.add(key)
                is_link, text = documented[key]
                if is_link:
                    assert value == f"${{{text}}}", key
                elif text == "required":
                    assert value == "???", key
                else:
                    read = OverridesParser.create().parse_override(f"key={text}").value()
                    assert read == value and type(read) is type(value), key
            elif key not in UNDOCUMENTED:
                assert isinstance(value, dict), f"{key} is not documented"
                compare(value, f"{key}.")

    compare(composed, "")
    assert len(documented) > 140 and found == documented.keys() | UNDOCUMENTED


def command_lines(page):
    """Configuration and overrides of every whole command line of a page that takes overrides."""
    blocks = re.findall(r"```(?:bash|console)\n(.*?)```", page.read_text(), re.DOTALL)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        overrides = [word for word in words if OVERRIDE.fullmatch(word)]
        if PROGRAM.search(line) and "compat=" not in line and "…" not in line:
            yield (
                "ppo" if re.search("train_ppo|config-name ppo|train ppo", line) else "grpo",
                overrides,
            )


def test_command_lines_name_keys_that_exist():
    problems = []
    for page in PAGES:
        for config_name, overrides in command_lines(page):
            try:
                check_overrides(config_name, overrides)
            except ConfigError as error:
                problems += [f"{page.name}: {problem}" for problem in error.problems]
    assert sum(len(list(command_lines(page))) for page in PAGES) > 20 and problems == []


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for path, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#?([^)]*)\)", page.read_text()):
            target = page.parent / path if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.name}: {path}#{anchor}")
    assert broken == []


def test_launch_scripts_are_short_and_scripts_parse():
    for name in ("train_ppo.sh", "train_grpo.sh"):
        assert len((ROOT / name).read_text().splitlines()) < 25
    scripts = [
        path
        for pattern in ("*.sh", "scripts/**/*.sh", "scripts/**/*.sbatch")
        for path in ROOT.glob(pattern)
    ]
    for script in [*scripts, ROOT / ".ci" / "run"]:
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_every_documented_metric_has_a_unit_a_formula_and_what_to_look_for():
    rows = documented_metrics.rows()
    lacking = [row["metric"] for row in rows if not all(row.values())]
    names = [name for row in rows for name in documented_metrics.names_of(row["metric"])]
    assert len(rows) > 80 and lacking == []
    assert sorted(names) == sorted(set(names))
    headers = re.findall(r"^\| metric .*", documented_metrics.PAGE.read_text(), re.MULTILINE)
    assert set(headers) == {f"| {' | '.join(documented_metrics.COLUMNS)} |"}
