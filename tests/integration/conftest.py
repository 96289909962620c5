"""Lets integration tests share helper modules, by name in the tests and as `tests.integration.…` in child processes."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(HERE), str(HERE.parents[1])) if p not in sys.path]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A service's and a learner's certificate, and those that will not do."""
    from tests.integration.certificates import Certificates

    made = Certificates(tmp_path_factory.mktemp("certificates"))
    made.make("service", "DNS:localhost,IP:127.0.0.1,IP:0.0.0.0")
    made.make("learner", "DNS:learner")
    made.make("elsewhere", "DNS:elsewhere.test")
    made.make("expired", days=-1)
    made.make("stranger", by="other")
    return made
