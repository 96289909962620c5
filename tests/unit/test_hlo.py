"""Reading compiled programs: every way in which HLO writes groups, loops and collectives, and a real program."""

import os
import subprocess
import sys

import pytest

from sqlrl_jax.hlo import groups, parse, summarize

# What TPU programs look like, with short names: a loop without a trip count, a reduction that is only sliced, starts and ends
# of asynchronous collectives, a kernel whose attributes run over several lines, a product whose batch is written as space.
TPU = """\
HloModule jit_step, is_scheduled=true

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[]{:T(256)} parameter(0)
  %y = bf16[]{:T(256)} parameter(1)
  ROOT %sum = bf16[]{:T(256)} add(%x, %y)
}

%all-reduce-scatter.1 (input.1: bf16[64,32]) -> bf16[16,32] {
  %input.1 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%input.1), channel_id=4, replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[]{:T(128)} constant(0)
  ROOT %part = bf16[16,32]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={16,32}
}

%condition (p.1: (s32[], bf16[16,32])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %p.1 = (s32[]{:T(128)}, bf16[16,32]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT, metadata={op_name="cond/lt"}
}

%body (p.2: (s32[], bf16[16,32])) -> (s32[], bf16[16,32]) {
  %p.2 = (s32[]{:T(128)}, bf16[16,32]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %w = bf16[16,32]{1,0:T(8,128)(2,1)} get-tuple-element(%p.2), index=1
  %start = (bf16[16,32]{1,0}, bf16[64,32]{1,0}) all-gather-start(%w), replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, \
dimensions={0}, metadata={op_name="jit(step)/layer"}
  %whole = bf16[64,32]{1,0} all-gather-done(%start)
  %kernel = bf16[64,32]{1,0} custom-call(%whole), custom_call_target="tpu_custom_call", frontend_attributes={metadata={
"block": "{1}"
}}, backend_config={"body":"AAA="}
  %product = f32[4,8,256]{1,2,0:T(8,128)} convolution(%left, %right), window={size=4 stride=3 lhs_dilate=4}, \
dim_labels=0bf_o0i->0bf
  %left = f32[4,8,128]{2,1,0} parameter(1)
  %right = f32[256,4,128]{2,1,0} parameter(2)
  %scattered = bf16[16,32]{1,0} fusion(%kernel), kind=kCustom, calls=%all-reduce-scatter.1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%j, %one)
  ROOT %out = (s32[]{:T(128)}, bf16[16,32]{1,0}) tuple(%next, %scattered)
}

%open_condition (p.3: (s32[], s32[])) -> pred[] {
  %p.3 = (s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %k = s32[]{:T(128)} get-tuple-element(%p.3), index=0
  %n = s32[]{:T(128)} get-tuple-element(%p.3), index=1
  ROOT %lt.2 = pred[]{:T(512)} compare(%k, %n), direction=LT
}

%open_body (p.4: (s32[], s32[])) -> (s32[], s32[]) {
  %p.4 = (s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %f = f32[10]{0} constant({...})
  %send = f32[10]{0} all-reduce(%f), replica_groups={{0,1},{2,3}}, to_apply=%add
  %k.2 = s32[]{:T(128)} get-tuple-element(%p.4), index=0
  ROOT %same = (s32[]{:T(128)}, s32[]{:T(128)}) tuple(%k.2, %k.2)
}

ENTRY %main (a: bf16[16,32], n.1: s32[]) -> bf16[16,32] {
  %a = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(0)
  %n.1 = s32[]{:T(128)} parameter(1)
  %first = s32[]{:T(128)} constant(2)
  %copy = s32[]{:T(128)} copy(%first)
  %carried = (s32[]{:T(128)}, bf16[16,32]{1,0}) tuple(%copy, %a)
  %loop = (s32[]{:T(128)}, bf16[16,32]{1,0}) while(%carried), condition=%condition, body=%body
  %bounds = (s32[]{:T(128)}, s32[]{:T(128)}) tuple(%first, %n.1)
  %head = (s32[]{:T(128)}, s32[]{:T(128)}) while(%bounds), condition=%open_condition, body=%open_body
  %hop = bf16[16,32]{1,0} collective-permute(%a), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  ROOT %result = bf16[16,32]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_without_a_trip_count_runs_from_its_start_to_its_bound():
    summary = summarize(TPU, 4)
    gather = next(c for c in summary.collectives if c.kind == "all-gather")
    assert gather.times == 5  # 2, 3, 4, 5, 6
    assert gather.sent == 5 * 16 * 32 * 2 * 3
    assert gather.source == "jit(step)/layer"
    assert summary.kernels["tpu_custom_call"] == 5


def test_a_reduction_that_is_sliced_at_once_is_scattered():
    scatter = next(c for c in summarize(TPU, 4).collectives if c.kind == "reduce-scatter")
    assert scatter.sent == 5 * 64 * 32 * 2 * 3 / 4


def test_a_loop_of_unknown_length_counts_as_often_as_said():
    for trips in (1, 6):
        summary = summarize(TPU, 4, open_trips=trips)
        assert summary.open_loops == ["head"]
        reduced = next(c for c in summary.collectives if c.kind == "all-reduce")
        assert (reduced.size, reduced.sent) == (2, trips * 40 * 2 * 1 / 2)
    assert summary.sent(2) == reduced.sent
    assert summary.sent() > summary.sent(2)


def test_a_collective_in_pieces_is_sent_once():
    hop = "%hop = bf16[16,32]{1,0} collective-permute(%a), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
    piece = (
        "= bf16[64,32]{1,0} all-gather(%a), channel_id=9, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="
    )
    pieces = [f'{name} {piece}"{chain}"}}' for name, chain in (("%p1", 0), ("%p2", 0), ("%p3", 1))]
    before, after = (summarize(text, 4).sent() for text in (TPU, TPU.replace(hop, "\n  ".join([hop, *pieces]))))
    assert after - before == 2 * 16 * 32 * 2 * 3


def test_a_permutation_sends_what_it_holds():
    hop = next(c for c in summarize(TPU, 4).collectives if c.kind == "collective-permute")
    assert (hop.size, hop.sent) == (4, 16 * 32 * 2)


def test_a_batch_written_as_space_is_not_multiplied_by_it():
    assert summarize(TPU, 4).flops == 5 * 2 * (4 * 8 * 256) * 128


@pytest.mark.parametrize(
    ("window", "labels", "shapes", "flops"),
    [
        ("", "bf_io->bf", ("8,32", "32,16", "8,16"), 2 * 8 * 16 * 32),
        (
            "window={size=7 pad=6_6 rhs_reversal=1}, ",
            "bf0_0oi->b0f",
            ("8,32,1", "7,16,32", "8,7,16"),
            2 * 8 * 7 * 16 * 32,
        ),
        (
            "window={size=4 stride=3 lhs_dilate=4}, ",
            "0bf_o0i->0bf",
            ("4,8,32", "16,4,32", "4,8,16"),
            2 * 4 * 8 * 16 * 32,
        ),
        ("window={size=3}, ", "b0f_0io->b0f", ("2,10,4", "3,4,5", "2,8,5"), 2 * 2 * 8 * 5 * 4 * 3),
        ("window={size=3x1 pad=1_1x0_0}, ", "b01f_01io->b01f", ("1,4,2,4", "3,1,4,5", "1,4,2,5"), 2 * 2 * 5 * 4 * 10),
    ],
)
def test_products_written_as_convolutions(window, labels, shapes, flops):
    left, right, out = shapes
    text = f"""ENTRY %main (a: f32[{left}], b: f32[{right}]) -> f32[{out}] {{
  %a = f32[{left}] parameter(0)
  %b = f32[{right}] parameter(1)
  ROOT %c = f32[{out}] convolution(%a, %b), {window}dim_labels={labels}
}}"""
    assert summarize(text, 1).flops == flops


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[4]", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [(0, 1), (2, 3)]),
        ("replica_groups=mesh['a'=4,'b'=1] {'a','b'}", [(0, 1, 2, 3)]),
        ("source_target_pairs={{0,2},{2,0},{1,3},{3,1}}", [(0, 2), (1, 3)]),
        ("channel_id=1", [(0, 1, 2, 3)]),
    ],
)
def test_groups_in_every_form(written, expected):
    assert groups(f", channel_id=7, {written}, dimensions={{0}}", 4) == expected


def test_what_is_not_hlo_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        parse("module @jit_f { }")


PROGRAM = """
import jax, jax.numpy as jnp
from functools import partial
from jax.sharding import Mesh, PartitionSpec as P, NamedSharding
mesh = jax.make_mesh((2, 4), ("data", "fsdp"))

