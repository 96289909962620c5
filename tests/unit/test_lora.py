"""Adapters: the arithmetic of the merged weights, nothing else trained, saved or sent, and PEFT's files both ways."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared_programs import shared_programs
from test_learner import MODEL, advantages, assert_same, episodes, fresh, learner, leaves

from sqlrl_jax.checkpoint import CheckpointError, Checkpoints
from sqlrl_jax.checkpoint_model import load_params
from sqlrl_jax.config import LoraConfig, ModelPathConfig, OptimizerConfig
from sqlrl_jax.config_file import load
from sqlrl_jax.export import export_adapter, export_checkpoint
from sqlrl_jax.learner import Learner
from sqlrl_jax.model.decoder import forward
from sqlrl_jax.model.hf import load_hf, save_hf
from sqlrl_jax.model.lora import join, merge, trained_specs
from sqlrl_jax.model.params import Params, flatten, nest, param_specs
from sqlrl_jax.model.peft import from_peft_tensors, load_peft, peft_manifest, save_peft, to_peft_tensors
from sqlrl_jax.model.peft_config import CONFIG, WEIGHTS, adapter_config, read_adapter_config
from sqlrl_jax.model.served import Served
from sqlrl_jax.optimizer import make_optimizer

LORA = LoraConfig(rank=4, alpha=8)
SOME = LoraConfig(rank=4, alpha=8, target_modules=("o_proj", "down_proj"))
SETTINGS = ["trainer.policy.model.lora.rank=4", "trainer.policy.model.lora.alpha=8", "trainer.policy.remat=none"]


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Learners of one configuration share compiled programs."""
    with shared_programs(tmp_path_factory.mktemp("xla")):
        yield


def adapters(lora: LoraConfig = LORA, seed: int = 0, zero_b: bool = False) -> Params:
    """Adapters whose B is not zero, unless asked."""
    rng = np.random.default_rng(seed)
    out = {path: rng.normal(size=spec.shape) * 0.2 for path, spec in trained_specs(MODEL, lora).items()}
    return nest({p: jnp.asarray(v * (not (zero_b and p.endswith("_b"))), jnp.float32) for p, v in out.items()})


@jax.jit
def hidden(params: Params) -> jax.Array:
    tokens = np.random.default_rng(0).integers(0, 64, (2, 12))
    positions = np.tile(np.r_[:7, :5], (2, 1))
    return forward(MODEL, params, tokens, positions, np.tile(np.repeat([7, 12], [7, 5]), (2, 1)))


def loss(params: Params) -> jax.Array:
    return jnp.sin(3 * hidden(params)).sum()


def test_zero_b_is_the_model_itself() -> None:
    base = fresh(0)
    same = hidden(join(base, adapters(SOME, zero_b=True), SOME))
    np.testing.assert_array_equal(same, hidden(base))
    everywhere = hidden(join(base, adapters(zero_b=True), LORA))  # q, k and v are three products then, not one
    np.testing.assert_allclose(everywhere, hidden(base), atol=1e-6)
    assert_same(merge(base, adapters(zero_b=True), LORA), base)


@pytest.mark.parametrize("lora", [LORA, SOME])
def test_merged_weights_compute_the_same(lora: LoraConfig) -> None:
    base, extra = fresh(0), adapters(lora)
    joined, merged = join(base, extra, lora), merge(base, extra, lora)
    np.testing.assert_allclose(hidden(joined), hidden(merged), atol=1e-5)
    assert np.abs(np.array(hidden(joined)) - hidden(base)).max() > 0.1
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    other = merge(base, extra, lora.model_copy(update={"alpha": 2 * lora.alpha}))
    delta = np.array(other["layers"]["o"] - base["layers"]["o"])
    np.testing.assert_allclose(delta, 2 * np.array(merged["layers"]["o"] - base["layers"]["o"]), rtol=1e-3, atol=1e-6)


def test_the_gradient_is_that_of_the_merged_weights() -> None:
    """dA = scale · dW Bᵀ and dB = scale · Aᵀ dW, with dW the gradient of the merged matrix."""
    base, extra = fresh(0), adapters()
    got = flatten(jax.jit(jax.grad(lambda a: loss(join(base, a, LORA))))(extra))
    through = flatten(jax.jit(jax.grad(loss))(merge(base, extra, LORA)))
    flat, scale = flatten(extra), LORA.alpha / LORA.rank
    for path in (p for p in got if p.endswith("_a")):
        matrix = path.removesuffix("_a")
        want_a = scale * jnp.einsum("lio,lro->lir", through[matrix], flat[f"{matrix}_b"])
        want_b = scale * jnp.einsum("lir,lio->lro", flat[path], through[matrix])
        for name, want in ((path, want_a), (f"{matrix}_b", want_b)):
            np.testing.assert_allclose(got[name], want, rtol=1e-3, atol=1e-4 * np.abs(want).max(), err_msg=name)


