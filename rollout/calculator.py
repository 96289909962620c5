"""A small environment that is not SQL: sums in words, with a calculator to use.

The model writes an expression as `<calc>3 * (4 + 5)</calc>`, reads its value, and answers with `<answer>27</answer>`. It
shows what docs/environments.md says on a whole environment: tags, an observation, settings, metrics, rewards by step. A
program as well: `python -m rollout.calculator FOLDER` writes questions. Left out: functions, powers and names; what is
not a sum of numbers is an error that the model reads.
"""

from __future__ import annotations

import ast
import json
import operator
import random
import re
import sys
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from rollout.environment import Environment, StepResult
from rollout.types import Task, Turn

PROMPT = """{question}
You may use a calculator: write a sum, for example <calc>3 * (4 + 5)</calc>, and read its value.
When you know the answer, write it, for example <answer>27</answer>."""
OPERATORS: dict[type[ast.AST], Callable[..., Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}
LARGEST = 10**300  # of a value's numerator and denominator; Python refuses to write much longer numbers
TAG = re.compile(r"<(calc|answer)>(.*?)</\1>", re.DOTALL)


class Calculator(Environment):
    """Task fields: question and answer, both text. Reward: 1 for the right answer, `calc_reward` for the first valid use."""

    def reset(self, task: Task) -> str:
        self.answer = evaluate(str(task.fields["answer"]))
        self.uses = 0
        return PROMPT.format(question=task.fields["question"])

    def step(self, action: str, turn: int) -> StepResult:
        found = TAG.search(action)
        if found is None:
            return self._result(action, "invalid", "Write <calc>…</calc> or <answer>…</answer>.")
        try:
            value = evaluate(found[2])
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            return self._result(action, "error", f"error: {error}")
        if found[1] == "answer":
            right = value == self.answer
            metrics = {"uses": self.uses}
            return StepResult(
                str(value), float(right), done=True, turn=Turn(action, status="solution"), metrics=metrics
            )
        self.uses += 1
        reward = float(self.settings.get("calc_reward", 0.0)) if self.uses == 1 else 0.0
        return self._result(action, "ok", str(value), reward)

    def _result(self, action: str, status: str, text: str, reward: float = 0.0) -> StepResult:
        turn = Turn(action, status=status, observation=text)
        return StepResult(f"\n<result>{text}</result>\n", reward, turn=turn, metrics={"uses": self.uses})


def evaluate(text: str) -> Fraction:
    """The value of a sum of decimal numbers with + - * / and brackets. Raises ValueError or what Python raises."""
    if len(text) > 200:
        raise ValueError("longer than 200 characters")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python would comment on the model's style
        tree = ast.parse(text.strip(), mode="eval")
    try:
        value = _value(tree.body)
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    if max(abs(value.numerator), value.denominator) > LARGEST:
        raise ValueError("too large or too fine a number")
    return value


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("only numbers, + - * / and brackets")


def make_questions(count: int, seed: int, name: str) -> list[dict[str, str]]:
    """Questions of two or three operations with their answers; the same seed gives the same ones."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        a, b, c = (rng.randrange(2, 100) for _ in range(3))
        question, answer = rng.choice(
            [
                (f"A box holds {a} pens. How many pens are in {b} boxes and {c} more pens?", a * b + c),
                (f"{a} people pay {b} euros each and get {c} euros back together. What was paid?", a * b - c),
                (f"{a} red and {b} blue cards are in each of {c} packs. How many cards are there?", (a + b) * c),
            ]
        )
        rows.append({"id": f"{name}{number}", "question": question, "answer": str(answer)})
    return rows


def main(folder: Path) -> None:
    """Writes train.jsonl and heldout.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, count) in enumerate((("train", 512), ("heldout", 64))):
        lines = (json.dumps(row) + "\n" for row in make_questions(count, seed, name))
        (folder / f"{name}.jsonl").write_text("".join(lines))
        print(folder / f"{name}.jsonl")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data/calculator"))
