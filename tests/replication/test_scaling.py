"""Test the fits of weak scaling against cases computed by hand."""

from __future__ import annotations

import pytest

from replication import scaling
from replication.scaling import Plan

pytestmark = pytest.mark.slow

GIB = 2**30


def traffic_of(n: int, *, near: int = 4) -> dict[str, float]:
  """Compute by hand the traffic of a network of 8 GiB of parameters on n chips, `fsdp` 4 and 16 images a chip.

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
  """Three compiled topologies determine the three terms for any `fsdp`. The smallest has no sums over `data`."""
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
  *_, line = scaling.lines(table)
  assert line.split()[:2] == ["v5e:16x16", "4,096"] and f"{100 * last['efficiency']:.1f} %" in line
