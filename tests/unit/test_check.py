"""`launch.py check` without a compiler: what it says, its exit status, and that its suggestions hold."""

import json
import os
from pathlib import Path
from unittest import mock

import pytest

import launch
from rollout.errors import UserError
from sqlrl_jax.aot import _needed, axes_of
from sqlrl_jax.check import Request, check, find_model
from sqlrl_jax.check_report import line_of, smallest
from sqlrl_jax.config_file import load, override
from sqlrl_jax.cost import Episodes
from sqlrl_jax.suggest import estimate, suggest
from sqlrl_jax.topology import find

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ["sql_fsdp", "skyrl_sql", "skyrl_sql_conversation", "skyrl_sql_tp_lora", "sql_fsdp_2node"]
SEVEN = ("trainer.policy.model.path=models/Qwen2.5-Coder-7B-Instruct", "trainer.policy.compute_dtype=bfloat16")
EPISODES = Episodes(32768, 0.25)


def run(*arguments: str) -> int:
    with mock.patch.dict(os.environ):
        return launch.main(["check", *arguments])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_known_to_fit_some_slice(name, capsys):
    assert run("--config", str(ROOT / "configs" / f"{name}.yaml"), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["parameters"] == (32_763_876_352 if "2node" in name else 7_615_616_512)
    assert found["micro_batch"]["flops"]["spent"] > found["micro_batch"]["flops"]["needed"]
    assert any(s["fits"] for s in found["slices"])


def test_the_tables_say_what_fits(capsys):
    assert run("--config", str(ROOT / "configs" / "sql_fsdp.yaml"), "--episode-tokens", "6000") == 0
    out = capsys.readouterr().out
    assert "7.62G parameters" in out
    assert "6·N·tokens" in out
    assert "episodes of 6000 tokens" in out
    assert "16 of 8192: a program more" in out
    assert "v5p:2x2x1" in out.splitlines()[-1]


def test_a_model_that_fits_nothing_ends_with_1(tmp_path, capsys):
    sizes = json.loads((ROOT / "sqlrl_jax" / "published" / "qwen2.5-coder-32b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"num_hidden_layers": 2000}))
    assert run("--config", str(ROOT / "configs" / "sql_fsdp.yaml"), "--model-config", str(tmp_path)) == 1
    assert "fits no known slice" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trainer.policy.model.path=models/none"], r"models/none holds no config.json.*--model-config.*qwen3-8b"),
        (["--model-config", "gpt"], r"--model-config gpt: expected a config.json or one of .*qwen2.5-coder-7b"),
        (["--topology", "v5e:1x1"], r"--topology v5e:1x1: libtpu says: .*Slices that work: .*v5e:2x4"),
        (["--topology", "v7:2x2"], r"--topology v7:2x2: expected generation:shape, such as"),
        (["--topology", "v5p:2x2x2"], r"rows_per_micro_batch 4 must be a multiple of the 8 .*rows_per_micro_batch=8"),
        (["--topology", "v5p:2x2x1", "trainer.mesh.tensor=3"], r"needs a multiple of 3 device"),
        (["trainer.policy.row_buckets=[5000]"], r"row_buckets: 5000 must be less than row_tokens 32768 and divide"),
        (["trainer.mesh.sequence=7"], r"row_tokens: 32768 must be a multiple of trainer.mesh.sequence 7"),
    ],
)
def test_mistakes_end_with_2_and_a_message(arguments, said, capsys):
    if arguments == ["--topology", "v5e:1x1"]:
        pytest.importorskip("libtpu", reason="libtpu decides what shapes there are")
    assert run("--config", str(ROOT / "configs" / "sql_fsdp.yaml"), *arguments) == 2
    assert __import__("re").search(said, capsys.readouterr().err)


@pytest.mark.parametrize("share", ["0", "1.5", "half"])
def test_a_share_is_a_part(share, capsys):
    with pytest.raises(SystemExit):
        run("--config", "configs/sql_fsdp.yaml", "--trained-share", share)
    assert "above 0 and at most 1" in capsys.readouterr().err


def test_a_broken_config_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not a model's config\.json"):
        find_model(load(None), str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"config\.json: model_type 'bert'"):
        find_model(load(None), str(tmp_path))


def test_a_configured_checkpoint_comes_before_a_published_name(tmp_path):
    folder = tmp_path / "Qwen2.5-Coder-7B-Instruct"
    folder.mkdir()
    sizes = json.loads((ROOT / "sqlrl_jax" / "published" / "qwen3-4b.json").read_text())
    (folder / "config.json").write_text(json.dumps(sizes))
    name, model = find_model(load(None, [f"trainer.policy.model.path={folder}"]), None)
    assert model.model_type == "qwen3"
    assert name == str(folder / "config.json")


def test_suggestions_fit_and_are_settings():
    where = find("v5e:2x4")
    config = load(None, [*SEVEN, "trainer.policy.rows_per_micro_batch=8"])
    model = find_model(config, None)[1]
    assert estimate(config, model, where, EPISODES) > where.generation.hbm
    changes = suggest(config, model, where, EPISODES)
    assert changes
    for change in changes:
        override(config, change.settings)
        needs = estimate(config, model, change.where, EPISODES, change.settings)
        assert needs == change.needs <= change.where.generation.hbm
        assert f"--topology {change.where.name}" in line_of(change)


def test_the_nearest_change_comes_first():
    config = load(None, [*SEVEN, "trainer.policy.rows_per_micro_batch=8"])
    model, where = find_model(config, None)[1], find("v5p:2x2x1")
    needs = estimate(config, model, where, EPISODES)
    just_too_little = (
        0.94
        * where.generation.hbm
        / estimate(config, model, where, EPISODES, (("trainer.policy.rows_per_micro_batch", 4),))
    )
    assert needs * just_too_little > where.generation.hbm
    first = suggest(config, model, where, EPISODES, just_too_little)[0]
    assert first.settings == (("trainer.policy.rows_per_micro_batch", 4),)


def test_nothing_is_suggested_where_nothing_fits():
    config = load(None, [*SEVEN, "trainer.policy.rows_per_micro_batch=8"])
    assert suggest(config, find_model(config, "qwen2.5-coder-32b")[1], find("v5e:16x16"), EPISODES, 100.0) == []


def test_the_smallest_slice_of_each_generation_is_named():
    found = check(load(ROOT / "configs" / "skyrl_sql_tp_lora.yaml"), Request())
    names = smallest(found.table)
    assert len({n.partition(":")[0] for n in names}) == len(names)
    assert "v5p:2x2x1" in names


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.23G of 15.75G hbm.", 17.23 * 2**30),
        ("RESOURCE_EXHAUSTED: … memory required for HLO temporaries (1.56T) exceeds HBM (95.74G).", 1.56 * 2**40 + 5),
        ("RESOURCE_EXHAUSTED: who knows", float("inf")),
        ("INTERNAL: Mosaic failed to compile", None),
    ],
)
def test_what_the_compiler_says_of_memory_is_read(message, needed):
    assert _needed(message, 5.0) == needed


def test_devices_are_named_by_the_axes_they_differ_on():
    sizes = {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2}
    assert axes_of(sizes, (0, 1)) == "tensor"
    assert axes_of(sizes, (0, 4)) == "fsdp"
    assert axes_of(sizes, (0, 2, 4, 6)) == "fsdp+sequence"
