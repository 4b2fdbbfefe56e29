"""What commands say of themselves: their name in the usage text, and a help that fits a screen."""

import argparse
import sys
from collections.abc import Sequence

CONSOLE_SCRIPT = "search-r1"
HELP_ALL = "--help-all"


def program_name(module: str) -> str:
    """How this program was called: `search-r1 ask` by the command line, else `python -m MODULE`.

    The command line leaves the former in `sys.argv[0]`.
    """
    called = sys.argv[0]
    return called if called.startswith(f"{CONSOLE_SCRIPT} ") else f"python -m {module}"


def described(module: str, text: str | None) -> str:
    """The docstring of a module as its help: its command is written as it was called."""
    return (text or "").replace(f"python -m {module}", program_name(module))


def command_parser(module: str, text: str | None) -> argparse.ArgumentParser:
    """The parser of the command that a module is; `text` is its docstring."""
    return argparse.ArgumentParser(
        prog=program_name(module),
        description=described(module, text),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def short_help(parser: argparse.ArgumentParser, argv: Sequence[str]) -> bool:
    """Whether only the help is asked for, and only of the flags that most users need.

    Gives the parser `--help-all`. The caller leaves the other flags out where this is true.
    """
    parser.add_argument(HELP_ALL, action="help", help="show every flag and exit")
    return HELP_ALL not in argv and not {"-h", "--help"}.isdisjoint(argv)
