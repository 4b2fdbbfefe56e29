"""The command line: one table of commands, whose arguments are left to the programs behind them."""

import subprocess
import sys
from importlib import import_module

import pytest

from search_r1.cli import forms
from search_r1.cli.commands import COMMANDS, SECTIONS
from search_r1.cli.main import OTHER_VERL, help_page, main
from verl.utils.places import root

SCREEN = (24 + 8, 80)
"""Lines and columns of a small terminal window."""
LONGEST_HELP = 52
"""Lines of a window of usual height, at a width of 80."""


@pytest.fixture(autouse=True)
def argv(monkeypatch):
    """`main` leaves the arguments of the command in `sys.argv`."""
    monkeypatch.setattr(sys, "argv", ["search-r1"])


def run(*arguments, capsys):
    try:
        status = main(arguments)
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    return status or 0, out, err


def test_the_help_names_every_command_and_fits_on_a_screen(capsys):
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        assert run(*arguments, capsys=capsys) == (0, help_page(), "")
    lines = help_page().splitlines()
    assert len(lines) <= SCREEN[0] and max(map(len, lines)) <= SCREEN[1]
    shown = [line.split()[0] for line in lines if line.startswith("  ")]
    assert shown == [command.name for section in SECTIONS.values() for command in section]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_calls_itself_by_its_name_in_a_help_of_a_screen(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    module, _, function = COMMANDS[name].function.partition(":")
    assert callable(getattr(import_module(module), function))
    status, out, _ = run(name, "--help", capsys=capsys)
    assert status == 0 and out.lower().startswith(f"usage: search-r1 {name}")
    assert len(out.splitlines()) <= LONGEST_HELP


def test_a_long_help_is_there_for_those_who_ask(capsys):
    status, short, _ = run("serve", "--help", capsys=capsys)
    assert status == 0 and "--help-all" in short and "--max_queue" not in short
    status, whole, _ = run("serve", "--help-all", capsys=capsys)
    assert status == 0 and all(flag in whole for flag in ("--port", "--nprobe", "--max_queue"))


@pytest.mark.parametrize(
    "name",
    [
        "data prepare",
        "data mask",
        "data synthesize",
        "data demonstrate",
        "data filter",
        "data benchmarks",
        "data benchmarks test",
        "data sample",
        "data traces",
        "estimate time",
    ],
)
def test_parts_of_commands_call_themselves_by_their_names(name, capsys):
    status, out, _ = run(*name.split(), "--help", capsys=capsys)
    assert status == 0 and out.lower().startswith(f"usage: search-r1 {name}")


def test_a_command_that_does_not_exist_is_refused_with_the_nearest(capsys):
    status, _, err = run("trian", capsys=capsys)
    assert status == 2 and err.endswith("there is no such command; did you mean train?\n")
    assert "there are train, evaluate" in run("x", capsys=capsys)[2]
    status, out, err = run("data", "x", capsys=capsys)
    assert (status, out) == (
        2,
        "",
    ) and "prepare|mask|synthesize|demonstrate|filter|benchmarks" in err


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ([], []),
        (["ppo", "a=1"], ["--config-name", "ppo", "a=1"]),
        (["--config-name", "ppo", "a=1"], ["--config-name", "ppo", "a=1"]),
        (["a=1", "--cfg", "job"], ["a=1", "--cfg", "job"]),
    ],
)
def test_train_passes_its_arguments_to_the_launcher(given, passed, monkeypatch):
    called = []
    monkeypatch.setattr("search_r1.launch.main", called.append)
    assert main(["train", *given]) is None and called == [passed]


def test_the_help_of_train_fits_on_a_screen_and_its_pages_exist():
    lines = forms.TRAIN_HELP.splitlines()
    assert len(lines) <= SCREEN[0] and max(map(len, lines)) <= 100
    pages = [word.strip(".,;") for word in forms.TRAIN_HELP.split() if word.startswith("docs/")]
    assert pages and all((root() / page).is_file() for page in [*pages, "docs/cli.md"])


def test_the_program_is_named_as_it_was_called():
    command = [sys.executable, "-m", "search_r1.evaluation.report", "--help"]
    done = subprocess.run(command, cwd=root(), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m search_r1.evaluation.report ")


def test_help_imports_nothing_that_takes_long():
    code = "import sys; from search_r1.cli.main import main; main([]); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root(), capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert not loaded & {
        "hydra",
        "omegaconf",
        "pydantic",
        "torch",
        "ray",
        "numpy",
        "click",
        "httpx",
    }


def test_an_import_that_fails_beside_the_other_verl_is_explained(monkeypatch):
    def fails():
        raise ImportError("cannot import name 'places'")

    monkeypatch.setattr(forms, "train", fails)
    with pytest.raises(ImportError):
        main(["train"])
    monkeypatch.setattr("search_r1.cli.main.version", lambda name: "0.7")
    with pytest.raises(SystemExit, match="cannot import name 'places'") as caught:
        main(["train"])
    assert OTHER_VERL in str(caught.value)
