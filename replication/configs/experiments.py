"""Define the experiments of replication/protocol.md for replication.ablate.

  python -m replication.ablate plan --base=replication/configs/scenes.py:measured=test \
      --arms=replication/configs/experiments.py:e1 --seeds=0,1,2,3,4 --out=runs/e1

`run` instead of `plan` runs or resumes them, and `table` writes their tables. Settings are chosen on val, the default
of scenes.py. Each experiment has this base, a file beside this one:

  e1        do the tasks help each other?          scenes.py:measured=test
  e2        why does generation first help?        emoji.py:path=data/emoji
  e3        which parts matter?                    scenes.py:measured=test
  e4_rates  the rate of each CLIP, by --seeds=5    emoji.py:path=data/emoji
  e4        is the lead over CLIP fair?            emoji.py:path=data/emoji
  e5        rare in the start too?                 shapes_lt.py
  e6        does augmentation make the better CLIP?  emoji.py:path=data/emoji
  e7        which parts matter on emoji?           emoji.py:path=data/emoji
  e8        do both help discrimination on emoji?  emoji.py:path=data/emoji
  e9        which timestep on emoji?               emoji.py:path=data/emoji
  e10       is the text query used?                scenes.py:measured=test,query_use
  e10_emoji the same on emoji                      emoji.py:path=data/emoji

Experiments of one base share runs if they have one --out: e3 finds its base runs among those of e1, e4 and e8 find
`discrimination` among those of e2, e9 finds `both` among those of e8, and e7 shares the autoencoders. `table` then
overwrites the tables of the other.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import clip_cc3m, common

STEPS = 900  # of 64 images, for arms with equal samples
# Seconds of a step on one idle core, by objectives: medians of 15 rounds in turns, measured by
# `python -m replication benchmark --config=scenes.py --rounds=15 --out=F.json`, before the first run.
STEP_SECONDS = {"generation": 0.251, "discrimination": 0.157, "generation+discrimination": 0.356}
EMOJI_STEPS = 600  # of 64 images, for arms with equal samples
# The same for emoji.py, by what is trained: with `path=data/emoji`; with `--config.model.alignment.spatial_pool=0
# --config.model.text_encoder.token_embedding_weight=0`, as "discrimination without additions"; with
# `objectives=contrastive,path=data/emoji`, as "CLIP" with that last field; and as "CLIP with parts" and "convolutional
# CLIP" with the fields of CLIPS. The other core was busy. Both objectives were timed later with the first command:
# 2.744 times discrimination, here converted to its seconds.
EMOJI_STEP_SECONDS = {
  "generation": 0.972,
  "discrimination": 0.519,
  "generation+discrimination": 1.424,
  "discrimination without additions": 0.504,
  "CLIP": 0.444,
  "CLIP with parts": 0.506,
  "convolutional CLIP": 0.250,
}
RATES = (3e-4, 1e-3, 3e-3)
# The best learning rate of RATES for each CLIP, by top-1 on val_vendor (measured/e4_rates_runs.tar.xz).
CLIP_RATES: dict[str, float] = {"CLIP": 1e-3, "CLIP with parts": 1e-3, "convolutional CLIP": 1e-3}
# Turn off the two additions of emoji.py that the paper's model lacks.
WITHOUT_PARTS: dict[str, Any] = dict(alignment=dict(spatial_pool=0))
WITHOUT_TOKENS: dict[str, Any] = dict(text_encoder=dict(token_embedding_weight=0.0))
# The change to the model for each CLIP: parts of its tokens, as in DiffDis's head, or the UNet's levels as its tower.
CLIPS: dict[str, dict[str, Any]] = {
  "CLIP": WITHOUT_TOKENS,
  "CLIP with parts": dict(vision_encoder=dict(spatial_pool=4)),
  "convolutional CLIP": dict(
    vision_encoder=dict(tower="convolutional", patch=2, depth=2, width=128),
  ),
}
# CLIP lacks these fields of an evaluation's protocol.
# Table 7 compares these timesteps t_z of the clean image with the paper's 1000.
TIMESTEPS: dict[str, dict[str, Any]] = {f"timestep {t_z}": dict(condition_timestep=t_z) for t_z in (0, 999)}
QUERY_STEPS = 1800  # steps of E10's runs
NO_SIGNAL = 1e-12  # γ of the arm whose e_t is pure noise; γ must be above 0
# Measure a run only at its end.
QUIET = dict(train_evals=(), sample_prompts=(), save_every=450, sample_every=100_000, eval_every=100_000)


def get_config(arg: str = "") -> ConfigDict:
  args = common.parse_arg(arg, **dict.fromkeys(EXPERIMENTS, False))
  requested = [name for name in EXPERIMENTS if args[name]]
  if len(requested) != 1:
    raise ValueError(f"argument should be one of {', '.join(EXPERIMENTS)}")
  return ConfigDict(EXPERIMENTS[requested[0]]())


def e1() -> dict[str, Any]:
  """Ask whether the tasks help each other, at equal samples and at equal minutes."""
  minutes = STEPS * STEP_SECONDS["generation+discrimination"] / 60
  half = STEPS // 2
  arms = [
    _arm("generation", "generation", num_steps=STEPS),
    _arm("discrimination", "discrimination", num_steps=STEPS),
    _arm("both", "both", num_steps=STEPS),
    _arm("generation as long as both", "generation", minutes=minutes),
    _arm("discrimination as long as both", "discrimination", minutes=minutes),
    _arm("first half generation", "generation", measured=False, num_steps=half),
    _arm("generation, then both", "both", start="first half generation", num_steps=half),
    _arm("first half of the time generation", "generation", measured=False, minutes=minutes / 2),
    _arm("generation, then both, as long as both", "both", start="first half of the time generation", num_steps=half),
  ]
  claims = [
    _claim("both", "discrimination", "test_unseen/acc1"),
    _claim("both", "discrimination as long as both", "test_unseen/acc1"),
    _claim("both", "generation", "test_unseen_generated/acc1_attributes"),
    _claim("both", "generation as long as both", "test_unseen_generated/acc1_attributes"),
  ]
  return dict(title="Do the tasks help each other?", arms=tuple(arms), step_seconds=STEP_SECONDS, claims=tuple(claims))


def e3() -> dict[str, Any]:
  """Ask which parts matter. The arms of the clean image's timestep t_z train both objectives, since without generation
  no other image has a timestep."""
  arms, claims = [], []
  for base, changes in (("discrimination", _parts(1.0, 0.1)), ("both", TIMESTEPS)):
    arms.append(_arm(base, base, num_steps=STEPS))
    arms += [_arm(name, base, num_steps=STEPS, **change) for name, change in changes.items()]
    claims += [_claim(name, base, "test/acc1") for name in changes]
  return dict(title="Which parts matter?", arms=tuple(arms), claims=tuple(claims))


def e2() -> dict[str, Any]:
  """Ask why generation first helps: because of its captions, its images, or its extra minutes."""
  seconds = _measured_seconds("generation", "discrimination")
  minutes = EMOJI_STEPS * (seconds["generation"] + seconds["discrimination"]) / 60
  same: dict[str, Any] = dict(num_steps=EMOJI_STEPS)
  arms = [
    _arm("discrimination", "discrimination", **same),
    _arm("generation", "generation", measured=False, **same),
    _arm("discrimination after generation", "discrimination", start="generation", **same),
    _arm("generation without captions", "generation", measured=False, loss=dict(condition_dropout=1.0), **same),
    _arm(
      "discrimination after generation without captions", "discrimination", start="generation without captions", **same
    ),
    _arm("discrimination as long as both stages", "discrimination", minutes=minutes),
  ]
  row, *others = "discrimination after generation", *(arm["name"] for arm in arms if arm["measured"])
  claims = [_claim(row, base, TOP1, 2.0) for base in others if base != row]
  title = "Why does generation first help?"
  return dict(title=title, arms=tuple(arms), step_seconds=seconds, claims=tuple(claims))


def e4_rates() -> dict[str, Any]:
  """Choose the learning rate of each CLIP, by a seed that is in no table. No test compares them."""
  arms = [_clip(name, f"{name}, rate {rate:g}", rate=rate, num_steps=EMOJI_STEPS) for name in CLIPS for rate in RATES]
  return dict(title="Which rate is each CLIP's?", arms=tuple(arms))


def e4() -> dict[str, Any]:
  """Ask whether the lead over CLIP is fair. Each comparison has two networks with the same text tower and head."""
  if missing := [name for name in CLIPS if name not in CLIP_RATES]:
    raise ValueError(f"no rate is chosen for {', '.join(missing)}; run e4_rates and add it to CLIP_RATES")
  alone = {"CLIP": "discrimination without additions"}  # the arm with equal minutes, if not "discrimination"
  seconds = _measured_seconds("discrimination", *alone.values(), *CLIPS)
  same: dict[str, Any] = dict(num_steps=EMOJI_STEPS)
  arms = []
  for name in CLIPS:
    minutes = EMOJI_STEPS * seconds[alone.get(name, "discrimination")] / 60
    arms.append(_clip(name, name, rate=CLIP_RATES[name], **same))
    arms.append(_clip(name, f"{name}, as long as DiffDis", rate=CLIP_RATES[name], minutes=minutes))
  arms.append(_arm("discrimination", "discrimination", **same))
  arms.append(_arm(alone["CLIP"], "discrimination", model=WITHOUT_PARTS | WITHOUT_TOKENS, **same))
  claims = [
    _claim(row, base, TOP1, 2.0)
    for row, clip in (("discrimination", "CLIP with parts"), (alone["CLIP"], "CLIP"))
    for base in (clip, f"{clip}, as long as DiffDis")
  ]
  return dict(
    title="Is the lead over CLIP fair?",
    arms=tuple(arms),
    step_seconds=seconds,
    claims=tuple(claims),
  )


def e5() -> dict[str, Any]:
  """Measure classes that the start has not seen either. Every seed measures the data set of shapes_lt.py:seed=0."""
  arms = []
  for classes, start_args in (("all classes", "stage=0,all_classes"), ("no low classes", "stage=0")):
    for model, backbone in (("DiffDis", "diffdis"), ("CLIP", "clip")):
      stages = {", start": start_args, ", stage 1": "stage=1", "": "stage=2"}
      if model == "DiffDis":
        stages = {", autoencoder": f"{start_args},autoencoder", **stages}
      start = ""
      for stage, args in stages.items():
        name = f"{model}, {classes}{stage}"
        args = f"backbone={backbone},{args}"
        arms.append(dict(name=name, args=args, changes=QUIET, start=start, measured=not stage))
        start = name
  claims = (
    _claim("DiffDis, no low classes", "CLIP, no low classes", "test/acc_low"),
    _claim("DiffDis, no low classes", "DiffDis, all classes", "test/acc_low"),
  )
  title = "Classes that are rare in the start too"
  return dict(title=title, arms=tuple(arms), claims=claims)


def e6() -> dict[str, Any]:
  """Ask whether stronger augmentation makes a better CLIP. The arms differ only in their views of the images; none has
  the views of emoji.py."""
  plain = common.base(clip_cc3m.clip_small(), image_size=32).data.augment.to_dict()
  arms = [
    _clip("CLIP", recipe, num_steps=EMOJI_STEPS, data=dict(augment=plain | clip_cc3m.RECIPES[recipe]))
    for recipe in ("paper", "openclip")
  ]
  claims = (_claim("paper", "openclip", TOP1, 2.0),)
  return dict(title="Does stronger augmentation make the better CLIP?", arms=tuple(arms), claims=claims)


def e7() -> dict[str, Any]:
  """Ask which parts matter on emoji without spatial pooling, whose means of the feature map bypass the fusion block."""
  base = "discrimination, no spatial pooling"
  arms, claims = [_arm(base, "discrimination", num_steps=EMOJI_STEPS, model=WITHOUT_PARTS)], []
  for name, change in _parts(1.0, 0.3).items():  # the config's own γ is 0.1
    change = dict(change, model=WITHOUT_PARTS | change.get("model", {}))
    arms.append(_arm(name, "discrimination", num_steps=EMOJI_STEPS, **change))
    claims.append(_claim(name, base, TOP1, 2.0))
  return dict(title="Which parts matter on emoji?", arms=tuple(arms), claims=tuple(claims))


def e8() -> dict[str, Any]:
  """Ask whether joint training helps discrimination on emoji, at equal samples and at equal minutes."""
  seconds = _measured_seconds("discrimination", "generation+discrimination")
  minutes = EMOJI_STEPS * seconds["generation+discrimination"] / 60
  others = [
    _arm("discrimination", "discrimination", num_steps=EMOJI_STEPS),
    _arm("discrimination as long as both", "discrimination", minutes=minutes),
  ]
  arms = (*others, _arm("both", "both", num_steps=EMOJI_STEPS))
  claims = tuple(_claim("both", arm["name"], TOP1, 2.0) for arm in others)
  title = "Does joint training help on emoji?"
  return dict(title=title, arms=arms, step_seconds=seconds, claims=claims)


def e9() -> dict[str, Any]:
  """Ask which timestep t_z of the clean image is best on emoji, beside E8's `both`."""
  arms = [_arm(name, "both", num_steps=EMOJI_STEPS, **change) for name, change in ({"both": {}} | TIMESTEPS).items()]
  claims = tuple(_claim(name, "both", TOP1, 2.0) for name in TIMESTEPS)
  return dict(title="Which timestep of the clean image on emoji?", arms=tuple(arms), claims=claims)


