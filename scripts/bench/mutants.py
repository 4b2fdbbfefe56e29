"""Plants faults into the core files, one at a time, and counts those that the tests beside them
find.

    python scripts/bench/mutants.py [FILE ...] [--sample N]   # adds to docs/results/mutants.jsonl
    python scripts/bench/mutants.py [FILE ...] --table        # shares killed, and the survivors

A fault is one change of the syntax tree: another comparison or operator, a number off by one, a
condition turned round, an argument or a statement left out, `detach` left out. They are drawn with
a seed, so that a sample is the same again; all those of `planted.py` come before them. A row is
known by the text that it tried, and is tried again when the file has changed; the table has those
of the present files.
"""

import argparse
import ast
import copy
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from planted import PLANTED

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/results/mutants.jsonl"
TIMEOUT_S = 240
CORE = (
    "test_core_algos",
    "test_algorithms",
    "test_correction",
    "test_combinations",
    "test_filters",
)
WORKERS = ("test_actor", "test_update", "test_golden", "test_forward", "test_columns", "test_masks")
CHECKPOINTS = ("test_run_folder", "test_checkpoints_of_run", "test_ray_trainer", "test_checkpoint")
TESTS: dict[str, tuple[str, ...]] = {
    "verl/trainer/ppo/core_algos/losses.py": (*CORE, "test_actor", "test_critic"),
    "verl/trainer/ppo/core_algos/advantages.py": CORE,
    "verl/trainer/ppo/core_algos/kl.py": CORE,
    "verl/trainer/ppo/core_algos/correction.py": CORE,
    "verl/trainer/ppo/advantage.py": ("test_advantage", "test_masks", "test_resume"),
    "verl/trainer/ppo/filters.py": CORE,
    "verl/trainer/ppo/batching.py": ("test_batching", "test_ray_trainer"),
    "verl/trainer/ppo/rollout_queue.py": ("test_rollout_queue",),
    "verl/trainer/ppo/batch_source.py": ("test_batching", "test_steps_of_trainer", "test_filters"),
    "verl/trainer/ppo/groups.py": ("test_batching", "test_filters", "test_reward"),
    "verl/trainer/ppo/failures.py": ("test_batching",),
    "verl/trainer/ppo/validation.py": ("test_ray_trainer", "test_steps_of_trainer"),
    "verl/trainer/ppo/collapse_guard.py": ("test_ray_trainer", "test_resume"),
    "verl/trainer/ppo/checkpoints.py": CHECKPOINTS,
    "verl/trainer/ppo/ray_trainer.py": ("test_ray_trainer", "test_steps_of_trainer", "test_resume"),
    "verl/workers/actor.py": ("test_actor", "test_update", "test_columns"),
    "verl/workers/critic.py": ("test_critic", "test_update"),
    "verl/workers/update.py": WORKERS,
    "verl/workers/forward.py": WORKERS,
    "verl/rollout/weight_sync.py": (
        "verl/rollout/test_weight_sync",
        "verl/rollout/test_lost_engine",
    ),
    "verl/utils/checkpoint.py": CHECKPOINTS,
    "verl/utils/seqlen_balancing.py": ("test_seqlen_balancing", "test_batching"),
    "search_r1/agent": ("search_r1/agent",),
    "search_r1/rewards": ("search_r1/rewards",),
    "search_r1/search/client": ("search_r1/search/test_client.py",),
}
"""The tests beside each file: names of tests/verl, or paths below tests/."""

PRELOADED = (
    "fastapi",
    "httpx",
    "hydra",
    "hypothesis",
    "numpy",
    "pandas",
    "peft",
    "ray",
    "sklearn.metrics",
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen2.modeling_qwen2",
    "uvicorn",
)
"""What the tests import for seconds, and is not of the project."""

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
NAMES = {
    "min": "max",
    "max": "min",
    "minimum": "maximum",
    "maximum": "minimum",
    "any": "all",
    "all": "any",
}
TRANSPARENT = frozenset({"detach", "clone", "float", "bool"})
"""Methods whose result has the same values: left out, only what they are there for goes wrong."""


@dataclass(frozen=True)
class Mutant:
    """One file with one fault."""

    file: str
    line: int
    before: str
    after: str
    text: str

    @property
    def key(self) -> str:
        """Tells this text of this file."""
        return hashlib.sha256(f"{self.file}\n{self.text}".encode()).hexdigest()[:16]


