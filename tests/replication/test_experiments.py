"""Test that the plans of replication/configs/experiments.py are those of replication/protocol.md."""

from __future__ import annotations

import pathlib
import types

import pytest

from configs import clip_cc3m, common
from diffdis_jax import config as run_config
from diffdis_jax.ablate import plan as planning
from diffdis_jax.common import cli
from diffdis_jax.run import workdir
from replication import arms
from replication.configs import experiments

pytestmark = pytest.mark.slow

PAGE = (pathlib.Path(__file__).parents[2] / "replication/protocol.md").read_text()
SCENES, EMOJI, SHAPES_LT = (
  "replication/configs/scenes.py:measured=test",
  "replication/configs/emoji.py:path=data/emoji",
  "replication/configs/shapes_lt.py",
)
SECONDS = {"generation": 2.0, "discrimination": 1.0, "discrimination without additions": 0.5}
SECONDS |= {"CLIP": 0.25, "CLIP with parts": 0.5, "convolutional CLIP": 2.0, "generation+discrimination": 2.5}
FILE = "replication/configs/experiments.py"
CHOSEN = {"CLIP": 1e-3, "CLIP with parts": 3e-4, "convolutional CLIP": 1e-3}


def section_of(name):
  return PAGE.split(f"### {name}\n")[1].split("\n##")[0]


def plan_of_replication(name, base=SCENES):
  experiment = arms.read(f"{FILE}:{name}", base=base, overrides={})
  config = cli.read_config(base).to_dict()
  autoencoder = planning.find_autoencoder(base, {}, config)
  plan = planning.make(config, autoencoder, [experiment.table], range(5), own_starts=True)
  assert len({run.name for run in plan.runs}) == len(plan.runs)
  return types.SimpleNamespace(**vars(plan), claims=experiment.claims)


def test_the_plan_of_the_first_experiment():
  plan = plan_of_replication("e1")
  for run in plan.runs[:10]:
    run_config.Run.of(run.config)
  assert len(plan.runs) == 50
  rows = {row.label: row for row in plan.tables[0].rows}
  section = section_of("E1")
  names = {"test_unseen/acc1": "5-way", "test_unseen_generated/acc1_attributes": "attributes"}
  for claim in plan.claims:
    assert f"| {claim.row} − {claim.base} | {names[claim.column]} |" in section and claim.bound == 3
  assert len(plan.claims) == section.count(" − ") == 4
  assert {rows[name].changes["num_steps"] for name in ("generation", "discrimination", "both")} == {900}
  both = rows["generation, then both"]
  assert both.changes["num_steps"] == both.start.changes["num_steps"] == 450
  for name, sections in ((run.name, run.evals) for run in plan.runs[:10]):
    assert all("test" in section["data"]["split"] for key, section in sections.items() if key != "held_out"), name


def test_the_third_experiment_has_its_base_runs_from_the_first():
  first, third = plan_of_replication("e1"), plan_of_replication("e3")
  names = {run.name for run in first.runs}
  shared = [run.name.partition("-")[0] for run in third.runs if run.name in names]
  assert sorted(shared) == sorted(["autoencoder", "both", "discrimination"] * 5)
  assert len(third.claims) == 10 and {claim.column for claim in third.claims} == {"test/acc1"}
  base = {run.name.partition("-seed_0")[0]: workdir.identity(run.config) for run in third.runs if "seed_0" in run.name}
  section = section_of("E3")
  for claim in third.claims:
    name = claim.row.replace(" ", "_")
    (field,) = (field for field, value in base[name].items() if value != base[claim.base][field])
    assert field in section and claim.bound == 3


@pytest.fixture
def timed(monkeypatch, tmp_path):
  """Return timed(name), which makes the plan of an experiment on emoji with invented seconds and rates."""
  file = tmp_path / "timed.py"
  file.write_text("from replication.configs.experiments import get_config\n")
  monkeypatch.setattr(experiments, "EMOJI_STEP_SECONDS", SECONDS)
  monkeypatch.setattr(experiments, "CLIP_RATES", CHOSEN)
  original = arms.read
  chosen = lambda path, **given: original(path.replace(FILE, str(file)), **given)
  monkeypatch.setattr(arms, "read", chosen)
  return lambda name, base=EMOJI: plan_of_replication(name, base)


def of_first_seed(plan):
  """Return the runs of seed 0 by their arms."""
  for run in plan.runs:
    run_config.Run.of(run.config)
  return {run.name.partition("-seed_0")[0]: run for run in plan.runs if "-seed_0-" in run.name}