def e10() -> dict[str, Any]:
  """Ask whether the noised text query helps, by arms that cannot read it and arms that are forced to read it."""
  return _query("Is the text query used?", {}, "test_unseen/acc1", 3.0)


def e10_emoji() -> dict[str, Any]:
  """Ask the same on emoji without spatial pooling, whose means of the feature map bypass the text token."""
  return _query("Is the text query used, on emoji?", WITHOUT_PARTS, TOP1, 2.0)


def _query(title: str, model: dict[str, Any], column: str, bound: float) -> dict[str, Any]:
  """Return E10 on one of its testbeds."""
  strong = dict(model=model | dict(query_init=1.0), text_diffusion=dict(gamma=1.0))
  plain: dict[str, Any] = dict(model=model) if model else {}
  fields: dict[str, dict[str, Any]] = {
    "constant": plain | dict(args=",constant_query"),
    "DiffDis": plain,
    "noise": plain | dict(text_diffusion=dict(gamma=NO_SIGNAL)),
    "strong query": strong,
    "late query": strong | dict(text_diffusion=dict(gamma=1.0, schedule="late")),
    "guided steps": strong | dict(loss=dict(image_dropout=0.3), inference=dict(steps=4, guidance=2.0)),
    "two captions": strong | dict(args=",two_captions"),
    "two captions, constant": plain | dict(args=",constant_query,two_captions"),
  }
  arms = tuple(_arm(name, "discrimination", num_steps=QUERY_STEPS, **arm_fields) for name, arm_fields in fields.items())
  bases = {"two captions": "two captions, constant"}
  reading = [name for name in fields if not name.endswith("constant")]
  claims = tuple(_claim(name, bases.get(name, "constant"), column, bound) for name in reading)
  return dict(title=title, arms=arms, claims=claims)


