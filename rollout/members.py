"""The services of a run as its learner knows them: which there are, and which can be asked now.

They are named by address, or by a name that stands for several (`dns:///rollout:8700`, a Kubernetes headless service), which
is looked up again each time. One that was lost or is about to stop is away until `look` finds that it answers again; so a
service that starts later, moves behind its name or comes back joins by itself. Whoever looks gives those that joined the
weights before they are asked for anything.

Left out: taking a service away because its name is gone while it still answers (it plays what it has, and is away once it
stops), and any watching between two looks: a service that dies meanwhile is noticed when it is asked.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rollout.channel import split_address
from rollout.security import PLAIN, Security
from rollout.stub import BridgeError, Stub

DNS = "dns:///"
PROBE_SECONDS = 5.0
AGAIN_SECONDS = 0.2
LONGEST_PAUSE = 60.0

Lookup = Callable[[str, int], list[str]]
"""(name, port) → the addresses `host:port` that it stands for now, sorted; empty when it stands for none."""


def look_up(name: str, port: int) -> list[str]:
    """What the system's resolver says."""
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return []
    hosts = sorted({str(address[0]) for *_, address in found})
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts]


class Pace:
    """Lets what failed be tried again so seldom that it takes a tenth of the time at most: a closed port at once, a host that
    swallows packets, or a resolver that does not answer, after a while."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._due = clock, dict[str, float]()

    def due(self, what: str) -> bool:
        return self._clock() >= self._due.get(what, 0.0)

    def took(self, what: str, seconds: float) -> None:
        self._due[what] = self._clock() + min(LONGEST_PAUSE, 10 * seconds)


@dataclass
class _Member:
    stub: Stub
    name: str = ""
    present: bool = False


class Members:
    """All services in the order in which they came; `services` as in `generator.services`. Raises UserError for a bad one.

    Not safe to use from several threads.
    """

    def __init__(
        self,
        services: Sequence[str],
        security: Security = PLAIN,
        lookup: Lookup = look_up,
    ) -> None:
        if not services:
            raise ValueError("at least one rollout service address is needed")
        self._security, self._lookup, self._pace = security, lookup, Pace()
        self._names = [split_address(service.removeprefix(DNS)) for service in services if service.startswith(DNS)]
        self._listed = [service for service in services if not service.startswith(DNS)]
        self._stand_for: dict[str, list[str]] = {}  # name → addresses, as they were last
        self._members: dict[str, _Member] = {}
        for address in self._listed:
            split_address(address)
            self._add(address, present=True)  # until asked
        self._resolve(eager=True)

    @property
    def present(self) -> list[Stub]:
        """Those that can be asked."""
        return [member.stub for member in self._members.values() if member.present]

    @property
    def away(self) -> list[str]:
        """Addresses of those that are known and cannot be asked."""
        return [address for address, member in self._members.items() if not member.present]

    def leave(self, address: str) -> None:
        """The service is lost, or about to stop: it is not asked until it is found again."""
        if address in self._members:
            self._members[address].present = False

    def replace(self, address: str, old: str) -> None:
        """The service that was at `old` is at `address` from now on, and away until it is looked for."""
        moved = {}
        for known, member in self._members.items():
            if known == old:
                member.stub.close()
                moved[address] = self._connect(address)
            else:
                moved[known] = member
        self._members = moved

    def there(self) -> list[tuple[str, str]]:
        """Addresses of those that can be asked, each with the name that it stands behind."""
        return [(address, member.name) for address, member in self._members.items() if member.present]

    def agree(self, there: Sequence[tuple[str, str]]) -> None:
        """Makes exactly these present, in this order, as another process found them."""
        for address, name in there:
            if address not in self._members or not self._members[address].present:
                self._add(address, name)  # over a new connection: a broken one waits before it tries again
        addresses = [address for address, _ in there]
        for address, member in self._members.items():
            member.present = address in addresses
        order = {address: place for place, address in enumerate(addresses)}
        self._members = dict(sorted(self._members.items(), key=lambda item: order.get(item[0], len(order))))

    def look(self, *, strict: bool = False, eager: bool = False) -> list[str]:
        """Looks names up again and tries those that are away; returns the addresses of those that joined.

        `strict` raises BridgeError for one that answers and will not have us (another token, an untrusted certificate);
        `eager` also tries what took long the last time.
        """
        self._resolve(eager)
        tried = self._try([address for address in self.away if eager or self._pace.due(address)])
        known = set(self._listed) | {address for found in self._stand_for.values() for address in found}
        for address, error in tried.items():
            if error is None:  # over a new connection: a broken one waits before it tries again
                self._add(address, self._members[address].name, present=True)
            elif strict and error.unwelcome:
                raise error
            elif self._names and address not in known:
                self._members.pop(address).stub.close()
        return [address for address, error in tried.items() if error is None]

    def wait(self, seconds: float, *, for_all: bool = False) -> list[str]:
        """Looks until some service is present, or all that are named; returns the addresses that joined.

        Raises BridgeError when none is after `seconds`, or one will not have us.
        """
        deadline, joined = time.monotonic() + seconds, []
        while True:
            joined += self.look(strict=True, eager=True)
            if self.present and not (for_all and (self.away or not all(self._stand_for.values()))):
                return joined
            if time.monotonic() > deadline:
                if self.present:
                    return joined
                raise self._nobody(seconds)
            time.sleep(AGAIN_SECONDS)

    def doubt_all(self) -> None:
        """Takes nobody for present before it has answered."""
        for member in self._members.values():
            member.present = False

    def close(self) -> None:
        for member in self._members.values():
            member.stub.close()

    def _add(self, address: str, name: str = "", present: bool = False) -> None:
        """In the place of one that is known already."""
        if address in self._members:
            self._members[address].stub.close()
        self._members[address] = self._connect(address, name, present)

    def _connect(self, address: str, name: str = "", present: bool = False) -> _Member:
        return _Member(Stub(address, self._security, name), name, present)

    def _resolve(self, eager: bool) -> None:
        for name, port in self._names:
            place, started = f"{name}:{port}", time.monotonic()
            if not eager and not self._pace.due(place):
                continue
            self._stand_for[place] = self._lookup(name, port)
            self._pace.took(place, time.monotonic() - started)
            for address in self._stand_for[place]:
                if address not in self._members:
                    self._add(address, name)

    def _try(self, addresses: Iterable[str]) -> dict[str, BridgeError | None]:
        """What each says, all asked at once, over connections of their own: one that is stopping may still send episodes over
        its old one."""
        addresses = list(addresses)
        if not addresses:
            return {}
        with ThreadPoolExecutor(min(len(addresses), 32), thread_name_prefix="look") as pool:
            return dict(zip(addresses, pool.map(self._trouble, addresses), strict=True))

    def _trouble(self, address: str) -> BridgeError | None:
        started = time.monotonic()
        with Stub(address, self._security, self._members[address].name) as probe:
            error = probe.trouble(PROBE_SECONDS)
        self._pace.took(address, time.monotonic() - started if error else 0.0)
        return error

    def _nobody(self, seconds: float) -> BridgeError:
        tried = self._try(self.away)
        if tried:
            address, error = next(iter(tried.items()))
            return BridgeError(
                address,
                f"no rollout service answered within {seconds:.0f} s; is one running? {error or address + ' does now'}. "
                f"Its log says more; start one with: python launch.py serve --config FILE",
            )
        name, port = self._names[0]
        return BridgeError(
            f"{name}:{port}", f"generator.services: {DNS}{name}:{port} stands for no address after {seconds:.0f} s"
        )
