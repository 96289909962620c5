"""Fixtures for all tests. Data that the project may not carry is used when it lies beside the checkout."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported: libtpu may be installed where no TPU is

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real questions, databases and tokenizers beside the checkout; tests that need them skip without."""
    if not (SHARED / "data" / "devset" / "questions.jsonl").exists():
        pytest.skip("needs the development data in ../shared")
    return SHARED
