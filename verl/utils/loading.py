"""Classes and functions named in a configuration."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from verl.utils.errors import ConfigError


def load_class(target: str, key: str) -> Any:
    """The object at the dotted path `target`. Raises ConfigError naming `key`."""
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError([f"{key}={target}: {error}"]) from error


def load_function(path: str, name: str, key: str) -> Any:
    """The function `name` of the Python file `path`. Raises ConfigError naming `key`."""
    if not Path(path).is_file():
        raise ConfigError([f"{key}.path={path}: no such file"])
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise ConfigError([f"{key}.name={name}: {path} defines no such function"])
    return getattr(module, name)
