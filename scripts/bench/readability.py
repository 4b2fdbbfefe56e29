"""Counts what a reader of verl/ and search_r1/ has before them, in one revision or in two.

    python scripts/bench/readability.py                  # the working tree
    python scripts/bench/readability.py REV_A            # a revision beside the working tree
    python scripts/bench/readability.py REV_A REV_B      # two revisions side by side

Prints a Markdown table. None of the figures is a goal; a large difference is worth a look.
"""

import argparse
import ast
import io
import subprocess
import sys
import tarfile
import token
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("verl", "search_r1")
ENTRY_POINT = "verl/trainer/main_ppo.py"
LONGEST_LINE = 100
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
NO_TOKENS = {
    token.COMMENT,
    token.DEDENT,
    token.ENCODING,
    token.ENDMARKER,
    token.INDENT,
    token.NEWLINE,
    token.NL,
}
Sources = dict[str, str]
"""The text of each Python file, by its path in the repository."""


def working_tree() -> Sources:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def of_revision(revision: str) -> Sources:
    """The files of a commit. Raises CalledProcessError for one that Git does not know."""
    command = ["git", "archive", revision, *PACKAGES]
    archive = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    sources: Sources = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.name.endswith(".py") else None
            if content is not None:
                sources[member.name] = content.read().decode("utf-8")
    return sources


def count_tokens(text: str) -> int:
    """Tokens that Python acts on: no comments, no line breaks, no indentation."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(1 for found in tokens if found.type not in NO_TOKENS)


def size_in_nodes(tree: ast.AST) -> int:
    return sum(1 for _ in ast.walk(tree))


def nested_comprehensions(tree: ast.AST) -> int:
    """Comprehensions that hold another one."""
    return sum(
        any(isinstance(inner, COMPREHENSIONS) for inner in ast.walk(outer) if inner is not outer)
        for outer in ast.walk(tree)
        if isinstance(outer, COMPREHENSIONS)
    )


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]


def lazy_imports(tree: ast.AST) -> int:
    """Import statements within functions."""
    statements = {
        node
        for function in functions(tree)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    return len(statements)


def parameters(tree: ast.AST) -> Iterator[ast.arg]:
    """The parameters of all functions, `self` and `cls` left out."""
    for function in functions(tree):
        given = function.args
        starred = [arg for arg in (given.vararg, given.kwarg) if arg is not None]
        for arg in [*given.posonlyargs, *given.args, *given.kwonlyargs, *starred]:
            if arg.arg not in ("self", "cls"):
                yield arg


def is_any(parameter: ast.arg) -> bool:
    """Whether its annotation says nothing but `Any`."""
    annotation = parameter.annotation
    return annotation is not None and ast.unparse(annotation) in ("Any", "typing.Any")


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def largest(sizes: dict[str, int]) -> str:
    name = max(sizes, key=lambda known: sizes[known])
    return f"{sizes[name]:,} ({name})"


def percentile_95(sizes: Sequence[int]) -> int:
    return sorted(sizes)[int(len(sizes) * 0.95)]


def figures_of_text(sources: Sources) -> dict[str, str]:
    lines = [line for text in sources.values() for line in text.splitlines()]
    written = [line for line in lines if line.strip()]
    characters = sum(len(line) for line in written)
    return {
        "files": f"{len(sources):,}",
        "lines": f"{len(lines):,}",
        "characters a line that is not empty": f"{characters / max(1, len(written)):.1f}",
        f"lines over {LONGEST_LINE} characters": str(
            sum(len(line) > LONGEST_LINE for line in lines)
        ),
        "`fmt: skip`": str(sum("# fmt: skip" in line for line in lines)),
        "tokens": f"{sum(map(count_tokens, sources.values())):,}",
    }


def figures_of_trees(trees: dict[str, ast.Module]) -> dict[str, str]:
    whole = trees.values()
    declared = [parameter for tree in whole for parameter in parameters(tree)]
    sizes = {
        f"{function.name} in {path}": size_in_nodes(function)
        for path, tree in trees.items()
        for function in functions(tree)
    }
    files = {path: size_in_nodes(tree) for path, tree in trees.items()}
    return {
        "AST nodes": f"{sum(files.values()):,}",
        "comprehensions that hold another": str(sum(map(nested_comprehensions, whole))),
        "parameters that are bare `Any`": share(sum(map(is_any, declared)), len(declared)),
        "imports within functions": str(sum(map(lazy_imports, whole))),
        "nodes of a function, 95th percentile": str(percentile_95(list(sizes.values()))),
        "nodes of the largest function": largest(sizes),
        "nodes of the largest file": largest(files),
    }


def figures(sources: Sources) -> dict[str, str]:
    """Each figure by its name, first those of the text, then those of the syntax trees."""
    trees = {path: ast.parse(text) for path, text in sources.items()}
    found = figures_of_text(sources) | figures_of_trees(trees)
    if ENTRY_POINT in trees:
        found[f"imports within functions of {ENTRY_POINT}"] = str(lazy_imports(trees[ENTRY_POINT]))
    return found


def table(revisions: dict[str, Sources]) -> str:
    """A Markdown table with a column for each package of each revision."""
    columns = {
        f"{package}, {name}": figures(
            {path: text for path, text in sources.items() if path.startswith(f"{package}/")}
        )
        for package in PACKAGES
        for name, sources in revisions.items()
    }
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    rows += [[name, *(column.get(name, "") for column in columns.values())] for name in names]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revisions", nargs="*", metavar="REV", help="at most two commits")
    asked = parser.parse_args(argv).revisions
    if len(asked) > 2:
        parser.error("at most two revisions are compared")
    revisions = {revision: of_revision(revision) for revision in asked}
    if len(asked) < 2:
        revisions["working tree"] = working_tree()
    sys.stdout.write(table(revisions) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
