"""Test which runs the paper's tables and a grid need, and what the names of runs depend on."""

from __future__ import annotations

import os
import pathlib

import pytest

from diffdis_jax.ablate import plan as planning
from diffdis_jax.ablate import tables
from diffdis_jax.ablate.run import Folder
from diffdis_jax.common import cli
from diffdis_jax.errors import UserError
from diffdis_jax.run import workdir
from tests.ablate.synthetic import base, make_plan


@pytest.mark.parametrize("name", ["tiny", "emoji", "paper"])
def test_the_papers_tables_need_nine_runs_for_each_seed(name):
  """One run serves Table 2's row "data", Table 3's row of the base's schedule and Table 7's row t_z = 1000; another
  serves the base rows of Tables 4 and 5."""
  config = base(name)
  asked_tables = tables.choose(["2", "3", "4", "5", "7"], schedule=config.text_diffusion.schedule)
  plan = planning.make(config.to_dict(), None, asked_tables, (0, 1, 2))
  assert len(plan.runs) == 27 and len({run.name for run in plan.runs}) == 27
  number = {"cosine": 0, "scaled_linear": 1}[config.text_diffusion.schedule]
  assert plan.rows["2", 1] == plan.rows["3", number] == plan.rows["7", 2]
  assert plan.rows["4", 1] == plan.rows["5", 2]
  assert [run.config["seed"] for run in plan.rows["4", 0]] == [0, 1, 2]
  assert [run.config["seed"] for run in plan.runs] == [0] * 9 + [1] * 9 + [2] * 9
  assert {table.name: table.base for table in asked_tables} == {"2": 1, "3": number, "4": 1, "5": 2, "7": 2}


def test_rows_change_the_fields_that_the_paper_changes():
  plan = make_plan(seeds=(5,))
  changed = {}
  base_fields = workdir.flatten(plan.base)
  for (table, row), (run,) in plan.rows.items():
    run_fields = workdir.flatten(run.config)
    changed[table, row] = {
      field: run_fields[field] for field in run_fields if field != "seed" and run_fields[field] != base_fields[field]
    }
  gamma = {"text_diffusion.gamma": 1.0}
  assert changed == {
    ("2", 0): gamma | {"text_diffusion.target": "noise"},
    ("2", 1): gamma,
    ("3", 0): gamma | {"text_diffusion.schedule": "cosine"},
    ("3", 1): gamma,
    ("4", 0): {"model.fusion": False},
    ("4", 1): {},
    ("5", 0): {"model.modality_ffn": False},
    ("5", 1): {"model.share_attention": False},
    ("5", 2): {},
    ("7", 0): gamma | {"condition_timestep": 0},
    ("7", 1): gamma | {"condition_timestep": 999},
    ("7", 2): gamma,
  }


def test_rows_about_the_fusion_block_turn_it_on():
  """Without the fusion block, all rows of Table 5 would be the same network."""
  config = base()
  config.model.fusion = False
  plan = make_plan(config, names=["5"], seeds=(0,))
  assert [plan.rows["5", row][0].config["model"]["fusion"] for row in range(3)] == [True] * 3


def test_one_autoencoder_comes_first_and_all_runs_start_from_it():
  plan = make_plan()
  first, *others = plan.runs
  assert len(others) == 27 and first.name.startswith("autoencoder-") and not first.evals
  assert {run.start for run in others} == {first}
  assert first.config["objectives"] == ("reconstruction",)


def test_runs_with_another_image_size_have_another_autoencoder():
  plan = make_plan(grid="image_size=16,32", seeds=(0, 1))
  small, large = plan.runs[:2]
  assert [run.config["image_size"] for run in (small, large)] == [16, 32]
  assert [run.start for run in plan.runs[2:]] == [small, large] * 2
  assert len(make_plan(grid="loss.ita_weight=0.1,0.2", seeds=(0, 1)).runs) == 5


def test_an_autoencoder_takes_the_fields_of_the_base_that_it_has(tmp_path):
  path, config = "tests/tiny.py", base()
  given = {"image_size": 32, "num_steps": 3, "data.path": "somewhere", "loss.ita_weight": 0.5}
  autoencoder = planning.find_autoencoder(path, given, config.to_dict())
  assert (autoencoder["image_size"], autoencoder["num_steps"], autoencoder["data"]["path"]) == (32, 8, "somewhere")
  config.init_from = "elsewhere"
  assert planning.find_autoencoder(path, given, config.to_dict()) is None
  emoji = "replication/configs/emoji.py:path=P"
  assert planning.find_autoencoder(emoji, {}, cli.read_config(emoji).to_dict())["data"]["path"] == "P"
  contrastive = "configs/shapes.py:objectives=contrastive"
  assert planning.find_autoencoder(contrastive, {}, cli.read_config(contrastive).to_dict()) is None
  assert planning.find_autoencoder("configs/diffdis_cc3m.py", {}, base("paper").to_dict()) is None


def test_the_name_of_a_run_depends_on_its_training_alone(tmp_path, monkeypatch):
  name = lambda config, **fields: make_plan(config, names=["4"], seeds=(0,), **fields).rows["4", 1][0].name
  config = base()
  first = name(config)
  # Frozen: later versions must find the runs of earlier ones.
  assert planning.digest({"a.b": 0.1, "c": (1, 2), "d": "x"}) == planning.digest({"d": "x", "c": [1, 2], "a.b": 0.1})
  assert planning.digest({"a.b": 0.1, "c": (1, 2), "d": "x"}) == "ec4025ea"  # computed by sha256sum
  config.mesh.data, config.log_every, config.data.loader.num_threads = 1, 1, 3
  config.evals.test.data.num_images = 8
  config.seed = 17  # each row sets its own
  assert name(config) == first
  monkeypatch.chdir(tmp_path)
  assert name(config) == first
  config.loss.ita_weight = 0.5
  assert name(config) != first


