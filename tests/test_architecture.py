"""The import law, the size limits and a few habits, read from the source of the packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import LONGEST_FILES

ROOT = Path(__file__).parents[1]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("verl", "search_r1")
    for path in sorted((ROOT / package).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}

VERL_FOR_TASKS = ["verl.protocol", "verl.agent", "verl.utils", "verl.namesake"]
PURE = ["verl.protocol", "verl.agent", "verl.trainer.ppo.core_algos"]
ENTRY_POINTS = [
    "verl.rollout",
    "verl.workers.config",
    "verl.trainer.sft",
    "verl.trainer.config",
    "verl.trainer.environment",
    "verl.trainer.export",
]
COMMAND_LINE = [
    "verl.trainer.supervise",
    "verl.trainer.compose",
    "verl.trainer.compat",
    "verl.trainer.overrides",
    "verl.trainer.config",
    "verl.trainer.host",
]
COMMANDS = [
    "search_r1.launch",
    "search_r1.evaluate",
    "search_r1.infer",
    "search_r1.session",
    "search_r1.finetune",
    "search_r1.traces.main",
    "search_r1.traces.sample",
    "search_r1.compat",
    "search_r1.doctor",
]
FORBIDDEN = [
    # where, what may not be imported, except
    ("verl", ["search_r1"], []),
    ("search_r1.search", ["verl", "torch", "ray"], []),
    ("search_r1", ["ray"], []),
    ("verl.utils", ["verl", "ray", "hydra"], ["verl.utils", "verl.agent"]),
    *(
        (name, ["verl", "ray", "hydra", "vllm", "transformers"], [*VERL_FOR_TASKS, *PURE])
        for name in PURE
    ),
    ("verl.single_controller", ["verl.workers", "verl.trainer"], []),
    (
        "verl.workers",
        ["verl.trainer", "verl.rollout", "hydra"],
        ["verl.trainer.ppo.core_algos", "verl.rollout.weight_sync"],
    ),
    ("verl.rollout", ["verl.trainer", "hydra"], ["verl.trainer.config"]),
]


def within(name: str, packages: list[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def imports(tree: ast.Module) -> list[str]:
    """Dotted names of everything imported anywhere in the file, also inside functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def allowed(importer: str, imported: str) -> bool:
    for where, what, exceptions in FORBIDDEN:
        if (
            within(importer, [where])
            and within(imported, what)
            and not within(imported, exceptions)
        ):
            return False
    if within(importer, ["search_r1"]) and within(imported, ["verl"]):
        wide = within(
            importer,
            [
                "search_r1.evaluation",
                "search_r1.export",
                "search_r1.infer",
                "search_r1.session",
                "search_r1.pages",
                "search_r1.world",
            ],
        )
        starts = within(importer, COMMANDS)
        return within(imported, VERL_FOR_TASKS + ENTRY_POINTS * wide + COMMAND_LINE * starts)
    if within(importer, ["verl"]) and within(imported, ["ray"]):
        return within(
            importer,
            [
                "verl.single_controller",
                "verl.trainer.driver",
                "verl.trainer.preparation",
                "verl.trainer.main_eval",
            ],
        )
    return True


def test_import_law():
    broken = [
        f"{a} imports {b}" for a, tree in TREES.items() for b in imports(tree) if not allowed(a, b)
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("verl.workers.actor", "search_r1.prompts"),
        ("search_r1.search.client", "verl.utils.errors"),
        ("search_r1.agent.loop", "verl.workers.actor"),
        ("verl.workers.actor", "ray"),
        ("verl.trainer.ppo.core_algos", "verl.workers.config"),
        ("verl.utils.config", "hydra.utils"),
    ],
)
def test_import_law_bites(importer, imported):
    assert not allowed(importer, imported)


def test_training_needs_nothing_of_the_estimate():
    """It is a tool beside the library, reached by two commands."""
    importers = {
        name
        for name, tree in TREES.items()
        for imported in imports(tree)
        if within(imported, ["verl.estimate"]) and not within(name, ["verl.estimate"])
    }
    assert importers == {"verl.trainer.estimate", "verl.trainer.step_time"}


