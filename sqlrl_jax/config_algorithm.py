"""The settings of trainer.algorithm: advantages, policy loss, corrections, reduction. docs/algorithms.md has the formulas.

The critic of gae is a model and has a section of its own, trainer.critic (config_optimizer.py).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from sqlrl_jax.config_base import OneOfOrOwn, Section

ADVANTAGE_ESTIMATORS = ("grpo", "rloo", "reinforce++", "maxrl", "gae")
POLICY_LOSSES = (
    "ppo",
    "dual_clip",
    "gspo",
    "cispo",
    "sapo",
    "dppo",
    "clip_cov",
    "kl_cov",
    "importance_sampling",
    "cross_entropy",
)
CORRECTED_BY_THEMSELVES = ("dppo", "importance_sampling")
"""Losses whose ratio is to the rollout's policy already."""


class OffPolicyCorrectionConfig(Section):
    """Where the learner and the engine disagree on a token: rho = exp(logprob of the learner - of the rollout).

    Any of these makes the learner's own log-probabilities before the update the old ones of the policy loss. They cost
    nothing where a batch is one optimizer step, otherwise one forward pass a batch.
    """

    tis_ratio_type: Literal["token", "sequence"] | None = None
    """Truncated importance sampling: each token's loss times min(rho, cap), of the token or of its whole episode."""
    token_tis_ratio_clip_high: float = Field(2.0, gt=0)
    """Cap of tis_ratio_type token."""
    sequence_tis_ratio_clip_high: float = Field(5.0, gt=0)
    """Cap of tis_ratio_type sequence, on the product over the episode."""
    sequence_mask_metric: Literal["geometric", "product"] | None = None
    """Drop episodes whose rho is out of bounds: its geometric mean over the tokens, or its product."""
    geo_mask_low: float = Field(0.99, gt=0)
    """Lower bound of geometric."""
    geo_mask_high: float = Field(1.01, gt=0)
    """Upper bound of geometric."""
    product_mask_low: float = Field(0.5, gt=0)
    """Lower bound of product."""
    product_mask_high: float = Field(2.0, gt=0)
    """Upper bound of product."""
    outlier_token_is_threshold_low: float | None = Field(None, gt=0)
    """Drop episodes with any token whose rho is below this; 1e-4 suits."""
    outlier_token_is_threshold_high: float | None = Field(None, gt=0)
    """Drop episodes with any token whose rho is above this; 100 suits."""
    token_mask_is_threshold_low: float | None = Field(None, gt=0)
    """Drop single tokens whose rho is below this."""
    token_mask_is_threshold_high: float | None = Field(None, gt=0)
    """Drop single tokens whose rho is above this."""

    @property
    def enabled(self) -> bool:
        """True when anything here needs the learner's own log-probabilities."""
        thresholds = (
            self.outlier_token_is_threshold_low,
            self.outlier_token_is_threshold_high,
            self.token_mask_is_threshold_low,
            self.token_mask_is_threshold_high,
        )
        return any(v is not None for v in (self.tis_ratio_type, self.sequence_mask_metric, *thresholds))


class CISPOConfig(Section):
    cispo_eps_clip_low: float = Field(1.0, ge=0, le=1)
    """The weight's lower bound is 1 - this; 1 is no bound, as in the paper."""
    cispo_eps_clip_high: float = Field(4.0, gt=0)
    """The weight's upper bound is 1 + this."""


class SAPOConfig(Section):
    tau_pos: float = Field(1.0, gt=0)
    """Temperature of the gate where the advantage is positive."""
    tau_neg: float = Field(1.05, gt=0)
    """Temperature of the gate elsewhere; a higher one forgets faster."""


class DPPOConfig(Section):
    dppo_type: Literal["binary_tv", "binary_kl"] = "binary_tv"
    """What is bounded: total variation or KL, each of the sampled token against all others."""
    delta_low: float = Field(0.2, gt=0)
    """Bound for negative advantages; 0.05 suits binary_kl."""
    delta_high: float = Field(0.2, gt=0)
    """Bound for positive advantages; 0.05 suits binary_kl."""


class ClipCovConfig(Section):
    clip_ratio: float = Field(0.0002, gt=0, le=1)
    """Share of a minibatch's tokens that lose their gradient; at least one."""
    clip_cov_lb: float = 1.0
    """They are drawn from tokens with a covariance above this …"""
    clip_cov_ub: float = 5.0
    """… and below this."""


class KLCovConfig(Section):
    kl_cov_frac: float = Field(0.2, gt=0, le=1)
    """Share of a minibatch's tokens, those of largest covariance, that get the penalty; at least one."""
    ppo_kl_coef: float = Field(1.0, ge=0)
    """Its weight."""


class KLControlConfig(Section):
    type: Literal["fixed", "adaptive"] = "fixed"
    """fixed keeps kl_loss_coef; adaptive starts there and steers the KL of the sampled tokens towards kl_target."""
    kl_target: float = Field(0.1, gt=0)
    """adaptive: the KL aimed at, a mean over tokens by kl_estimator_type."""
    horizon: int = Field(10_000, ge=1)
    """adaptive: episodes over which the coefficient changes by up to a fifth of itself."""


class OverlongBufferConfig(Section):
    len: int = Field(0, ge=0)
    """Tokens before generator.max_input_length over which an episode's reward falls; 0 is off."""
    penalty_factor: float = Field(1.0, ge=0)
    """What an episode that fills the context loses."""


class DynamicSamplingConfig(Section):
    type: Literal["filter"] | None = None
    """filter: a batch holds only questions whose episodes differ in reward; others are left out and more are asked (DAPO)."""
    max_sample_batches: int = Field(30, ge=-1)
    """Batches of questions looked at for one step, after which it takes what there is; -1 or 0 is no limit."""