def layer(x, w):
    x = x @ jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
    part = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=1, tiled=True)
    x = x + jax.lax.all_gather(jax.lax.psum(part, "data"), "fsdp", axis=1, tiled=True)
    x = jax.lax.all_to_all(x.reshape(8, 4, 8), "fsdp", 1, 1).reshape(8, 32)
    return jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]), None

def f(x, w):
    return jax.lax.scan(layer, x, w)[0]

step = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(P(("data", "fsdp")), P(None, "fsdp")), out_specs=P(("data", "fsdp")),
                             check_vma=False))
x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
w = jax.ShapeDtypeStruct((5, 32, 32), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
print(step.lower(x, w).compile().as_text())
"""


def test_a_real_program_of_eight_devices():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    summary = summarize(done.stdout, 8)
    sent: dict[tuple[str, int], float] = {}
    for c in summary.collectives:
        sent[c.kind, c.size] = sent.get((c.kind, c.size), 0) + c.sent
    rows = 8 * 32 * 4  # bytes of a device's activations
    assert sent == {
        ("all-gather", 4): 5 * (3 * 8 * 32 * 4 + 3 * rows / 4),
        ("reduce-scatter", 4): 5 * rows * 3 / 4,
        ("all-reduce", 2): 5 * 2 * rows / 4 / 2,
        ("all-to-all", 4): 5 * rows * 3 / 4,
        ("collective-permute", 4): 5 * rows,
    }
    assert summary.flops == 5 * 2 * 8 * 32 * 32
    assert summary.open_loops == []
