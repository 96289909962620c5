"""Every setting of a run, typed, with its meaning beside it.

A run is described by one YAML file that states only what differs from the defaults here, plus `key=value` pairs from the
command line. Keys are those of the SkyRL text-to-SQL example wherever the meaning is the same. This file imports neither
jax nor torch, because both the learner and the rollout service read it. Checks that need other files (does the model
exist, does the database folder) belong to whoever opens those files.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue, model_validator

from sqlrl_jax.config_algorithm import AlgorithmConfig
from sqlrl_jax.config_base import ConfigError as ConfigError
from sqlrl_jax.config_base import Section
from sqlrl_jax.config_bridge import BridgeConfig as BridgeConfig
from sqlrl_jax.config_lora import LoraConfig as LoraConfig
from sqlrl_jax.config_optimizer import CriticConfig
from sqlrl_jax.config_optimizer import OptimizerConfig as OptimizerConfig
from sqlrl_jax.config_sft import SFTConfig


class MeshConfig(Section):
    """Devices by axis; the product must equal the number of devices. -1 on one axis takes what is left."""

    data: int = Field(1, ge=-1)
    """Copies of the model, each fed another part of the batch."""
    fsdp: int = Field(-1, ge=-1)
    """Shards of parameters and optimizer state; each is fed another part of the batch too."""
    sequence: int = Field(1, ge=-1)
    """Shards of each packed row along its length; parameters and optimizer state are split over them too."""
    tensor: int = Field(1, ge=-1)
    """Shards of heads, MLP width and vocabulary inside each layer."""

    @model_validator(mode="after")
    def _one_free_axis(self) -> MeshConfig:
        sizes = [self.data, self.fsdp, self.sequence, self.tensor]
        if 0 in sizes or sizes.count(-1) > 1:
            raise ValueError("sizes are at least 1, and -1 (take what is left) on at most one axis")
        return self


class DistributedConfig(Section):
    """Patience between the processes of a run on several hosts."""

    start_timeout: float = Field(300.0, gt=0)
    """Seconds in which all processes must have started."""
    lost_after: float = Field(30.0, ge=5)
    """Seconds of silence after which a process counts as gone, and the run ends; a killed one is seen at once."""
    wait_timeout: float = Field(7200.0, gt=0)
    """Seconds a process that is alive may let the others wait: at least what a step's slowest rollouts take."""


class ModelPathConfig(Section):
    path: str = "models/quickstart"
    """A Hugging Face checkpoint folder (config.json, safetensors, tokenizer)."""
    lora: LoraConfig = LoraConfig()


class PolicyConfig(Section):
    model: ModelPathConfig = ModelPathConfig()
    optimizer_config: OptimizerConfig = OptimizerConfig()
    row_tokens: int = Field(32768, ge=16, le=1_048_576)
    """Length of a packed row; episodes share rows. At least max_input_length + max_generate_length."""
    rows_per_micro_batch: int = Field(1, ge=1)
    """Packed rows in one forward and backward pass; gradients are summed over the passes of a minibatch."""
    row_buckets: tuple[int, ...] = ()
    """Lengths below row_tokens that packed rows may have besides, such as [16384, 8192], as many rows more to a pass: less
    attention where episodes are short, one more program to compile for each."""
    share_prefixes: bool | None = None
    """Compute what several episodes of a row begin with once: a question's prompt, a schema, the turns before in stepwise
    training. The result is the same to rounding. null: everywhere but on TPUs. There true takes this project's own attention
    kernel, which was compiled for TPUs but never run on one, in place of splash attention."""
    logprob_chunk: int = Field(1024, ge=16)
    """Trained tokens whose logits exist at one time."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the master weights."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products; statistics stay float32."""
    scan_layers: bool = True
    """Compile one layer and loop over it; false unrolls all layers (faster for tiny models)."""
    remat: Literal["none", "attention", "full"] = "full"
    """full recomputes each layer in the backward pass; attention keeps its queries, keys, values and what attention made of
    them (four times the memory) and recomputes the MLP; none keeps all."""
    offload_optimizer: bool = False
    """Keep the optimizer's moments in the host's memory while gradients are computed."""

    @property
    def buckets(self) -> tuple[int, ...]:
        """The row_buckets that are shorter than a row, which may have been made shorter than the file says."""
        return tuple(length for length in self.row_buckets if length < self.row_tokens)


class RefModelConfig(Section):
    path: str = ""
    """A Hugging Face checkpoint folder; empty is the policy's own, as it was before training."""


class RefConfig(Section):
    """The reference model of a KL term. It is loaded only where there is one."""

    model: RefModelConfig = RefModelConfig()


