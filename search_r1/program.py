"""The name that a command has in its own usage text."""

import sys

CONSOLE_SCRIPT = "search-r1"


def program_name(module: str) -> str:
    """How this program was called: `search-r1 ask` by the command line, else `python -m MODULE`.

    The command line leaves the former in `sys.argv[0]`.
    """
    called = sys.argv[0]
    return called if called.startswith(f"{CONSOLE_SCRIPT} ") else f"python -m {module}"


def described(module: str, text: str | None) -> str:
    """The docstring of a module as its help: its command is written as it was called."""
    return (text or "").replace(f"python -m {module}", program_name(module))
