"""The wheel: what it holds, and that it works in a folder that has nothing of the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from verl.utils.places import IN_WHEEL, root

BASES = (
    "data/closed_world/base",
    "data/closed_world/arithmetic/base",
    "data/closed_world/deep/base",
)
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE")
PACKAGES = ("search_r1", "verl", "configs", *BASES)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which the wheel of this repository was unpacked, as pip does."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root() / name, folder / "source" / name, ignore=ignored)
    for name in SOURCES:
        shutil.copy(root() / name, folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "./source", "-w", "built", "-q"]
    command += ["--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = (folder / "built").glob("search_r1-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site-packages")
    return folder / "site-packages"


def run(installed: Path, folder: Path, *arguments: str) -> str:
    """The output of a run of Python that finds the wheel, and not the repository."""
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-P", *arguments], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def files_under(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in paths
        if "__pycache__" not in path.parts
    }


def test_it_holds_the_packages_the_configurations_and_the_bases(installed):
    shipped = installed / "search_r1" / IN_WHEEL.name
    for name in ("configs", *BASES):
        assert files_under(shipped / name) == files_under(root() / name)
    for package in ("search_r1", "verl"):
        held = files_under(installed / package)
        held = {name: data for name, data in held.items() if not name.startswith(IN_WHEEL.name)}
        assert held == files_under(root() / package)
    (info,) = installed.glob("search_r1-*.dist-info")
    assert "search-r1 = search_r1.cli.main:main" in (info / "entry_points.txt").read_text()


def test_its_commands_work_in_an_empty_folder_and_leave_it_empty(installed, tmp_path):
    assert "search-r1 doctor" in run(installed, tmp_path, "-m", "search_r1.cli")
    job = ["train", "ppo", "experiment=own_data", "setup.corpus_path=c.jsonl", "--cfg", "job"]
    config = OmegaConf.create(run(installed, tmp_path, "-m", "search_r1.cli", *job))
    assert config.trainer.experiment_name == "own_data"
    assert config.setup.corpus_path == f"{tmp_path}/c.jsonl"
    assert list(tmp_path.iterdir()) == []


def test_a_package_in_the_folder_that_would_hide_its_own_is_refused(installed, tmp_path):
    (tmp_path / "verl").mkdir()
    with pytest.raises(AssertionError, match="verl would hide the package verl of this program"):
        run(installed, tmp_path, "-m", "search_r1.cli", "train")


def test_modules_of_the_user_are_found_in_the_folder(installed, tmp_path):
    (tmp_path / "my_reward.py").write_text("class Mine: ...")
    code = "from verl.utils.loading import load_class as c; print(c('my_reward.Mine', 'reward'))"
    assert "my_reward.Mine" in run(installed, tmp_path, "-c", code)


def test_what_it_makes_lies_where_the_user_stands(installed, tmp_path):
    code = (
        "from search_r1.launch import composed, prepare_base; from pathlib import Path; "
        "config, _ = composed('grpo', []); path = config.actor_rollout_ref.model.path; "
        "prepare_base(Path(path)); print(path)"
    )
    path = run(installed, tmp_path, "-c", code).strip()
    assert files_under(tmp_path / path) == files_under(root() / BASES[0])


def test_a_user_has_configurations_of_their_own(installed, tmp_path):
    mine = tmp_path / "configs" / "experiment" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text(
        "# @package _global_\ndefaults:\n  - /experiment/closed_world/grpo\n  - _self_\n"
        "trainer:\n  total_training_steps: 7\n"
    )
    job = ["train", "experiment=mine", "trainer.seed=3", "--cfg", "job"]
    config = OmegaConf.create(run(installed, tmp_path, "-m", "search_r1.cli", *job))
    assert (config.trainer.total_training_steps, config.trainer.seed) == (7, 3)
    code = "from search_r1.launch import composed; print(composed('grpo', ['experiment=mine'])[0])"
    assert "'total_training_steps': 7" in run(installed, tmp_path, "-c", code)
    code = "from verl.trainer.compose import check_overrides as c; c('grpo', ['experiment=min'])"
    with pytest.raises(AssertionError, match="did you mean mine"):
        run(installed, tmp_path, "-c", code)
