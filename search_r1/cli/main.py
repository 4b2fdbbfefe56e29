"""Finds the command that is asked for, and runs it."""

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from search_r1.cli.commands import COMMANDS, SECTIONS
from search_r1.program import CONSOLE_SCRIPT

COMPLETE = "_SEARCH_R1_COMPLETE"
"""Environment variable by which a shell asks for completions."""
OTHER_VERL = (
    "PyPI's verl is installed too, whose package has the same name as a part of this program: pip "
    "uninstall verl, then install this again (pip install --force-reinstall --no-deps WHEEL_FILE)"
)
"""Said here too, because `verl.namesake` cannot say it where that package was found first."""
HELP = ("--help", "-h", "help")


def main(argv: Sequence[str] | None = None) -> int | None:
    """Runs the command of the command line and returns its exit status; None stands for success.

    What follows the name of the command belongs to that command alone.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if COMPLETE in os.environ:
        from search_r1.cli.completion import complete

        return complete(os.environ[COMPLETE])
    name = arguments[0] if arguments else HELP[0]
    if name in HELP:
        sys.stdout.write(help_page())
        return 0
    if name == "--version":
        number = version(CONSOLE_SCRIPT) if is_installed(CONSOLE_SCRIPT) else "not installed"
        sys.stdout.write(f"{CONSOLE_SCRIPT} {number}\n")
        return 0
    if name not in COMMANDS:
        sys.stderr.write(f"error: {unknown(name)}\n")
        return 2
    sys.argv = [f"{CONSOLE_SCRIPT} {name}", *arguments[1:]]
    try:
        if hidden := hidden_package():
            sys.stderr.write(f"error: {hidden}\n")
            return 2
        return COMMANDS[name].run()
    except ImportError as error:
        if not is_installed("verl"):
            raise
        sys.exit(f"error: {error}. {OTHER_VERL}")


def hidden_package() -> str | None:
    """Says which package in the user's folder would hide one of an installed program; None: none.

    The processes of a run look for packages in that folder first, for the sake of the user's own
    modules, and would import a clone of another `verl` there.
    """
    from verl.utils import places

    if not places.is_installed():
        return None
    for package in ("verl", "search_r1"):
        found = Path.cwd() / package
        if found.is_dir() and not found.samefile(places.HOME / package):
            return (
                f"{found} would hide the package {package} of this program from the processes of a "
                "run: go to a folder without one of that name"
            )
    return None


def help_page() -> str:
    """The page of all commands, which fits on a screen."""
    lines = [
        f"Usage: {CONSOLE_SCRIPT} COMMAND ...",
        "",
        "Trains language models to search while they reason.",
    ]
    width = max(map(len, COMMANDS))
    for title, commands in SECTIONS.items():
        lines += ["", title]
        lines += [f"  {command.name:{width}}  {command.summary}" for command in commands]
    lines += [
        "",
        f"{CONSOLE_SCRIPT} COMMAND --help says more; docs/cli.md has examples.",
        f"Begin with: {CONSOLE_SCRIPT} doctor, then: {CONSOLE_SCRIPT} train",
    ]
    return "\n".join(lines) + "\n"


def unknown(name: str) -> str:
    """The message about a command that does not exist."""
    near = get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
    return f"{CONSOLE_SCRIPT} {name}: there is no such command; {hint}"


def is_installed(name: str) -> bool:
    """Whether there is a distribution of that name."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
