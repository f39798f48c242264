"""What a name that nobody knows was meant for: other projects' names of fields and flags, and misspellings."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from diffdis_jax.errors import UserError

MOST_LISTED = 12  # names that a message lists one by one; of more, those of a section
# Names in use elsewhere -> the fields and flags (with --) that they stand for here, of which the first that there is is
# given | what else there is to know. The last rows are of names that some fields and flags had here before.
_TABLE = """
  lr learning_rate learning_rates base_lr max_lr peak_lr lrs -> optim.rates.new
  epochs epoch num_epochs n_epochs max_epochs num_train_epochs -> num_steps --epochs | an epoch is PAIRS/batch_size
  steps max_steps total_steps train_steps training_steps num_train_steps max_train_steps iterations iters
    max_iters -> num_steps --steps --query_steps
  bs batch batchsize batch_size global_batch global_batch_size train_batch_size per_device_train_batch_size
    micro_batch_size -> batch_size --batch_size | the global one
  wandb use_wandb wandb_project trackio logger report_to log_with tracker tracking -> --tracker | --tracker=wandb
  tensorboard tb -> | its events are always written, into the workdir
  precision mixed_precision amp use_amp bf16 fp16 fp32 bfloat16 float16 half dtype param_dtype
    compute_dtype -> model.dtype --dtype | float32 or bfloat16
  grad_accum gradient_accumulation gradient_accumulation_steps grad_accum_steps accumulation_steps accum_iter
    accum_freq accumulate_grad_batches accum accumulation microbatches -> optim.accumulate
  resume auto_resume resume_from resume_from_checkpoint resume_path restore continue
    continue_training -> | training resumes when its command is given again with the same --workdir
  pretrained pretrained_model pretrained_model_name_or_path finetune finetune_from init_checkpoint from_pretrained
    init init_weights load_from load_checkpoint -> init_from --workdir | the workdir of a run or of import_weights
  wd weight_decay adam_weight_decay l2 decay -> optim.weight_decay
  ema use_ema ema_rate ema_beta ema_momentum -> optim.ema_decay --ema
  warmup warmup_steps num_warmup_steps lr_warmup_steps warmup_iters warmup_epochs -> optim.warmup_steps
  lr_scheduler lr_scheduler_type lr_schedule scheduler sched decay_schedule -> optim.schedule_kind
  optimizer opt -> | it is AdamW, whose fields are optim.b1, optim.b2, optim.eps and optim.weight_decay
  beta1 adam_beta1 -> optim.b1
  beta2 adam_beta2 -> optim.b2
  betas adam_betas -> optim.b1 | and optim.b2
  epsilon adam_epsilon adam_eps -> optim.eps
  clip grad_clip clip_grad clip_grad_norm grad_clip_norm max_grad_norm gradient_clip gradient_clip_val
    max_norm -> optim.clip_norm
  outdir out_dir output output_dir output_path save_path results_dir -> --out --workdir
  logdir log_dir logging_dir save_dir run_dir exp_dir experiment_dir work_dir run_name exp_name -> --workdir
  res resolution img_size image_res image_resolution input_size size height width crop_size -> image_size --image_size
  random_seed manual_seed rng_seed -> seed --seed --seeds
  workers num_workers n_workers dataloader_num_workers num_threads -> data.loader.num_workers --num_processes
  prefetch_factor prefetch_size prefetch_buffer_size -> data.loader.prefetch
  data dataset data_dir dataset_dir data_path dataset_path dataset_name train_data train_data_dir data_root
    path -> data.path --data --source --data_root
  max_len max_seq_len seq_len context_length tokenizer_max_length -> data.max_length
  caption_column caption_key text_key -> data.caption_fields --caption_field
  log_interval log_freq log_steps logging_steps log_every_n_steps log_every_steps print_freq -> log_every
  save_interval save_freq save_steps save_every_steps checkpointing_steps checkpoint_every ckpt_every -> save_every
  eval_interval eval_freq eval_steps eval_every_steps val_every validation_steps val_check_interval -> eval_every
  sample_interval image_every image_freq -> sample_every
  max_to_keep keep_checkpoints save_total_limit checkpoints_total_limit keep -> checkpoint.keep_last
  gradient_checkpointing grad_checkpointing activation_checkpointing use_checkpoint checkpointing
    grad_checkpoint -> model.remat
  cfg cfg_scale guidance_scale unconditional_guidance_scale
    scale -> --guidance inference.generation_guidance --generation_guidance
  num_inference_steps inference_steps ddim_steps sampling_steps sample_steps num_sampling_steps
    diffusion_steps -> --steps --generation_steps inference.generation_steps
  cond_drop_prob drop_prob uncond_prob p_uncond ucg_rate caption_dropout cfg_dropout -> loss.condition_dropout
  lambda lam loss_weight ita_lambda -> loss.ita_weight
  gamma -> text_diffusion.gamma
  tau temp logit_scale -> model.temperature
  beta_schedule noise_schedule -> image_diffusion.schedule
  num_timesteps num_train_timesteps timesteps -> | both diffusion processes have 1000 timesteps
  flip hflip random_flip -> data.augment.flip
  center_crop centre_crop random_crop crop -> data.augment.crop
  zero zero_stage shard sharding -> mesh.fsdp
  tp tensor_parallel model_parallel -> mesh.tensor
  dp data_parallel -> mesh.data
  gpu gpus gpu_ids num_gpus n_gpu device devices -> | all are used; JAX_PLATFORMS=cpu leaves accelerators out
  nodes num_nodes nnodes world_size num_hosts -> --num_processes
  rank node_rank local_rank host_id -> --process_id
  n num_samples n_samples samples num_images_per_prompt n_images -> --num_images
  prompts text caption -> --prompt sample_prompts
  negative_prompt -> | there are none; guidance is against the empty caption
  ckpt ckpt_path checkpoint checkpoint_path model model_path run -> --workdir init_from
  metrics task eval evals -> --tasks --eval
  chip chips tpu accelerator mesh_shape -> --topology
  unit_query -> inference.normalize_query --normalize_query
  draws -> inference.num_noise_samples --num_noise_samples
  equal_captions -> loss.duplicate_captions | mask or negatives
  random_frozen -> optim.allow_uninitialized
  map_parts -> model.alignment.spatial_pool
  token_query -> model.text_encoder.token_embedding_weight
  class_power -> | it is data.sampling.sampling_exponent
  fraction -> | it is long_tail.crop_pct
