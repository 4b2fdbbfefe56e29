"""Completion, by the functions of a real bash, and what it finds in a cache."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest

from search_r1.cli import known
from search_r1.cli.commands import COMMANDS
from search_r1.cli.completion import candidates
from verl.utils.places import root

CALL = """
eval "$(search-r1 completion bash)"
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_search_r1_completion search-r1
printf '%s\\n' "${COMPREPLY[@]}"
"""
CALL_ZSH = """
compdef() {}
compadd() { print -r -- "${argv[1,-3]}: ${(P)argv[-1]}" }
_describe() {}
eval "$(search-r1 completion zsh)"
words=("$@")
CURRENT=$#
_search_r1_completion
true
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A program `search-r1` in PATH, and a cache that knows two keys."""
    path = tmp_path / "search-r1"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={root()} exec {sys.executable} -m search_r1.cli "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    known.kept("keys", lambda: ["trainer.seed", "trainer.total_epochs"])


def complete(*words):
    command = ["bash", "--norc", "-c", CALL, "bash", "search-r1", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_recipes_and_keys(program):
    assert complete("co") == ["corpus", "compare", "completion"]
    assert complete("train", "trainer.t") == ["trainer.total_epochs="]
    # bash splits words at `=` and replaces what follows it
    assert complete("train", "ppo", "experiment", "=", "own") == ["own_data", "own_model"]
    assert "search_o1" in complete("evaluate", "runs/A", "method", "=")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
def test_zsh_puts_a_space_after_words_but_not_after_the_name_of_a_key(program):
    def added(*words):
        command = ["zsh", "-f", "-c", CALL_ZSH, "zsh", "search-r1", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [line.removeprefix("-U -V unsorted").strip() for line in done.stdout.splitlines()]

    recipes = "experiment=own_data experiment=own_model"
    assert added("train", "ppo", "experiment=own") == [f": {recipes}"]
    assert added("train", "trainer.t") == ["-S : trainer.total_epochs="]


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish")
def test_fish_completes_commands_recipes_and_keys(program):
    def completions(line):
        ask = f"search-r1 completion fish | source; complete -C {shlex.quote(line)}"
        done = subprocess.run(
            ["fish", "--no-config", "-c", ask], capture_output=True, text=True, check=True
        )
        return [line.split("\t")[0] for line in done.stdout.splitlines() if line]

    assert completions("search-r1 co") == ["compare", "completion", "corpus"]
    assert completions("search-r1 train experiment=own") == [
        "experiment=own_data",
        "experiment=own_model",
    ]
    assert completions("search-r1 train trainer.t") == ["trainer.total_epochs="]


def test_what_may_stand_at_the_cursor(monkeypatch):
    monkeypatch.setattr("search_r1.cli.completion.keys", lambda: ["experiment=", "trainer.seed="])
    train = COMMANDS["train"]
    assert candidates(train, [], "")[:3] == ["grpo", "ppo", "experiment="]
    assert candidates(train, ["ppo"], "")[0] == "experiment="
    assert candidates(train, [], "method=")[0] == "method=artist"
    assert candidates(train, [], "trainer.seed=") == []
    assert candidates(COMMANDS["serve"], [], "") == []


def test_flags_and_keys_are_found_once_until_the_program_changes(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = []

    def says(*arguments):
        said.append(arguments)
        return "usage: x [--port PORT] [--log_level L]  --not-a-flag_"

    monkeypatch.setattr(known, "said_by", says)
    assert known.flags("serve", None) == ["--help", "--log_level", "--not-a-flag_", "--port"]
    assert known.flags("serve", None) and len(said) == 1
    monkeypatch.setattr(known, "fingerprint", lambda: "changed")
    assert known.flags("serve", None) and len(said) == 2
    assert [path.name for path in (tmp_path / "search-r1").iterdir()] == [
        "flags-serve-None-changed.json"
    ]


def test_flags_are_those_of_the_longer_help(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    helps = {"--help": "--port  --help-all", "--help-all": "--port --nprobe --help-all"}
    monkeypatch.setattr(known, "said_by", lambda *arguments: helps[arguments[-1]])
    assert known.flags("serve", None) == ["--help", "--help-all", "--nprobe", "--port"]


def test_without_a_cache_or_an_answer_nothing_breaks(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert known.kept("keys", lambda: ["a"]) == ["a"]
    monkeypatch.setattr(known, "PATIENCE_S", 0.001)
    assert known.said_by("-c", "import time; time.sleep(5)") == ""
