"""Test the command preflight, also without libtpu, and its parts."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import SingleDeviceSharding

from diffdis_jax.config import Run
from diffdis_jax.errors import UserError
from diffdis_jax.models import attention
from diffdis_jax.preflight import __main__ as preflight
from diffdis_jax.preflight import chips, flops, gpus, hlo, targets, times
from diffdis_jax.training.step import Trainer
from tests import pages, steps, tiny_clip
from tests.command_runs import call

pytest_plugins = ("tests.command_runs",)

CONFIG = "--config=tests/tiny.py"


@pytest.fixture(scope="module")
def variables(environment, tmp_path_factory):
  """Return the environment with its own cache, and without a number of devices."""
  without_devices = {name: value for name, value in environment.items() if name != "JAX_NUM_CPU_DEVICES"}
  return without_devices | {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}


@pytest.mark.slow
def test_the_train_step_on_cpu_devices(variables, tmp_path):
  out = tmp_path / "out.json"
  flags = [CONFIG, "--topology=v5e:2x2", "--cpu", "--config.model.unet.attention=(False,)"]
  done = call("preflight", variables, *flags, f"--out={out}")
  assert done.returncode == 0, done.stderr
  train = json.loads(out.read_text())["train"]
  assert train["fits"] and not train["for_this_chip"] and train["chips"] == 4 and train["images"] == 16
  memory = train["memory_gib"]
  parts = memory["arguments"] + memory["temporaries"] + memory["outputs"]
  assert 0 < memory["arguments"] < parts == pytest.approx(memory["total"]) and memory["chip"] == 16
  assert train["seconds"] is None and train["seconds_by_cycles"] is None and train["seconds_bound"] > 0
  assert train["collectives_gib"].keys() == {"all-reduce", "all-gather"}
  hours = 6 * 2_905_954 / 16 * train["seconds_bound"] * 4 / 3600
  assert train["chip_hours"] == pytest.approx(hours)
  assert "XLA for cpu" in done.stderr and f"{train['parameters']:,} parameters" in done.stderr


@pytest.mark.slow
def test_accumulation_does_not_change_the_counted_operations():
  mesh = steps.make_mesh(2, 2, 2)
  trace = lambda **changes: flops.trace_train(Trainer(Run.of(steps.make_config(**changes)), mesh))
  once = trace()
  assert once.rows == 16
  alone = {"optim.accumulate": 2, "optim.contrastive_batch": "microbatch"}
  assert trace(**alone).operations == pytest.approx(once.operations, rel=0.1)
  assert trace(**{"optim.accumulate": 2}).operations == once.operations


@pytest.mark.slow
def test_counting_operations_changes_neither_program_nor_config():
  """Operations are counted without rematerialisation, but the program is rematerialised as its config says."""
  config, mesh = steps.make_config("discrimination", **{"model.remat": "full"}), steps.make_mesh()
  convolutions = lambda config: (
    flops.trace_train(Trainer(Run.of(config), mesh)).lower().as_text().count("stablehlo.convolution")
  )
  assert convolutions(config) > convolutions(steps.make_config("discrimination"))
  assert config.model.remat == "full" and config.model.attention_kernel == "auto"


@pytest.mark.slow
def test_the_operations_of_a_clips_step():
  """The step has three times the operations of both towers' layers and some more, rematerialised or not."""
  config, mesh = tiny_clip.get_config(), steps.make_mesh(2, 2, 2)
  counted = flops.trace_train(Trainer(Run.of(config), mesh))
  layer = lambda tokens, width, hidden: 2 * tokens * (4 * width**2 + 2 * width * hidden + 2 * tokens * width)
  at_least = 3 * config.batch_size * 2 * (layer(8, 16, 32) + layer(17, 16, 32))
  assert at_least < counted.operations < 1.5 * at_least and counted.rows == config.batch_size
  config.model.remat = "full"
  assert flops.trace_train(Trainer(Run.of(config), mesh)).operations == counted.operations
  # The extra forward pass of two microbatches with one contrastive batch is not counted as useful work.
  config.optim.accumulate = 2
  twice = flops.trace_train(Trainer(Run.of(config), mesh))
  assert twice.operations == counted.operations


