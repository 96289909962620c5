"""The arithmetic of a step's cost, against published sizes, against counting, and against the shardings themselves."""

import json
import math
from functools import partial
from typing import Any

import jax
import pytest
import tiny_model
from jax.extend.core import Var, jaxprs_in_params
from jax.sharding import AbstractMesh, NamedSharding

from sqlrl_jax.check import PUBLISHED, find_model
from sqlrl_jax.config import Config
from sqlrl_jax.config_file import load
from sqlrl_jax.cost import Cost, Episodes
from sqlrl_jax.learner import make_program
from sqlrl_jax.mesh import AXES, make_mesh, partition_spec
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.params import param_specs

ONE = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
SMALL = ("generator.max_input_length=100", "generator.sampling_params.max_generate_length=28")
ROWS = ("trainer.policy.row_tokens=128", "trainer.policy.rows_per_micro_batch=2", "trainer.policy.logprob_chunk=64")


def config(*settings: str) -> Config:
    return load(None, [*SMALL, *ROWS, *settings])


def seven(sizes: dict[str, int], *settings: str, tokens: int = 32768) -> Cost:
    rows = f"trainer.policy.rows_per_micro_batch={sizes['data'] * sizes['fsdp']}"
    given = load(None, ["trainer.policy.compute_dtype=bfloat16", rows, *settings])
    return Cost(given, find_model(given, "qwen2.5-coder-7b")[1], sizes, Episodes(tokens, 0.25))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2.5-coder-1.5b", 1_543_714_304),
        ("qwen2.5-coder-7b", 7_615_616_512),
        ("qwen2.5-coder-32b", 32_763_876_352),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-32b", 32_762_123_264),
    ],
)
def test_published_models_have_the_published_number_of_parameters(name, parameters):
    model = ModelConfig.from_hf(json.loads((PUBLISHED / f"{name}.json").read_text()))
    assert Cost(config(), model, ONE, Episodes(100, 0.5)).parameters == parameters


def products(jaxpr: Any, trips: int, batched: bool) -> float:
    """FLOPs of the matrix products of a jaxpr whose results are used, those with or those without a batch dimension;
    `while` runs `trips` times."""
    total, used = 0.0, {v for v in jaxpr.outvars if isinstance(v, Var)}
    for equation in reversed(jaxpr.eqns):
        if not used & set(equation.outvars):
            continue  # the compiler drops it
        used |= {v for v in equation.invars if isinstance(v, Var)}
        if equation.primitive.name == "dot_general":
            (contracted, _), (batch, _) = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            sums = min(v.aval.ndim for v in (*equation.invars, *equation.outvars)) < 2  # as products with a vector
            if bool(batch) == batched and not sums:
                total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        times = {"scan": equation.params.get("length", 1), "while": trips}.get(equation.primitive.name, 1)
        for inner in jaxprs_in_params(equation.params):
            total += times * products(inner, trips, batched)
    return total


