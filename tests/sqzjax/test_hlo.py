# SPDX-License-Identifier: Apache-2.0
"""Reading compiled programs: communication with loop counts, and where instructions came from."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sqzjax.analysis import hlo

# A loop of 12 trips in steps of 2 as the TPU compiler prints it, and the forms of device groups.
PROGRAM = """\
HloModule jit_step

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (p: f32[16,8]) -> f32[4,8] {
  %p = f32[16,8]{1,0} parameter(0)
  %inner = f32[16,8]{1,0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %cut = f32[4,8]{1,0} slice(%inner)
}

%body (carry: (u32[], bf16[8,128])) -> (u32[], bf16[8,128]) {
  %carry = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%carry), index=0
  %data = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i, %two)
  %send = (TILED, TILED, u32[]{:S(2)}, /*index=3*/u32[]{:S(2)}) PERMUTE-start(%data), PAIRS
  %got = bf16[8,128]{1,0:T(8,128)(2,1)} collective-permute-done(%send)
  ROOT %out = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%next, %got)
}

%condition (carry.1: (u32[], bf16[8,128])) -> pred[] {
  %carry.1 = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %limit = u32[]{:T(128)} constant(12)
  %now = u32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %more = pred[]{:T(512)} compare(%now, %limit), direction=LT
}

ENTRY %main (a: bf16[8,128], w: f32[16,8]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0), metadata={op_name="params[\\'head\\'][\\'kernel\\']"}
  %w = f32[16,8]{1,0} parameter(1)
  %zero = u32[] constant(0)
  %start = (u32[], bf16[8,128]{1,0}) tuple(%zero, %a)
  %loop = (u32[], bf16[8,128]{1,0}) while(%start), condition=%condition, body=%body
  %all = bf16[32,128]{1,0} all-gather(%a), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %one = f32[16,8]{1,0} all-reduce(%w), replica_groups=MESH {'data'}, to_apply=%add
  %part = f32[4,8]{1,0} fusion(%one), kind=kCustom, calls=%all-reduce-scatter.1
  %alone = f32[16,8]{1,0} all-reduce(%w), replica_groups={{0},{1}}, to_apply=%add
  ROOT %done = bf16[8,128]{1,0} get-tuple-element(%loop), index=1
}
"""


for _short, _long in (
    ("TILED", "bf16[8,128]{1,0:T(8,128)(2,1)}"),
    ("PERMUTE", "collective-permute"),
    ("PAIRS", "source_target_pairs={{0,1},{1,0}}"),
    ("MESH", "mesh['data'=2,'tensor'=4]"),
):
    PROGRAM = PROGRAM.replace(_short, _long)


def by_kind(text):
    return {step.kind: step for step in hlo.parse(text).collectives()}


def test_communication_is_counted_with_its_loops():
    steps = by_kind(PROGRAM)
    permute = steps["collective-permute"]
    assert (permute.count, permute.result_bytes, permute.sent_bytes) == (6, 2048, 2048)
    assert permute.group == (0, 1)


def test_ring_bytes_and_groups():
    steps = by_kind(PROGRAM)
    gather, reduce, scatter = (steps[k] for k in ("all-gather", "all-reduce", "reduce-scatter"))
    assert gather.group == (0, 2, 4, 6) and gather.sent_bytes == 32 * 128 * 2 * 3 / 4
    assert reduce.group == (0, 4) and reduce.sent_bytes == 2 * 512 / 2
    # A fused reduce-scatter is printed as an all-reduce followed by a slice.
    assert scatter.group == (0, 1, 2, 3)
    assert (scatter.result_bytes, scatter.sent_bytes) == (128, 512 * 3 / 4)
    assert reduce.count == 1  # the one over single devices moves nothing


def test_unreadable_loops_are_named():
    text = PROGRAM.replace("direction=LT", "direction=NE")
    module = hlo.parse(text)
    steps = {step.kind: step for step in module.collectives()}
    assert steps["collective-permute"].count == 1 and module.unknown_loops == ["loop"]
    assert hlo.parse(PROGRAM).unknown_loops == []


def test_scopes_fall_back_on_the_argument_that_is_read():
    names = hlo.parse(PROGRAM).op_names()
    assert names["all"] == names["send"] == "/params/head/kernel/"
    assert names["next"] == ""


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [("f32[3,5]{1,0}", [60]), ("(s4[3], /*index=1*/pred[2])", [2, 2]), ("bf16[]", [2])],
)
def test_shape_bytes(shape, sizes):
    assert hlo.shape_bytes(shape) == sizes


def test_a_program_compiled_here():
    """The text of this jax version: a product split over four devices inside a loop of five."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    split = NamedSharding(mesh, PartitionSpec(None, "x"))

    def step(x, w):
        with jax.named_scope("ours"):
            return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=5)[0]

    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=split)
    w = jax.ShapeDtypeStruct(
        (64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("x", None))
    )
    compiled = jax.jit(step, out_shardings=split).lower(x, w).compile()
    module = hlo.parse(compiled.as_text())
    steps = module.collectives()
    assert sum(step.count for step in steps if step.kind != "collective-permute") >= 5
    assert all(step.group == (0, 1, 2, 3) for step in steps if step.kind == "all-reduce")
    assert any("ours" in name for name in module.op_names().values())