class TrainerConfig(Section):
    run_dir: str = "runs/default"
    """Folder of the run: configuration, metrics, trajectories, checkpoints, export, report."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of data order, sampling and initialisation."""
    epochs: int = Field(1, ge=1)
    """Passes over the training questions."""
    max_steps: int = Field(0, ge=0)
    """Stop after this many steps; 0 means when the epochs are done."""
    train_batch_size: int = Field(256, ge=1)
    """Questions in a training step. An epoch's last partial batch is dropped."""
    policy_mini_batch_size: int = Field(256, ge=1)
    """Questions in one optimizer step; must divide train_batch_size."""
    critic_mini_batch_size: int | None = Field(None, ge=1)
    """Questions in one optimizer step of the critic; must divide train_batch_size. null: policy_mini_batch_size."""
    update_epochs_per_batch: int = Field(1, ge=1)
    """Passes over each batch of episodes."""
    max_staleness: int = Field(0, ge=0, le=64)
    """Versions of the weights that an episode's oldest token may be behind those it trains; 0 waits for a whole batch of each
    version, 1 plays the next batch while one is trained on, more never waits. docs/asynchronous.md."""
    max_prompt_length: int = Field(6000, ge=1)
    """Questions whose prompt has more tokens are dropped and counted."""
    eval_before_train: bool = True
    """Evaluate before the first step."""
    eval_interval: int = Field(5, ge=0)
    """Evaluate every so many steps, and at the end; 0 only at the end."""
    ckpt_interval: int = Field(10, ge=0)
    """Save a checkpoint every so many steps, and at the end; 0 only at the end."""
    max_ckpts_to_keep: int = Field(3, ge=1)
    """Older checkpoints are deleted."""
    keep_best_ckpt: bool = True
    """Keep also the checkpoint of the highest evaluation accuracy, of the steps that are evaluated and saved."""
    print_samples_interval: int = Field(10, ge=0)
    """Print an episode, drawn from the step's, every so many steps, as a person reads it; 0 never."""
    hf_save_interval: int = Field(0, ge=0)
    """Export the model every so many steps to exports/step_N in run_dir, which are all kept; 0 only at the end, to export."""
    resume_mode: Literal["none", "latest"] = "none"
    """latest continues the run in run_dir; none refuses a run_dir that already holds one."""
    compile_cache: str = "~/.cache/sqlrl_jax/xla"
    """Folder of compiled programs kept between runs; empty keeps none."""
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    policy: PolicyConfig = PolicyConfig()
    critic: CriticConfig = CriticConfig()
    ref: RefConfig = RefConfig()

    @property
    def critic_questions(self) -> int:
        """Questions in one optimizer step of the critic."""
        return self.critic_mini_batch_size or self.policy_mini_batch_size

    @model_validator(mode="after")
    def _minibatches_fit(self) -> TrainerConfig:
        for name in ("policy_mini_batch_size", "critic_mini_batch_size"):
            size = getattr(self, name)
            if size and self.train_batch_size % size:
                raise ValueError(f"{name} {size} must divide train_batch_size {self.train_batch_size}")
        return self


class SamplingConfig(Section):
    temperature: float = Field(1.0, ge=0, le=10)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the smallest set of tokens that holds this much probability."""
    max_generate_length: int = Field(3000, ge=1)
    """New tokens in one turn."""
    stop: tuple[str, ...] = ("</sql>", "</solution>")
    """A turn ends after any of these; it stays in the output."""


class EvalSamplingConfig(Section):
    """What is not given is taken from sampling_params."""

    temperature: float | None = Field(None, ge=0, le=10)
    """0 is greedy."""
    top_p: float | None = Field(None, gt=0, le=1)
    """As in sampling_params."""
    max_generate_length: int | None = Field(None, ge=1)
    """As in sampling_params."""
    stop: tuple[str, ...] | None = None
    """As in sampling_params."""


class InferenceEngineConfig(Section):
    num_engines: int = Field(1, ge=1, le=256)
    """Rollout services that a run starts on this machine, each with an engine and tensor_parallel_size GPUs of its own."""
    python: str = ""
    """Python that runs them, such as that of an environment with SGLang; empty: the one that runs the learner."""
    max_sequences: int = Field(256, ge=1, le=65536)
    """Episodes held in the KV cache at one time; more wait their turn."""
    decode_chunk: int = Field(16, ge=1, le=1024)
    """Tokens decoded in one compiled call, between looks at stop strings."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the engine's weights and cache, and of the weights that are pushed to it."""
    tensor_parallel_size: int = Field(1, ge=1, le=64)
    """sglang: GPUs that one engine is spread over."""
    gpu_memory_utilization: float | None = Field(None, gt=0, lt=1)
    """sglang: share of a GPU's memory for weights and KV cache; not given: SGLang's choice."""
    quantization: Literal["", "fp8"] = ""
    """sglang: fp8 keeps the weights in 8 bits; they are pushed in dtype and quantised as they are loaded."""
    engine_init_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """sglang: more arguments of its Engine, by its own names (attention_backend, kv_cache_dtype, base_gpu_id, …)."""


