"""The table of an evaluation."""

from rollout.types import Trajectory, Turn
from sqlrl_jax.eval_table import as_markdown, as_text, habits, set_line, set_rows
from sqlrl_jax.metrics import eval_metrics


def episode(task, sample, outcome, source="dev", answer="", **metrics):
    turns = [Turn("", sql="SELECT 1", status="error"), Turn("", sql="SELECT 1", status="solution", answer=answer)]
    return Trajectory(task, source, sample, [], [], [], [], [], 0.0, outcome, "solution", turns, metrics)


def cells(m):
    header, rows = set_rows(m)
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_one_set_has_one_row():
    m = eval_metrics([episode("a", 0, "correct"), episode("b", 0, "wrong")])
    assert cells(m) == {
        "dev": {"set": "dev", "questions": "2", "accuracy": "50.0", "95% interval": "9.5–90.5", "turns": "2.00"}
    }
    assert set_line("dev", m) == "dev, 2 questions: accuracy 50.0 (9.5–90.5)  turns 2.00"


def test_sets_all_and_mean():
    m = eval_metrics([episode("a", 0, "correct", "x"), *(episode(f"b{i}", 0, "wrong", "y") for i in range(3))])
    found = cells(m)
    assert list(found) == ["x", "y", "all questions", "mean of sets"]
    assert [found[name]["accuracy"] for name in found] == ["100.0", "0.0", "25.0", "50.0"]
    assert found["mean of sets"]["questions"] == ""


def test_samples_votes_and_gradings_have_columns():
    grade = {"grade/bird_set": 1.0}
    m = eval_metrics([episode("a", 0, "wrong", answer="u"), episode("a", 1, "correct", answer="v", **grade)])
    assert list(cells(m)["dev"]) == [
        "set",
        "questions",
        "accuracy",
        "95% interval",
        "pass@2",
        "maj@2",
        "bird_set",
        "turns",
    ]
    two = eval_metrics([episode("a", 0, "correct", **grade), episode("b", 0, "wrong", **{"sql/queries": 1.0})])
    assert cells(two)["dev"]["bird_set"] == "100.0 (1)"  # one of the two could be graded


def test_habits_say_how_queries_went():
    m = eval_metrics([episode("a", 0, "correct"), episode("b", 0, "sql_error")])
    assert habits(m) == (
        "outcomes: correct 50.0%, sql error 50.0%; looked before answering 0.0%; "
        "of the queries 100.0% failed and 0.0% timed out"
    )


def test_markdown_and_terminal_show_the_same_cells():
    header, rows = ["set", "n"], [["a|b", "1"], ["c", "2"]]
    assert as_markdown(header, rows) == "| set | n |\n| --- | ---: |\n| a\\|b | 1 |\n| c | 2 |"
    assert as_text("title", header, rows).plain == "\ntitle\n\nset  n\na|b  1\nc    2\n"


def test_names_are_not_read_as_styles():
    assert "[red]" in as_text("[red]", ["set"], [["[bold]"]]).plain
