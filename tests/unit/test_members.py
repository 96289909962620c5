"""Which services are known and which can be asked, without any: who answers is the integration tests' business."""

import pytest

from rollout.errors import UserError
from rollout.members import LONGEST_PAUSE, Members, Pace, look_up


@pytest.fixture
def members():
    opened = []

    def make(*services, names=None):
        opened.append(Members(services, lookup=lambda name, port: (names or {}).get(name, [])))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def addresses(members):
    return [stub.address for stub in members.present]


def test_those_listed_count_as_there_until_they_are_lost(members):
    known = members("a:1", "b:2", "c:3")
    assert addresses(known) == ["a:1", "b:2", "c:3"]
    known.leave("b:2")
    known.leave("unknown:9")
    assert (addresses(known), known.away) == (["a:1", "c:3"], ["b:2"])


def test_one_that_was_started_again_keeps_its_turn(members):
    known = members("a:1", "b:2", "c:3")
    known.leave("b:2")
    known.replace("b:9", "b:2")
    assert known.away == ["b:9"]
    known.agree([("a:1", ""), ("b:9", ""), ("c:3", "")])
    assert addresses(known) == ["a:1", "b:9", "c:3"]


def test_another_process_says_who_is_there_and_in_which_order(members):
    known = members("a:1", "b:2")
    known.agree([("new:7", "rollout"), ("a:1", "")])
    assert addresses(known) == ["new:7", "a:1"]
    assert known.there() == [("new:7", "rollout"), ("a:1", "")]
    assert known.away == ["b:2"]


def test_a_name_stands_for_what_it_stands_for_now(members):
    names = {"rollout": ["10.0.0.1:80", "10.0.0.2:80"]}
    known = members("dns:///rollout:80", "a:1", names=names)
    assert known.away == ["10.0.0.1:80", "10.0.0.2:80"]  # not asked yet
    assert addresses(known) == ["a:1"]


def test_the_systems_resolver_gives_every_address_once():
    found = look_up("localhost", 8700)
    assert "127.0.0.1:8700" in found or "[::1]:8700" in found
    assert found == sorted(set(found))
    assert look_up("no-such-name.invalid", 8700) == []


@pytest.mark.parametrize("service", ["a", "dns:///a", "dns:///:80", "a:port", ""])
def test_a_bad_address_is_named(members, service):
    with pytest.raises(UserError, match="expected host:port"):
        members("b:1", service)


def test_what_takes_long_is_tried_seldom():
    now = [100.0]
    pace = Pace(lambda: now[0])
    assert pace.due("a")
    pace.took("a", 0.0)
    assert pace.due("a"), "a closed port costs nothing"
    pace.took("a", 5.0)
    now[0] += 49.0
    assert not pace.due("a")
    assert pace.due("b")
    now[0] += 1.0
    assert pace.due("a")
    pace.took("a", 1000.0)
    now[0] += LONGEST_PAUSE
    assert pace.due("a")
