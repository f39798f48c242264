"""Test how collectives are read from a program's text: lines as compilers write them, and a program of our own."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffdis_jax.preflight import chips, hlo, times
from tests import steps


@pytest.mark.parametrize(
  "line, kind, shapes, size",
  [
    ("%g = bf16[64,768]{1,0:T(8,128)(2,1)} all-gather(%a)", "all-gather", ((64, 768),), 2 * 64 * 768),
    ("%r = (f32[3,8]{1,0}, /*index=1*/bf16[4]{0:T(1024)(128)}) all-reduce(%a, %b)", "all-reduce", ((3, 8), (4,)), 104),
    ("ROOT %s = f32[2,8]{1,0} reduce-scatter(%a)", "reduce-scatter", ((2, 8),), 64),
    ("%g = (f32[2,8], f32[8,8]) all-gather-start(%a)", "all-gather", ((8, 8),), 256),
    ("%p = (u32[4], u32[4], u32[], u32[]) collective-permute-start(%a)", "collective-permute", ((4,),), 16),
    ("%r = f32[] all-reduce-start(%a)", "all-reduce", ((),), 4),
    ("%t = pred[16]{0} all-to-all(%a)", "all-to-all", ((16,),), 16),
    # XLA for GPUs writes asynchronous ones as (operands, results), but an all-reduce with the results alone.
    ("%s = ((f32[1024]{0}), f32[128]{0}) reduce-scatter-start(f32[1024]{0} %p)", "reduce-scatter", ((128,),), 512),
    ("%s = (f32[1024], f32[128]) reduce-scatter-start(f32[1024] %p)", "reduce-scatter", ((128,),), 512),
    ("%t = ((f32[4,8]{1,0}), f32[4,8]{1,0}, u32[], u32[]) all-to-all-start(%p)", "all-to-all", ((4, 8),), 128),
    ("%t = ((f32[1,8], f32[1,8]), (f32[1,8], f32[1,8])) all-to-all-start(%p, %q)", "all-to-all", ((1, 8), (1, 8)), 64),
    ("%r = (f32[1024]{0}, bf16[64]{0}) all-reduce-start(%p, %q)", "all-reduce", ((1024,), (64,)), 4 * 1024 + 128),
  ],
)
def test_one_collective(line, kind, shapes, size):
  (collective,) = hlo.collectives(f"ENTRY %main {{\n  {line}, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}\n}}")
  assert collective == hlo.Collective(kind=kind, shapes=shapes, bytes=size, group=(0, 1, 2, 3))


def test_a_reduce_scatter_of_the_tpu_compiler_ends_with_its_computation():
  text = """
%all-reduce-scatter.1 (input: f32[8,8]) -> f32[2,8] {
  %r = f32[8,8] all-reduce(%input), channel_id=1
}

ENTRY %main.2 (p: f32[8,8]) -> f32[8,8] {
  %s = f32[2,8] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %g = f32[8,8] all-gather(%s), channel_id=2
}
"""
  assert hlo.bytes_by_kind(text) == {"reduce-scatter": 4 * 16, "all-gather": 4 * 64}


def test_a_computation_of_another_thread_ends_too():
  """XLA closes a computation on a SparseCore like this; what follows is not in the loop before it."""
  text = """
