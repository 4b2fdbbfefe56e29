"""Where the program finds what comes with it, and where it works.

In a clone of the repository, both are the repository. Installed from a wheel, what comes with it
lies in the package, and it works in the folder in which the user stands.
"""

from pathlib import Path

HOME = Path(__file__).resolve().parents[2]
"""The folder of the packages `verl` and `search_r1`: the repository, or site-packages."""
IN_WHEEL = HOME / "search_r1" / "_shipped"
"""Where a wheel has what lies beside the packages in the repository (setup.py puts it there)."""


def is_installed() -> bool:
    """Whether the program runs from a wheel, and not from a clone of the repository."""
    return IN_WHEEL.is_dir()


def root() -> Path:
    """The folder that relative paths of configurations start from, such as data/ and runs/."""
    return Path.cwd() if is_installed() else HOME


def shipped(path: str) -> Path:
    """The place of a file or folder that comes with the program, by its path in the repository."""
    return (IN_WHEEL if is_installed() else HOME) / path


def config_folders() -> list[Path]:
    """The folders of configurations: those of the program, then those of the user, if any.

    In a clone, users put theirs beside the program's; elsewhere they have a folder `configs`.
    """
    own = root() / "configs"
    return [configs(), own] if is_installed() and own.is_dir() else [configs()]


def configs() -> Path:
    """The folder of the configurations that come with the program."""
    return shipped("configs")


def config_names(group: str) -> list[str]:
    """The names of the files of configurations that an override of a group chooses from."""
    folders = [folder / group for folder in config_folders()]
    found = {
        path.relative_to(folder).with_suffix("").as_posix()
        for folder in folders
        for path in folder.rglob("*.yaml")
    }
    return sorted(found)
