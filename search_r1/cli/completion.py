"""Completion for bash, zsh and fish: `search-r1 completion SHELL` prints what a shell reads.

click writes the functions of the shells and reads what they ask. It is used for nothing else: what
follows the name of a command is left to the command.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import click
from click.shell_completion import BashComplete, CompletionItem, FishComplete, ZshComplete

from search_r1.cli.commands import COMMANDS, Command
from search_r1.cli.known import choices, flags, keys
from search_r1.cli.main import COMPLETE
from search_r1.program import CONSOLE_SCRIPT, program_name

INSTALLED_BY = {
    "bash": 'eval "$(search-r1 completion bash)"      # in ~/.bashrc',
    "zsh": 'eval "$(search-r1 completion zsh)"       # in ~/.zshrc',
    "fish": "search-r1 completion fish | source      # in ~/.config/fish/config.fish",
}


class Bash(BashComplete):
    """bash, which takes `experiment=nq` for three words and completes the last one.

    After a word that ends with `=` no space is put, because its value follows.
    """

    source_template = BashComplete.source_template.replace(
        "COMPREPLY+=($value)",
        'COMPREPLY+=("$value"); [[ $value != *= ]] || compopt -o nospace',
    )

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before the cursor's, and the part of that word before the cursor."""
        words = os.environ["COMP_WORDS"].split("\n")[: int(os.environ["COMP_CWORD"]) + 1]
        joined = joined_at_equals(words)
        self.split_at_equals = joined != words
        return joined[1:-1], joined[-1]

    def format_completion(self, item: CompletionItem) -> str:
        """One completion as the function of the shell reads it."""
        value = item.value
        if self.split_at_equals and item.type == "plain":
            value = value.rpartition("=")[2] or value
        return f"{item.type},{value}"


class Zsh(ZshComplete):
    """zsh, which puts no space after a word that ends with `=`, because its value follows."""

    source_template = ZshComplete.source_template.replace(
        "compadd -U -V unsorted -a completions",
        "local -a names=(${(M)completions:#*=}) words=(${completions:#*=})\n"
        "        (( $#words )) && compadd -U -V unsorted -a words\n"
        "        (( $#names )) && compadd -U -V unsorted -S '' -a names\n"
        "        return 0",
    )


SHELLS = {"bash": Bash, "zsh": Zsh, "fish": FishComplete}
"""The classes that speak with the shells."""


def joined_at_equals(words: Sequence[str]) -> list[str]:
    """The words with those joined that bash has split at `=`.

    >>> joined_at_equals(["train", "experiment", "=", "nq", "a", "="])
    ['train', 'experiment=nq', 'a=']
    """
    joined: list[str] = []
    goes_on = False
    for word in words:
        if joined and (word == "=" or goes_on):
            joined[-1] += word
        else:
            joined.append(word)
        goes_on = word == "="
    return joined


class Group(click.Group):
    """The commands, as click sees them while it completes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = COMMANDS.get(cmd_name)
        return Leaf(command) if command else None


class Leaf(click.Command):
    """One command, which keeps all of its arguments as they are."""

    def __init__(self, command: Command) -> None:
        super().__init__(command.name, short_help=command.summary, add_help_option=False)
        self.command = command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return ctx.args

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """What may stand at the cursor; files where nothing else is known."""
        found = candidates(self.command, ctx.args, incomplete)
        items = [CompletionItem(text) for text in found if text.startswith(incomplete)]
        return items or [CompletionItem(incomplete, type="file")]


def candidates(command: Command, before: Sequence[str], incomplete: str) -> list[str]:
    """The words that may stand at the cursor: flags, forms of the command, or overrides.

    `before` are the words between the name of the command and the cursor.
    """
    if incomplete.startswith("-"):
        return flags(command.name, before[0] if before and before[0] in command.forms else None)
    name, equals, _ = incomplete.partition("=")
    if equals:
        return choices(name) if command.takes_overrides else []
    forms = [] if before else list(command.forms)
    return forms + keys() if command.takes_overrides else forms


def complete(instruction: str) -> int:
    """Writes the completions that a shell asks for; returns the exit status."""
    shell = instruction.partition("_")[0]
    group = Group(CONSOLE_SCRIPT, add_help_option=False)
    sys.stdout.write(SHELLS[shell](group, {}, CONSOLE_SCRIPT, COMPLETE).complete() + "\n")
    return 0


def main() -> int:
    """Prints what a shell reads to complete the commands; returns the exit status."""
    lines = "\n".join(f"  {line}" for line in INSTALLED_BY.values())
    parser = argparse.ArgumentParser(
        prog=program_name("search_r1.cli.completion"),
        description=f"Prints the completion for a shell. To have it in every session:\n\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=INSTALLED_BY)
    shell = parser.parse_args().shell
    group = Group(CONSOLE_SCRIPT)
    sys.stdout.write(SHELLS[shell](group, {}, CONSOLE_SCRIPT, COMPLETE).source() + "\n")
    return 0