%body (p: f32[8]) -> f32[8] {
  %r = f32[8] all-reduce(%p), channel_id=1
}, execution_thread="sparsecore"

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = f32[8] while(%p), condition=%until, body=%body, backend_config={"known_trip_count":{"n":"6"}}
  %g = f32[64] all-gather(%w), channel_id=2
}
"""
  assert hlo.bytes_by_kind(text) == {"all-reduce": 6 * 32, "all-gather": 256}


def test_a_collective_spread_over_several_operations_counts_once():
  """The TPU compiler writes the collective in each operation that it overlaps, with the same channel."""
  part = "bf16[64,8] all-gather(%a), channel_id={}, replica_groups={{{{0,1}}}}, {}metadata={{}}"
  spread = 'frontend_attributes={chain_id="2"}, '
  lines = [part.format(*fields) for fields in ((7, spread), (7, spread), (8, spread), (9, ""), (9, ""))]
  text = "".join(f"%fused.{i} (a: bf16[32,8]) -> bf16[64,8] {{\n  %g = {line}\n}}\n" for i, line in enumerate(lines))
  assert hlo.bytes_by_kind(text) == {"all-gather": (1 + 1 + 2) * 2 * 64 * 8}


def test_estimated_cycles():
  line = '  %f = f32[8] fusion(%a), kind=kLoop, backend_config={{"estimated_cycles":"{}","flag_configs":[]}}'
  assert hlo.estimated_cycles("\n".join(line.format(cycles) for cycles in (1200, 34))) == 1234
  assert hlo.estimated_cycles("  %f = f32[8] add(%a, %b)") == 0


def test_cycles_of_a_loop_count_as_often_as_it_turns():
  """This also holds in a loop that XLA made itself, which no trace shows."""
  noted = ', backend_config={"estimated_cycles":"CYCLES"}'
  lines = {"%r": "1000", "%g": "20", "%d": "3"}  # in body, called computation, program
  text = CALLS.replace("LOOP", "%less, body=%body").replace("s32[]", "u32[]")
  for name, cycles in lines.items():
    text = re.sub(rf"(  {name} = .*)", rf"\1{noted.replace('CYCLES', cycles)}", text)
  assert hlo.estimated_cycles(text) == 7 * 1000 + 20 + 3
  assert hlo.estimated_cycles(text, turns=False) == 1023


@pytest.mark.parametrize(
  "line",
  ["%d = f32[8,8] all-gather-done(%g)", "%f = f32[8] fusion(%all-reduce.1), calls=%x", "%a = f32[8] add(%a, %b)"],
)
def test_no_collective(line):
  assert not hlo.collectives(line)


def test_bytes_of_a_compiled_program():
  mesh = steps.make_mesh(8)
  split, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
  x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
  compiled = lambda f, out: jax.jit(f, in_shardings=split, out_shardings=out).lower(x).compile().as_text()
  assert hlo.bytes_by_kind(compiled(lambda x: x + 1, replicated)) == {"all-gather": 4 * 64 * 32}
  assert hlo.bytes_by_kind(compiled(lambda x: x.sum(axis=0), replicated)) == {"all-reduce": 4 * 32}
  assert hlo.bytes_by_kind(compiled(lambda x: x + 1, split)) == {}


def test_a_collective_in_a_loop_counts_as_often_as_the_loop_turns():
  """Five turns, with an inner loop of three turns each, have 15 sums and 5 gathers; one sum follows them."""
  mesh, rows = steps.make_mesh(8), PartitionSpec("data")

  def inner(c, _):
    return jnp.sin(jax.lax.psum(c, "data")) + c, None

  def outer(c, _):
    return jax.lax.all_gather(jax.lax.scan(inner, c, length=3)[0], "data").mean(axis=0) * c, None

  f = lambda x: jax.lax.psum(jax.lax.scan(outer, x, length=5)[0].sum(), "data") + x
  x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, rows))
  text = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=rows, out_specs=rows)).lower(x).compile().as_text()
  own = 4 * 8 * 32  # bytes of a device's rows
  assert hlo.bytes_by_kind(text) == {"all-reduce": 15 * own + 4, "all-gather": 5 * 8 * own}
  turns = sorted((collective.kind, collective.times) for collective in hlo.collectives(text))
  assert turns == [("all-gather", 5), ("all-reduce", 1), ("all-reduce", 15)]
  chip = chips.CHIPS["h100"]
  moved = (15 * own + 4) * 2 * 7 / 8 + 5 * 8 * own * 7 / 8
  assert times.traffic(text, near=8).seconds(chip) == pytest.approx(moved / chip.links)


CALLS = """
%less (p: f32[8]) -> pred[] {
  %n = s32[]{:T(128)} constant(7), metadata={}
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%until (p: f32[8]) -> pred[] {
  ROOT %eq = pred[] compare(%i, %n), direction=EQ
}

%body (p: f32[8]) -> f32[8] {
  %r = f32[8] all-reduce(%p), channel_id=1
}

%wrapped (p: f32[8]) -> f32[64] {
  %g = f32[64] all-gather(%p), channel_id=2
}

%branch (p: f32[8]) -> f32[8] {
  %t = f32[8] all-to-all(%p), channel_id=3
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = f32[8] while(%p), condition=LOOP
  %a = (f32[8], f32[64]) async-start(%w), calls=%wrapped
  %d = f32[64] async-done(%a), calls=%wrapped
  %c = f32[8] conditional(%i, %p, %p), branch_computations={%branch, %other}
}
"""


@pytest.mark.parametrize(
  "loop, turns",
  [
    ('%until, body=%body, backend_config={"known_trip_count":{"n":"6"}}', 6),
    ("%less, body=%body", 7),  # as the TPU compiler writes it
    ("%until, body=%body", 1),
  ],
)
def test_calls_of_other_kinds_count_once_and_so_does_a_loop_of_unknown_turns(loop, turns):
  expected = {"all-reduce": turns * 32, "all-gather": 256, "all-to-all": 32}
  text = CALLS.replace("LOOP", loop)
  assert hlo.bytes_by_kind(text) == expected
  # XLA's own loops, of products beside an exchange, look like this.
  assert hlo.bytes_by_kind(text.replace("s32[]", "u32[]")) == expected


@pytest.mark.parametrize(
  "groups, expected",
  [
    ("replica_groups={{0,2},{1,3}}", (0, 2)),
    ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
    ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", (0, 1, 4, 5)),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=3] {'axis_0'}", (0, 3)),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=3,'axis_2'=2] {'axis_0','axis_2'}", (0, 1, 6, 7)),
    # XLA for GPUs on several hosts writes devices in an order of its own, and parts of an axis.
    ("replica_groups=mesh['axis_0'=8,'axis_1'=1,'axis_2'=2], device_ids=([2,8]T(1,0)) {'axis_2'}", (0, 8)),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=(0,3,1,2) {'axis_1'}", (0, 3)),
    ("replica_groups=mesh['axis_0'=8,'axis_1'=3] {'axis_0':(2)2}", (0, 6)),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0':(1)2,'axis_1'}", (0, 1, 4, 5)),
    ("replica_groups={}", ()),
  ],
)
def test_groups(groups, expected):
  (collective,) = hlo.collectives(f"  %g = f32[8] all-gather(%a), channel_id=1, {groups}, dimensions={{0}}")
  assert collective.group == expected


def test_a_group_that_is_written_in_another_way_is_not_passed_over_in_silence(caplog):
  hlo.collectives("  %g = f32[8] all-gather(%a), channel_id=1, replica_groups=<ring 8>, dimensions={0}")
  assert "replica_groups=<ring 8>" in caplog.text


def test_bytes_that_reach_a_device():
  """A result has 400 bytes on each of four devices, and a device already has its own part."""
  received = {
    "all-gather": 300,
    "reduce-scatter": 1200,
    "all-reduce": 600,
    "all-to-all": 300,
    "collective-permute": 400,
  }
  of_kind = lambda kind: hlo.Collective(kind=kind, shapes=((100,),), bytes=400, group=(0, 1, 2, 3)).received
  assert {kind: of_kind(kind) for kind in received} == received


COST = (
  '{"custom_call_config":{"body":"A=","cost_estimate":{"flops":"7000","transcendentals":"50","bytes_accessed":"64"}}}'
)


def test_kernels_declare_their_cost():
  call = '  %k.1 = f32[8]{0} custom-call(%one), custom_call_target="tpu_custom_call", backend_config=COST\n'
  kernel = hlo.kernels(f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{call.replace('COST', COST)}}}")["k.1"]
  assert (kernel.flops, kernel.transcendentals, kernel.bytes) == (7000, 50, 64)


def test_kernels_of_a_loop_are_alike_too_and_run_as_often_as_it_turns():
  """In sampling the network is the loop's body: several layers call one kernel, and one of the calls has a schedule."""
  call = '  %{} = f32[8]{{0}} custom-call(%{}), custom_call_target="tpu_custom_call", backend_config={}\n'
  calls = (call.format(*names, COST) for names in (("k.4", "p"), ("k.5", "k.4"), ("k.6", "k.5")))
  body = "  %p = f32[8]{0} parameter(0)\n" + "".join(calls)
  text = CALLS.replace("LOOP", "%less, body=%body").replace("  %r =", f"{body}  %r =")
  text = text.replace("  %a =", f"{call.format('k.7', 'w', COST)}  %a =")
  assert {name: kernel.times for name, kernel in hlo.kernels(text).items()} == {"k.4": 7, "k.5": 7, "k.6": 7, "k.7": 1}
  chip = chips.CHIPS["v5p"]
  assert times.seconds_in_kernels(text, {"k.5": 50}, chip) == pytest.approx((3 * 7 + 1) * 50 / chip.clock)