def test_the_plan_of_the_second_experiment(timed):
  plan = timed("e2")
  runs = of_first_seed(plan)
  assert len(plan.runs) == 5 * len(runs) == 35
  steps = {name: run.config["num_steps"] for name, run in runs.items() if name != "autoencoder"}
  long = steps.pop("discrimination_as_long_as_both_stages")
  assert {*steps.values()} == {600} and long == 600 * (2 + 1)
  start = lambda name: runs[name].start.name.partition("-seed")[0]
  assert start("discrimination_after_generation") == "generation"
  assert start("discrimination_after_generation_without_captions") == "generation_without_captions"
  assert start("generation") == start("discrimination") == start("discrimination_as_long_as_both_stages")
  assert runs["generation_without_captions"].config["loss"]["condition_dropout"] == 1.0
  assert {claim.row for claim in plan.claims} == {"discrimination after generation"} and len(plan.claims) == 3
  section = section_of("E2")
  for row in plan.tables[0].rows:
    assert f"| {row.label} |" in section
  assert {(claim.column, claim.bound) for claim in plan.claims} == {("val_vendor/acc1", 2.0)}


def test_the_plan_of_the_fourth_experiment(timed):
  plan = timed("e4")
  runs = of_first_seed(plan)
  steps = {name: run.config["num_steps"] for name, run in runs.items()}
  assert len(plan.runs) == 5 * len(runs) == 45
  assert [value for name, value in steps.items() if "as_long" in name] == [1200, 1200, 300]
  assert {value for name, value in steps.items() if "as_long" not in name} == {600, 1500}  # the autoencoder's
  model = lambda name: runs[name].config["model"]
  additions = lambda name: (
    model(name).get("alignment", model(name).get("vision_encoder")).get("spatial_pool", 0),
    model(name)["text_encoder"]["token_embedding_weight"],
  )
  assert additions("discrimination") == additions("CLIP_with_parts") == (4, 8.0)
  assert additions("discrimination_without_additions") == additions("CLIP") == (0, 0.0)
  assert model("convolutional_CLIP")["vision_encoder"]["tower"] == "convolutional"
  assert runs["CLIP_with_parts_as_long_as_DiffDis"].config["optim"]["rates"]["new"] == 3e-4
  base = "discrimination", "discrimination without additions"
  assert {(claim.row, claim.base) for claim in plan.claims} == {
    (row, f"{clip}{long}")
    for row, clip in zip(base, ("CLIP with parts", "CLIP"), strict=True)
    for long in ("", ", as long as DiffDis")
  }
  second = {run.name for run in timed("e2").runs}
  assert {run.name.partition("-")[0] for run in plan.runs if run.name in second} == {"autoencoder", "discrimination"}


def test_each_clip_has_its_rate_from_a_plan_of_its_own():
  plan = plan_of_replication("e4_rates", EMOJI)
  runs = of_first_seed(plan)
  assert sorted(run.config["optim"]["rates"]["new"] for run in runs.values()) == sorted(3 * experiments.RATES)
  assert len(runs) == 9 and not plan.claims and {run.config["num_steps"] for run in runs.values()} == {600}
  assert {*CHOSEN} == {*experiments.CLIPS}


def test_the_plan_of_the_fifth_experiment():
  """A seed has a chain of runs: an autoencoder for DiffDis, a start, two stages."""
  plan = plan_of_replication("e5", SHAPES_LT)
  runs = of_first_seed(plan)
  assert len(plan.runs) == 5 * len(runs) == 70
  for model, depth in (("DiffDis", 3), ("CLIP", 2)):
    for classes, split in (("all", "start_all"), ("no_low", "start")):
      run = runs[f"{model}_{classes}_classes"]
      assert run.depth == depth and run.config["objectives"] == ("long_tail_head",)
      before = run.start.start
      assert run.start.config["objectives"] == ("class_contrastive",)
      assert before.config["data"]["split"] == split and before.config["num_steps"] == 300
      assert not before.start or before.start.config["data"]["split"] == split
      # It has the network of its start, since it takes those weights.
      own = {**run.config["model"]}
      assert own.pop("head") and own == run.start.config["model"] == before.config["model"]
      assert run.config["text_diffusion"] == before.config["text_diffusion"]
  assert [(claim.row, claim.base, claim.column, claim.bound) for claim in plan.claims] == [
    ("DiffDis, no low classes", "CLIP, no low classes", "test/acc_low", 3.0),
    ("DiffDis, no low classes", "DiffDis, all classes", "test/acc_low", 3.0),
  ]


def test_the_plan_of_the_sixth_experiment():
  plan = plan_of_replication("e6", EMOJI)
  runs = of_first_seed(plan)
  plain = common.base(clip_cc3m.clip_small(), image_size=32).data.augment.to_dict()
  for recipe, run in runs.items():
    assert run.config["data"]["augment"] == plain | clip_cc3m.RECIPES[recipe] and run.config["num_steps"] == 600
  differing = {
    field
    for field, value in workdir.identity(runs["paper"].config).items()
    if value != workdir.identity(runs["openclip"].config)[field]
  }
  assert differing and all(field.startswith("data.augment") for field in differing)
  (claim,) = plan.claims
  assert (claim.row, claim.base, claim.bound) == ("paper", "openclip", 2.0) and len(plan.runs) == 10


