"""What an environment may return: everything else is named before it leaves the worker."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.environment import StepResult
from rollout.environment_worker import BadResult, checked_messages, checked_step
from rollout.types import Turn
from rollout.worker_process import frame


class Odd:
    """Looks like a number."""

    def __float__(self) -> float:
        return 0.25


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "step returned None"),
        (("text", 1.0), "expected a StepResult"),
        (StepResult("x", float("nan")), r"reward nan \(float\): expected a finite number"),
        (StepResult("x", float("inf")), "reward inf"),
        (StepResult("x", 10**400), "reward 1000"),
        (StepResult("x", "1"), "reward '1'"),  # type: ignore[arg-type]
        (StepResult("x", None), "reward None"),  # type: ignore[arg-type]
        (StepResult(), "neither an observation nor done=True"),
        (StepResult(3), r"observation 3 \(int\)"),  # type: ignore[arg-type]
        (StepResult(done=True, outcome="won"), "outcome 'won': expected one of correct, wrong"),
        (StepResult("x", outcome="correct"), "outcome 'correct'"),
        (StepResult("x", metrics={"a": float("nan")}), "metric a nan"),
        (StepResult("x", metrics=[1]), r"metrics \[1\]"),  # type: ignore[arg-type]
        (StepResult("x", turn={"status": "ok"}), r"turn \{'status': 'ok'\} \(dict\): expected a rollout"),  # type: ignore[arg-type]
    ],
)
def test_an_unusable_result_is_named(result: object, message: str) -> None:
    with pytest.raises(BadResult, match=message):
        checked_step(result, "step")


@pytest.mark.parametrize("prompt", [None, [], 3, ["hello"], [{"role": "user"}], [{"role": "user", "content": 1}]])
def test_an_unusable_prompt_is_named(prompt: object) -> None:
    with pytest.raises(BadResult, match="reset returned"):
        checked_messages(prompt)


def test_numbers_of_other_libraries_count() -> None:
    for value in (np.float32(0.25), Odd(), np.array(0.25)):
        assert checked_step(StepResult("x", value), "step")[1] == 0.25  # type: ignore[arg-type]
    assert checked_step(StepResult("x", True), "step")[1] == 1.0


@settings(max_examples=200, deadline=None)
@given(st.text(), st.floats(), st.booleans(), st.text(max_size=8), st.dictionaries(st.text(), st.floats(), max_size=3))
def test_what_passes_the_check_can_be_sent(
    text: str, reward: float, done: bool, outcome: str, metrics: dict[str, float]
) -> None:
    try:
        reply = checked_step(StepResult(text, reward, done, outcome, Turn(text), metrics), "step")
    except BadResult:
        return
    frame(reply)
    reply[0].encode()
    assert reply[2] == bool(reply[3])
