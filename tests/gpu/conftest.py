"""These tests need a GPU that jax sees, and are run by themselves:

    JAX_PLATFORMS=cuda,cpu python -m pytest tests/gpu

Elsewhere they skip: the rest of the suite runs on the CPU alone.
"""

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "cuda" in os.environ.get("JAX_PLATFORMS", ""):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: JAX_PLATFORMS=cuda,cpu python -m pytest tests/gpu"))
