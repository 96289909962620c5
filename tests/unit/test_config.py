"""Settings: what is accepted, and what a person reads when it is not."""

from pathlib import Path

import pytest

from sqlrl_jax import config_file
from sqlrl_jax.config import Config, ConfigError

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_configuration_loads(path):
    assert isinstance(config_file.load(path), Config)


def test_saved_configuration_loads_to_an_equal_one(tmp_path):
    config = config_file.load(None, ["trainer.policy.optimizer_config.lr=1e-4", "generator.services=[a:1, b:2]"])
    config_file.save(config, tmp_path / "c.yaml")
    assert config_file.load(tmp_path / "c.yaml") == config
    assert config.trainer.policy.optimizer_config.lr == 1e-4


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.epoch=3", "did you mean 'trainer.epochs'"),
        ("generator.max_turn=3", "did you mean 'generator.max_turns'"),
        ("trainer.policy.lr=1", "did you mean 'trainer.policy.optimizer_config.lr'"),
        ("max_turns=3", "did you mean 'generator.max_turns'"),
        ("generator.max_turns=0", r"generator.max_turns = 0: allowed is int ≥ 1, ≤ 100"),
        ("trainer.policy.optimizer_config.lr=.nan", "trainer.policy.optimizer_config.lr = nan: allowed is float > 0"),
        ("trainer.algorithm.policy_loss_type=foo", "'foo': allowed is ppo | dual_clip"),
        ("trainer.algorithm.policy_loss_type=own:a.b", "package.module:function"),
        ("trainer.algorithm.advantage_estimator=foo", "allowed is grpo | rloo | reinforce++ | maxrl | gae | package"),
        ("trainer.algorithm.kl_ctrl.type=adaptive", "kl_ctrl.type adaptive has no KL to steer: set use_kl_loss or"),
        ("trainer.critic_mini_batch_size=7", "critic_mini_batch_size 7 must divide train_batch_size 256"),
        ("trainer.algorithm.loss_reduction=seq_mean_token_sum_norm", "trainer.algorithm: loss_reduction seq_mean"),
        (
            "trainer.algorithm={policy_loss_type: dppo, off_policy_correction: {tis_ratio_type: token}}",
            "tis_ratio_type would count it twice",
        ),
        (
            "trainer.algorithm={advantage_estimator: maxrl, overlong_buffer: {len: 9}}",
            "maxrl divides by the mean reward and needs none below 0",
        ),
        ("trainer.algorithm.turn_penalty=0.3", "leaves -0.2 of a right answer's reward after generator.max_turns = 5"),
        ("trainer.train_batch_size=10", "policy_mini_batch_size 256 must divide train_batch_size 10"),
        ("trainer.mesh.data=0", "trainer.mesh: sizes are at least 1"),
        ("trainer=3", "'trainer' is a section"),
        ("trainer.seed.x=3", "'trainer.seed' is a setting"),
        ("foo", "expected key=value"),
        ("trainer.epochs=[1", "not valid YAML"),
    ],
)
def test_bad_settings_are_named(override, expected):
    with pytest.raises(ConfigError) as caught:
        config_file.load(None, [override])
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"), [("- a\n", "expected sections"), ("a: [", "not valid YAML"), (None, "No such file")]
)
def test_bad_files_are_named(tmp_path, text, expected):
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=expected) as caught:
        config_file.load(path)
    assert str(path) in str(caught.value)


def test_evaluation_inherits_sampling_that_is_not_given():
    config = config_file.load(
        None, ["generator.sampling_params.temperature=0.6", "generator.eval_sampling_params.max_generate_length=7"]
    )
    sampling = config.generator.eval_sampling()
    assert (sampling.temperature, sampling.max_generate_length) == (0.6, 7)


def test_an_environments_own_settings_are_free_and_keep_their_types(tmp_path):
    (tmp_path / "own.yaml").write_text("environment: {settings: {cost: 0.1, words: [a, b], deep: {x: null}}}")
    config = config_file.load(tmp_path / "own.yaml", ["environment.settings.cost=0.2", "environment.settings.new=yes"])
    assert config.environment.settings == {"cost": 0.2, "words": ["a", "b"], "deep": {"x": None}, "new": True}
    config_file.save(config, tmp_path / "c.yaml")
    assert config_file.load(tmp_path / "c.yaml") == config
    for bad in ("environment.settings=3", "environment.settings.when=2020-01-01"):
        with pytest.raises(ConfigError, match=r"environment\.settings"):
            config_file.load(None, [bad])


def test_every_setting_has_a_meaning():
    assert [s.key for s in config_file.settings(Config()) if not s.meaning] == []