def test_a_step_changes_adapters_and_nothing_else() -> None:
    subject = learner(*SETTINGS)
    names = {"q", "k", "v", "o", "gate", "up", "down"}
    assert set(flatten(subject.state.params)) == {f"layers.{n}_{x}" for n in names for x in "ab"}
    shapes = {leaf.shape for leaf in jax.tree.leaves(subject.state.opt_state)} - {()}
    assert shapes == {leaf.shape for leaf in jax.tree.leaves(subject.state.params)}
    a = np.array(subject.state.params["layers"]["q_a"])
    bound = MODEL.hidden_size**-0.5
    assert 0.9 * bound < np.abs(a).max() <= bound
    assert abs(a.std() - bound / 3**0.5) < 0.1 * bound  # uniform
    batch = episodes()
    metrics = [subject.update(batch, advantages(batch)) for _ in range(2)]
    assert metrics[1]["policy/loss"] < metrics[0]["policy/loss"]
    assert metrics[0]["policy/compiles"] == metrics[1]["policy/compiles"]
    assert_same(subject._stepper.frozen, fresh(0))
    for name, value in flatten(subject.state.params).items():
        assert np.abs(value).max() > 0, name
    assert np.abs(np.array(subject.state.params["layers"]["q_a"]) - a).max() > 0
    assert subject.trained_count == sum(leaf.size for leaf in jax.tree.leaves(subject.state.params))


def test_adamw_decays_both_factors_and_muon_takes_each_layer_by_itself() -> None:
    specs, start = trained_specs(MODEL, SOME), adapters(SOME)
    zeros = jax.tree.map(jnp.zeros_like, start)
    adamw = make_optimizer(OptimizerConfig(lr=0.1, weight_decay=0.5), specs, 1)
    updates, _ = jax.jit(adamw.update)(zeros, adamw.init(start), start)
    for update, value in zip(leaves(updates), leaves(start), strict=True):
        np.testing.assert_allclose(update, -0.05 * value, rtol=1e-5)
    muon = make_optimizer(OptimizerConfig(name="muon", lr=0.1, weight_decay=0.0), specs, 1)
    updates, _ = jax.jit(muon.update)(adapters(SOME, seed=1), muon.init(start), start)
    for update in leaves(updates):
        for layer in update:
            singular = np.linalg.svd(layer, compute_uv=False)
            assert len(singular) == 4
            assert singular.min() > 0.4 * singular.max()
    assert all(spec.is_matrix for spec in specs.values())


def subject_in(tmp_path: Path, *more: str) -> Learner:
    model = tmp_path / "model"
    if not model.exists():
        save_hf(model, fresh(0), MODEL)
        (model / "tokenizer.json").write_text("{}")
    return learner(f"trainer.policy.model.path={model}", *SETTINGS, *more)


def test_resumed_equals_uninterrupted_and_exports_itself(tmp_path: Path) -> None:
    batch = episodes()
    whole = subject_in(tmp_path)
    whole.update(batch, advantages(batch))
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", 2)
    checkpoints.save(1, whole)
    checkpoints.wait()
    at_one = leaves(whole.params)
    saved = [f for f in (tmp_path / "run" / "checkpoints" / "1").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in saved) < 4 * 6 * whole.trained_count + 60_000  # adapters and moments alone
    whole.update(batch, advantages(batch))

    resumed = subject_in(tmp_path, "trainer.seed=7")
    assert checkpoints.restore_latest(resumed, warn=pytest.fail) == 1
    resumed.update(batch, advantages(batch))
    assert_same(resumed.state, whole.state)
    for change in ("alpha=9", "rank=2", "target_modules=[q_proj]"):
        with pytest.raises(CheckpointError, match=r"has trained adapters of rank 4 and alpha 8 on q_proj, .* now asks"):
            checkpoints.restore_latest(subject_in(tmp_path, f"trainer.policy.model.lora.{change}"), warn=pytest.fail)
    checkpoints.close()

    params, config, _ = load_params(tmp_path / "run")
    for got, want in zip(leaves(params), at_one, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-7)
    export_checkpoint(tmp_path / "run", tmp_path / "merged")
    assert_same(load_hf(tmp_path / "merged", config), params)
    assert "adapter" in str(export_adapter(tmp_path / "run", tmp_path / "adapter"))
    again = merge(load_hf(tmp_path / "model"), load_peft(tmp_path / "adapter", MODEL, LORA), LORA)
    assert_same(again, params)
    more = (f"trainer.policy.model.lora.path={tmp_path / 'adapter'}", "trainer.algorithm.use_kl_loss=true")
    started = subject_in(tmp_path, *more)
    assert_same(started.params, params)
    assert_same(started._reference, params)
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="is not there: say where with --base"):
        export_checkpoint(tmp_path / "run", tmp_path / "other")
    export_checkpoint(tmp_path / "run", tmp_path / "other", base=tmp_path / "moved")