@pytest.mark.slow
@pytest.mark.parametrize(
  "flags, message",
  [
    ([CONFIG, "--topology=v5e:3x3"], r"unknown topology 'v5e:3x3'.*v5e: 1x1 2x2 2x4.*v6e: .*v4: .*v5p: "),
    ([CONFIG, "--topology=v5e:2x2", "--config.mesh.fsdp=3"], "mesh data=-1, fsdp=3, tensor=1 takes 3 devices"),
    ([CONFIG, "--topology=v5e:2x2", "--config.batch_size=18"], "batch_size is 18; .* multiple of 4, such as"),
    ([CONFIG], "give --topology"),
    (["calibrate", CONFIG, "--topology=v5e:2x2"], "unexpected argument 'calibrate'"),
    (["--topology=v5e:2x2"], r"or FILE.py\[:args\]\) is missing"),
  ],
)
def test_wrong_input_is_refused_in_one_line(variables, flags, message):
  done = call("preflight", variables, "--cpu", *flags)
  assert done.returncode == 2
  lines = [line for line in done.stderr.splitlines() if "compiling for" not in line]
  assert len(lines) == 1 and re.search(message, lines[0]), done.stderr


def test_a_topology_is_parsed():
  topology = chips.parse("v5p:2x2x4")
  assert (topology.size, topology.is_tpu, topology.chip) == (16, True, chips.CHIPS["v5p"])
  assert chips.parse("h100:8").size == chips.parse("h100:8").a_host == 8 and not chips.parse("h100:8").is_tpu
  assert (chips.parse("h100:8x4").size, chips.parse("h100:8x4").a_host) == (32, 8)
  # Cards of 24 GB are rented as single hosts. The peaks are those with sums in float32, without sparsity.
  for name, tflops, gib in (("l4", 121, 24), ("a10g", 70, 24), ("rtx4090", 165.2, 24), ("a100-40", 312, 40)):
    chip = chips.parse(f"{name}:8").chip
    assert (chip.flops / 1e12, chip.memory / chips.GIB) == (tflops, gib)
  with pytest.raises(UserError, match="unknown topology 'l4:8x2'.* l4: 1 2 4 8"):
    chips.parse("l4:8x2")


def test_a_gpu_has_the_memory_that_jax_may_take():
  memory = lambda topology: targets.find("cpu", chips.parse(topology), 1).chip.memory
  assert memory("h100:8") == pytest.approx(0.9 * 81_008 * 2**20) and memory("v5e:2x2") == 16 * 2**30


@pytest.mark.parametrize("chip, expected", [pytest.param("h100", "gpu", marks=pytest.mark.slow), ("v5e", "tpu")])
def test_the_program_for_cpu_devices_is_traced_for_the_chip(monkeypatch, chip, expected):
  asked, original = [], attention.platform
  monkeypatch.setattr(attention, "platform", lambda: asked.append(original()) or asked[-1])
  compiled = targets.Compiled(arguments=0, temporaries=0, outputs=0)
  monkeypatch.setattr(targets, "compile", lambda lowered, target: compiled)
  target = targets.Target(devices=jax.devices()[:1], chip=chips.CHIPS[chip], compiler="cpu")
  preflight.compile_step(Run.of(steps.make_config()), target, num_pairs=1, epochs=1)
  assert set(asked) == {expected} and attention.platform() == "cpu"


def test_the_needed_memory_is_read_from_the_tpu_compilers_error():
  message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm"
  assert targets.memory_needed(message) == int(20.5 * 2**30)
  assert targets.memory_needed("INTERNAL: something else") is None


def test_the_tpu_compilers_estimate_is_used_only_if_it_is_complete():
  estimated = functools.partial(times.estimated_seconds, chip=chips.CHIPS["v5p"], in_kernels=0.0)
  assert estimated({"optimal_seconds": 0.25}, "") == 0.25
  assert estimated({"optimal_seconds": -0.75}, "") is None
  assert estimated({}, "") is None
  for name in ("ZeroCrop", "ConcatBitcast"):  # the compiler counts each as -1 s
    call = f'%a = custom-call(%copy), custom_call_target="{name}"'
    assert estimated({"optimal_seconds": 0.25}, call) is None


def test_kernels_take_the_time_of_their_schedules_not_the_declared_cost():
  cost = '"cost_estimate":{{"flops":"{}","transcendentals":"{}","bytes_accessed":"{}"}}'
  line = '  %k.{} = f32[8] custom-call(%a), custom_call_target="tpu_custom_call", backend_config={{' + cost + "}}"
  # These costs take 10, 20 and 30 ms on a v5p.
  costs = ((3_940_000_000_000, 1, 1), (1, 61_440_000_000, 1), (1, 1, 70_512_000_000))
  text = "\n".join(line.format(i, *declared) for i, declared in enumerate(costs))
  seconds = times.estimated_seconds({"optimal_seconds": 0.1}, text, chips.CHIPS["v5p"], in_kernels=0.025)
  assert seconds == pytest.approx(0.1 - 0.060 + 0.025)


