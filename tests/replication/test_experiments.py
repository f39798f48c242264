"""Test that the plans in replication/configs/experiments.py are those of replication/protocol.md and of the runs."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import pytest

from configs import clip_cc3m, common
from diffdis_jax import config as run_config
from diffdis_jax.ablate import plan as planning
from diffdis_jax.common import cli
from diffdis_jax.run import workdir
from replication import arms
from replication.configs import experiments
from replication.measured import replication

pytestmark = pytest.mark.slow

PAGE = (pathlib.Path(__file__).parents[2] / "replication/protocol.md").read_text()
SCENES, EMOJI, SHAPES_LT = "scenes.py:measured=test", "emoji.py:path=data/emoji", "shapes_lt.py"
BASES = {
  **dict.fromkeys(("e1", "e3"), SCENES),
  **dict.fromkeys(("e2", "e4", "e4_rates", "e6", "e7", "e8", "e9"), EMOJI),
  "e5": SHAPES_LT,
}
EMOJI_CLAIM = ("val_vendor/acc1", 2.0)


def plan_of(name: str) -> tuple[planning.Plan, tuple[arms.Claim, ...]]:
  base = f"replication/configs/{BASES[name]}"
  experiment = arms.read(f"replication/configs/experiments.py:{name}", base=base, overrides={})
  config = cli.read_config(base).to_dict()
  autoencoder = planning.find_autoencoder(base, {}, config)
  return planning.make(config, autoencoder, [experiment.table], range(5), own_starts=True), experiment.claims


def of_first_seed(name: str) -> dict[str, planning.Run]:
  """Return the runs of seed 0 by arm, after checking that each has a valid config."""
  plan, _ = plan_of(name)
  runs = {run.name.partition("-seed_0-")[0]: run for run in plan.runs if "-seed_0-" in run.name}
  assert len({run.name for run in plan.runs}) == len(plan.runs) == 5 * len(runs)
  for run in runs.values():
    run_config.Run.of(run.config)
  return runs


def without_digest(run: str | None) -> str | None:
  return run and run.rpartition("-")[0]


@pytest.mark.parametrize("name", [name for name in BASES if name != "e4_rates"])
def test_the_plan_is_the_one_that_ran(name):
  """The plan has the arms, starts, objectives and comparisons of the archive. Digests differ, since the config grew."""
  plan, claims = plan_of(name)
  archive = replication.stored()
  ran = {without_digest(run): (without_digest(of["start"]), of["objectives"]) for run, of in archive["runs"].items()}
  for run in plan.runs:
    start = without_digest(run.start.name) if run.start else None
    assert ran[without_digest(run.name)] == (start, [*run.config["objectives"]])
  fields = ("row", "base", "column", "bound")
  named = [tuple(getattr(claim, field) for field in fields) for claim in claims]
  assert named == [tuple(claim[field] for field in fields) for claim in archive["claims"][name]]


def steps_of(runs: Mapping[str, planning.Run]) -> dict[str, int]:
  return {arm: run.config["num_steps"] for arm, run in runs.items() if arm != "autoencoder"}


def test_arms_have_equal_steps_or_equal_minutes():
  seconds = experiments.EMOJI_STEP_SECONDS
  e1, e2, e8 = (steps_of(of_first_seed(name)) for name in ("e1", "e2", "e8"))
  assert {e1[arm] for arm in ("generation", "discrimination", "both")} == {900} and e1["generation_then_both"] == 450
  long = e2.pop("discrimination_as_long_as_both_stages")
  assert {*e2.values()} == {600} and long == 600 + round(600 * seconds["generation"] / seconds["discrimination"])
  long = e8.pop("discrimination_as_long_as_both")
  assert {*e8.values()} == {600} and long == round(
    600 * seconds["generation+discrimination"] / seconds["discrimination"]
  )


def test_a_clip_has_the_additions_and_the_rate_that_were_chosen_for_it():
  runs = of_first_seed("e4")
  model = lambda arm: runs[arm].config["model"]
  additions = lambda arm: (
    model(arm).get("alignment", model(arm).get("vision_encoder")).get("spatial_pool", 0),
    model(arm)["text_encoder"]["token_embedding_weight"],
  )
  assert additions("discrimination") == additions("CLIP_with_parts") == (4, 8.0)
  assert additions("discrimination_without_additions") == additions("CLIP") == (0, 0.0)
  assert model("convolutional_CLIP")["vision_encoder"]["tower"] == "convolutional"
  for arm, run in runs.items():
    for clip, rate in experiments.CLIP_RATES.items():
      if arm.replace("_", " ") in (clip, f"{clip}, as long as DiffDis", f"{clip} as long as DiffDis"):
        assert run.config["optim"]["rates"]["new"] == rate
  rates = [run.config["optim"]["rates"]["new"] for run in of_first_seed("e4_rates").values()]
  assert sorted(rates) == sorted(3 * experiments.RATES)


def test_stages_of_long_tailed_runs_share_their_classes_and_their_network():
  runs = of_first_seed("e5")
  for model, depth in (("DiffDis", 3), ("CLIP", 2)):
    for classes, split in (("all", "start_all"), ("no_low", "start")):
      run = runs[f"{model}_{classes}_classes"]
      before = run.start.start
      assert run.depth == depth and before.config["data"]["split"] == split and before.config["num_steps"] == 300
      assert not before.start or before.start.config["data"]["split"] == split
      own = {**run.config["model"]}
      assert own.pop("head") and own == run.start.config["model"] == before.config["model"]


def test_recipes_of_augmentation_differ_in_nothing_else():
  runs = of_first_seed("e6")
  plain = common.base(clip_cc3m.clip_small(), image_size=32).data.augment.to_dict()
  for recipe, run in runs.items():
    assert run.config["data"]["augment"] == plain | clip_cc3m.RECIPES[recipe] and run.config["num_steps"] == 600
  changes = changes_of(runs["openclip"], runs["paper"])
  assert changes and all(field.startswith("data.augment") for field in changes)


def changes_of(run: planning.Run, base: planning.Run) -> dict[str, Any]:
  before = workdir.identity(base.config)
  return {field: value for field, value in workdir.identity(run.config).items() if value != before[field]}


@pytest.mark.parametrize("name, base", [("e3", "both"), ("e7", "discrimination_no_spatial_pooling"), ("e9", "both")])
def test_an_arm_changes_one_field_that_the_protocol_names(name, base):
  runs = of_first_seed(name)
  bases = {base, "autoencoder", "discrimination"}
  section = PAGE.split(f"### {name.upper()}\n")[1].split("\n##")[0]
  for arm in runs.keys() - bases:
    start = "discrimination" if name == "e3" and runs[arm].config["objectives"] == ("discrimination",) else base
    (field,) = changes_of(runs[arm], runs[start])
    assert field in section or field.rpartition(".")[2] in section, arm
  fields = workdir.identity(runs["discrimination_no_spatial_pooling" if name == "e7" else base].config)
  assert name != "e7" or (fields["text_diffusion.gamma"], fields["text_diffusion.schedule"]) == (0.1, "scaled_linear")


@pytest.mark.parametrize("name", [name for name in experiments.EXPERIMENTS if name != "e4_rates"])
def test_the_protocols_list_has_figure_and_bound_of_every_experiment(name):
  claims = experiments.EXPERIMENTS[name]()["claims"]
  words = {"val_vendor/acc1": "top-1", "test/acc_low": "low", "test_unseen_generated/acc1_attributes": "attributes"}
  (line,) = (line for line in PAGE.splitlines() if line.startswith((f"| {name.upper()} |", f"| {name.upper()}, ")))
  *_, figures, bound, _ = line.split("|")
  assert {claim["bound"] for claim in claims} == {float(bound)}
  assert all(words.get(claim["column"], "5-way") in figures for claim in claims)
