"""What a person reads: the plan, lines, tables, warnings."""

import pytest
from rich.console import Console

from rollout.types import Trajectory
from sqlrl_jax.config import Config
from sqlrl_jax.config_file import load
from sqlrl_jax.display import Display, comparison, duration
from sqlrl_jax.metrics import eval_metrics
from sqlrl_jax.plan import asynchrony, correction, plan_rows


def episode(task: str, sample: int, outcome: str, source: str = "join") -> Trajectory:
    return Trajectory(task, source, sample, [1], [2], [1], [0.0], [], float(outcome == "correct"), outcome, "solution")


def text_of(table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_without_a_terminal_a_bar_leaves_nothing(capsys):
    with Display().bar("playing", 2) as bar:
        bar(1)
    assert capsys.readouterr().out == ""


def test_comparison_shows_each_measurement():
    before = eval_metrics([episode("a", 0, "wrong"), episode("b", 0, "sql_error", "tie")])
    after = eval_metrics([episode("a", 0, "correct"), episode("b", 0, "sql_error", "tie")])
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in text_of(comparison("t", [("x", before), ("y", after)])).splitlines()
    ]
    assert ["accuracy, all", "0.0%", "50.0%"] in lines
    assert ["accuracy, join", "0.0%", "100.0%"] in lines
    assert ["sql error", "50.0%", "50.0%"] in lines
    assert not any(line and line[0].startswith("pass@") for line in lines)


def test_comparison_shows_pass_at_n_when_there_are_samples():
    metrics = eval_metrics([episode("a", 0, "wrong"), episode("a", 1, "correct")])
    assert "pass@2" in text_of(comparison("t", [("x", metrics)]))


def test_duration():
    assert [duration(s) for s in (5, 75, 3675)] == ["0:05", "1:15", "1:01:15"]


def test_everything_printed_is_logged_without_colour():
    log: list[str] = []
    Display(log.append).warn("look here")
    assert log == ["warning: look here\n"]


def test_plan_names_model_mesh_and_memory():
    def rows(config: Config, trained: int) -> dict[str, str]:
        mesh = {"data": 1, "fsdp": 4, "sequence": 1, "tensor": 2}
        given = {"devices": "8 cpu", "mesh": mesh, "questions": (10, 5), "steps": (3, 9), "run_dir": "r"}
        return dict(plan_rows(config, parameters=8 << 20, trained=trained, **given))

    plain = rows(Config(), 8 << 20)
    assert plain["devices"] == "8 cpu; mesh: fsdp 4 x tensor 2"
    assert plain["memory"].startswith("16 MiB a device")
    assert plain["steps"] == "9, 3 done"
    assert "training" not in plain
    lora = ["trainer.policy.model.lora.rank=4", "trainer.policy.model.lora.target_modules=q_proj"]
    adapted = rows(load(None, [*lora, "trainer.policy.compute_dtype=bfloat16"]), 1 << 20)
    assert adapted["memory"].startswith("4 MiB a device")  # 2 bytes a frozen number, 16 a trained one, over 8 devices
    assert adapted["training"].startswith("adapters of rank 4 and alpha 16 on q_proj: 1.05M numbers, float32")


@pytest.mark.parametrize(
    ("settings", "corrected"),
    [
        ([], "corrected by ppo's ratio to the policy that sampled each token"),
        (["tis_ratio_type=token"], "corrected by importance sampling by token, up to 2"),
        (["tis_ratio_type=sequence"], "corrected by importance sampling by episode, up to 5"),
        (["sequence_mask_metric=geometric"], "nothing corrects that"),
    ],
)
def test_the_plan_says_what_corrects_stale_episodes(settings, corrected):
    key = "trainer.algorithm.off_policy_correction"
    config = load(None, ["trainer.max_staleness=2", *(f"{key}.{setting}" for setting in settings)])
    assert asynchrony(config) == f"episodes up to 2 versions of the weights behind; {corrected}"
    assert bool(correction(config)) == corrected.startswith("corrected")