TOP1 = "val_vendor/acc1"
EXPERIMENTS = {"e1": e1, "e2": e2, "e3": e3, "e4_rates": e4_rates, "e4": e4, "e5": e5, "e6": e6, "e7": e7, "e8": e8}
EXPERIMENTS |= {"e9": e9, "e10": e10, "e10_emoji": e10_emoji}


def _parts(*gammas: float) -> dict[str, dict[str, Any]]:
  """Return, by name, the changes of an arm of discrimination alone in the fusion block or the text diffusion."""
  return {
    "without fusion": dict(model=dict(fusion=False)),
    "own attention": dict(model=dict(share_attention=False)),
    "shared FFN": dict(model=dict(modality_ffn=False)),
    "target noise": dict(text_diffusion=dict(target="noise")),
    **{f"gamma {gamma}": dict(text_diffusion=dict(gamma=gamma)) for gamma in gammas},
    "schedule cosine": dict(text_diffusion=dict(schedule="cosine")),
    "schedule linear": dict(text_diffusion=dict(schedule="linear")),
  }


def _measured_seconds(*names: str) -> dict[str, float]:
  if missing := [name for name in names if name not in EMOJI_STEP_SECONDS]:
    raise ValueError(
      f"no step is timed for {', '.join(missing)}; time it by `diffdis benchmark"
      " --config=replication/configs/emoji.py:path=data/emoji --rounds=15 --out=F.json` and its like, on an idle core,"
      " and add it to EMOJI_STEP_SECONDS"
    )
  return {name: EMOJI_STEP_SECONDS[name] for name in names}


def _clip(kind: str, name: str, *, rate: float | None = None, **fields: Any) -> dict[str, Any]:
  """Return an arm with one of CLIPS, by default at the config's learning rate."""
  if rate:
    fields["optim"] = dict(rates=dict(new=rate))
  return _arm(name, "contrastive", model=CLIPS[kind], **fields) | dict(speed=kind)


def _arm(
  name: str,
  objectives: str,
  *,
  start: str = "",
  minutes: float | None = None,
  measured: bool = True,
  args: str = "",
  **changes: Any,
) -> dict[str, Any]:
  """Return an arm with other values of some fields; `args` are appended to those of its config."""
  changes = dict(**QUIET, **changes)
  args = f"objectives={objectives}{args}"
  return dict(name=name, args=args, changes=changes, start=start, minutes=minutes, measured=measured)


def _claim(row: str, base: str, column: str, bound: float = 3.0) -> dict[str, Any]:
  """Return a comparison whose bound is in points."""
  return dict(row=row, base=base, column=column, bound=bound)
