"""Groups go to whoever has least to do, and are dealt out the same way every time."""

from hypothesis import given
from hypothesis import strategies as st

from rollout.placement import Load, choose, deal

services = st.dictionaries(st.sampled_from("abcde"), st.builds(Load, st.integers(0, 40)), max_size=5)


@given(services)
def test_the_least_loaded_plays_and_the_first_of_equals(loads):
    least = min((load.episodes for load in loads.values()), default=None)
    assert choose(loads) == next((name for name, load in loads.items() if load.episodes == least), None)


@given(services, st.lists(st.integers(1, 8), max_size=30))
def test_a_batch_is_dealt_out_evenly(loads, sizes):
    groups = [(f"q{i}", size) for i, size in enumerate(sizes)]
    placed = deal(groups, loads)
    if not loads:
        assert placed == {}
        return
    assert list(placed) == [name for name, _ in groups]
    got = {name: sum(size for group, size in groups if placed[group] == name) for name in loads}
    after = {name: loads[name].episodes + got[name] for name in loads}
    for name in after:  # nobody got more than one group beyond what the least loaded has in the end
        assert not got[name] or after[name] - min(after.values()) <= max(sizes)


def test_equal_services_take_turns():
    """What the exactness of runs with several services rests on: question i of a batch goes to service i mod N."""
    loads = {name: Load() for name in "abc"}
    assert list(deal([(f"q{i}", 4) for i in range(7)], loads).values()) == list("abcabca")


def test_what_a_dead_one_held_goes_to_those_with_least_left():
    placed = deal([(f"q{i}", 4) for i in range(3)], {"busy": Load(9), "nearly done": Load(1)})
    assert list(placed.values()) == ["nearly done", "nearly done", "busy"]