def variants(node: ast.AST) -> Iterator[ast.AST | None]:
    """What may stand in the place of `node`; None: nothing, where `node` is a statement."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in COMPARISONS:
            yield _with(node, ops=[COMPARISONS[type(op)]()])
        case ast.BinOp(op=op) if type(op) in OPERATORS and not _is_optional(node):
            yield _with(node, op=OPERATORS[type(op)]())
        case ast.BoolOp(op=op):
            yield _with(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not() | ast.Invert() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield ast.Constant(value + 1)
        case ast.IfExp(body=body, orelse=orelse):
            yield _with(node, body=orelse, orelse=body)
        case ast.Call():
            yield from _calls(node)
        case ast.stmt():
            yield from _statements(node)


def _is_optional(node: ast.BinOp) -> bool:
    """Whether it is a type, `X | None`."""
    return isinstance(node.right, ast.Constant) and node.right.value is None


def _statements(node: ast.stmt) -> Iterator[ast.AST | None]:
    match node:
        case ast.If(test=test):
            yield _with(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.Expr(value=ast.Call() | ast.Await()) | ast.AugAssign():
            yield None


def _calls(node: ast.Call) -> Iterator[ast.AST]:
    function = node.func
    if isinstance(function, ast.Name) and function.id in NAMES:
        yield _with(node, func=ast.Name(NAMES[function.id], ast.Load()))
    if isinstance(function, ast.Attribute):
        if function.attr in NAMES:
            yield _with(node, func=_with(function, attr=NAMES[function.attr]))
        if function.attr in TRANSPARENT and not node.args:
            yield function.value
    for place, keyword in enumerate(node.keywords):
        if keyword.arg is not None:
            yield _with(node, keywords=node.keywords[:place] + node.keywords[place + 1 :])


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def mutants(file: str) -> list[Mutant]:
    """All mutants of a file of the project."""
    source = (ROOT / file).read_text(encoding="utf-8")
    tree = ast.parse(source)
    found: list[Mutant] = []
    for parent in list(ast.walk(tree)):
        if isinstance(parent, (ast.Raise, ast.JoinedStr, ast.AnnAssign)):
            continue
        for field, value in list(ast.iter_fields(parent)):
            if field in ("annotation", "returns", "decorator_list", "slice"):
                continue
            for place, node in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(node, ast.AST) and not _is_message(node):
                    found += _replaced(file, tree, parent, field, place, node)
    return found


def _is_message(node: ast.AST) -> bool:
    """Whether it only tells somebody something: the tests need not read every word."""
    text = ast.unparse(node) if isinstance(node, (ast.Expr, ast.Raise)) else ""
    return isinstance(node, ast.Raise) or text.startswith(("logger.", "super().__init__"))


def _replaced(
    file: str, tree: ast.Module, parent: ast.AST, field: str, place: int, node: ast.AST
) -> Iterator[Mutant]:
    siblings = getattr(parent, field)
    for variant in variants(node):
        if isinstance(siblings, list):
            kept = [] if variant is None else [variant]
            instead: object = siblings[:place] + kept + siblings[place + 1 :]
            if not instead and field == "body":
                instead = [ast.Pass()]
        else:
            instead = variant
        setattr(parent, field, instead)
        text = ast.unparse(ast.fix_missing_locations(tree))
        setattr(parent, field, siblings)
        after = "left out" if variant is None else ast.unparse(variant).splitlines()[0]
        yield Mutant(
            file, getattr(node, "lineno", 0), ast.unparse(node).splitlines()[0], after, text
        )


def planted(files: Sequence[str]) -> list[Mutant]:
    """The faults of `planted.py` in these files. Raises ValueError for one whose text does not
    stand there once."""
    found = []
    for file, before, after in PLANTED:
        if file not in files:
            continue
        source = (ROOT / file).read_text(encoding="utf-8")
        places = list(however_broken(before).finditer(source))
        if len(places) != 1:
            raise ValueError(
                f"planted.py: {file} has {len(places)} times {before!r}, expected once"
            )
        start, end = places[0].span()
        line = source[:start].count("\n") + 1
        found.append(
            Mutant(
                file,
                line,
                before.strip(),
                after.strip() or "left out",
                source[:start] + after + source[end:],
            )
        )
    return found


def however_broken(code: str) -> re.Pattern[str]:
    """Matches a piece of code however a formatter breaks its lines.

    >>> bool(however_broken("f(a, b)").search("f(\\n    a,\\n    b,\\n)"))
    True
    """
    indentation = re.match(r" *", code)
    begin = f"^{indentation.group()}" if indentation and len(indentation.group()) > 1 else ""
    pieces = re.findall(r"\w+|[^\w\s]", code)
    patterns = [rf",?\s*{re.escape(p)}" if p in ")]}" else re.escape(p) for p in pieces]
    end = "\n" if code.endswith("\n") else ""
    return re.compile(begin + r"\s*".join(patterns) + end, re.MULTILINE)


def tests_of(file: str) -> list[str]:
    """The tests beside a file, as arguments of pytest; those that do not exist are left out."""
    names = next(tests for prefix, tests in TESTS.items() if file.startswith(prefix))
    paths = [f"tests/{name}" if "/" in name else f"tests/verl/{name}.py" for name in names]
    return [path for path in paths if (ROOT / path).exists()]


def run_tests(tree: str, file: str, tests: Sequence[str]) -> None:
    """Runs pytest in a copy of the project; ends this process with its status."""
    os.chdir(tree)
    sys.path[:] = [tree, *(path for path in sys.path if path not in (str(ROOT), ""))]
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    import pytest

    from tests import distributed

    distributed.START_METHOD = "fork"  # this process has imported everything
    doctests = [file] if file.startswith("search_r1") else []
    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *doctests, *tests]))


def status_of_tests(tree: Path, file: str) -> int | None:
    """Exit status of the tests beside `file` in that copy of the project; None if they take too
    long."""
    run = multiprocessing.get_context("fork").Process(
        target=run_tests, args=(str(tree), file, tests_of(file))
    )
    run.start()
    run.join(TIMEOUT_S)
    status = run.exitcode
    if status is None:
        run.kill()
        run.join()
    return status


def try_mutants(tree: Path, todo: Sequence[Mutant], out: Path) -> None:
    """Appends the row of each: killed, survived, or timeout, which counts as killed.

    Raises RuntimeError where the tests fail without any fault.
    """
    healthy: set[tuple[str, ...]] = set()
    for number, mutant in enumerate(todo, 1):
        tests = tuple(tests_of(mutant.file))
        if tests not in healthy and status_of_tests(tree, mutant.file) != 0:
            raise RuntimeError(
                f"{mutant.file}: the tests beside it fail without any fault: {' '.join(tests)}"
            )
        healthy.add(tests)
        path = tree / mutant.file
        original = path.read_text(encoding="utf-8")
        path.write_text(mutant.text, encoding="utf-8")
        began = time.monotonic()
        status = status_of_tests(tree, mutant.file)
        path.write_text(original, encoding="utf-8")
        outcome = {0: "survived", None: "timeout"}.get(status, "killed")
        row = {name: value for name, value in asdict(mutant).items() if name != "text"}
        row |= {
            "key": mutant.key,
            "outcome": outcome,
            "seconds": round(time.monotonic() - began, 1),
        }
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        sys.stdout.write(
            f"{number}/{len(todo)} {outcome} {mutant.file}:{mutant.line} {mutant.after}\n"
        )
        sys.stdout.flush()


def copy_project(tree: Path) -> Path:
    """Copies the files that git tracks or would."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    return tree