def test_the_compilers_estimate_is_scaled_by_the_turns_of_loops():
  """100 of 400 cycles are in a loop of five turns, so the program takes twice as long as the estimate."""
  body = '%body (p: f32[8]) -> f32[8] {\n  %r = f32[8] add(%p, %p), backend_config={"estimated_cycles":"100"}\n}\n'
  own = '  %w = f32[8] while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}\n'
  text = (
    f'{body}ENTRY %main (p: f32[8]) -> f32[8] {{\n{own}  %a = f32[8] add(%w, %w), {{"estimated_cycles":"300"}}\n}}\n'
  )
  chip = chips.CHIPS["v5p"]
  assert times.estimated_seconds({"optimal_seconds": 0.1}, text, chip, in_kernels=0.0) == pytest.approx(0.2)
  # The time of kernels already includes the turns of loops.
  kernel = (
    '  %k = f32[8] custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":'
    '{"flops":"3940000000000","transcendentals":"1","bytes_accessed":"1"}}\n'
  )  # 10 ms
  text = text.replace("  %a =", f"{kernel}  %a =")
  seconds = times.estimated_seconds({"optimal_seconds": 0.1}, text, chip, in_kernels=0.025)
  assert seconds == pytest.approx(2 * 0.090 + 0.025)


def test_the_time_between_chips_by_links_and_network():
  """Links carry the traffic within a host or slice, the network the rest. The speed of TPUs' network is unknown."""
  line = "  %g = f32[{}] all-gather(%a), channel_id=1, replica_groups={}, dimensions={{0}}\n"
  text = line.format(900_000_000, "[4,8]<=[32]") + line.format(4_000_000, "[8,4]<=[4,8]T(1,0)")
  seconds = lambda chip, near: times.traffic(text, near).seconds(chips.CHIPS[chip])
  inside, across = 3.6e9 * 7 / 8, 16e6 * 3 / 4
  assert seconds("h100", 8) == pytest.approx(inside / 450e9 + across / 50e9)
  assert seconds("v5p", None) == pytest.approx((inside + across) / 600e9)
  assert seconds("v5p", 8) is None


@pytest.mark.parametrize("topology, slices, near", [("h100:4x2", 1, 4), ("v5e:2x2", 2, 4), ("v5e:2x4", 1, None)])
def test_cpu_devices_stand_in_for_chips_with_the_same_links(topology, slices, near):
  """Otherwise traffic between hosts or slices would count as carried by fast links, and estimates be too low."""
  assert targets.find("cpu", chips.parse(topology), slices).near == near


@pytest.mark.parametrize("name", gpus.GPUS)
def test_every_gpu_has_peak_figures(name):
  gpu, chip = gpus.GPUS[name], chips.CHIPS[name]
  assert gpu.memory == pytest.approx(chip.memory, rel=0.07)
  config = gpus.target_config(gpu, chip, cuda=(12, 9, 79), cudnn=(9, 28, 0))
  assert config.count("{") == config.count("}")
  assert "runtime_version { major: 12 minor: 9 patch: 79 }" in config and 'dnn_version: "9.28.0"' in config


def report_of(rows=8, operations=0.2 * chips.CHIPS["v5p"].flops, pairs=3600, epochs=2, **compiled):
  """Return the report of a program on two v5p chips."""
  program = flops.Program(lower=lambda: None, rows=rows, operations=operations, parameters=1)
  target = targets.Target(devices=jax.devices()[:2], chip=chips.CHIPS["v5p"], compiler="tpu", near=1)
  compiled = targets.Compiled(arguments=1, temporaries=0, outputs=0, **compiled)
  return preflight.summarise(program, compiled, target, num_pairs=pairs, epochs=epochs)


