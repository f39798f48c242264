"""Test which runs an experiment of arms has, what each starts from, and which faults of a file are reported."""

from __future__ import annotations

import json
import re

import pytest
from ml_collections import ConfigDict

from diffdis_jax.ablate import plan as planning
from diffdis_jax.ablate import summary, tables
from diffdis_jax.ablate.run import Folder
from diffdis_jax.common import cli
from diffdis_jax.errors import UserError
from replication import arms, claims
from replication.configs.experiments import EXPERIMENTS
from replication.measured import records, replication
from tests import pages, tiny
from tests.ablate.synthetic import write

pytestmark = pytest.mark.slow

BASE = "tests/tiny.py"
CLAIM = dict(row="after", base="alone", column="test/acc1", bound=3.0)
ARMS = (
  dict(name="after", changes=dict(num_steps=6), start="first"),
  dict(name="first", changes=dict(objectives=("generation",)), minutes=0.5, measured=False),
  dict(name="alone", changes=dict(num_steps=12)),
  dict(name="clip", args="objectives=contrastive"),
)
FIELDS = dict(title="Which?", arms=ARMS, step_seconds={"generation": 2.0}, claims=(CLAIM,))


@pytest.fixture
def read(monkeypatch):
  """Return read(**fields), which reads an experiment with these fields on the tiny config."""
  original = cli.read_config

  def make(**fields):

    def chosen(path, flag="config"):
      # The tiny config takes no argument for CLIP; a config of its own replaces it.
      clip = "tests/tiny_clip.py" if path == f"{BASE}:objectives=contrastive" else path
      return ConfigDict(FIELDS | fields) if path == "file:x" else original(clip, flag)

    monkeypatch.setattr(cli, "read_config", chosen)
    return arms.read("file:x", base=BASE, overrides={"batch_size": 4})

  return make


def plan_of(experiment, seeds=(3, 5)):
  config = tables.changed(tiny.get_config().to_dict(), {"batch_size": 4})
  autoencoder = tiny.get_config("autoencoder").to_dict()
  return planning.make(config, autoencoder, [experiment.table], seeds, own_starts=True)


def test_the_experiments_of_the_pages_have_what_they_compare():
  """Their bases measure the columns that the claims name. No claim names CLIP's learning rates."""
  text = (pages.ROOT / "replication/index.md").read_text()
  named = {*re.findall(r"\| `(\w+\.py\S*)` \| `(\w+)` \|$", text, re.M)}
  assert {name for _, name in named} == {*EXPERIMENTS}
  for base, name in named:
    experiment = arms.read(
      f"replication/configs/experiments.py:{name}", base=f"replication/configs/{base}", overrides={}
    )
    assert bool(experiment.claims) is (name != "e4_rates")


def test_each_seed_has_its_own_chain(read):
  plan = plan_of(read())
  assert [run.config["seed"] for run in plan.runs] == [3] * 5 + [5] * 5
  for seed, of_seed in ((3, plan.runs[:5]), (5, plan.runs[5:])):
    by_name = {run.name.partition("-seed")[0]: run for run in of_seed}
    assert [*by_name] == ["autoencoder", "clip", "first", "alone", "after"]  # a run's start comes before the run
    assert {name: run.start and run.start.name for name, run in by_name.items()} == {
      "autoencoder": None,
      "clip": None,
      "first": by_name["autoencoder"].name,
      "alone": by_name["autoencoder"].name,
      "after": by_name["first"].name,
    }
    assert all(run.name.split("-")[1] == f"seed_{seed}" for run in of_seed)
    steps = {name: run.config["num_steps"] for name, run in by_name.items()}
    assert steps == {"autoencoder": 8, "clip": 8, "first": 15, "alone": 12, "after": 6}  # 30 s at 2 s a step
    assert {run.config["batch_size"] for name, run in by_name.items() if name != "autoencoder"} == {4}
    assert not by_name["first"].evals and by_name["alone"].evals
    assert by_name["clip"].config["objectives"] == ("contrastive",)
  folder = Folder("out")
  assert folder.config(plan.runs[4])["init_from"] == folder.workdir(plan.runs[2])


