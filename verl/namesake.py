"""Whether another distribution brings a package `verl` as well.

PyPI has one, the library whose vocabulary this one follows. In one environment both fill the folder
`verl`, so that neither works. Only folders are listed, because this runs at every import.
"""

import os
import re
import sys
import warnings
from collections.abc import Iterable

NAMESAKE = re.compile(r"verl-[^-]+\.(dist-info|egg-info)")
SAID = "VERL_NAMESAKE_SAID"
"""Environment variable that keeps the processes of a run from repeating the warning."""
CURE = (
    "Use an environment without it: pip uninstall verl, then install search-r1 again "
    "(pip install --force-reinstall --no-deps WHEEL_FILE, or in a clone: bash scripts/setup.sh)"
)


def namesake(folders: Iterable[str]) -> str | None:
    """The record of a distribution `verl` in one of these folders; None if there is none.

    >>> namesake(["/nowhere"])
    """
    for folder in folders:
        try:
            names = os.listdir(folder or ".")
        except OSError:
            continue
        for name in names:
            if NAMESAKE.fullmatch(name):
                return os.path.join(folder, name)
    return None


def warn_of_namesake() -> None:
    """Warns, once in a run, if another distribution `verl` is installed."""
    if SAID in os.environ:
        return
    if found := namesake(sys.path):
        os.environ[SAID] = "1"
        warnings.warn(
            f"PyPI's verl is installed too ({found}). Its package has the name of search-r1's: "
            "whichever Python finds first hides the other, and in one folder each overwrites the "
            f"other's files. {CURE}",
            stacklevel=2,
        )
