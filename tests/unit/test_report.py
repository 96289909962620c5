"""The report page: what it shows, and that hostile text, torn files and unfinished runs do it no harm."""

from __future__ import annotations

import html
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import SOURCES, episode, eval_entry, make_run, train_entry, turn, write_lines

from rollout.errors import UserError
from rollout.types import OUTCOMES
from sqlrl_jax import config_file
from sqlrl_jax.config import Config
from sqlrl_jax.report import write_report
from sqlrl_jax.report_charts import Series, line_chart, running_mean, stacked_chart
from sqlrl_jax.report_episodes import Pair, choose_pairs, highlight, match, read_lines, split_action, spread, view

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;</pre></details>{{ 7*7 }}"


class _Page(HTMLParser):
    """Text, elements and the balance of tags of a page."""

    VOID = frozenset({"meta", "br", "img", "input", "link", "hr"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def page_of(folder: Path) -> tuple[str, _Page]:
    source = write_report(folder).read_text(encoding="utf-8")
    return source, _Page(source)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, _Page]:
    return page_of(make_run(tmp_path_factory.mktemp("runs") / "shop-seed-0"))


# --- the page -----------------------------------------------------------------------------------------------------------


def test_shows_the_figures_and_every_section(whole: tuple[str, _Page]) -> None:
    source, page = whole
    for expected in (
        "shop-seed-0", "9 October 2025, 08:53 UTC", "models/quickstart", "13.5 → 88.7%", "11.5 → 26.9%", "9,600",
        "1,920 questions asked", "1.86 M",
        "7 min 31 s", "Held-out accuracy", "Training reward", "look up a value", "+75.2", "How episodes end", "Looked first",
        "Entropy", "Gradient norm", "Clipped ratios", "Time of a step", "Wrong before, correct after", "Still wrong",
        "Correct before, wrong after", "no such column: sales.store", "You have 4 turns left.", "gold query",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert "Not recorded" not in page.text
    assert page.open == []
    assert len(source.encode()) < 1_500_000


def test_warnings_are_on_the_page(whole: tuple[str, _Page], tmp_path: Path) -> None:
    assert "What needed attention" not in whole[1].text
    folder = make_run(tmp_path / "run", steps=6, questions=4)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["outcome/malformed"] = 0.8 if line["step"] >= 4 else 0.1
    write_lines(folder / "metrics.jsonl", lines)
    text = page_of(folder)[1].text
    assert "What needed attention From step 4 on: 80% of the episodes gave no usable answer" in text
    assert text.count("no usable answer") == 1


def test_asks_for_nothing_from_elsewhere(whole: tuple[str, _Page]) -> None:
    _, page = whole
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    assert sum(tag == "script" for tag, _ in page.elements) == 1


def test_drawings_have_names_and_ids_of_their_own(whole: tuple[str, _Page]) -> None:
    source, page = whole
    drawings = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(drawings) == 13
    assert all(drawing.get("aria-label") and drawing["role"] == "img" for drawing in drawings)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', source)) <= set(ids)
    declared = set(re.findall(r"(--[\w-]+):", source))
    assert set(re.findall(r"var\((--[\w-]+)\)", source)) <= declared
    assert "#0000" not in source  # a placeholder colour that was not replaced


def test_same_folder_same_bytes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=6, questions=6)
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a<b>&run", steps=5, questions=4)
    attack = [
        turn(f"{HOSTILE}<think>{HOSTILE}</think><sql>SELECT '{HOSTILE}' -- {HOSTILE}</sql>", HOSTILE, HOSTILE, HOSTILE),
        turn(f"<solution>{HOSTILE}</solution>", "solution", HOSTILE, f"<observation>{HOSTILE}</observation>{HOSTILE}"),
    ]
    for kind, step in (("eval", 0), ("eval", 5), ("train", 1)):
        lines = []
        for number, outcome in enumerate(("wrong", "correct" if step else "wrong", HOSTILE)):
            record = episode(kind, step, number, outcome, attack)
            fields = ("question", "gold_sql", "db_id", "source", "prompt", "evidence", "error", "stop_reason")
            lines.append(record | dict.fromkeys(fields, HOSTILE))
        write_lines(folder / f"trajectories/{kind}_{step:06d}.jsonl", lines)
    source, page = page_of(folder)
    assert page.open == []
    assert sum(tag == "script" for tag, _ in page.elements) == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "<img" not in source
    assert html.escape(HOSTILE, quote=False)[:40] in source
    assert "{{ 7*7 }}" in source


def test_long_texts_are_cut_and_many_turns_are_left_out(tmp_path: Path) -> None:
    long = [turn(f"<think>{'t' * 50_000}</think><sql>{'<' * 50_000}</sql>", "ok", "", "o" * 90_000) for _ in range(30)]
    write_lines(tmp_path / "trajectories/train_000001.jsonl", [episode("train", 1, n, "wrong", long) for n in range(9)])
    config_file.save(Config(), tmp_path / "config.yaml")
    source, page = page_of(tmp_path)
    assert "(48,800 more characters)" in page.text
    assert "… 24 turns not shown …" in page.text
    assert len(source) < 300_000


# --- unfinished and damaged runs ----------------------------------------------------------------------------------------


def test_run_that_has_only_begun(tmp_path: Path) -> None:
    config_file.save(Config(), tmp_path / "config.yaml")
    _, page = page_of(tmp_path)
    assert "No step has finished yet" in page.text
    assert "No evaluation has finished yet." in page.text
    assert "trainer:" in page.text


def test_run_with_one_evaluation_and_no_training(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [eval_entry(0, 60, 5)])
    write_lines(tmp_path / "trajectories/eval_000000.jsonl", [episode("eval", 0, 1, "wrong")])
    _, page = page_of(tmp_path)
    for expected in (
        "config.yaml is missing",
        "13.5%",
        "Only one evaluation has written",
        "Not recorded",
        "No training episode",
    ):
        assert expected in page.text


def test_torn_last_lines_are_left_out_with_a_note(tmp_path: Path) -> None:
    rng = random.Random(0)
    write_lines(tmp_path / "metrics.jsonl", [train_entry(s, 9, rng) for s in (1, 2, 3)], tail='{"kind": "train", "st')
    write_lines(
        tmp_path / "trajectories/train_000003.jsonl", [episode("train", 3, 1, "wrong")], tail='{"question": "h\xe9'
    )
    _, page = page_of(tmp_path)
    assert "The last line of metrics.jsonl is incomplete and was left out." in page.text
    assert "The last line of train_000003.jsonl is incomplete and was left out." in page.text
    assert "3 steps" in page.text


@pytest.mark.parametrize("damage", ["not json\n", "[1, 2]\n", '{"kind": "train"\n'])
def test_damage_in_the_middle_names_file_and_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n' + damage + '{"kind": "train", "step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: "):
        write_report(tmp_path)


def test_entry_without_step_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"kind": "train", "step": 1}, {"kind": "train"}])
    with pytest.raises(UserError, match="entry 2 needs an integer 'step'"):
        write_report(tmp_path)


