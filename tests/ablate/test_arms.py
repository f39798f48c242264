"""Experiments of arms: which runs they are, what each starts from, and what is wrong with a file."""

from __future__ import annotations

import json
import pathlib

import pytest
from ml_collections import ConfigDict

from diffdis_jax import config as run_config
from diffdis_jax.ablate import arms, render, summary, tables
from diffdis_jax.ablate import plan as planning
from diffdis_jax.ablate import run as running
from diffdis_jax.ablate.columns import columns_of
from diffdis_jax.ablate.folder import Folder
from diffdis_jax.common import cli
from diffdis_jax.errors import UserError
from diffdis_jax.run import workdir
from docs.measured import records, replication
from tests import tiny
from tests.ablate.synthetic import write

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
  """read(**fields): the experiment of these fields, on the tiny config."""
  original = cli.read_config

  def make(**fields):

    def chosen(path, flag="config"):
      # The tiny config takes no argument for CLIP; there is one beside it.
      clip = "tests/tiny_clip.py" if path == f"{BASE}:objectives=contrastive" else path
      return ConfigDict(FIELDS | fields) if path == "file:x" else original(clip, flag)

    monkeypatch.setattr(cli, "read_config", chosen)
    return arms.read("file:x", base=BASE, overrides={"batch_size": 4})

  return make


def plan_of(experiment, seeds=(3, 5)):
  config = tables.changed(tiny.get_config().to_dict(), {"batch_size": 4})
  autoencoder = tiny.get_config("autoencoder").to_dict()
  return planning.make(config, autoencoder, [experiment.table], seeds, own_starts=True, claims=experiment.claims)


def test_each_seed_has_its_own_chain(read):
  plan = plan_of(read())
  assert [run.config["seed"] for run in plan.runs] == [3] * 5 + [5] * 5
  for seed, of_seed in ((3, plan.runs[:5]), (5, plan.runs[5:])):
    by_name = {run.name.partition("-seed")[0]: run for run in of_seed}
    assert [*by_name] == ["autoencoder", "clip", "first", "alone", "after"]  # what is started from comes before
    assert {name: run.start and run.start.name for name, run in by_name.items()} == {
      "autoencoder": None,
      "clip": None,
      "first": by_name["autoencoder"].name,
      "alone": by_name["autoencoder"].name,
      "after": by_name["first"].name,
    }
    assert all(run.name.split("-")[1] == f"seed_{seed}" for run in of_seed)
    steps = {name: run.config["num_steps"] for name, run in by_name.items()}
    assert steps == {"autoencoder": 8, "clip": 8, "first": 15, "alone": 12, "after": 6}  # 30 s of 2 s each
    assert {run.config["batch_size"] for name, run in by_name.items() if name != "autoencoder"} == {4}
    assert not by_name["first"].evals and by_name["alone"].evals
    assert by_name["clip"].config["objectives"] == ("contrastive",)
  folder = Folder("out")
  assert folder.config(plan.runs[4])["init_from"] == folder.workdir(plan.runs[2])


def test_a_longer_start_makes_another_run(read):
  name = lambda experiment: [run.name for run in plan_of(experiment, (0,)).runs][-1]
  first = name(read())
  assert name(read()) == first
  longer = tuple(each | {"minutes": 1.0} if each["name"] == "first" else each for each in ARMS)
  assert name(read(arms=longer)) != first


def test_waves_keep_seeds_together(read):
  plan = plan_of(read())
  names = [[plan.runs[n].name.partition("-seed")[0] for n in wave] for wave in running._waves(plan, range(10))]
  first = ["autoencoder", "clip"], ["first", "alone"], ["after", "autoencoder", "clip"]
  assert names == [*map(list, first), ["first", "alone"], ["after"]]


def test_claims_have_verdicts(read, tmp_path):
  """Differences of 10, 11 and 12 points in three seeds; 95 % interval 11 ± 4.30 / √3, by hand."""
  plan, folder = plan_of(read(), (0, 1, 2)), Folder(tmp_path)
  write_claim(plan, folder, [(0.50, 0.40), (0.51, 0.40), (0.52, 0.40)])
  found = summary.summarise(plan, folder, columns_of(plan.base["evals"]), base="tiny")
  (claim,) = found["claims"]
  assert claim["values"] == {"after": {"0": 50.0, "1": 51.0, "2": 52.0}, "alone": {"0": 40.0, "1": 40.0, "2": 40.0}}
  difference, verdict = claim["verdict"]["difference"], claim["verdict"]
  assert (difference["mean"], difference["n"]) == (pytest.approx(11.0), 3)
  assert difference["low"] == pytest.approx(11 - 4.3027 / 3**0.5, abs=1e-3)
  assert verdict["words"] == "higher" and verdict["p_equivalent"] > 0.9
  text = render.markdown(found)
  assert "| after − alone | test/acc1 | +11.00 [+8.52, +13.48] | 3 | 0.003, 0.003 | 3.3 | 3 |" in text
  assert "− base" not in text  # only what was named is compared
  assert {*found["runs"]} == {run.name for run in plan.runs}