def preload() -> None:
    """Imports what takes seconds, so that a fork has it; nothing of the project."""
    for name in PRELOADED:
        importlib.import_module(name)


def drawn(files: Sequence[str], sample: int, seed: int) -> list[Mutant]:
    """At most `sample` mutants of each file."""
    chosen: list[Mutant] = []
    for file in files:
        found = mutants(file)
        order = random.Random(f"{seed} {file}").sample(found, len(found))
        chosen += order[:sample]
    return chosen


def all_files() -> list[str]:
    """The files that have tests beside them."""
    found: list[str] = []
    for path in TESTS:
        whole = sorted((ROOT / path).glob("*.py")) if (ROOT / path).is_dir() else [ROOT / path]
        found += [str(p.relative_to(ROOT)) for p in whole if p.stat().st_size]
    return found


def table(rows: Sequence[dict[str, object]]) -> str:
    """Killed of tried, by file, and the survivors."""
    lines = ["| file | tried | killed | share |", "|---|---|---|---|"]
    files = sorted({str(row["file"]) for row in rows})
    for name in [*files, "all"]:
        own = [row for row in rows if name in (row["file"], "all")]
        killed = sum(row["outcome"] != "survived" for row in own)
        lines.append(f"| {name} | {len(own)} | {killed} | {killed / len(own):.2f} |")
    lines.append("")
    survivors = [row for row in rows if row["outcome"] == "survived"]
    lines += [
        f"- {row['file']}:{row['line']}: `{row['before']}` -> `{row['after']}`" for row in survivors
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files",
        nargs="*",
        help="files to plant faults in (default: all that have tests beside them)",
    )
    parser.add_argument(
        "--sample", type=int, default=12, help="most mutants of a file (default: 12)"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws them (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of rows")
    parser.add_argument(
        "--again", action="store_true", help="try those that survived again: the tests have changed"
    )
    parser.add_argument("--table", action="store_true", help="print the table of the rows and end")
    args = parser.parse_args()
    lines = args.out.read_text(encoding="utf-8").splitlines() if args.out.exists() else []
    rows = {
        row["key"]: row for row in map(json.loads, lines)
    }  # of one that was tried again the last
    files = args.files or all_files()
    if args.table:
        present = {
            mutant.key
            for mutant in [*planted(files), *(m for file in files for m in mutants(file))]
        }
        sys.stdout.write(table([row for key, row in rows.items() if key in present]) + "\n")
        return
    known = {key for key, row in rows.items() if not (args.again and row["outcome"] == "survived")}
    tried = planted(files) + drawn(files, args.sample, args.seed)
    todo = [mutant for mutant in tried if mutant.key not in known]
    preload()
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for job in range(args.jobs):
            tree = copy_project(Path(folder, str(job)))
            jobs.append(
                fork.Process(target=try_mutants, args=(tree, todo[job :: args.jobs], args.out))
            )
        for process in jobs:
            process.start()
        for process in jobs:
            process.join()
    sys.exit(max(process.exitcode or 0 for process in jobs))


if __name__ == "__main__":
    main()