def test_few_files_know_vllm():
    importers = {
        name
        for name, tree in TREES.items()
        for imported in imports(tree)
        if within(imported, ["vllm"])
    }
    assert importers == {
        "verl.rollout.engine_images",
        "verl.rollout.vllm_server",
        "verl.rollout.weight_sync",
        "verl.utils.tool_parser",
    }


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_pull_in_no_machinery(module):
    code = (
        f"import sys, {module}; print(*({{'ray', 'hydra', 'vllm', 'transformers'}} & "
        "set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


NODES_OF_A_FILE = 3000
NODES_OF_MOST_FUNCTIONS = 250
"""Nodes of the syntax tree: what there is to read, however it is broken into lines."""


def size_in_nodes(tree: ast.AST) -> int:
    return sum(1 for _ in ast.walk(tree))


def test_files_have_one_reason_to_exist():
    sizes = {name: size_in_nodes(tree) for name, tree in TREES.items()}
    assert not {name: size for name, size in sizes.items() if size > NODES_OF_A_FILE}


def test_functions_are_short():
    """All but one in twenty: a dispatcher or a table may be longer."""
    functions = [
        node
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    sizes = sorted(size_in_nodes(node) for node in functions)
    assert sizes[int(len(sizes) * 0.95)] <= NODES_OF_MOST_FUNCTIONS


def test_habits():
    broken = [f"{name}: TODO" for name, path in SOURCES.items() if "TODO" in path.read_text()]
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                broken.append(f"{name}:{node.lineno} bare except")
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "print"
            ):
                broken.append(f"{name}:{node.lineno} print")
    assert not broken, "\n".join(broken)


RUN_WHAT_THEY_READ = ["pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"]
"""Modules that run what a file holds."""
PICKLES = [
    "torch.distributed.checkpoint.FileSystemReader",
    "torch.distributed.checkpoint.FileSystemWriter",
    "torch.distributed.checkpoint.filesystem.FileSystemReader",
    "torch.distributed.checkpoint.filesystem.FileSystemWriter",
]
"""Torch's own, whose index is a pickle: `checkpoint_storage` replaces that part."""
LOADERS = ("torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load")
"""Functions that do so unless they are told not to."""


def runs_what_it_imports(importer: str, imported: str) -> bool:
    """Whether an import brings something by which reading a file runs code."""
    if within(imported, PICKLES):
        return importer != "verl.utils.checkpoint_storage"
    return within(imported, RUN_WHAT_THEY_READ)


def runs_what_it_reads(node: ast.AST) -> bool:
    """Whether a call lets a file, or what comes with a model, run code."""
    if not isinstance(node, ast.Call):
        return False
    given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
    if ast.unparse(node.func) in LOADERS and given.get("weights_only") is not True:
        return True
    return given.get("allow_pickle") is True or given.get("trust_remote_code") is True


def test_no_file_is_read_that_could_run_code():
    broken = [
        f"{a} imports {b}"
        for a, tree in TREES.items()
        for b in imports(tree)
        if runs_what_it_imports(a, b)
    ]
    for name, tree in TREES.items():
        broken += [
            f"{name}: {ast.unparse(node)}" for node in ast.walk(tree) if runs_what_it_reads(node)
        ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    "call",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_that_rule_bites(call):
    assert runs_what_it_reads(ast.parse(call, mode="eval").body)
    assert runs_what_it_imports("verl.utils.tracking", "pickle.loads")
    assert runs_what_it_imports(
        "verl.utils.checkpoint", "torch.distributed.checkpoint.filesystem.FileSystemReader"
    )


def test_the_retrieval_server_needs_no_trainer():
    """The extra `retrieval` is enough.

    Engines with other needs import them when they are chosen.
    """
    code = (
        "import sys, search_r1.search.retrieval_server, search_r1.search.index_builder; "
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {
        "torch",
        "transformers",
        "ray",
        "vllm",
        "hydra",
        "faiss",
        "sentence_transformers",
        "jnius",
        "bs4",
        "verl",
    }
    assert not heavy & set(done.stdout.split())


TESTS = {path: path.read_text() for path in sorted((ROOT / "tests").rglob("*.py"))}


def imports_a_test_module(text: str) -> bool:
    modules = [name.split(".") for name in imports(ast.parse(text))]
    return any(
        parts[0] == "tests" and any(part.startswith("test_") for part in parts) for parts in modules
    )


def test_what_test_modules_share_is_in_no_test_module():
    """It is a fixture of a conftest.py or stands in a helper module beside the tests."""
    broken = [
        str(path.relative_to(ROOT)) for path, text in TESTS.items() if imports_a_test_module(text)
    ]
    assert not broken
    hidden = "noqa: " + "F811"
    assert not [str(path.relative_to(ROOT)) for path, text in TESTS.items() if hidden in text]


def test_that_rule_sees_test_modules():
    assert imports_a_test_module("from tests.verl.test_config import composed")
    assert imports_a_test_module("import tests.verl.test_config as other")
    assert not imports_a_test_module("from tests.configs import composed")


def test_the_longest_files_exist():
    assert not [name for name in LONGEST_FILES if not (ROOT / "tests" / name).is_file()]