def test_what_is_kept_of_an_experiment(read, tmp_path):
  """Records by seed, as docs/measured reads them; those of another experiment stay."""
  plan, folder = plan_of(read(), (0, 1, 2)), Folder(tmp_path)
  write_claim(plan, folder, [(0.50, 0.40), (0.51, 0.40), (0.52, 0.40)])
  found = json.loads(json.dumps(summary.summarise(plan, folder, columns_of(plan.base["evals"]), base="tiny")))
  kept = replication.merged({"records": {"e9/a/b": {}, "x/old/b": {}}}, replication.records_of(found))
  record = records.Record(**kept["records"]["x/after/test/acc1"])
  assert record.values == {"0": 50.0, "1": 51.0, "2": 52.0} and record.what == "after: top-1 test ↑"
  assert "e9/a/b" in kept["records"] and "x/old/b" not in kept["records"]
  assert {*record.of["runs"]} < {*kept["runs"]} and kept["settings"]["x"]["seeds"] == [0, 1, 2]
  assert kept["claims"]["x"][0]["verdict"]["words"] == "higher"


def test_a_claim_without_runs_has_no_verdict(read, tmp_path):
  found = summary.summarise(plan_of(read()), Folder(tmp_path), (), base="tiny")
  assert found["claims"][0]["verdict"] is None
  assert "| after − alone | test/acc1 |  |  |  |  | 3 |  |  |" in render.markdown(found)


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
    (dict(arms=(dict(name="a"), dict(name="a"))), "has arms of one name"),
    (dict(arms=(dict(name="a", measured=False),)), "has no arm that is measured"),
    (dict(arms=(dict(name="a", minutes=0.0),)), "arms.minutes is 0.0; it must be above 0"),
    (dict(arms=(dict(name="a", minutes=1.0),)), r"arm a has minutes, and step_seconds has no 'generation\+discrimi"),
    (dict(claims=(CLAIM | dict(row="first"),)), "a claim names arm 'first'; measured are after, alone, clip"),
    (dict(claims=(CLAIM | dict(column="tets/acc1"),)), "a claim names column 'tets/acc1', which arm after lacks; it"),
    (dict(claims=(CLAIM | dict(bound=0.0),)), "claims: bound is 0.0; it must be above 0"),
  ],
)
def test_what_is_wrong_is_one_line(read, fields, message):
  with pytest.raises(UserError, match=message) as error:
    read(**fields)
  assert "\n" not in str(error.value)


def plan_of_replication(name, base="scenes:measured=test"):
  experiment = arms.read(f"replication:{name}", base=base, overrides={})
  config = cli.read_config(base).to_dict()
  autoencoder = planning.find_autoencoder(base, {}, config)
  plan = planning.make(config, autoencoder, [experiment.table], range(5), own_starts=True, claims=experiment.claims)
  assert len({run.name for run in plan.runs}) == len(plan.runs)
  return plan


def test_the_first_experiment_is_as_the_protocol_has_it():
  plan = plan_of_replication("e1")
  for run in plan.runs[:10]:
    run_config.Run.of(run.config)
  assert len(plan.runs) == 50
  rows = {row.label: row for row in plan.tables[0].rows}
  page = (pathlib.Path(__file__).parents[2] / "docs/replication/protocol.md").read_text()
  section = page.split("### E1")[1].split("### E2")[0]
  names = {"test_unseen/acc1": "5-way", "test_unseen_generated/acc1_attributes": "attributes"}
  for claim in plan.claims:
    assert f"| {claim.row} − {claim.base} | {names[claim.column]} |" in section and claim.bound == 3
  assert len(plan.claims) == section.count(" − ") == 4
  assert {rows[name].changes["num_steps"] for name in ("generation", "discrimination", "both")} == {900}
  both = rows["generation, then both"]
  assert both.changes["num_steps"] == both.start.changes["num_steps"] == 450
  for name, sections in ((run.name, run.evals) for run in plan.runs[:10]):
    assert all("test" in each["data"]["split"] for key, each in sections.items() if key != "held_out"), name


def test_the_third_experiment_has_its_base_runs_from_the_first():
  first, third = plan_of_replication("e1"), plan_of_replication("e3")
  names = {run.name for run in first.runs}
  shared = [run.name.partition("-")[0] for run in third.runs if run.name in names]
  assert sorted(shared) == sorted(["autoencoder", "both", "discrimination"] * 5)
  assert len(third.claims) == 10 and {claim.column for claim in third.claims} == {"test/acc1"}
  base = {run.name.partition("-seed_0")[0]: workdir.identity(run.config) for run in third.runs if "seed_0" in run.name}
  page = (pathlib.Path(__file__).parents[2] / "docs/replication/protocol.md").read_text()
  section = page.split("### E3")[1].split("### E4")[0]
  for claim in third.claims:
    name = claim.row.replace(" ", "_")
    (field,) = (field for field, value in base[name].items() if value != base[claim.base][field])
    assert field in section and claim.bound == 3
