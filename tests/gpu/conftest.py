"""Skips what is marked `gpu` without a CUDA device, or without the packages in the mark."""

import importlib.util

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture of the test."""
    packages = [package for mark in item.iter_markers("gpu") for package in mark.args]
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