@pytest.mark.parametrize(("name", "message"), [("nothing", "no such folder"), ("", "is not a run's folder")])
def test_folder_that_is_no_run(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_report(tmp_path / name)


def test_values_that_are_not_numbers_are_gaps(tmp_path: Path) -> None:
    entries = [train_entry(s, 9, random.Random(0)) for s in (1, 2, 3)]
    entries[1] |= {
        "policy/entropy": None,
        "reward/avg_raw_reward": math.nan,
        "policy/grad_norm": math.inf,
        "outcome/wrong": None,
    }
    write_lines(tmp_path / "metrics.jsonl", entries)
    source, page = page_of(tmp_path)
    assert page.open == []
    drawings = re.findall(r"<svg.*?</svg>", source, re.S)
    assert not any(re.search(r"[ \"](?:nan|inf)", re.sub(r'aria-label="[^"]*"', "", d)) for d in drawings)


def test_resumed_run_says_that_its_time_has_pauses(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"kind": "train", "step": 1}])
    (tmp_path / ".starts.json").write_text('{"id": "a", "starts": 3}')
    assert "The run was started 3 times" in page_of(tmp_path)[1].text


def test_repeated_step_counts_once(tmp_path: Path) -> None:
    rng = random.Random(0)
    write_lines(tmp_path / "metrics.jsonl", [train_entry(s, 9, rng) for s in (1, 2, 3, 2, 3, 4)])
    assert "4 steps" in page_of(tmp_path)[1].text


