"""Says whether this Python has what extras of pyproject.toml ask for: `python
scripts/requirements_met.py EXTRA ...`.

Exit status 1 and the first missing or unfitting package on standard error if not. Nothing of the
project need be installed.
"""

import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def requirements(project: dict[str, Any], extras: Sequence[str]) -> Iterator[Any]:
    """What the project needs itself and for these extras, those within extras too. Raises KeyError
    for others."""
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
    """What is wrong with the installed package, if anything."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(found, prereleases=True):
        return None
    return f"{requirement.name} is {found}, not {requirement.specifier}"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status."""
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