class AlgorithmConfig(Section):
    advantage_estimator: Annotated[str, OneOfOrOwn(ADVANTAGE_ESTIMATORS)] = "grpo"
    """How good an episode was: grpo (arXiv:2402.03300), rloo, reinforce++, maxrl, gae (with trainer.critic), or your own."""
    grpo_norm_by_std: bool = True
    """Divide by the group's standard deviation; false gives Dr. GRPO (arXiv:2503.20783)."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount of reinforce++ and gae for each sampled token between a token and a reward."""
    lambd: float = Field(1.0, ge=0, le=1)
    """gae's lambda (arXiv:1506.02438): 1 trusts the rewards alone, 0 the critic's next value alone."""
    value_clip: float | None = Field(0.2, gt=0)
    """The critic's loss counts a value as if it had moved at most this far from the value before the update, where that is
    worse; null clips nothing."""
    policy_loss_type: Annotated[str, OneOfOrOwn(POLICY_LOSSES)] = "ppo"
    """ppo: clipped ratio (arXiv:1707.06347). The others: docs/algorithms.md. Or your own function."""
    eps_clip_low: float = Field(0.2, gt=0, lt=1)
    """ppo, dual_clip, gspo, clip_cov: the ratio is clipped below at 1 - this. gspo needs about 3e-4."""
    eps_clip_high: float = Field(0.2, gt=0, lt=10)
    """The same, above at 1 + this. gspo needs about 4e-4."""
    clip_ratio_c: float = Field(3.0, gt=1)
    """Bound of dual_clip: the loss of a negative advantage A is at most -c A."""
    cispo: CISPOConfig = CISPOConfig()
    sapo: SAPOConfig = SAPOConfig()
    dppo: DPPOConfig = DPPOConfig()
    clip_cov: ClipCovConfig = ClipCovConfig()
    kl_cov: KLCovConfig = KLCovConfig()
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    """Settings of your own estimator or loss; any names, any JSON values."""
    off_policy_correction: OffPolicyCorrectionConfig = OffPolicyCorrectionConfig()
    loss_reduction: Literal["token_mean", "sequence_mean", "seq_mean_token_sum_norm", "prompt_mean"] = "token_mean"
    """Mean over the minibatch's tokens, episodes (of token means, or of sums over max_seq_len), or questions."""
    max_seq_len: int | None = Field(None, ge=1)
    """What seq_mean_token_sum_norm divides an episode's sum by."""
    use_entropy_loss: bool = False
    """Subtract entropy_loss_coef times the entropy of the trained tokens' distributions from the loss."""
    entropy_loss_coef: float = Field(0.01, ge=0)
    """Weight of the entropy."""
    use_kl_loss: bool = False
    """Add kl_loss_coef times the KL from the reference model (trainer.ref) to the loss."""
    use_kl_in_reward: bool = False
    """Subtract it from each sampled token's reward instead, with the tokens as they were drawn."""
    kl_loss_coef: float = Field(0.001, ge=0)
    """Weight of the KL, in the loss or in the reward; with kl_ctrl.type adaptive its first value."""
    kl_ctrl: KLControlConfig = KLControlConfig()
    kl_estimator_type: Literal["k1", "k2", "k3", "abs"] = "k3"
    """With d = log pi - log pi_ref: d, d^2/2, exp(-d) - 1 + d, or |d|."""
    overlong_buffer: OverlongBufferConfig = OverlongBufferConfig()
    turn_penalty: float = Field(0.0, ge=0, lt=1)
    """What a right answer loses for each turn after the first; 0.02 suits. Wrong answers lose nothing."""
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()
    zero_variance_filter: bool = True
    """Leave questions whose advantages are all zero (group baselines: whose rewards are all equal) out of the update."""

    @property
    def needs_reference(self) -> bool:
        """Whether the reference model is asked for log-probabilities."""
        return self.use_kl_loss or self.use_kl_in_reward

    @property
    def needs_critic(self) -> bool:
        """Whether there is a critic beside the policy."""
        return self.advantage_estimator == "gae"

    @property
    def adapts_kl(self) -> bool:
        """Whether the weight of the KL changes from step to step."""
        return self.needs_reference and self.kl_ctrl.type == "adaptive"

    @model_validator(mode="after")
    def _fits_together(self) -> AlgorithmConfig:
        if self.use_kl_loss and self.use_kl_in_reward:
            raise ValueError("use_kl_loss and use_kl_in_reward would count the KL twice: choose one")
        if self.use_kl_in_reward and self.advantage_estimator == "maxrl":
            raise ValueError("maxrl divides by the mean reward and needs none below 0: use use_kl_loss instead")
        if self.kl_ctrl.type == "adaptive" and (not self.needs_reference or self.kl_loss_coef == 0):
            raise ValueError(
                "kl_ctrl.type adaptive has no KL to steer: set use_kl_loss or use_kl_in_reward, and kl_loss_coef above 0"
            )
        if self.loss_reduction == "seq_mean_token_sum_norm" and self.max_seq_len is None:
            raise ValueError("loss_reduction seq_mean_token_sum_norm needs max_seq_len, the tokens it divides by")
        if self.off_policy_correction.tis_ratio_type and self.policy_loss_type in CORRECTED_BY_THEMSELVES:
            raise ValueError(
                f"policy_loss_type {self.policy_loss_type} has its ratio to the rollout's policy already: "
                f"off_policy_correction.tis_ratio_type would count it twice"
            )
        if self.advantage_estimator == "maxrl" and self.overlong_buffer.len and self.overlong_buffer.penalty_factor:
            raise ValueError("maxrl divides by the mean reward and needs none below 0: set overlong_buffer.len to 0")
        return self
