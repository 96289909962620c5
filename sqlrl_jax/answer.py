"""What a learner process hears from its services and tells the other processes of its run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from rollout import bridge_pb2 as pb
from rollout import wire
from rollout.types import Trajectory


@dataclass
class Answer:
    """What one process got. `lost` are services (address, why, told to stop or not), `unplayed` questions that must
    be asked again; `stop` tells that it was asked to stop."""

    episodes: list[Trajectory] = field(default_factory=list)
    unplayed: list[str] = field(default_factory=list)
    lost: list[tuple[str, str, bool]] = field(default_factory=list)
    stop: str = ""

    def pack(self) -> bytes:
        messages = [wire.trajectory_to_proto(episode).SerializeToString() for episode in self.episodes]
        sizes = [len(message) for message in messages]
        head = {"unplayed": self.unplayed, "lost": self.lost, "stop": self.stop, "sizes": sizes}
        return b"".join([json.dumps(head).encode(), b"\n", *messages])

    @classmethod
    def unpack(cls, data: bytes) -> Answer:
        line, _, body = data.partition(b"\n")
        head, episodes, start = json.loads(line), [], 0
        for size in head["sizes"]:
            message = pb.Trajectory.FromString(body[start : start + size])
            episodes.append(wire.trajectory_from_proto(message))
            start += size
        return cls(episodes, head["unplayed"], [(a, why, stops) for a, why, stops in head["lost"]], head["stop"])
