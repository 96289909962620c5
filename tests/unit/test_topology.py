"""Names of TPU slices, and what is said of wrong ones and of a missing compiler."""

import importlib.util

import pytest

from rollout.errors import UserError
from sqlrl_jax import topology


def test_a_slice_has_the_devices_of_its_shape():
    assert topology.find("v5p:2x2x1").devices == 4
    assert topology.find("v5e:4x4").devices == 16
    assert topology.find("tpu7x:2x2x1").devices == 8  # two to a chip
    assert topology.find("v6e:2x4").generation.hbm == 31.25 * 2**30


@pytest.mark.parametrize("name", ["v5p", "v9:2x2", "v5e:4", "v5e:4x0", "v5e:4x4x4x4", "v5litepod-16", "", "v5e:axb"])
def test_a_name_that_means_nothing_is_answered_with_those_that_do(name):
    with pytest.raises(UserError, match=r"expected generation:shape, such as .*v5p:2x2x1.*v6e:2x4"):
        topology.find(name)


def test_every_known_name_is_found():
    assert [s.name for s in topology.slices()] == topology.known()
    sizes = [s.devices for s in topology.slices(topology.GENERATIONS["v5e"])]
    assert sizes == sorted(sizes)


def test_without_libtpu_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install '\.\[tpu\]'"):
        topology.devices("v5p:2x2x1")


def test_the_environment_keeps_jax_off_accelerators():
    environment = {"JAX_PLATFORMS": "tpu", "HOME": "/"}
    topology.prepare(environment)
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert environment["HOME"] == "/"