def test_the_plan_of_the_seventh_experiment(timed):
  """Each arm changes one thing, nothing bypasses the fusion block, and the autoencoders are those of E2."""
  plan = plan_of_replication("e7", EMOJI)
  runs = of_first_seed(plan)
  base = workdir.identity(runs["discrimination_no_spatial_pooling"].config)
  assert base["model.alignment.spatial_pool"] == 0 and base["model.text_encoder.token_embedding_weight"] == 8.0
  assert (base["text_diffusion.gamma"], base["text_diffusion.schedule"]) == (0.1, "scaled_linear")
  changed = [
    {field: value for field, value in workdir.identity(run.config).items() if value != base[field]}
    for name, run in runs.items()
    if name not in ("autoencoder", "discrimination_no_spatial_pooling")
  ]
  expected = [
    *({f"model.{name}": False} for name in ("fusion", "share_attention", "modality_ffn")),
    {"text_diffusion.target": "noise"},
    *({"text_diffusion.gamma": gamma} for gamma in (1.0, 0.3)),
    *({"text_diffusion.schedule": name} for name in ("cosine", "linear")),
  ]
  assert all(change in changed for change in expected) and len(changed) == len(expected) == len(plan.claims)
  assert {run.config["num_steps"] for name, run in runs.items() if name != "autoencoder"} == {600}
  assert {(claim.base, claim.column, claim.bound) for claim in plan.claims} == {
    ("discrimination, no spatial pooling", "val_vendor/acc1", 2.0)
  }
  assert len(plan.runs) == 50 and runs["autoencoder"].name in {run.name for run in timed("e2").runs}
  for field, value in (item for change in expected for item in change.items()):
    assert f"`{field}={value}`" in section_of("E7") or f"`{field}` " in section_of("E7")


def test_the_plan_of_the_eighth_experiment(timed):
  """The arms have equal steps, then equal minutes. `discrimination` is the run of E2."""
  plan = timed("e8")
  runs = of_first_seed(plan)
  seconds = experiments.EMOJI_STEP_SECONDS
  longer = round(600 * seconds["generation+discrimination"] / seconds["discrimination"])
  assert {name: run.config["num_steps"] for name, run in runs.items() if name != "autoencoder"} == {
    "discrimination": 600,
    "both": 600,
    "discrimination_as_long_as_both": longer,
  }
  assert longer > 600 and runs["both"].config["objectives"] == ("generation", "discrimination")
  assert {runs[name].name for name in ("autoencoder", "discrimination")} <= {run.name for run in timed("e2").runs}
  assert {(claim.row, claim.base, claim.column, claim.bound) for claim in plan.claims} == {
    ("both", base, "val_vendor/acc1", 2.0) for base in ("discrimination", "discrimination as long as both")
  }


def test_the_plan_of_the_ninth_experiment(timed):
  """Only the timestep of the clean image differs from `both` of E8."""
  plan = timed("e9")
  runs = of_first_seed(plan)
  config = {name: workdir.identity(run.config) for name, run in runs.items()}
  section = section_of("E9")
  for t_z in (0, 999):
    name = f"timestep_{t_z}"
    (field,) = (field for field, value in config[name].items() if value != config["both"][field])
    assert (field, config[name][field]) == ("condition_timestep", t_z) and f"| timestep {t_z} |" in section
  assert config["both"]["condition_timestep"] == 1000
  assert {*runs} == {"autoencoder", "both", "timestep_0", "timestep_999"}
  assert {runs[name].name for name in ("autoencoder", "both")} <= {run.name for run in timed("e8").runs}
  assert {(claim.row, claim.base, claim.column, claim.bound) for claim in plan.claims} == {
    (f"timestep {t_z}", "both", "val_vendor/acc1", 2.0) for t_z in (0, 999)
  }


@pytest.mark.parametrize("name", [name for name in experiments.EXPERIMENTS if name != "e4_rates"])
def test_the_protocols_list_has_figure_and_bound_of_every_experiment(name):
  claims = experiments.EXPERIMENTS[name]()["claims"]
  words = {"val_vendor/acc1": "top-1", "test/acc_low": "low", "test_unseen_generated/acc1_attributes": "attributes"}
  (line,) = (line for line in PAGE.splitlines() if line.startswith((f"| {name.upper()} |", f"| {name.upper()}, ")))
  *_, figures, bound, _ = line.split("|")
  assert {claim["bound"] for claim in claims} == {float(bound)}
  assert all(words.get(claim["column"], "5-way") in figures for claim in claims)