class GeneratorConfig(Section):
    backend: Literal["embedded", "sglang"] = "embedded"
    """embedded: JAX decoding inside the rollout service, on CPU or any device JAX sees. sglang: SGLang, on GPUs."""
    services: tuple[str, ...] = ()
    """host:port of rollout services that run already, or dns:///name:port; empty starts num_engines on this machine."""
    n_samples_per_prompt: int = Field(5, ge=1)
    """Episodes for each training question: the group of GRPO."""
    eval_n_samples_per_prompt: int = Field(1, ge=1)
    """Episodes for each evaluation question; above 1 pass@k is shown too."""
    max_turns: int = Field(5, ge=1, le=100)
    """Actions of the model in one episode."""
    max_input_length: int = Field(29000, ge=16)
    """An episode whose context would grow past this many tokens ends (overflow)."""
    use_conversation_multi_turn: bool = False
    """true: each observation is a chat message of its own; false: one growing assistant message."""
    append_eos_token_after_stop_str_in_multi_turn: bool = True
    """In conversation style, close a turn that ended on a stop string with the end-of-turn token (mask 0)."""
    step_wise_trajectories: bool = False
    """Train on each turn as a sample of its own: its prompt is all that came before it. In conversation style a chat
    template that drops the thoughts of earlier turns then does so before each turn."""
    apply_overlong_filtering: bool = False
    """Leave episodes that ran out of tokens, in a turn or in the context, out of the update."""
    zero_reward_on_non_stop: bool = False
    """Such episodes earn 0, whatever they did before."""
    sampling_params: SamplingConfig = SamplingConfig()
    eval_sampling_params: EvalSamplingConfig = EvalSamplingConfig()
    inference_engine: InferenceEngineConfig = InferenceEngineConfig()

    def eval_sampling(self) -> SamplingConfig:
        """Sampling for evaluation: eval_sampling_params over sampling_params."""
        given = {k: v for k, v in self.eval_sampling_params.model_dump().items() if v is not None}
        return self.sampling_params.model_copy(update=given)


Grading = Literal["rows", "bird_set", "spider_test_suite"]


class Text2SQLConfig(Section):
    database_root: str = "data/demo/databases"
    """Folder with <db_id>/<db_id>.sqlite, or .duckdb."""
    engine: Literal["sqlite", "duckdb"] = "sqlite"
    """What runs the queries; duckdb needs the extra of that name, and has no VM steps to count."""
    prompt_style: Literal["full", "short"] = "full"
    """full: instructions for pretrained models; short: schema and question alone, for models that learn the format."""
    prompt_template: str = ""
    """A YAML file with `system` and `user`, texts that hold {schema}, {question}, {evidence}, {turns}; empty: ours."""
    max_schema_tokens: int = Field(5000, ge=50)
    """Tokens of the schema in a prompt; one that is longer loses samples, descriptions, types, keys, tables, in turn."""
    timeout: float = Field(5.0, gt=0, le=600)
    """CPU seconds a query may take: the backup to max_vm_steps, and DuckDB's only limit."""
    max_vm_steps: int = Field(50_000_000, ge=1000)
    """SQLite virtual-machine steps a query may take: the same verdict on a busy machine."""
    max_rows: int = Field(50, ge=1)
    """Rows of a result that the model sees."""
    max_observation_chars: int = Field(9000, ge=100)
    """Characters of an observation."""
    workers: int = Field(2, ge=1, le=256)
    """Processes that run queries."""
    cache_mb: int = Field(64, ge=0)
    """Megabytes of results remembered, by exact SQL and content of the database; 0 runs every query."""
    malformed_reward: float = Field(0.0, ge=-1, le=0)
    """Reward of an episode without a well-formed answer; the reference's reward scheme uses -1."""
    partial_reward: float = Field(0.0, ge=0, lt=1)
    """Reward of a wrong answer that ran, read a table and returned rows; 0.1 suits. Accuracy counts right answers alone."""
    require_think: bool = False
    """An answer is well-formed only with a thought somewhere, one first after each observation, and a single solution."""
    grading: Grading = "rows"
    """When an answer is right. rows: the same rows, in order if the gold orders; the others are published measures."""
    column_permutation: bool = False
    """With grading rows, accept the gold's columns in another order."""
    measures: tuple[Grading, ...] = ()
    """Gradings to report beside the reward, as grade/<name>; of use in evaluation."""
    test_suite_root: str = ""
    """Folder with <db_id>/*.sqlite, the several databases of spider_test_suite."""
    test_suite_keep_distinct: bool = False
    """Keep DISTINCT in both queries of spider_test_suite; the published script drops it unless told --keep_distinct."""

    @model_validator(mode="after")
    def _test_suite_has_databases(self) -> Text2SQLConfig:
        if "spider_test_suite" in (self.grading, *self.measures):
            if not self.test_suite_root:
                raise ValueError("spider_test_suite needs test_suite_root, the folder of its databases")
            if self.engine != "sqlite":
                raise ValueError("spider_test_suite needs engine sqlite, which its databases are for")
        return self


