"""An episode for the terminal: what a person needs, bounded, and harmless whatever the texts hold."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rollout.types import Task, Trajectory, Turn
from sqlrl_jax.display import Display
from sqlrl_jax.episode_text import TURNS_SHOWN, bounded, episode_text, pick

TASK = Task("t", "join", {"db_id": "shop", "question": "How many in [Bergen]?", "gold_sql": "SELECT count(*) FROM s"})
HOSTILE = "[bold red]x[/bold red] [/] [link=http://x]y[/link] \x1b[2J\x1b]0;t\x07 \u202ebdi"


def episode(turns: list[Turn], outcome: str = "wrong") -> Trajectory:
    reward = float(outcome == "correct")
    return Trajectory("t", "join", 0, [1], [2], [1], [0.0], [], reward, outcome, "solution", turns)


def printed(played: Trajectory) -> str:
    log: list[str] = []
    Display(log.append, quiet=True).print(episode_text(played, TASK, 20))
    return log[0]


def test_question_turns_and_outcome_are_shown():
    look = Turn("<think>Look.</think>\n<sql>SELECT city\nFROM s</sql>", "SELECT city\nFROM s", "ok", "city\nBERGEN")
    answer = Turn("<solution>SELECT 1</solution>", "SELECT 1", "solution")
    lines = [line.rstrip() for line in printed(episode([look, answer])).rstrip().split("\n")]
    assert lines == [
        "episode    of step 20, shop",
        "question   How many in [Bergen]?",
        "1 think    Look.",
        "  sql      SELECT city",
        "           FROM s",
        "  ok       city",
        "           BERGEN",
        "2 solution SELECT 1",
        "outcome    wrong answer, reward 0",
        "gold       SELECT count(*) FROM s",
    ]
    assert "gold" not in printed(episode([answer], "correct"))


def test_a_long_episode_is_bounded():
    turn = Turn("<sql>" + "x\n" * 5000 + "</sql>", "x", "ok", "row\n" * 5000)
    text = printed(episode([turn] * 50))
    assert f"{50 - TURNS_SHOWN} more turn(s)" in text
    assert len(text.split("\n")) < 20 * TURNS_SHOWN
    assert bounded("y" * 1000).endswith(" … (400 more characters)")


def test_markup_and_control_characters_are_shown_and_not_obeyed():
    text = printed(episode([Turn(f"<sql>{HOSTILE}</sql>", "", "ok", HOSTILE)]))
    assert text.count("[bold red]x[/bold red] [/] [link=http://x]y[/link]") == 2
    assert not set("\x1b\x07\u202e") & set(text)
    console = Console(force_terminal=True, width=80)
    with console.capture() as capture:
        console.print(episode_text(episode([Turn(HOSTILE)]), TASK, 1))
    assert "\x1b[2J" not in capture.get()


@given(st.text(max_size=50), st.text(max_size=50))
def test_any_text_can_be_printed(action, observation):
    assert "outcome" in printed(episode([Turn(action, "", "ok", observation)]))


def test_the_same_step_shows_the_same_episode():
    episodes = [episode([], outcome) for outcome in ("wrong", "correct", "malformed")]
    assert pick(episodes, 0, 10) is pick(episodes, 0, 10)
    assert {pick(episodes, 0, step).outcome for step in range(30)} == {"wrong", "correct", "malformed"}
