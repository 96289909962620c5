"""Which samples share a row: few rows, none overfull, and what is alike stored once."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sqlrl_jax.data.rows import Trie, apart, assign_buckets, assign_rows, assign_sharing, trie


@given(st.lists(st.integers(1, 64), max_size=60))
def test_rows_are_few_and_never_overfull(lengths: list[int]) -> None:
    rows = assign_rows(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 64) + 1 or sum(n > 32 for n in lengths) > sum(lengths) / 64
    assert rows == assign_rows(list(lengths), 64)


def slowly_assigned(lengths: list[int], row_tokens: int) -> list[list[int]]:
    """Best fit by looking at every open row; of equally full ones the one that has been so for longest."""
    rows: list[list[int]] = []
    room: dict[int, tuple[int, int]] = {}  # row → (room, when it became so)
    for time, i in enumerate(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))):
        fitting = [(*room[r], r) for r in room if room[r][0] >= lengths[i]]
        left, _, row = min(fitting, default=(row_tokens, time, len(rows)))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        room[row] = left - lengths[i], time
    return rows


@given(st.lists(st.integers(1, 64), max_size=60))
def test_rows_are_those_of_the_plain_algorithm(lengths: list[int]) -> None:
    assert assign_rows(lengths, 64) == slowly_assigned(lengths, 64)


@given(st.lists(st.integers(1, 64), max_size=150), st.sampled_from([(32,), (16, 32), (32, 16, 8)]))
def test_short_rows_never_cost_a_micro_batch_more(lengths: list[int], buckets: tuple[int, ...]) -> None:
    plan = assign_buckets(apart(lengths), 64, 2, buckets)
    assert plan == assign_buckets(apart(list(lengths)), 64, 2, buckets)
    assert sorted(i for _, rows in plan for row in rows for i in row) == list(range(len(lengths)))
    for length, rows in plan:
        assert all(sum(lengths[i] for i in row) <= length for row in rows)
        assert length == 64 or len(rows) * length % 128 == 0  # only whole micro-batches of short rows
    count = sum(-(-len(rows) * length // 128) for length, rows in plan)
    assert count <= -(-len(assign_rows(lengths, 64)) // 2)


def test_short_episodes_go_to_short_rows() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(8, 0.5, 1280), 500, 29000).astype(int).tolist()
    plan = assign_buckets(apart(lengths), 32768, 4, (16384, 8192, 4096))
    tokens = {length: len(rows) * length for length, rows in plan}
    assert sum(lengths) / sum(tokens.values()) > 0.95
    assert sum(n * length for length, n in tokens.items()) / sum(tokens.values()) < 12_000


def test_realistic_episodes_fill_their_rows() -> None:
    lengths = np.random.default_rng(0).triangular(40, 60, 184, 256).astype(int).tolist()
    rows = assign_rows(lengths, 256)
    assert sum(lengths) / (len(rows) * 256) > 0.95


def stored(sequences: list[np.ndarray], row: list[int]) -> int:
    """Tokens of a row in which everything alike stands once: the different prefixes of its sequences."""
    return len({tuple(sequences[i][: n + 1]) for i in row for n in range(len(sequences[i]))})


SEQUENCES = st.lists(
    st.lists(st.integers(1, 2), min_size=1, max_size=12).map(lambda ids: np.array(ids, np.int32)), max_size=30
)


@given(SEQUENCES, st.sampled_from([12, 20, 40]))
@settings(max_examples=200, deadline=None)
def test_what_is_alike_is_counted_once(sequences: list[np.ndarray], row_tokens: int) -> None:
    """Of a binary alphabet: much is alike, to every depth, and some is a beginning of another or the same as it."""
    rows = assign_sharing(trie(sequences, [len(s) for s in sequences]), row_tokens)
    assert sorted(i for row in rows for i in row.samples) == list(range(len(sequences)))
    for row in rows:
        assert stored(sequences, row.samples) <= row.tokens <= row_tokens
        words = [sequences[i].tolist() for i in row.samples]
        assert words == sorted(words)  # neighbours share most
    assert len(rows) <= len(assign_rows([len(s) for s in sequences], row_tokens))
    if len(rows) == 1:
        assert rows[0].tokens == stored(sequences, rows[0].samples)


@given(SEQUENCES, st.integers(0, 2**32 - 1))
def test_a_part_of_a_trie_is_the_trie_of_the_part(sequences: list[np.ndarray], seed: int) -> None:
    whole = [len(s) for s in sequences]
    chosen = np.flatnonzero(np.random.default_rng(seed).random(len(sequences)) < 0.5).tolist()
    part = trie(sequences, whole).of(set(chosen))
    alone = trie([sequences[i] for i in chosen], [whole[i] for i in chosen])
    assert [sequences[i].tolist() for i in part.order] == [sequences[chosen[i]].tolist() for i in alone.order]
    assert list(part.common) == list(alone.common)


def questions(prompt: int, answers: list[int], count: int) -> Trie:
    """A trie of `count` questions, each with a prompt of its own and `answers`."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 1000, prompt) for _ in range(count)]
    tokens = [np.r_[p, rng.integers(0, 1000, n)] for p in prompts for n in answers]
    return trie(tokens, [prompt] * len(tokens))


def test_the_episodes_of_a_question_stay_together() -> None:
    rows = assign_sharing(questions(30, [10, 12, 8, 9, 11], 6), 170)
    assert [row.tokens for row in rows] == [160, 160, 160]
    assert [len({i // 5 for i in row.samples}) for row in rows] == [2, 2, 2]


def test_a_question_too_large_for_a_row_repeats_its_prompt_in_few() -> None:
    rows = assign_sharing(questions(40, [30] * 8, 1), 100)
    assert sorted(row.tokens for row in rows) == [100] * 4


def test_groups_of_a_little_more_than_half_a_row_are_divided() -> None:
    assert len(assign_sharing(questions(10, [10] * 6, 10), 100)) < 10  # 70 tokens a question: whole, each takes a row


def test_where_joining_costs_a_row_nothing_is_joined() -> None:
    """Two questions with prompts of one token: together, their answers fill rows worse than one by one."""
    answers = [(1, n) for n in (7, 9, 17, 10)] + [(2, n) for n in (4, 1, 13, 19)]
    tokens = [np.array([question, *range(100 * n, 101 * n)]) for question, n in answers]
    assert len(assign_sharing(trie(tokens, [1] * len(tokens)), 23)) == 4


def test_what_a_later_sample_trains_is_not_shared() -> None:
    tokens = [np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5])]
    assert trie(tokens, [2, 2]).common == [0, 2]
    assert trie(tokens, [2, 4]).common == [0, 3]