# --- pieces -------------------------------------------------------------------------------------------------------------


def test_pairs_show_every_kind_of_change_and_of_question() -> None:
    before = [episode("eval", 0, n, "correct" if n >= 30 else "wrong") for n in range(40)]
    after = [episode("eval", 9, n, "wrong" if n < 10 or n >= 35 else "correct") for n in range(40)]
    groups = dict(choose_pairs(match(before, after)))
    assert {title: len(members) for title, members in groups.items()} == {
        "Wrong before, correct after": 6, "Still wrong": 3, "Correct before, wrong after": 2,
    }  # fmt: skip
    assert {pair.after["source"] for pair in groups["Wrong before, correct after"]} == set(SOURCES)
    assert all(pair.before["task_id"] == pair.after["task_id"] for pair in groups["Still wrong"])


def test_matching_takes_the_first_sample_of_a_question_in_both() -> None:
    before = [episode("eval", 0, 1, "wrong") | {"sample": s} for s in (1, 0)] + [episode("eval", 0, 2, "wrong")]
    after = [episode("eval", 9, 1, "correct"), episode("eval", 9, 3, "correct")]
    assert match(before, after) == [Pair(before[1], after[0])]


def test_action_is_split_into_what_was_thought_asked_and_answered() -> None:
    assert split_action("<think>a</think>\n<sql>b</sql>") == [("think", "a"), ("sql", "b")]
    assert split_action("already open</think><solution>b") == [("think", "already open"), ("solution", "b")]
    assert split_action("<think>a<sql>b</sql> rest") == [("think", "a"), ("sql", "b"), ("text", "rest")]
    assert split_action("only words") == [("text", "only words")]
    assert split_action(" ") == []


@given(st.text())
def test_nothing_the_model_wrote_is_lost_by_splitting(action: str) -> None:
    assert "".join("".join(c for _, c in split_action(action)).split()) == "".join(action.split()) or "<" in action


@given(st.text(alphabet=st.sampled_from("ab'\"`-/*\n 1.<>&select")))
def test_highlighting_only_adds_marks(sql: str) -> None:
    marked = highlight(sql)
    assert html.unescape(re.sub(r'<span class="\w">|</span>', "", marked)) == sql


def test_view_bears_records_with_nothing_in_them() -> None:
    assert view({})["outcome_label"] == "unknown"
    assert view({"turns": None, "prompt": [{"role": "user", "content": "hi"}]})["prompt"] == "[user]\nhi"
    assert view({"turns": [{}, "x"], "outcome": "correct"})["turn_count"] == 1


def test_every_outcome_has_a_name_and_a_colour(whole: tuple[str, _Page]) -> None:
    for outcome in OUTCOMES:
        assert view({"outcome": outcome})["outcome"] == outcome
        assert f"--{outcome.replace('_', '-')}:" in whole[0]


def test_spread_takes_first_and_last() -> None:
    files = [Path(str(i)) for i in range(10)]
    assert [p.name for p in spread(files, 4)] == ["0", "3", "6", "9"]
    assert spread(files[:3], 4) == files[:3]


def test_running_mean_leaves_gaps_out() -> None:
    values = np.array([1.0, np.nan, 3.0, 5.0])
    np.testing.assert_allclose(running_mean(values, 2), [1.0, 1.0, 3.0, 4.0])
    assert np.isnan(running_mean(np.array([np.nan]), 3)).all()


def test_many_steps_do_not_make_a_large_drawing() -> None:
    x = list(range(20_000))
    rows = [Series("a", x, [0.5] * 20_000, "correct"), Series("b", x, [0.1] * 20_000, "wrong")]
    for chart in (
        stacked_chart("s", "Shares", "", "% of all", rows, bars=True),
        line_chart("l", "Line", "", "units", rows[:1]),
    ):
        assert chart.svg is not None
        assert len(chart.svg) < 80_000


def test_read_lines_drops_token_ids(tmp_path: Path) -> None:
    write_lines(tmp_path / "train_000001.jsonl", [episode("train", 1, 1, "wrong")])
    (record,), note = read_lines(tmp_path / "train_000001.jsonl")
    assert "prompt_ids" not in record
    assert record["task_id"] == "q001"
    assert note == ""
