"""A receiver of three small tensors, and what a learner sends it."""

import numpy as np

from rollout.manifest import Slice
from rollout.receiver import Key, Receiver
from rollout.types import TensorSpec
from tests.slices import slice_frames

SPECS = [TensorSpec("a", (4, 6), "float32"), TensorSpec("b", (3,), "bfloat16"), TensorSpec("c", (), "float32")]
KEY = Key("run", 1, 5)
WHOLE: list[list[Slice]] = [[], [], []]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def make(specs=SPECS, live=None):
    clock = Clock()
    return Receiver(specs, clock, live), clock


def values(seed=0):
    """Bytes of each tensor."""
    rng = np.random.default_rng(seed)
    return [rng.bytes(96), rng.bytes(6), rng.bytes(4)]


def frames_for(key, data, missing):
    for r in missing:
        yield from slice_frames(key.push_id, r.tensor, r.slice, memoryview(data[r.tensor]), [(r.offset, r.length)])


def stage(receiver, key=KEY, data=None):
    data = data or values()
    for frame in frames_for(key, data, receiver.begin(key, SPECS, WHOLE, 10)):
        receiver.frame(frame)
    return data


def go_live(receiver, key=KEY, data=None):
    stage(receiver, key, data)
    receiver.prepare(key)
    receiver.start_apply(key)
    receiver.finish_apply()
