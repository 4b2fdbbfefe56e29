"""Checks that this Python has the packages which extras of pyproject.toml require.

    python scripts/requirements_met.py EXTRA ...

If a package is missing or has the wrong version, names it on stderr and exits with status 1. The
project itself need not be installed.
"""

import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def requirements(project: dict[str, Any], extras: Sequence[str]) -> Iterator[Any]:
    """Yields what the project requires, by itself and with these extras, also nested ones.

    Raises KeyError for an unknown extra.
    """
    from packaging.requirements import Requirement

    for line in project["dependencies"]:
        yield Requirement(line)
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            requirement = Requirement(line)
            if requirement.name == project["name"]:
                yield from requirements(project, sorted(requirement.extras))
            else:
                yield requirement


def unmet(requirement: Any) -> str | None:
    """What is wrong with the installed package, None if it meets the requirement."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(found, prereleases=True):
        return None
    return f"{requirement.name} is {found}, not {requirement.specifier}"


def main(argv: Sequence[str] | None = None) -> int:
    """Checks the extras of the command line; returns the exit status."""
    extras = list(sys.argv[1:] if argv is None else argv)
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    try:
        problems = [problem for r in requirements(project, extras) if (problem := unmet(r))]
    except ImportError:
        sys.stderr.write("packaging is not installed\n")
        return 1
    except KeyError as error:
        known = ", ".join(project["optional-dependencies"])
        sys.stderr.write(f"{error.args[0]} is no extra of the project; there are {known}\n")
        return 2
    if problems:
        sys.stderr.write(f"{problems[0]}\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