class EnvironmentConfig(Section):
    env_class: str = "text2sql"
    """text2sql, calculator, or package.module:Class of an environment of your own."""
    path: str = "."
    """Folder that holds your own environment's module, besides PYTHONPATH and what is installed."""
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    """Settings of your own environment, which finds them in self.settings; any names, any JSON values."""
    workers: int = Field(2, ge=1, le=256)
    """Processes that run environments other than text2sql."""
    timeout: float = Field(10.0, gt=0, le=3600)
    """CPU seconds one call of an environment other than text2sql may take; past them the episode ends (timeout)."""
    stall_timeout: float = Field(60.0, gt=0)
    """Seconds such a call may wait without computing; past them it failed and is tried again, never scored."""
    text2sql: Text2SQLConfig = Text2SQLConfig()


class DemoConfig(Section):
    directory: str = "data/demo"
    """Where the generated databases and questions go: train.jsonl, heldout.jsonl, databases/."""
    train_databases: int = Field(0, ge=0)
    """Databases to generate for training; 0 generates none and uses data.train_data as it is."""
    heldout_databases: int = Field(40, ge=1)
    """Databases for evaluation; none of them is trained on."""
    questions_per_database: int = Field(8, ge=1)
    """Questions asked of each database."""
    seed: int = Field(0, ge=0)
    """Another seed gives other databases, values and questions."""


class DataConfig(Section):
    train_data: tuple[str, ...] = ("data/demo/train.jsonl",)
    """Files of training questions: JSON lines of id, db_id, question, gold_sql, evidence; or SkyRL-SQL's parquet files."""
    val_data: tuple[str, ...] = ("data/demo/heldout.jsonl",)
    """Files of evaluation questions."""
    order: Literal["shuffled", "learnable_first", "easy_first"] = "shuffled"
    """Order of an epoch's questions. Beside shuffled, by the pass rates that the run has measured, from the second epoch on:
    learnable_first begins with those nearest to a half, easy_first with the highest. Each is still asked once an epoch."""
    bad_gold: Literal["drop", "keep"] = "drop"
    """drop: training questions whose gold query fails, is empty, volatile, slow or ambiguous are left out and listed."""
    max_val_questions: int = Field(0, ge=0)
    """Evaluate on a seeded sample of this many; 0 on all."""
    demo: DemoConfig = DemoConfig()


class Config(Section):
    trainer: TrainerConfig = TrainerConfig()
    generator: GeneratorConfig = GeneratorConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    bridge: BridgeConfig = BridgeConfig()
    data: DataConfig = DataConfig()
    sft: SFTConfig = SFTConfig()

    @model_validator(mode="after")
    def _rewards_suit_the_estimator(self) -> Config:
        if self.trainer.algorithm.advantage_estimator == "maxrl" and self.environment.text2sql.malformed_reward < 0:
            raise ValueError(
                "trainer.algorithm.advantage_estimator maxrl divides by the mean reward and needs none below 0: "
                "set environment.text2sql.malformed_reward to 0"
            )
        return self

    @model_validator(mode="after")
    def _right_answers_earn_most(self) -> Config:
        turns, partial = self.generator.max_turns, self.environment.text2sql.partial_reward
        least = 1 - self.trainer.algorithm.turn_penalty * (turns - 1)
        if self.trainer.algorithm.turn_penalty and least <= partial:
            raise ValueError(
                f"trainer.algorithm.turn_penalty = {self.trainer.algorithm.turn_penalty:g} leaves {least:g} of a right "
                f"answer's reward after generator.max_turns = {turns}, no more than a wrong one's {partial:g}: lower it"
            )
        return self

    @model_validator(mode="after")
    def _groups_can_have_spread(self) -> Config:
        if self.trainer.algorithm.dynamic_sampling.type and self.generator.n_samples_per_prompt == 1:
            raise ValueError(
                "trainer.algorithm.dynamic_sampling leaves out questions whose episodes earn the same, which is all of them "
                "with generator.n_samples_per_prompt = 1: ask for more samples or set its type to null"
            )
        return self

    @model_validator(mode="after")
    def _episodes_fit_rows(self) -> Config:
        longest = self.generator.max_input_length + self.generator.sampling_params.max_generate_length
        if self.trainer.policy.row_tokens < longest:
            raise ValueError(
                f"trainer.policy.row_tokens = {self.trainer.policy.row_tokens} cannot hold the longest episode: "
                f"generator.max_input_length + generator.sampling_params.max_generate_length = {longest}"
            )
        return self
