"""Resolves the pinned environments for every supported Python, without installing or downloading
them.

    python scripts/check_resolution.py [gpu|cpu|docs]

A resolution fails if constraints and requirements contradict each other, or if the constraints do
not pin a package. The package indexes are those of pip's configuration.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORM = "x86_64-manylinux_2_28"
EXTRAS = {"gpu": ("gpu", "dev", "dense-gpu"), "cpu": ("cpu", "dev"), "docs": ("docs",)}
"""What each file of constraints is for."""
ELSEWHERE = {"cpu": ("torch", "torchvision", "torchaudio", "torchcodec")}
"""Packages that scripts/setup.sh installs from another index, or removes."""
FLAGS = {
    "index-url": "--index-url",
    "extra-index-url": "--extra-index-url",
    "find-links": "--find-links",
    "constraint": "--constraint",
    "trusted-host": "--allow-insecure-host",
}
"""The flags of uv for options of pip."""


def pip_settings() -> dict[str, str]:
    """Reads pip's options from its files and environment variables; the latter win, as in pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in output.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in sections:
            sections[section][name] = str(ast.literal_eval(value))
    return sections["global"] | sections["install"] | sections[":env:"]


def index_flags(settings: dict[str, str]) -> list[str]:
    """The arguments of uv for pip's settings. An option may have several values with white space
    between them."""
    flags = ["--index-strategy", "unsafe-best-match"]  # pip's: the best version of all indexes
    for name, flag in FLAGS.items():
        for value in settings.get(name, "").split():
            flags += [flag, value]
    return flags


def resolve(
    device: str, python: str, flags: Sequence[str], environment: dict[str, str]
) -> str | None:
    """Resolves one environment; returns what is wrong with it, None if nothing is."""
    constraints = ROOT / "scripts" / f"constraints-{device}.txt"
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        "pyproject.toml",
        "--quiet",
        "--no-config",
    ]
    command += ["--no-header", "--no-annotate", "--python", sys.executable]
    command += [
        "--python-version",
        python,
        "--python-platform",
        PLATFORM,
        "--constraint",
        str(constraints),
        *flags,
    ]
    for extra in EXTRAS[device]:
        command += ["--extra", extra]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as overrides:
        for name in ELSEWHERE.get(device, ()):
            # a marker that never holds: left out
            overrides.write(f'{name}; python_version < "3"\n')
        overrides.flush()
        done = subprocess.run(
            [*command, "--override", overrides.name],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        return done.stderr.strip()
    if floating := sorted(names(done.stdout) - names(constraints.read_text(encoding="utf-8"))):
        return f"{constraints.name} does not name {', '.join(floating)}"
    return None


def names(lines: str) -> set[str]:
    """The normalised names of the packages in a requirements file."""
    found = re.findall(r"^([A-Za-z0-9][A-Za-z0-9._-]*)", lines, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in found}


def main(argv: Sequence[str] | None = None) -> int:
    """Resolves all environments; returns the exit status, 1 if a resolution failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "device", nargs="?", choices=tuple(EXTRAS), help="the environment (default: all)"
    )
    args = parser.parse_args(argv)
    settings = pip_settings()
    environment = dict(os.environ)
    if "cert" in settings:
        environment.setdefault("SSL_CERT_FILE", settings["cert"])
    flags = index_flags(settings)
    wanted = [
        (device, python)
        for device in ([args.device] if args.device else EXTRAS)
        for python in PYTHONS
    ]
    with ThreadPoolExecutor() as pool:  # they wait for the index most of the time
        problems = list(
            pool.map(lambda pair: resolve(pair[0], pair[1], flags, environment), wanted)
        )
    for (device, python), problem in zip(wanted, problems, strict=True):
        sys.stdout.write(
            f".[{','.join(EXTRAS[device])}] for Python {python}: {problem or 'resolves'}\n"
        )
    return int(any(problems))


if __name__ == "__main__":
    sys.exit(main())