@pytest.mark.parametrize(
  "seconds, by_cycles, planned, by, line",
  [
    (0.25, 0.5, 0.25, "seconds", "250.0 ms, 40.0 % of the chips' peak, by the compiler's sum; what follows"),
    (0.5, 0.25, 0.5, "seconds", "500.0 ms, 20.0 % of the chips' peak, by the compiler's sum; what follows"),
    (None, 0.4, 0.4, "seconds_by_cycles", "400.0 ms, 25.0 % of the chips' peak, by its operations' cycles"),
    (None, None, 0.1, "seconds_bound", "at least 100.0 ms"),
  ],
)
def test_costs_follow_the_compilers_estimate(seconds, by_cycles, planned, by, line):
  """Cycles count bf16 operations twice; the time of a measured step agrees with the compiler's estimate."""
  report = report_of(seconds=seconds, seconds_by_cycles=by_cycles)
  assert (report["seconds"], report["seconds_by_cycles"], report["planned_by"]) == (seconds, by_cycles, by)
  assert report["images_per_second"] == pytest.approx(8 / planned)
  assert report["chip_hours"] == pytest.approx(2 * 3600 / 8 * planned * 2 / 3600)
  assert report["mfu"] == (pytest.approx(0.1 / planned) if seconds or by_cycles else None)
  lines = "\n".join(preflight.lines(report | {"collectives_gib": {"all-gather": 1.0}}))
  assert line in lines and ("not in that time" in lines) == bool(seconds or by_cycles)
  assert lines.count("what follows goes by it") == bool(seconds or by_cycles)
  of_rate, of_cost = preflight.BOUNDS[by]
  assert f"\n{of_rate}{8 / planned:.0f} images/s" in lines
  assert f"pairs: {of_cost}{report['chip_hours']:.1f} chip-hours" in lines
  # The rate of a slow step, such as sampling on one small GPU, is not rounded to 0.
  assert f"{of_rate}0.42 images/s" in "\n".join(preflight.lines(report | {"images_per_second": 0.42}))


def test_a_network_of_unknown_speed_is_reported():
  """Between slices of TPUs the network may take most of a step's time."""
  crossing = times.Traffic(links_bytes=1.0, network_bytes=0.5 * chips.GIB)
  line = "between chips: unknown; 0.500 GiB a chip cross a network whose speed is not known"
  assert line in preflight.lines(report_of(traffic=crossing))
  assert not any("between chips" in line for line in preflight.lines(report_of()))


def test_the_clocks_of_chips_agree_with_their_peaks():
  """Each cell of a chip's arrays, of 128 x 128 or on v6e 256 x 256 cells, has two operations per cycle."""
  for name, cells in (("v4", 8 * 128**2), ("v5e", 4 * 128**2), ("v5p", 8 * 128**2), ("v6e", 4 * 256**2)):
    chip = chips.CHIPS[name]
    assert 2 * cells * chip.clock == pytest.approx(chip.flops, rel=0.01)


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology, slices", [("v5e:2x2", 1), ("v6e:2x4", 1), ("v4:2x2x1", 2), ("v5p:2x2x1", 1)])
def test_the_train_step_by_the_tpu_compiler(variables, tmp_path, topology, slices):
  out, cache = tmp_path / "out.json", tmp_path / "xla"
  environment = {**variables, "JAX_COMPILATION_CACHE_DIR": str(cache)}
  done = call("preflight", environment, CONFIG, f"--topology={topology}", f"--slices={slices}", f"--out={out}")
  assert done.returncode == 0, done.stderr
  assert not cache.exists()
  result = json.loads(out.read_text())["train"]
  assert result["for_this_chip"] and result["seconds_by_cycles"] > 0 and 0 < result["mfu"] < 1 and result["fits"]
  assert result["chips"] == chips.parse(topology).size * slices
  assert (result["seconds_between_chips"] is None) == (slices > 1)


