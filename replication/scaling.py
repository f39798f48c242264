"""Estimate weak scaling: one config on more and more chips, with a constant batch per chip.

  python -m replication.scaling --config=diffdis_cc3m:latents=none --topology=h100 --scaling=8,16,32,64,128,256 \\
      --fit_above=64 --config.mesh.fsdp=8 --config.model.remat=none --out=scaling.json

The config's batch is that of the smallest topology. Small topologies are compiled, as in `diffdis preflight`. Larger
ones are fitted by least squares, with as many terms as compiled topologies:

  computing   a                        constant for a chip; taken from the largest compiled topology
  bytes       a (n - 1) / n + b + c n  a: groups that grow with n chips, in rings, such as sums of gradients;
                                       b: groups of a fixed size; c: the batch, such as the embeddings of a loss
  hops        a + b n                  from one chip of a ring to the next, one after another: by the last two
  memory      a + b / n                b: arrays that are split over all chips

The parts of a step are assumed not to overlap: its time is the sum of computing, of moving the bytes at full speed, and
of the latency of all hops.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags, logging

from diffdis_jax.common import cli, files
from diffdis_jax.errors import UserError
from diffdis_jax.preflight import __main__ as preflight
from diffdis_jax.preflight import chips, gpus
from diffdis_jax.preflight.times import Traffic

FLAGS = flags.FLAGS
Terms = tuple[Callable[[int], float], ...]
BYTES: Terms = (lambda n: (n - 1) / n, lambda n: 1, lambda n: n)
HOPS: Terms = (lambda n: 1, lambda n: n)
MEMORY: Terms = (lambda n: 1, lambda n: 1 / n)

# Latency of a hop in seconds. TPUs: "How To Scale Your Model" (Google DeepMind, 2025), section 3. GPUs: what
# NCCL assumes for rings and its protocol Simple (src/graph/tuning.cc, 2.2x).
TPU_HOP, NVLINK_HOP, PCIE_HOP, NETWORK_HOP = 1e-6, 3.4e-6, 5.7e-6, 14e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """The topologies to compile, and the larger ones to fit.

  Attributes:
    topologies: topologies of one kind of chip, the smallest first.
    compiled: the first ones, which are compiled.
    base: number of chips for which the config's batch is meant.
  """

  topologies: tuple[chips.Topology, ...]
  compiled: tuple[chips.Topology, ...]
  base: int

  @classmethod
  def of(cls, topology: str | None, sizes: Sequence[str], fit_above: int | None) -> Plan:
    """Read the plan from --topology, --scaling and --fit_above.

    Raises:
      UserError: unknown chips, an impossible number of them, or too few topologies to compile.
    """
    kind, _, layout = (topology or "CHIP").partition(":")
    if kind not in chips.LAYOUTS:
      raise UserError(f"--topology={kind} with --scaling; CHIP is one of {', '.join(chips.LAYOUTS)}")
    numbers = [int(size) if size.isdecimal() else 0 for size in sizes]
    if len(numbers) < 2 or 0 in numbers or numbers != sorted(set(numbers)):
      raise UserError(f"--scaling={','.join(sizes)}; give two numbers of chips or more, the smallest first: 4,16,64")
    layouts = [chips.parse(f"{kind}:{layout}") for layout in chips.LAYOUTS[kind]]
    by_size = {topology.size: topology for topology in reversed(layouts)}
    for number in numbers:
      if number not in by_size or number % numbers[0]:
        possible = ", ".join(str(size) for size in sorted(by_size) if size % numbers[0] == 0)
        raise UserError(f"--scaling has {number}; multiples of {numbers[0]} that {kind} comes in: {possible or 'none'}")
    base = chips.parse(f"{kind}:{layout}").size if layout else numbers[0]
    small = tuple(by_size[number] for number in numbers if fit_above is None or number <= fit_above)
    plan = cls(topologies=tuple(by_size[number] for number in numbers), compiled=small, base=base)
    for size in plan.topologies:
      if size not in small and len(plan.like(size)) < 2:
        hosts = "" if size.is_tpu else " of several hosts" if len(size.shape) > 1 else " of one host"
        raise UserError(f"--fit_above={fit_above} leaves fewer than two compiled topologies{hosts} to fit {size.name}")
    return plan

  def like(self, topology: chips.Topology) -> list[chips.Topology]:
    """Return the compiled topologies by which a topology is fitted: a network between hosts changes the exchanges."""
    has_network = len(topology.shape) > 1
    return [small for small in self.compiled if (len(small.shape) > 1) == has_network]

  def batch_size(self, topology: chips.Topology, configured: int) -> int:
    """Return the batch size of a topology. Raises UserError if the config's batch does not divide over its chips."""
    if configured % self.base:
      raise UserError(f"batch_size is {configured}, for {self.base} chips; --scaling needs a multiple of {self.base}")
    return configured // self.base * topology.size


