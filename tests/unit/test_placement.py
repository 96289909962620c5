"""Groups go to whoever has least to do, stay where they were, and are dealt out the same way every time."""

from hypothesis import given
from hypothesis import strategies as st

from rollout.placement import Load, choose, deal

services = st.dictionaries(st.sampled_from("abcde"), st.builds(Load, st.integers(0, 40), st.booleans()), max_size=5)


@given(services)
def test_the_least_loaded_that_accepts(loads):
    open_to = [name for name, load in loads.items() if load.accepts]
    expected = min(open_to, key=lambda name: loads[name].episodes, default=None)
    assert choose(loads) == expected


@given(services, st.sampled_from("abcdef"), st.integers(0, 20))
def test_a_group_stays_where_it_was_unless_that_one_has_much_more_to_do(loads, last, slack):
    chosen, least = choose(loads, last=last, slack=slack), choose(loads)
    stays = last in loads and loads[last].accepts and loads[last].episodes - loads[least].episodes <= slack
    assert chosen == (last if stays else least)


@given(services, st.lists(st.integers(1, 8), max_size=30))
def test_a_batch_is_dealt_out_evenly(loads, sizes):
    groups = [(f"q{i}", size) for i, size in enumerate(sizes)]
    placed = deal(groups, loads)
    if not any(load.accepts for load in loads.values()):
        assert placed == {}
        return
    assert list(placed) == [name for name, _ in groups]
    assert all(loads[service].accepts for service in placed.values())
    got = {name: sum(size for group, size in groups if placed[group] == name) for name in loads}
    after = {name: loads[name].episodes + got[name] for name in loads if loads[name].accepts}
    for name in after:  # nobody got more than one group beyond what the least loaded has in the end
        assert not got[name] or after[name] - min(after.values()) <= max(sizes)


def test_equal_services_take_turns():
    """What the losses of a run with several services rest on: question i of a batch goes to service i mod N."""
    loads = {name: Load() for name in "abc"}
    assert list(deal([(f"q{i}", 4) for i in range(7)], loads).values()) == list("abcabca")


def test_groups_of_a_dead_service_go_to_those_with_least_left():
    loads = {"dead": Load(12, accepts=False), "busy": Load(9), "nearly done": Load(1)}
    placed = deal([(f"q{i}", 4) for i in range(3)], loads, last={f"q{i}": "dead" for i in range(3)})
    assert list(placed.values()) == ["nearly done", "nearly done", "busy"]


def test_a_group_that_comes_back_finds_its_prompt():
    loads = {"a": Load(0), "b": Load(8)}
    assert deal([("q", 8)], loads, last={"q": "b"}, slack=8) == {"q": "b"}
    assert deal([("q", 8)], loads, last={"q": "b"}, slack=7) == {"q": "a"}