@pytest.mark.parametrize("lora", [LORA, SOME])
def test_peft_folders_come_back(tmp_path: Path, lora: LoraConfig) -> None:
    extra = adapters(lora)
    save_peft(tmp_path / "a", extra, MODEL, lora, tmp_path / "base")
    assert_same(load_peft(tmp_path / "a", MODEL, lora), extra)
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == [CONFIG, WEIGHTS]
    assert read_adapter_config(tmp_path / "a")[1] == tmp_path / "base"
    tensors = to_peft_tensors(extra, MODEL, lora, "bfloat16")
    assert {(s.name, s.shape, s.dtype) for s in peft_manifest(MODEL, lora, "bfloat16")} == {
        (name, value.shape, str(value.dtype)) for name, value in tensors.items()
    }
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    np.testing.assert_array_equal(tensors[name], np.array(extra["layers"]["down_a"][1]).T.astype(tensors[name].dtype))
    assert len(tensors) == 2 * MODEL.num_hidden_layers * len({p[:-2] for p in extra["layers"]})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_serves_the_base_then_what_is_pushed(tmp_path: Path, dtype: str) -> None:
    base = fresh(0)
    save_hf(tmp_path / "model", base, MODEL)
    small = jax.tree.map(lambda x: x * (0.2 if dtype == "float32" else 0.01), adapters())
    model = ModelPathConfig(path=str(tmp_path / "model"), lora=LORA)
    served = Served(model, MODEL, dtype)
    start = hidden(served.start())
    np.testing.assert_allclose(start, hidden(base), atol=1e-6 if dtype == "float32" else 0.1)
    tensors = jax.device_get(to_peft_tensors(small, MODEL, LORA, dtype))
    assert {(s.name, s.shape, s.dtype) for s in served.manifest()} == {
        (name, value.shape, str(value.dtype)) for name, value in tensors.items()
    }
    got, want = hidden(served.params(tensors)), hidden(join(base, small, LORA))
    moved = np.array(want - hidden(base))
    # bfloat16 rounds both sides alike, so what the adapters do is seen far below what it rounds the weights by.
    tolerance = 1e-5 if dtype == "float32" else 0.3 * np.abs(moved).max()
    np.testing.assert_allclose(np.array(got - start), moved, atol=tolerance)
    with pytest.raises(CheckpointError, match="is missing"):
        served.params({})
    save_peft(tmp_path / "a", small, MODEL, LORA, "base")
    lora = LORA.model_copy(update={"path": str(tmp_path / "a")})
    restarted = Served(model.model_copy(update={"lora": lora}), MODEL, dtype)
    np.testing.assert_array_equal(hidden(restarted.start()), got)


REFUSED = [
    ({"peft_type": "LOHA"}, "peft_type = 'LOHA' is not supported"),
    ({"use_dora": True}, "use_dora = True is not supported"),
    ({"use_rslora": True}, "use_rslora"),
    ({"bias": "all"}, "bias = 'all'"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"target_modules": "model.*"}, "target_modules = 'model"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules"),
    ({"r": 0}, "rank 4"),
    ({"r": 8}, "holds adapters of rank 8"),
    ({"r": "many"}, "r = 'many' is not supported"),
    ({"lora_alpha": 16}, "alpha 16"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_other_adapters_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    save_peft(tmp_path / "a", adapters(), MODEL, LORA, "base")
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**adapter_config(LORA, "base"), **change}))
    with pytest.raises(CheckpointError, match=message):
        load_peft(tmp_path / "a", MODEL, LORA)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    tensors = {name: np.array(value) for name, value in to_peft_tensors(adapters(), MODEL, LORA, "float32").items()}
    names = sorted(tensors)
    tensors[names[0]] = tensors[names[0]][:, :-1]
    tensors["more"] = tensors.pop(names[1])
    with pytest.raises(CheckpointError, match=rf"{names[1]} is missing; more is not a tensor .*{names[0]} has shape"):
        from_peft_tensors(tensors, MODEL, LORA, "float32")
    save_peft(tmp_path / "a", adapters(), MODEL, LORA, "base")
    (tmp_path / "a" / WEIGHTS).write_bytes(b"short")
    with pytest.raises(CheckpointError, match="damaged"):
        load_peft(tmp_path / "a", MODEL, LORA)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not an adapter folder"):
        save_peft(tmp_path / "b", adapters(), MODEL, LORA, "base")


def test_settings() -> None:
    key = "trainer.policy.model.lora"
    for given, want in (("all-linear", LORA), ("[o_proj, down_proj]", SOME), ("o_proj", None)):
        lora = load(None, [*SETTINGS, f"{key}.target_modules={given}"]).trainer.policy.model.lora
        paths = {path for path in trained_specs(MODEL, lora)}
        assert paths == set(trained_specs(MODEL, want)) if want else {"layers.o_a", "layers.o_b"}
    for bad, message in (
        ("dropout=0.1", "unknown setting"),
        ("target_modules=[embed_tokens]", "allowed is list of all-linear | q_proj"),
        ("init_method=gaussian", "allowed is kaiming"),
        ("path=somewhere", "give its rank too"),
    ):
        with pytest.raises(Exception, match=message.replace("|", r"\|")):
            load(None, [f"{key}.{bad}"])
    assert trained_specs(MODEL, LoraConfig()) == param_specs(MODEL)