def fitted(numbers: Sequence[int], values: Sequence[float], at: int, terms: Terms) -> float:
  """Return the value at a number of chips, by a least-squares fit with as many terms as there are numbers."""
  basis = np.array([[float(term(n)) for term in terms[: len(numbers)]] for n in (*numbers, at)])
  return max(0.0, float(basis[-1] @ np.linalg.lstsq(basis[:-1], np.array(values))[0]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """The estimate for one topology.

  Attributes:
    images: images of a step, on all chips.
    is_fitted: True if it is fitted, False if it is compiled.
    computing: seconds of computing in a step.
    memory: GiB that a chip needs.
    room: GiB that a program may use.
  """

  topology: chips.Topology
  images: int
  is_fitted: bool
  computing: float
  traffic: Traffic
  memory: float
  room: float

  @property
  def latency(self) -> float:
    """Return the seconds of all hops."""
    kind = self.topology.kind
    link = TPU_HOP if self.topology.is_tpu else NVLINK_HOP if gpus.GPUS[kind].links else PCIE_HOP
    return self.traffic.links_hops * link + self.traffic.network_hops * NETWORK_HOP

  @property
  def seconds(self) -> float:
    moving = self.traffic.seconds(self.topology.chip)
    assert moving is not None, "chips that come in several hosts have a network"
    return self.computing + moving + self.latency

  def as_json(self, first: Row) -> dict[str, Any]:
    """Return a step's seconds, a chip's bytes, hops and GiB, and the efficiency relative to the first row."""
    rate = self.images / self.seconds
    return dict(
      row="fitted" if self.is_fitted else "compiled",
      topology=self.topology.name,
      chips=self.topology.size,
      images=self.images,
      seconds=self.seconds,
      seconds_computing=self.computing,
      seconds_of_hops=self.latency,
      traffic=vars(self.traffic),
      between_chips_gib=(self.traffic.links_bytes + self.traffic.network_bytes) / chips.GIB,
      memory_gib=self.memory,
      fits=self.memory <= self.room,
      images_per_second=rate,
      efficiency=rate / self.topology.size / (first.images / first.seconds / first.topology.size),
    )


def check(topology: chips.Topology, report: Mapping[str, Any]) -> None:
  """Raise UserError if the train step's report (preflight.summarise) has no program."""
  memory = report["memory_gib"]
  if not memory["arguments"]:
    needed = f"{memory['total']:.2f} GiB a chip of {memory['chip']:.0f}"
    raise UserError(f"{topology.name} would take {needed}; take --config.model.remat=full or a smaller batch")


def tabulate(plan: Plan, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Return a row for each topology, and the estimate used for computing time: the first that all compiled ones have.

  `reports` are the train step's reports for plan.compiled, after `check`.
  """
  compiled: dict[chips.Topology, Row] = {}
  bound_name = next((bound for bound in preflight.BOUNDS if all(report[bound] for report in reports)), "")
  for topology, report in zip(plan.compiled, reports, strict=True):
    memory = report["memory_gib"]
    compiled[topology] = Row(
      topology=topology,
      images=report["images"],
      is_fitted=False,
      computing=report[bound_name],
      traffic=Traffic(**report["traffic"]),
      memory=memory["total"],
      room=memory["chip"],
    )
  rows = [
    compiled.get(topology) or _fit(topology, [compiled[small] for small in plan.like(topology)])
    for topology in plan.topologies
  ]
  return {"planned_by": bound_name, "rows": [row.as_json(rows[0]) for row in rows]}


def _fit(topology: chips.Topology, rows: Sequence[Row]) -> Row:
  numbers, last = [row.topology.size for row in rows], rows[-1]
  extrapolated = lambda values, terms: fitted(numbers, values, topology.size, terms)
  moved = {name: [vars(row.traffic)[name] for row in rows] for name in vars(last.traffic)}
  traffic = {name: extrapolated(values, BYTES) for name, values in moved.items()}
  # Never take fewer hops than the last: without an axis `data` XLA joins fewer sums, so the smallest may have more.
  for name in ("links_hops", "network_hops"):
    traffic[name] = max(moved[name][-1], fitted(numbers[-2:], moved[name][-2:], topology.size, HOPS))
  return dataclasses.replace(
    last,
    topology=topology,
    images=last.images // numbers[-1] * topology.size,
    is_fitted=True,
    traffic=Traffic(**traffic),
    memory=extrapolated([row.memory for row in rows], MEMORY),
  )


def lines(table: Mapping[str, Any]) -> Iterator[str]:
  """Yield the lines of a readable table."""
  estimate = preflight.ESTIMATES.get(table["planned_by"], "the chips' peak, a lower bound")
  yield f"weak scaling; nothing overlaps, computing by {estimate}"
  yield "topology       images  step, ms  GiB into one chip  GiB a chip  images/s  efficiency"
  for row in table["rows"]:
    kind = row["row"] if row["fits"] else f"{row['row']}, DOES NOT FIT"
    yield (
      f"{row['topology']:<12}{row['images']:>9,}{1e3 * row['seconds']:>10.1f}{row['between_chips_gib']:>19.3f}"
      f"{row['memory_gib']:>12.2f}{row['images_per_second']:>10,.0f}{100 * row['efficiency']:>10.1f} %  {kind}"
    )


def scale(platform: str, plan: Plan) -> dict[str, Any]:
  """Return the table of a weak scaling, and the report of each compiled topology.

  Raises UserError at the first topology without a program, before the next ones are compiled.
  """
  reports = {}
  for topology in plan.compiled:
    config = FLAGS.config.copy_and_resolve_references()
    config.batch_size = plan.batch_size(topology, config.batch_size)
    reports[topology.name] = preflight.estimate(config, platform, topology)
    check(topology, reports[topology.name])
  table = tabulate(plan, [*reports.values()])
  for line in lines(table):
    logging.info("%s", line)
  return {"scaling": table, "compiled": reports}


def main(argv: object) -> None:
  if FLAGS.slices > 1:
    raise UserError("weak scaling is of one slice; leave out --slices")
  plan = Plan.of(FLAGS.topology, FLAGS.scaling, FLAGS.fit_above)
  plan.batch_size(plan.topologies[0], FLAGS.config.batch_size)  # refuse a wrong size before anything is compiled
  if FLAGS.out:
    files.check_out(FLAGS.out)
  results = scale(preflight.prepare(plan.compiled[-1]), plan)
  if FLAGS.out:
    files.write_out(FLAGS.out, files.as_json(results))


if __name__ == "__main__":
  preflight.define_flags()
  flags.DEFINE_list("scaling", None, "numbers of chips, such as 4,16,64", required=True)
  flags.DEFINE_integer("fit_above", None, "more chips are fitted, not compiled", lower_bound=1)
  cli.run(main)
