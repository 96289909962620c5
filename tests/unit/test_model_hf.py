"""Checkpoint folders: what is written is read back, and everything that does not fit is named."""

import dataclasses
import json
import resource
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rollout.types import TensorSpec
from sqlrl_jax.config import MeshConfig
from sqlrl_jax.export import import_model
from sqlrl_jax.mesh import make_mesh
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf import CheckpointError, from_hf_tensors, hf_manifest, load_hf, save_hf, to_hf_tensors
from sqlrl_jax.model.hf_files import Crew, plan_shards, write_checkpoint
from sqlrl_jax.model.params import flatten, nest, param_specs, parameter_count

TIED = ModelConfig("qwen2", 61, 32, 48, 2, 4, 2, 8, attention_bias=True, tie_word_embeddings=True)
FREE = ModelConfig("qwen3", 61, 32, 48, 2, 4, 2, 16, qk_norm=True, eos_token_ids=(3, 4))
LLAMA = ModelConfig("llama", 61, 32, 48, 2, 4, 1, 8)
FAMILIES = pytest.mark.parametrize("config", [TIED, FREE, LLAMA], ids=["qwen2", "qwen3", "llama"])


def params_of(config: ModelConfig, seed: int) -> dict:
    """Random parameters; numpy's, because compiling a generator for each shape takes seconds."""
    rng = np.random.default_rng(seed)
    return nest({p: jnp.asarray(rng.normal(size=s.shape), jnp.float32) for p, s in param_specs(config).items()})


def assert_same(left: dict, right: dict) -> None:
    left, right = flatten(left), flatten(right)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(np.asarray(left[name]), np.asarray(right[name]), err_msg=name)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_hf(tmp_path / "model", params_of(TIED, 0), TIED)
    return tmp_path / "model"


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@FAMILIES
def test_folder_and_back(config: ModelConfig, tmp_path: Path) -> None:
    params = params_of(config, 0)
    save_hf(tmp_path / "out", params, config)
    assert ModelConfig.from_dir(tmp_path / "out") == config
    assert_same(load_hf(tmp_path / "out"), params)
    assert_same(load_hf(tmp_path / "out", mesh=make_mesh(MeshConfig(), jax.devices()[:1])), params)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("model.layers.1.mlp.down_proj.weight").shape == (32, 48)


@FAMILIES
def test_tensors_follow_the_manifest_and_come_back(config: ModelConfig) -> None:
    params = params_of(config, 0)
    tensors = jax.jit(lambda p: to_hf_tensors(p, config, "bfloat16"))(params)
    for spec in hf_manifest(config, "bfloat16"):
        assert (tensors[spec.name].shape, str(tensors[spec.name].dtype)) == (spec.shape, spec.dtype)
    assert len(tensors) == len(hf_manifest(config, "bfloat16"))
    assert sum(t.size for t in tensors.values()) == parameter_count(config)
    as_numpy = {name: np.asarray(value) for name, value in tensors.items()}
    expected = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert_same(from_hf_tensors(as_numpy, config, "float32"), expected)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        from_hf_tensors({n: v for n, v in as_numpy.items() if n != "model.norm.weight"}, config, "float32")


def test_bfloat16_folder(tmp_path: Path) -> None:
    params = params_of(FREE, 0)
    save_hf(tmp_path / "out", params, FREE, "bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same(load_hf(tmp_path / "out", dtype="bfloat16"), jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))


def test_shards_with_an_index(tmp_path: Path) -> None:
    params = params_of(LLAMA, 0)
    # any memory order must be written in rows
    tensors = {n: np.asfortranarray(t) for n, t in to_hf_tensors(params, LLAMA, "float32").items()}
    manifest = hf_manifest(LLAMA, "float32")
    write_checkpoint(tmp_path / "out", manifest, lambda s: tensors[s.name], LLAMA.to_hf(), None, shard_bytes=20_000)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) == len(plan_shards(manifest, 20_000)) > 2
    assert all((tmp_path / "out" / f).stat().st_size < 24_000 for f in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {s.name for s in manifest}
    assert index["metadata"]["total_size"] == 4 * parameter_count(LLAMA)
    assert_same(load_hf(tmp_path / "out"), params)
    (tmp_path / "out" / files[1]).unlink()
    with pytest.raises(CheckpointError, match=files[1]):
        load_hf(tmp_path / "out")


def test_neither_reading_nor_writing_holds_the_model(tmp_path: Path) -> None:
    """55 MB of weights, the widest stack of layers 17 MB, the largest tensor 1 MB: pieces of 2 MB go through the host."""
    config = ModelConfig("llama", 512, 256, 1024, 16, 4, 4, 64)
    params = params_of(config, 0)
    total = 4 * parameter_count(config)
    tracemalloc.start()
    save_hf(tmp_path / "out", params, config, shard_bytes=20_000_000)
    _, saving = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    back = load_hf(tmp_path / "out", config, piece_bytes=2_000_000)
    _, loading = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert_same(back, params)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert saving < total / 10
    assert loading < total / 10


def test_an_export_has_the_dtype_of_the_model_it_came_from(tmp_path: Path) -> None:
    config = dataclasses.replace(TIED, dtype="bfloat16")
    save_hf(tmp_path / "out", params_of(TIED, 0), config)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="np") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert ModelConfig.from_dir(tmp_path / "out").dtype == "bfloat16"


