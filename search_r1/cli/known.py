"""What completion knows: files of configs/, keys of the configuration, flags of the commands.

Keys and flags are found by running the program once, which takes seconds, and are kept in the
user's cache until a file of the program changes.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from search_r1.program import HELP_ALL
from verl.utils.places import config_folders, config_names

GROUPS = ("experiment", "method", "algo")
"""Folders of configs/ that an override without + chooses from."""
PACKAGES = Path(__file__).resolve().parents[2]
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
SOURCES = (".py", ".yaml")
PATIENCE_S = 30
"""How long a program may take to say what it knows. Without an answer nothing is completed."""


def choices(group: str) -> list[str]:
    """The overrides `GROUP=NAME` that choose a file of configs/; none for other keys."""
    return [f"{group}={name}" for name in config_names(group)] if group else []


def keys() -> list[str]:
    """The beginnings of overrides: groups of configs/, then every key of the configuration."""
    program = (
        "from verl.trainer.compose import *; "
        "config = compose_or_say_why('grpo', ['~experiment']); "
        "keys = keys_of(config); "
        "print(*sorted(k for k in keys if not any(o.startswith(k + '.') for o in keys)))"
    )
    words = kept("keys", lambda: said_by("-c", program).split())
    return [f"{name}=" for name in (*GROUPS, *words)]


def flags(command: str, form: str | None) -> list[str]:
    """The flags that the help of a command names, the longer help where there are two."""
    words = ["-m", "search_r1.cli", command, *([form] if form else [])]

    def find() -> list[str]:
        named = FLAG.findall(said_by(*words, "--help"))
        if HELP_ALL in named:
            named = FLAG.findall(said_by(*words, HELP_ALL))
        return sorted(set(named))

    return sorted({*kept(f"flags-{command}-{form}", find), "--help"})


def said_by(*arguments: str) -> str:
    """What a run of Python writes; nothing if it takes too long."""
    path = os.pathsep.join([str(PACKAGES), os.environ.get("PYTHONPATH", "")])
    env = {name: value for name, value in os.environ.items() if "COMPLETE" not in name}
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            env={**env, "PYTHONPATH": path, "COLUMNS": "100"},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def kept(name: str, find: Callable[[], list[str]]) -> list[str]:
    """The words of that name in the user's cache, or those that `find` finds, which are kept.

    Where the cache cannot be written, they are found anew each time.
    """
    path = cache() / f"{name}-{fingerprint()}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        words = find()
    if words:
        write(path, words)
    return words


def write(path: Path, words: list[str]) -> None:
    """Writes words to a file of the cache, if it can be written, in place of older ones."""
    name = path.stem.rpartition("-")[0]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for older in path.parent.glob(f"{name}-*.json"):
            older.unlink()
        path.write_text(json.dumps(words), encoding="utf-8")
    except OSError:
        return


def cache() -> Path:
    """The folder of what is kept between two completions."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "search-r1"


def fingerprint() -> str:
    """A text that changes when a file of the program or of configs/ changes."""
    folders = (PACKAGES / "search_r1", PACKAGES / "verl", *config_folders())
    files = sorted(file for folder in folders for file in folder.rglob("*.*"))
    seen = [f"{file}:{file.stat().st_mtime_ns}" for file in files if file.suffix in SOURCES]
    return hashlib.sha256("\n".join(seen).encode()).hexdigest()[:16]