def test_a_row_has_the_evaluations_of_its_objectives():
  plan = make_plan(grid="objectives=('generation',),('discrimination',),('generation','discrimination')", seeds=(0,))
  generation, discrimination, joint = (plan.rows["grid", place][0] for place in range(3))
  assert {*generation.evals} == {"generated", "held_out"}
  assert {*discrimination.evals} == {"test", "unseen", "test_retrieval", "held_out"}
  assert {*joint.evals} == {*generation.evals, *discrimination.evals}
  assert plan.tables[0].base == 2 and plan.tables[0].rows[2].label == "objectives = generation + discrimination"


def test_a_grid_has_a_row_for_each_combination():
  table = tables.grid("loss.ita_weight=0.003,0.01; text_diffusion.schedule=cosine,scaled_linear", base().to_dict())
  fields = ("loss.ita_weight", "text_diffusion.schedule")
  assert [tuple(row.changes[field] for field in fields) for row in table.rows] == [
    (0.003, "cosine"),
    (0.003, "scaled_linear"),
    (0.01, "cosine"),
    (0.01, "scaled_linear"),
  ]
  assert table.base == 3  # this row equals the base
  assert tables.grid("model.fusion=false,true", base().to_dict()).rows[0].changes == {"model.fusion": False}
  assert tables.grid("text_diffusion.gamma=1", base().to_dict()).rows[0].changes == {"text_diffusion.gamma": 1.0}


@pytest.mark.parametrize(
  "grid, message",
  [
    ("loss.ita_wieght=1", r"unknown config key loss.ita_wieght; did you mean loss.ita_weight\?"),
    ("loss=1", "loss is a section, not a field; it has "),
    ("loss.ita_weight", "write it as field=value,value"),
    ("loss.ita_weight=", "write it as field=value,value"),
    (" ; ", "--grid is empty"),
    ("loss.ita_weight=big", "'big'; it must be a number, such as 0.01"),
    ("model.fusion=1", "1; it must be True or False"),
    ("seed=0,1", "the seeds of every row are --seeds"),
    ("loss.ita_weight=0.1,0.2,0.1", "a value twice, which would be two runs of one name"),
    ("loss.ita_weight=0.1;loss.ita_weight=0.2", "loss.ita_weight twice"),
  ],
)
def test_a_wrong_grid_is_refused(grid, message):
  with pytest.raises(UserError, match=message) as error:
    tables.grid(grid, base().to_dict())
  assert "\n" not in str(error.value)


def test_wrong_tables_seeds_and_bases_are_refused():
  choose = lambda *names: tables.choose(names, schedule="cosine")
  for name in ("6", "2"):
    with pytest.raises(UserError, match=f"--tables has '{name}'; it takes each of 2,3,4,5,7 once"):
      choose("2", name)
  with pytest.raises(UserError, match="--seeds=0,0 should be different numbers"):
    make_plan(seeds=(0, 0))
  for seed in (-1, 2**32):
    with pytest.raises(UserError, match=f"--seeds is {seed}; it must be at least 0 and at most 4294967295"):
      make_plan(seeds=(0, seed))
  clip = base("emoji")
  del clip.model.fusion
  with pytest.raises(UserError, match="unknown config key model.fusion"):
    planning.make(clip.to_dict(), None, choose("4"), (0,))
  config = base()
  config.evals = {"held_out": base().evals.held_out}
  with pytest.raises(UserError, match="base's evaluations, held_out, these rows measure none that has a column"):
    planning.make(config.to_dict(), None, choose("4"), (0,))
  config = base()
  del config.evals["generated"]
  with pytest.raises(UserError, match="no evaluation of the base measures objectives reconstruction"):
    make_plan(config, grid="objectives=('reconstruction',)")


def test_a_folder_holds_ablations_of_one_base(tmp_path):
  plan, folder = make_plan(), Folder(tmp_path / "out")
  folder.check(plan)
  assert not (tmp_path / "out").exists()
  folder.open(plan)
  folder.open(make_plan(grid="loss.ita_weight=0.1", seeds=(7,)))  # other rows of the same base
  other = base()
  other.loss.ita_weight = 0.5
  before = (tmp_path / "out" / "base.json").read_bytes()
  with pytest.raises(UserError, match="ablations of another base: loss.ita_weight is 0.01 there and 0.5 here"):
    folder.open(make_plan(other))
  assert (tmp_path / "out" / "base.json").read_bytes() == before
  for content in ("{", "{}", "[]"):
    (tmp_path / "out" / "base.json").write_text(content)
    with pytest.raises(UserError, match="base.json is no base of ablations; take a new --out"):
      folder.check(plan)
  with pytest.raises(UserError, match="is not empty and holds no ablations"):
    Folder(pathlib.Path(__file__).parent).check(plan)


def test_init_from_is_the_autoencoders_absolute_workdir(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  run = make_plan().runs[1]
  relative, absolute = Folder("out"), Folder(os.path.abspath("out"))
  assert relative.config(run)["init_from"] == absolute.config(run)["init_from"] == absolute.workdir(run.start)
  assert run.config["init_from"] == ""
  assert Folder("gs://bucket/out").workdir(run) == f"gs://bucket/out/runs/{run.name}"