def test_a_disk_that_fills_leaves_the_export_before(saved: Path) -> None:
    before = (saved / "model.safetensors").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(CheckpointError, match=r"model could not be written: .*File too large"):
            save_hf(saved, params_of(TIED, 1), TIED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (saved / "model.safetensors").read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_crew_writes_the_same_bytes_as_one(count: int, tmp_path: Path) -> None:
    """Threads in place of processes: each goes through all tensors in one order and writes the files that are its own."""
    tensors = {n: np.asarray(t) for n, t in to_hf_tensors(params_of(FREE, 0), FREE, "float32").items()}
    manifest = hf_manifest(FREE, "float32")
    write_checkpoint(tmp_path / "one", manifest, lambda s: tensors[s.name], FREE.to_hf(), None, shard_bytes=9_000)
    orders: list[list[str]] = [[] for _ in range(count)]
    texts, barrier = [""] * count, threading.Barrier(count, timeout=60)

    def member(index: int) -> None:
        def exchange(text: str) -> list[str]:
            texts[index] = text
            barrier.wait()
            told = list(texts)
            barrier.wait()
            return told

        def produce(spec: TensorSpec) -> np.ndarray:
            orders[index].append(spec.name)
            return tensors[spec.name]

        crew = Crew(index, count, exchange)
        write_checkpoint(tmp_path / "crew", manifest, produce, FREE.to_hf(), None, shard_bytes=9_000, crew=crew)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(member, range(count)))
    assert all(order == orders[0] for order in orders)
    assert sorted(orders[0]) == sorted(tensors)
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert sorted(p.name for p in (tmp_path / "crew").iterdir()) == names
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "crew" / n).read_bytes() for n in names)
    assert len(names) > 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight is missing"),
        (lambda t: t.update(extra=np.zeros(2, np.float32)), "extra is not a tensor of this model"),
        (
            lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": np.zeros((32, 16), np.float32)}),
            r"k_proj\.weight has shape \(32, 16\), config.json asks for \(16, 32\)",
        ),
        (lambda t: t.update({"model.norm.weight": np.zeros(32, np.int8)}), r"model\.norm\.weight has type I8"),
        (lambda t: t.update({"lm_head.weight": np.zeros((61, 32), np.float32)}), "tie_word_embeddings"),
    ],
)
def test_what_does_not_fit_is_named(saved: Path, change, message: str) -> None:
    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=message):
        load_hf(saved)


def test_leftovers_of_other_programs_are_harmless(saved: Path) -> None:
    expected = load_hf(saved)

    def change(tensors: dict) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    rewrite(saved, change)
    assert_same(load_hf(saved), expected)


@pytest.mark.parametrize("keep", [4, 200, -100])
def test_a_damaged_file_is_named(saved: Path, keep: int) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_hf(saved)


def test_no_weights_no_folder_or_a_pickle(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_hf(tmp_path / "nowhere", TIED)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="pickle"):
        load_hf(tmp_path, TIED)


def test_export_replaces_a_checkpoint_and_nothing_else(saved: Path, tmp_path: Path) -> None:
    save_hf(saved, params_of(TIED, 1), TIED)
    assert_same(load_hf(saved), params_of(TIED, 1))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not a checkpoint folder"):
        save_hf(tmp_path / "notes", params_of(TIED, 0), TIED)
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"


def test_a_failed_export_leaves_nothing(saved: Path, tmp_path: Path) -> None:
    before = (saved / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        save_hf(saved, params_of(TIED, 1), TIED, tokenizer_source=tmp_path / "empty")
    assert (saved / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_import_checks_and_carries_the_tokenizer(saved: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "optimizer.pt"):
        (saved / name).write_text(name)
    rewrite(saved, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    report = import_model(saved, tmp_path / "ours")
    assert (report.parameters, report.model_type, report.dtype) == (parameter_count(TIED), "qwen2", "float32")
    assert_same(load_hf(tmp_path / "ours"), load_hf(saved))
    names = {p.name for p in (tmp_path / "ours").iterdir()}
    assert names == {
        *("config.json", "model.safetensors"),
        *("tokenizer.json", "chat_template.jinja", "generation_config.json"),
    }
    assert import_model(saved, tmp_path / "half", "bfloat16").dtype == "bfloat16"
    with pytest.raises(CheckpointError, match="another folder"):
        import_model(saved, saved)