def test_claims_have_verdicts(read, tmp_path):
  """The differences of three seeds are 10, 11 and 12 points; by hand, the 95 % interval is 11 ± 4.30 / √3."""
  experiment = read()
  plan, folder = plan_of(experiment, (0, 1, 2)), Folder(tmp_path)
  write_claim(plan, folder, [(0.50, 0.40), (0.51, 0.40), (0.52, 0.40)])
  judged = claims.judge(experiment.claims, plan, summary.read_results(plan, folder))
  (claim,) = judged
  assert claim["values"] == {"after": {"0": 50.0, "1": 51.0, "2": 52.0}, "alone": {"0": 40.0, "1": 40.0, "2": 40.0}}
  difference, verdict = claim["verdict"]["difference"], claim["verdict"]
  assert (difference["mean"], difference["n"]) == (pytest.approx(11.0), 3)
  assert difference["low"] == pytest.approx(11 - 4.3027 / 3**0.5, abs=1e-3)
  assert verdict["words"] == "higher" and verdict["p_equivalent"] > 0.9
  text = claims.markdown(judged)
  assert "| after − alone | higher | test/acc1 | +11.00 [+8.52, +13.48] | 3 | 0.003, 0.003 | 3.3 | 3 |" in text
  summarised = summary.summarise(plan, folder, base="tiny")
  assert "− base" not in summary.markdown(summarised), "only the named comparisons are made"
  assert {*summarised["runs"]} == {run.name for run in plan.runs}


def test_the_records_of_an_experiment_are_kept(read, tmp_path):
  """Records have values by seed, as replication/measured reads them; other experiments' records stay."""
  experiment = read()
  plan, folder = plan_of(experiment, (0, 1, 2)), Folder(tmp_path)
  write_claim(plan, folder, [(0.50, 0.40), (0.51, 0.40), (0.52, 0.40)])
  judged = claims.judge(experiment.claims, plan, summary.read_results(plan, folder))
  summarised = json.loads(json.dumps(summary.summarise(plan, folder, base="tiny") | {"claims": judged}))
  merged = replication.merged({"records": {"e9/a/b": {}, "x/old/b": {}}}, replication.records_of(summarised))
  record = records.Record(**merged["records"]["x/after/test/acc1"])
  assert record.values == {"0": 50.0, "1": 51.0, "2": 52.0} and record.what == "after: top-1 test ↑"
  assert "e9/a/b" in merged["records"] and "x/old/b" not in merged["records"]
  assert {*record.of["runs"]} < {*merged["runs"]} and merged["settings"]["x"]["seeds"] == [0, 1, 2]
  assert merged["claims"]["x"][0]["verdict"]["words"] == "higher"


def test_a_claim_without_runs_has_no_verdict(read, tmp_path):
  experiment = read()
  plan = plan_of(experiment)
  judged = claims.judge(experiment.claims, plan, summary.read_results(plan, Folder(tmp_path)))
  assert judged[0]["verdict"] is None
  assert "| after − alone |  | test/acc1 |  |  |  |  | 3 |  |" in claims.markdown(judged)


def test_claims_are_corrected_for_those_that_are_not_done(read, tmp_path):
  """By hand, t = 11 √3 with two degrees of freedom has p = 1 - √(363 / 365). The diverged comparison counts too."""
  experiment = read(claims=(CLAIM, CLAIM | dict(column="unseen/acc1")))
  plan, folder = plan_of(experiment, (0, 1, 2)), Folder(tmp_path)
  for seed, of_seed in enumerate(zip(*(plan.rows[plan.tables[0].name, place] for place in (0, 1)), strict=True)):
    for run, value in zip(of_seed, (0.5 + seed / 100, 0.4), strict=True):
      write(folder, run, {"test": value, "unseen": float("nan")})
  done, other = claims.judge(experiment.claims, plan, summary.read_results(plan, folder))
  difference = done["verdict"]["difference"]
  assert difference["p"] == pytest.approx(0.002744, abs=1e-6) and difference["p_holm"] == 2 * difference["p"]
  assert done["verdict"]["p_equivalent_holm"] == 1.0 and other["verdict"] is None


def write_claim(plan, folder, figures):
  for seed, values in enumerate(figures):
    for label, value in zip(("after", "alone"), values, strict=True):
      place = [row.label for row in plan.tables[0].rows].index(label)
      write(folder, plan.rows[plan.tables[0].name, place][seed], {"test": value})


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(tittle="x"), "--arms=file:x has no field 'tittle'; it has arms, claims"),
    (dict(arms=(dict(name="a", start="b"),)), "arm a starts from 'b'; there are a"),
    (dict(arms=(dict(name="a", start="b"), dict(name="b", start="a"))), "arms start from each other: a from b from a"),
    (dict(arms=(dict(name="a", minutes=1.0),)), r"arm a has minutes, and step_seconds has no 'generation\+discrimi"),
    (dict(arms=(dict(name="a", changes=dict(seed=3)),)), "arm a has a seed, which has no effect: .* of --seeds"),
    (dict(claims=(CLAIM | dict(row="first"),)), "a claim names arm 'first'; measured are after, alone, clip"),
    (dict(claims=(CLAIM | dict(column="tets/acc1"),)), "a claim names column 'tets/acc1', which arm after lacks; it"),
  ],
)
def test_a_wrong_file_is_refused(read, fields, message):
  with pytest.raises(UserError, match=message):
    read(**fields)
