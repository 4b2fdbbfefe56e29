"""Puts into a wheel what lies beside the packages in the repository and a run from nothing needs.

All else is in pyproject.toml. `verl/utils/places.py` says where the program finds these files.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = (
    "configs",
    "data/closed_world/base",
    "data/closed_world/arithmetic/base",
    "data/closed_world/deep/base",
)
TARGET = "search_r1/_shipped"


class BuildWithShipped(build_py):
    """Copies the packages, then the shipped folders; an editable installation needs no copy."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, TARGET)
        shutil.rmtree(target, ignore_errors=True)
        for folder in SHIPPED:
            shutil.copytree(folder, target / folder)


setup(cmdclass={"build_py": BuildWithShipped})