"""
_ROW = re.compile(r"([\w\s]+) -> ([^|\n]*)\|?(.*)")
_MEANT = {
  name: (targets.split(), note.strip()) for names, targets, note in _ROW.findall(_TABLE) for name in names.split()
}


def check_key(config: Mapping[str, Any], key: str, flags: Collection[str] = ()) -> None:
  """Raises UserError unless `key` is one of the config's fields or their sections; `a.b[0]` is an element of `a.b`.

  `flags`: the command's, which may be meant instead.
  """
  known = fields_of(config)
  sections = {".".join(path.split(".")[:i]) for path in known for i in range(1, path.count(".") + 1)}
  if key.split("[")[0] in {*known, *sections}:
    return
  answer = _of_the_table(key, known, flags) or _near_field(key, known) or f"known: {', '.join(_listed(key, known))}"
  raise UserError(f"unknown config key {key}; {answer}")


def guess_flag(name: str, flags: Collection[str], fields: Collection[str]) -> str:
  """What an unknown flag may be: 'did you mean --X?', or where to look.

  Args:
    name: of the flag, without its dashes.
    flags: the command's.
    fields: of its config, which it sets by --config.a.b=value; none where it has none.
  """
  if found := _of_the_table(name, fields, flags, prefix="--config."):
    return found
  same = _highest(path for path in fields if path.split(".")[-1] == name)
  near = difflib.get_close_matches(name, flags, n=1)
  # A field of that very name, unless a flag is but a letter away.
  if same and not (near and difflib.SequenceMatcher(None, name, near[0]).ratio() > 0.9):
    return _ask(f"--config.{path}" for path in same)
  return _ask([f"--{near[0]}"]) if near else "see --help"


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """'did you mean X?' for the nearest of the known names, or else the list of them all."""
  known = sorted(known)
  nearest = difflib.get_close_matches(name, known, n=1)
  return _ask(nearest) if nearest else f"known: {', '.join(known) or 'none'}"


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
  """A config's fields by their dotted paths. A section without fields stands for itself."""
  return dict(_leaves(config))


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for key, value in section.items():
    if isinstance(value, Mapping) and value:
      yield from _leaves(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def _of_the_table(name: str, fields: Collection[str], flags: Collection[str], prefix: str = "") -> str:
  """The table's answer to a name; empty where it has none that this command knows. `prefix`: before a field."""
  # Other projects write a name with - or _, and some in capitals.
  targets, note = _MEANT.get(name.split(".")[-1].lower().replace("-", "_"), ([], ""))
  if note and not targets:
    return note
  # Flags first where a flag was given, fields first where a field was.
  fields_and_flags = sorted(targets, key=lambda target: target.startswith("--") != bool(prefix))
  for target in fields_and_flags:
    if target.startswith("--"):
      found = target if target[2:] in flags else None
    elif target.startswith("optim.rates."):  # of the groups that the config has
      rates = [path for path in fields if path.startswith("optim.rates.")]
      found = target if target in rates else next(iter(rates), None)
    else:
      found = target if target in fields else None
    if found:
      return _ask([found if found.startswith("--") else prefix + found]) + (f" ({note})" if note else "")
  return ""


def _near_field(key: str, known: Collection[str]) -> str:
  """A question for the field that the last part of a key, or all of it, is like; empty where none is."""
  section, _, leaf = key.rpartition(".")
  if section in known:  # a field, which has no fields of its own
    return _ask([section])
  if same := _highest(path for path in known if path.split(".")[-1] == leaf):
    return _ask(same)
  beside = {path.split(".")[-1]: path for path in known if path.rpartition(".")[0] == section}
  leaves, whole = {path.split(".")[-1]: path for path in known}, {path: path for path in known}
  # The least likeness is asked of a field in the section that was named.
  for names, word, cutoff in ((beside, leaf, 0.6), (whole, key, 0.75), (leaves, leaf, 0.75)):
    if near := difflib.get_close_matches(word, names, n=1, cutoff=cutoff):
      return _ask([names[near[0]]])
  return ""


def _highest(paths: Iterable[str]) -> list[str]:
  """Of several paths those with the fewest sections above them, three at most."""
  found = list(paths)
  least = min((path.count(".") for path in found), default=0)
  return [path for path in found if path.count(".") == least][:3]


def _listed(key: str, known: Collection[str]) -> list[str]:
  """All the fields of a small config; of another one the fields and sections of the section that the key is in."""
  if len(known) <= MOST_LISTED:
    return sorted(known)
  section = key.rpartition(".")[0]
  prefix = f"{section}." if any(path.startswith(f"{section}.") for path in known) else ""
  return sorted({prefix + path[len(prefix) :].split(".")[0] for path in known if path.startswith(prefix)})


def _ask(names: Iterable[str]) -> str:
  return f"did you mean {' or '.join(names)}?"