@pytest.mark.parametrize("remat", ["none", "attention", "full"])
@pytest.mark.parametrize("rank", [0, 4])
def test_flops_with_weights_are_those_of_the_traced_step(remat, rank):
    given = config(f"trainer.policy.remat={remat}", f"trainer.policy.model.lora.rank={rank}")
    model = tiny_model.model_config(320)
    program = make_program(given, make_mesh(given.trainer.mesh, jax.devices()[:1]), model)
    state, frozen, batch = program.abstract_state(), program.abstract_frozen(), program.abstract_batches()
    gradients, sums = jax.eval_shape(program.zeros, state.params, frozen, batch)
    traced = program.add.trace(gradients, sums, state.params, frozen, batch, 1).jaxpr.jaxpr
    cost = Cost(given, model, ONE, Episodes(128, 0.5))
    chosen = int(cost.tokens * 0.5)
    # Traced, the head's gradient is summed in a loop even where the head is frozen; the compiler drops that too.
    unused = 2.0 * model.hidden_size * model.vocab_size * chosen if rank else 0.0
    assert products(traced, chosen // 64, batched=False) == pytest.approx(cost.flops().matrices + unused, rel=0.001)


def test_full_remat_of_the_7b_model_is_within_the_waste_allowed():
    flops = seven({**ONE, "fsdp": 4}).flops()
    assert 1.1 < flops.matrices / flops.six_n <= 1.35
    assert flops.six_n == 6 * (7_615_616_512 - 152064 * 3584 - 57 * 3584 - 28 * 4608) * 4 * 32768
    assert flops.spent > flops.needed > 0


def test_shorter_episodes_need_less_attention_and_spend_as_much():
    long, short = (seven({**ONE, "fsdp": 4}, tokens=n).flops() for n in (32768, 1024))
    assert short.needed < long.needed
    assert short.attention == long.attention


def test_weights_of_a_device_are_what_the_shardings_say():
    sizes = {"data": 1, "fsdp": 4, "sequence": 1, "tensor": 2}
    cost = seven(sizes)
    mesh = AbstractMesh(tuple(sizes[a] for a in AXES), AXES)
    spec_of = partial(partition_spec, mesh)
    held = sum(
        math.prod(NamedSharding(mesh, spec_of(s.axes, s.units)).shard_shape(s.shape))
        for s in param_specs(cost.model).values()
    )
    memory = cost.memory()
    assert memory.weights == 4 * held
    assert memory.optimizer == 8 * held
    assert memory.gradients == 4 * held


def test_adapters_leave_optimizer_and_gradients_small():
    whole, adapters = seven(ONE).memory(), seven(ONE, "trainer.policy.model.lora.rank=32").memory()
    assert adapters.weights < 0.6 * whole.weights  # bfloat16, and float32 adapters
    assert adapters.optimizer < 0.02 * whole.optimizer
    assert adapters.gradients < 0.02 * whole.gradients


def test_moments_in_host_memory_are_not_counted():
    assert seven(ONE, "trainer.policy.offload_optimizer=true").memory().optimizer == 0


def test_a_critic_is_a_second_trained_model_without_a_head():
    gae = "trainer.algorithm.advantage_estimator=gae"
    assert seven(ONE).memory().critic == 0
    head, vector = 3584 * 152_064, 3584
    assert seven(ONE, gae).memory().critic == 4 * 3 * (7_615_616_512 - head + vector)
    assert (
        seven(ONE, gae, "trainer.policy.offload_optimizer=true").memory().critic * 3 == seven(ONE, gae).memory().critic
    )


def test_only_a_reference_of_its_own_takes_memory():
    kl = "trainer.algorithm.use_kl_loss=true"
    assert seven(ONE).memory().reference == 0
    assert seven(ONE, kl).memory().reference == 2 * 7_615_616_512
    assert seven(ONE, kl, "trainer.policy.model.lora.rank=8").memory().reference == 0


def test_the_least_to_send_over_fsdp_is_three_times_the_weights():
    cost = seven({**ONE, "fsdp": 4})
    ideal = cost.ideal_sent()
    embedding = 152064 * 3584
    weights = 3 * 2 * (7_615_616_512 - embedding - 57 * 3584 - 28 * 4608) * 3 / 4
    looked_up = 2 * 2 * 32768 * 3584 * 3 / 4
    assert ideal["fsdp"] == pytest.approx(weights + looked_up, rel=1e-6)
    assert ideal["tensor"] == ideal["data"] == ideal["sequence"] == 0


def test_adapters_save_the_sum_of_gradients():
    whole, adapters = (seven({**ONE, "fsdp": 4}, f"trainer.policy.model.lora.rank={r}").ideal_sent() for r in (0, 8))
    assert adapters["fsdp"] < 0.7 * whole["fsdp"]


def test_every_axis_sends_something():
    ideal = seven({"data": 2, "fsdp": 2, "sequence": 2, "tensor": 2}).ideal_sent()
    assert {axis for axes, sent in ideal.items() if sent > 0 for axis in axes.split("+")} == set(AXES)


def test_long_rows_on_more_devices_take_less_of_each():
    short, long = (seven({**ONE, "fsdp": 8 // n, "sequence": n}).memory() for n in (1, 4))
    assert long.weights == short.weights  # split over the sequence axis too
    assert long.saved == short.saved / 4


def test_a_step_reads_every_episode():
    step = seven({**ONE, "fsdp": 4}, tokens=8000).step()
    assert step.episodes == 256 * 5
    assert step.tokens == 256 * 5 * 8000
    assert step.micro_batches == 256 * 5 / 4 / 4  # four episodes a row, four rows a micro-batch
    assert step.optimizer_steps == 1


def test_a_kl_term_adds_forward_passes():
    plain, kl = (seven(ONE, f"trainer.algorithm.use_kl_loss={flag}").step().flops for flag in ("false", "true"))
    assert kl > 1.1 * plain
