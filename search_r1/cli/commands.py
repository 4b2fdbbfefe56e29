"""The table of the commands. Another command is another line of it."""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple


def function_at(place: str) -> Callable[..., int | None]:
    """The function that `module:function` names; the module is imported."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


class Command(NamedTuple):
    """A command: its name, a line about it, and the function that does it."""

    name: str
    summary: str
    function: str
    """`module:function`. It reads its arguments from `sys.argv`, as a program does."""
    forms: tuple[str, ...] = ()
    """Words that may stand first, such as the names of parts of the command."""
    takes_overrides: bool = False
    """Whether `key=value` may follow, as in a training."""

    def run(self) -> int | None:
        """Runs the command and returns its exit status; None stands for success."""
        return function_at(self.function)()


TRAINED_BY = ("grpo", "ppo")
SECTIONS: dict[str, tuple[Command, ...]] = {
    "Train and evaluate": (
        Command("train", "trains a search agent", "search_r1.cli.forms:train", TRAINED_BY, True),
        Command("evaluate", "scores a model or a run", "search_r1.evaluate:main", (), True),
        Command("ask", "asks a model, and shows it think", "search_r1.infer:main", (), True),
    ),
    "Retrieval": (
        Command("serve", "serves an index", "search_r1.search.retrieval_server:main"),
        Command("index", "builds an index of a corpus", "search_r1.search.index_builder:main"),
        Command(
            "expand",
            "finds words by which documents can be searched",
            "search_r1.cli.forms:expand",
            ("neighbours", "model"),
        ),
        Command("corpus", "makes a corpus of documents", "search_r1.search.make_corpus:main"),
    ),
    "Data": (
        Command(
            "data",
            "makes training files: questions, benchmarks, traces",
            "search_r1.cli.forms:data",
            (
                "prepare",
                "mask",
                "synthesize",
                "demonstrate",
                "filter",
                "benchmarks",
                "sample",
                "traces",
            ),
            True,
        ),
    ),
    "Look": (
        Command("watch", "shows runs while they go on", "search_r1.pages.watch:main"),
        Command("view", "makes a page of trajectories to read", "search_r1.pages.viewer:main"),
        Command("play", "a playground in the browser", "search_r1.pages.play:main", (), True),
        Command("compare", "sets results side by side", "search_r1.evaluation.report:main"),
    ),
    "Tools": (
        Command("export", "writes a checkpoint for other programs", "search_r1.export:main"),
        Command(
            "estimate",
            "says what a training will take of a GPU, before it runs",
            "search_r1.cli.forms:estimate",
            ("memory", "time"),
            True,
        ),
        Command(
            "doctor",
            "says what is wrong here, and the cure",
            "search_r1.doctor.main:main",
            takes_overrides=True,
        ),
        Command(
            "completion",
            "prints the completion for a shell",
            "search_r1.cli.completion:main",
            ("bash", "zsh", "fish"),
        ),
    ),
}
COMMANDS = {command.name: command for section in SECTIONS.values() for command in section}