@pytest.mark.full
@pytest.mark.skipif(not targets.is_installed("cuda"), reason="jax's CUDA plugin is not installed")
@pytest.mark.parametrize(
  "topology", ["a100:1", "a100-40:2", "h100:4x2", "h200:2", "b200:2", "l4:1", "a10g:1", "rtx4090:2"]
)
def test_the_train_step_by_the_gpu_compiler(variables, tmp_path, topology):
  out = tmp_path / "out.json"
  done = call("preflight", variables, CONFIG, f"--topology={topology}", f"--out={out}")
  assert done.returncode == 0, done.stderr
  result = json.loads(out.read_text())["train"]
  assert result["for_this_chip"] and result["compiler"] == "cuda" and result["fits"]
  assert result["chips"] == chips.parse(topology).size and result["planned_by"] == "seconds_bound"
  assert bool(result["collectives_gib"]) == (result["chips"] > 1)


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e"])
def test_kernels_are_charged_as_the_tpu_compiler_charges_them(chip):
  """chips.Charged agrees with the compiler's time for kernels that declare their cost."""
  topology = chips.parse(f"{chip}:{'2x2' if chip in ('v5e', 'v6e') else '2x2x1'}")
  target = targets.find("tpu", topology, 1)
  place = SingleDeviceSharding(target.devices[0])
  x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=place)

  def kernel(x_ref, y_ref):
    y_ref[...] = x_ref[...] + 1

  for operations, transcendentals, size in ((10**10, 0, 0), (0, 10**8, 0), (0, 0, 10**8), (10**11, 10**8, 10**8)):
    cost = pl.CostEstimate(flops=operations, transcendentals=transcendentals, bytes_accessed=size)
    call_kernel = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), cost_estimate=cost)
    program = jax.jit(call_kernel).lower(x).compile()
    (declared,) = hlo.kernels(program.as_text()).values()
    assert (declared.flops, declared.transcendentals, declared.bytes) == (operations, transcendentals, size)
    expected = target.chip.charged.seconds(flops=operations, transcendentals=transcendentals, bytes=size)
    assert program.cost_analysis()["optimal_seconds"] == pytest.approx(expected, rel=0.01)


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_loops_are_read_from_the_tpu_compilers_text():
  """A loop of eight turns has two equal kernels, with a matrix product after each."""
  target = targets.find("tpu", chips.parse("v5p:2x2x1"), 1)
  place = SingleDeviceSharding(target.devices[0])
  weights = lambda n: jax.ShapeDtypeStruct((n, 512, 512), jnp.bfloat16, sharding=place)
  x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=place)

  def kernel(x_ref, y_ref):
    y_ref[...] = x_ref[...] + 1

  cost = pl.CostEstimate(flops=2**18, transcendentals=0, bytes_accessed=2**20)
  add = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), cost_estimate=cost)
  turn = lambda x, weight: (add(add(x) @ weight) @ weight, None)
  lower = lambda n: jax.jit(lambda x, weights: jax.lax.scan(turn, x, weights)[0]).lower(x, weights(n))
  eight, four = targets.compile(lower(8), target), targets.compile(lower(4), target)
  assert [kernel.times for kernel in hlo.kernels(eight.text).values()] == [8, 8]
  # Not exactly twice, because of the operations before and after the loop.
  assert 1.7 < eight.seconds / four.seconds < 2.1 and 1.7 < eight.seconds_by_cycles / four.seconds_by_cycles < 2.1
  cycles = times.cycles_by_operation(times.schedules())
  assert times.seconds_in_kernels(four.text, cycles, target.chip) > 0
  assert len({kernel.code for kernel in hlo.kernels(four.text).values()}) == 1


def test_the_chips_of_the_examples_hold_the_papers_state():
  """Parameters, moments and averages fit into the memory of a v5e only if fsdp shards them."""
  listing = (pages.ROOT / "tests/golden/diffdis_cc3m.txt").read_text()
  state = 0
  for dims, group in re.findall(r"float32\[([\d,]*)\] (\w+)", listing):
    state += (4 if group == "frozen" else 16) * math.prod(int(dim) for dim in dims.split(",") if dim)
  assert 15.4 < state / chips.GIB < 15.5
  shown = [*pages.commands(), *(preflight.__doc__ or "").splitlines()]
  examples = [line for line in shown if "preflight --config=diffdis_cc3m" in line and "--topology=v" in line]
  assert len(examples) >= 4
  for line in examples:
    (topology,), fsdp = re.findall(r"--topology=(\S+)", line), re.findall(r"mesh\.fsdp=(\d+)", line) or ["1"]
    assert state / int(fsdp[0]) < 0.75 * chips.parse(topology).chip.memory, line


# Simple programs by name: a function, its arguments' shapes and dtype, its operations, and the bytes that it must move.
# One is bound by operations and one by memory: they show how the estimate errs at either bound.
PLAIN = {
  "product": (jnp.dot, ((8192, 8192),) * 2, jnp.bfloat16, 2 * 8192**3, 3 * 8192**2 * 2),
  "sum": (jnp.add, ((2**13, 2**13),) * 2, jnp.float32, 0, 3 * 2**26 * 4),
}


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("name", PLAIN)
def test_large_simple_programs_are_estimated_at_most_half_too_slow(topology, name):
  """The lower bound is the time of the operations at the chip's peak, or of the bytes at its memory's bandwidth."""
  f, shapes, dtype, operations, moved = PLAIN[name]
  target = targets.find("tpu", chips.parse(topology), 1)
  place = SingleDeviceSharding(target.devices[0])
  lowered = jax.jit(f).lower(*(jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in shapes))
  lower_bound = max(operations / target.chip.flops, moved / target.chip.bandwidth)
  assert 0.99 < targets.compile(lowered, target).seconds / lower_bound < 1.5
