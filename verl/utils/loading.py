"""Loads classes and functions that a configuration names."""

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

from verl.utils.errors import ConfigError
from verl.utils.places import root


def load_class(target: str, key: str) -> Any:
    """Imports the object at the dotted path `target`, of the user's modules last.

    Raises ConfigError naming `key`.
    """
    if str(root()) not in sys.path:
        sys.path.append(str(root()))
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError([f"{key}={target}: {error}"]) from error


def load_function(path: str, name: str, key: str) -> Any:
    """Loads the function `name` of the Python file `path`.

    Raises ConfigError naming `key`, also when the file raises.
    """
    if not Path(path).is_file():
        raise ConfigError([f"{key}.path={path}: no such file"])
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError([f"{key}.path={path}: expected a Python file (.py)"])
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError([f"{key}.path={path}: {place_of(error, path)}"]) from error
    if not hasattr(module, name):
        raise ConfigError([f"{key}.name={name}: {path} defines no such function"])
    return getattr(module, name)


def place_of(error: BaseException, path: str) -> str:
    """The exception that a user's file raised, and the line of the file that led to it."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == path
    ]
    where = f", line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}: {error}{where}"
