"""Weak scaling: fits against cases computed by hand, and bad input."""

from __future__ import annotations

import types

import pytest
from ml_collections import ConfigDict

from diffdis_jax.errors import UserError
from diffdis_jax.preflight import __main__ as preflight
from diffdis_jax.preflight import chips, times
from replication import scaling
from replication.scaling import Plan
from tests.replication.test_commands import command

pytestmark = pytest.mark.slow

pytest_plugins = ("tests.command_runs",)

GIB = 2**30


def traffic_of(n: int, *, near: int = 4) -> dict[str, float]:
  """Of a network of 8 GiB of parameters on n chips, `fsdp` 4 and 16 images a chip, by hand.

  Parameters are gathered over 4 chips twice, gradients are summed over n / 4 groups, two MiB of embeddings a chip are
  gathered over all of them.
  """
  gathered = 2 * 8 * GIB * 3 / 4
  summed = 2 * (8 * GIB / 4) * (n / 4 - 1) / (n / 4)
  embeddings = 2 * 2**20 * (n - 1)
  hops = 2 * 3 + 2 * (n // 4 - 1) + (n - 1)
  return dict(links_bytes=gathered + summed + embeddings, network_bytes=0.0, links_hops=hops, network_hops=0)


def report_of(n: int, **changes: object) -> dict[str, object]:
  memory = dict(arguments=2 + 8 / n, temporaries=3.0, outputs=0.0, total=5 + 8 / n, chip=16)
  times = dict(seconds=None, seconds_by_cycles=0.2, seconds_bound=0.1)
  return dict(images=16 * n, fits=True, memory_gib=memory, traffic=traffic_of(n), **times) | changes


def test_fitted_rows_are_those_of_the_case_computed_by_hand():
  """Three compiled topologies determine the three terms, whatever `fsdp` is; the smallest has no sums over `data`."""
  plan = Plan.of("v5e", ["4", "16", "64", "128", "256"], 64)
  table = scaling.tabulate(plan, [report_of(n) for n in (4, 16, 64)])
  assert [(row["topology"], row["row"]) for row in table["rows"]] == [
    ("v5e:2x2", "compiled"),
    ("v5e:4x4", "compiled"),
    ("v5e:8x8", "compiled"),
    ("v5e:8x16", "fitted"),
    ("v5e:16x16", "fitted"),
  ]
  for row in table["rows"]:
    assert row["traffic"] == pytest.approx(traffic_of(row["chips"]))
    assert row["memory_gib"] == pytest.approx(5 + 8 / row["chips"]) and row["images"] == 16 * row["chips"]
  first, *_, last = table["rows"]
  # 12 GiB and 6 MiB at 200 GB/s, 6 + 3 hops of 1 us; then 12 + 3.9375 GiB and 510 MiB, 6 + 126 + 255 hops.
  assert first["seconds"] == pytest.approx(0.2 + (12 * GIB + 6 * 2**20) / 200e9 + 9e-6)
  assert last["seconds"] == pytest.approx(0.2 + (15.9375 * GIB + 510 * 2**20) / 200e9 + 387e-6)
  assert last["images_per_second"] == pytest.approx(4096 / last["seconds"])
  assert first["efficiency"] == 1 and last["efficiency"] == pytest.approx(first["seconds"] / last["seconds"])
  assert table["planned_by"] == "seconds_by_cycles"
  said = [*scaling.lines(table)]
  assert [line.endswith(kind) for line, kind in zip(said[2:], ["compiled"] * 3 + ["fitted"] * 2, strict=True)] == [
    True
  ] * 5
  assert said[-1].split()[:2] == ["v5e:16x16", "4,096"] and f"{100 * last['efficiency']:.1f} %" in said[-1]


def test_two_topologies_determine_what_does_not_grow_with_the_batch():
  values = [7 + 5 * (n - 1) / n for n in (4, 16)]
  assert scaling.fitted([4, 16], values, 256, scaling.BYTES) == pytest.approx(7 + 5 * 255 / 256)


def test_hops_do_not_become_fewer_as_chips_are_added():
  """The smallest program may have more of them, where `data` is 1 and XLA joins fewer sums."""
  reports = [report_of(n, traffic=traffic_of(n) | dict(links_hops=hops)) for n, hops in ((4, 2328), (16, 1944))]
  two = scaling.tabulate(Plan.of("v5e", ["4", "16", "64"], 16), reports)
  assert [row["traffic"]["links_hops"] for row in two["rows"]] == [2328, 1944, 1944]
  reports.append(report_of(64, traffic=traffic_of(64) | dict(links_hops=3000)))
  three = scaling.tabulate(Plan.of("v5e", ["4", "16", "64", "256"], 64), reports)
  assert three["rows"][-1]["traffic"]["links_hops"] == pytest.approx(3000 + 22 * 192)


def test_hosts_that_a_network_joins_are_fitted_to_such():
  plan = Plan.of("h100:8", ["8", "16", "32", "64", "256"], 64)
  assert [each.name for each in plan.like(plan.topologies[-1])] == ["h100:8x2", "h100:8x4", "h100:8x8"]
  assert plan.batch_size(plan.topologies[-1], 1024) == 32_768
  assert Plan.of("h100:8x4", ["8", "16"], None).batch_size(plan.topologies[0], 1024) == 256


def test_hops_of_rings_within_hosts_and_between_them():
  """As NCCL counts them: an all-reduce goes round twice; a ring over all of 4 hosts of 8 leaves a host three times."""
  line = "  %g = f32[32] {}(%a), channel_id=1, replica_groups={}\n"
  text = line.format("all-gather", "[4,8]<=[32]") + line.format("all-reduce", "[8,4]<=[4,8]T(1,0)")
  text += line.format("all-gather", "[1,32]<=[32]")
  found = times.traffic(text, near=8)
  assert (found.links_hops, found.network_hops) == (7 + 0 + 28, 0 + 2 * 3 + 3)
  assert (found.links_bytes, found.network_bytes) == (128 * 7 / 8, 2 * 128 * 3 / 4 + 128 * 31 / 32)
  assert times.traffic(text, near=None) == times.Traffic(
    links_bytes=found.links_bytes + found.network_bytes, links_hops=7 + 6 + 31
  )


@pytest.mark.parametrize(
  ("topology", "network_hops", "seconds"),
  [("v5e:2x2", 0, 10e-6), ("h100:8x2", 5, 10 * 3.4e-6 + 5 * 14e-6), ("l4:8", 0, 10 * 5.7e-6)],
)
def test_latency_is_of_links_and_the_network(topology, network_hops, seconds):
  traffic = times.Traffic(links_hops=10, network_hops=network_hops)
  row = dict(topology=chips.parse(topology), images=1, is_fitted=False, computing=0.0, memory=1.0, room=16.0)
  assert scaling.Row(traffic=traffic, **row).latency == pytest.approx(seconds)


def test_what_is_larger_than_a_chip_is_said_so():
  memory = dict(arguments=10.0, temporaries=7.0, outputs=0.0, total=17.0, chip=16)
  table = scaling.tabulate(Plan.of("v5e", ["4", "16", "64"], 16), [report_of(4, memory_gib=memory), report_of(16)])
  assert [row["fits"] for row in table["rows"]] == [False, True, True]
  assert "compiled, DOES NOT FIT" in [*scaling.lines(table)][2]


def test_what_has_no_program_is_refused_before_the_next_is_compiled(monkeypatch):
  memory, asked = dict(arguments=0.0, temporaries=20.5, outputs=0.0, total=20.5, chip=16), []

  def estimate(config, platform, topology):
    asked.append((topology.name, config.batch_size))
    return {"train": report_of(topology.size, memory_gib=memory)}

  monkeypatch.setattr(preflight, "estimate", estimate)
  monkeypatch.setattr(scaling, "FLAGS", types.SimpleNamespace(config=ConfigDict({"batch_size": 64})))
  with pytest.raises(UserError, match=r"v5e:2x2 would take 20\.50 GiB a chip of 16; see --topology=v5e:2x2 --search"):
    scaling.scale("tpu", Plan.of("v5e", ["4", "16"], None))
  assert asked == [("v5e:2x2", 64)]


def test_time_goes_by_an_estimate_that_all_have():
  reports = [report_of(4, seconds=0.3), report_of(16, seconds_by_cycles=None)]
  assert scaling.tabulate(Plan.of("v5e", ["4", "16"], None), reports)["planned_by"] == "seconds_bound"


@pytest.mark.parametrize(
  ("topology", "sizes", "fit_above", "message"),
  [
    ("v9", "4,16", None, "--topology=v9 with --scaling; CHIP is one of v5e, v6e, v4"),
    (None, "4,16", None, "--topology=CHIP with --scaling; CHIP is one of"),
    ("v5e", "4", None, "--scaling=4; give two numbers of chips or more, the smallest first"),
    ("v5e", "16,4", None, "--scaling=16,4; give two numbers"),
    ("v5e", "4,many", None, "--scaling=4,many; give two numbers"),
    ("v5e", "4,-8", None, "--scaling=4,-8; give two numbers"),
    ("v5e", "4,12", None, "--scaling has 12; multiples of 4 that v5e comes in: 4, 8, 16, 32, 64, 128, 256"),
    ("v5e", "8,16,20", None, "--scaling has 20; multiples of 8 that v5e comes in: 8, 16"),
    ("l4", "8,16", None, "--scaling has 16; multiples of 8 that l4 comes in: 8"),
    ("v5e", "4,16,64", 4, "--fit_above=4 leaves fewer than two compiled topologies to fit v5e:4x4"),
    (
      "h100",
      "8,16,32",
      16,
      "--fit_above=16 leaves fewer than two compiled topologies of several hosts to fit h100:8x4",
    ),
  ],
)
def test_numbers_that_cannot_be(topology, sizes, fit_above, message):
  with pytest.raises(UserError) as error:
    Plan.of(topology, sizes.split(","), fit_above)
  assert message in str(error.value)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (
      ["--topology=v5e", "--scaling=4,16", "--config.batch_size=18"],
      "batch_size is 18, for 4 chips; --scaling needs a",
    ),
    (["--topology=v5e", "--scaling=4,x"], "--scaling=4,x; give two numbers"),
    (["--topology=v5e", "--scaling=4,16", "--search"], "weak scaling is of one slice"),
  ],
)
def test_bad_input_is_one_line_and_writes_nothing(environment, tmp_path, flags, message):
  out = tmp_path / "out.json"
  done = command("replication.scaling", environment, "--config=tests/tiny.py", "--platform=cpu", f"--out={out}", *flags)
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr
  assert not out.exists()
