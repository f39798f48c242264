"""Train the paper's model: DiffDis on CC3M at 256 px, from Stable Diffusion v1-1's weights.

  diffdis prepare_data cc3m --source=TARS --out=DIR
  diffdis train --config=diffdis_cc3m:path=DIR --workdir=DIR2 --config.init_from=SD_WORKDIR

It was not run at full size. From cached latents `preflight` estimates 16 chip-hours by the compiler's sum on 16 v5p at
batch 1024, at most 51 on 64 v5e, and at least 3.6 on 8 H100 (docs/preflight.md).

Cached latents save encoding the images, a third of a step's cost:

  diffdis prepare_data latents --workdir=SD_WORKDIR --data=DIR --out=LATENTS --image_size=256 --views=4 \
      --augment='{"crop": "random", "flip": true}'
  diffdis train --config=diffdis_cc3m:latents=LATENTS --workdir=DIR2 \
      --config.init_from=SD_WORKDIR

Every 2,000 steps it generates sample_prompts, and measures the data sets that imagenet=DIR,coco=DIR,flickr=DIR name,
each a folder written by prepare_data (`folder`, `coco`, `flickr30k`; the latter two with Karpathy's splits). ImageNet's
class folders are numbers such as n01440764: imagenet_names=F.json is a list of 1,000 names in their order. Without it
the folders' own names are the classes. Accuracy is measured on 5,000 of its images, with OpenAI's 80 prompts.
held_out=DIR is what prepare_data cc3m wrote: the losses on its split `val` show whether the run overfits.

With inception=F, the weights of FID's network (docs/fid.md), and fid=DIR, a prepared set with captions and a
split `val` such as COCO 2014, it measures FID and KID of 1,000 images too: enough to see a run go wrong, too few to
compare with the paper.

A smoke test for a laptop, 20 steps of a small model on rendered shapes, or with path=DIR on your own pairs:

  diffdis train --config=diffdis_cc3m:runlocal --workdir=DIR2

Ablations, as the appendix numbers its tables:

  Table 2  gamma=1.0,target=noise      gamma=1.0,target=data
  Table 3  gamma=1.0,schedule=cosine   gamma=1.0,schedule=scaled_linear
  Table 4  fusion=False
  Table 5  modality_ffn=False          share_attention=False
  Table 7  gamma=1.0,condition_timestep=0, and 999; γ of Table 7 is not stated by the paper

Single tasks: objectives=generation is Stable Diffusion alone, Table 6's baseline beside clip_cc3m.py:model=vit_l14;
objectives=discrimination is in none of the appendix's tables. `diffdis benchmark table6` times the three of Table 6.
The paper's figures for the model itself: FID 9.80, zero-shot ImageNet 25.92 %, mean R@1 33.60 %. Batch size, epochs and
rates are not stated by the paper for DiffDis; its CLIP baseline has batch 1024.
"""

from typing import Any

from ml_collections import ConfigDict

from diffdis_jax.configs import common
from diffdis_jax.models.sizes import sd_v1, small

# The first four prompts are from the paper's Figure 4; the others resemble them.
PROMPTS = (
  "A river with boats docked and houses in the background",
  "A piece of chocolate swirled cake on a plate",
  "A large bed sitting next to a small Christmas Tree surrounded by pictures",
  "A bear searching for food near the river",
  "A wooden bridge over a stream in the forest",
  "A bowl of tomato soup next to a slice of bread",
  "A kitchen with white cabinets and a window over the sink",
  "A herd of elephants walking across the plain at sunset",
  "A lighthouse on a cliff above the sea",
  "A red bicycle leaning against a brick wall",
  "A vase of yellow flowers on a table by the window",
  "A cat sleeping on a pile of books",
  "Snow covered mountains reflected in a lake",
  "A train crossing a stone viaduct in the fog",
  "A crowded street market with fruit stalls",
  "An owl sitting on a branch in the moonlight",
)
BATCH = 1024
EPOCHS = 6


def get_config(arg: str = "") -> ConfigDict:
  args = common.parse_arg(
    arg,
    runlocal=False,
    path="",
    latents="",
    objectives="both",
    schedule="cosine",
    target="data",
    gamma=0.3,
    fusion=True,
    share_attention=True,
    modality_ffn=True,
    condition_timestep=1000,
    imagenet="",
    imagenet_names="",
    coco="",
    flickr="",
    held_out="",
    fid="",
    inception="",
  )
  config = common.base(sd_v1(), image_size=256)
  config.model.update(fusion=args.fusion, share_attention=args.share_attention, modality_ffn=args.modality_ffn)
  config.text_diffusion.update(schedule=args.schedule, target=args.target, gamma=args.gamma)
  config.condition_timestep = args.condition_timestep
  if args.objectives != "both":
    config.objectives = (args.objectives,)

  config.data.update(name="latents" if args.latents else "pairs", path=args.latents or args.path, max_length=77)
  # Generation needs an undistorted square, as in Stable Diffusion's training. Both objectives share the view, since the
  # paper states none for DiffDis. With --config.data.discrimination_view=own, discrimination gets the views of the
  # paper's CLIP baseline: random crop and RandAugment.
  config.data.augment.update(crop="random", flip=True)
  config.data.discrimination_augment.update(crop="random_resized", randaugment_operations=2)
  config.data.loader.update(num_threads=16, prefetch=16)
  config.batch_size = BATCH
  config.num_steps = EPOCHS * common.CC3M_PAIRS // BATCH
  config.model.remat = "full"
  config.optim.update(
    groups=(("^autoencoder|^text_encoder", "frozen"), ("^unet", "pretrained"), (".*", "new")),
    rates=dict(pretrained=1e-5, new=1e-4),
    warmup_steps=1000,
    weight_decay=1e-4,
    ema_decay=0.9999,  # an upper bound that this run does not reach: it ends at 0.99947 (training/optim.update_ema)
  )
  config.save_every = config.sample_every = config.eval_every = 2000
  config.checkpoint.keep_every = 10_000
  config.sample_prompts = PROMPTS
  if args.latents and args.path:
    raise ValueError("latents=DIR stands in the place of path=DIR; leave out one of them")
  if args.runlocal and args.latents:
    raise ValueError("runlocal has a small network and encodes images itself; leave out latents, or give path=")
  if args.runlocal:
    run_local(config, args.path)
  config.evals = common.evaluations(args, common.own_size(config))
  if args.fid or args.inception:
    config.evals.fid = fid(args, common.own_size(config))
  config.train_evals = tuple(config.evals)
  if args.objectives == "generation" and (args.imagenet or args.coco or args.flickr):
    raise ValueError("imagenet, coco and flickr measure discrimination; leave them out with objectives=generation")
  if args.objectives == "discrimination" and args.fid:
    raise ValueError("fid measures generation; leave it out with objectives=discrimination")
  return config


def fid(args: ConfigDict, image_size: Any) -> dict[str, Any]:
  """Return the evaluation of FID on the captions of a prepared set. Training waits, so it generates 1,000 images in 50
  steps; `evaluate --num_images=30000` takes the usual number."""
  if not (args.fid and args.inception):
    raise ValueError("fid=DIR and inception=FILE go together: a set with captions, and the weights of FID's network")
  data = dict(name="pairs", path=args.fid, split="val", image_size=image_size)
  # The statistics file --config.evals.fid.reference=F.npz is written at the first evaluation and then reused by all
  # runs.
  return dict(task="fid", data=data, inception=args.inception, num_images=1000, reference="")


def run_local(config: ConfigDict, path: str) -> None:
  """Turn the config into a smoke test: a small network of random parameters, 32 px, 20 steps."""
  switches = {name: config.model[name] for name in ("fusion", "share_attention", "modality_ffn")}
  config.model = small()
  config.model.update(switches)
  config.image_size, config.batch_size, config.num_steps = 32, 16, 20
  config.data.max_length = config.model.text_encoder.max_length
  config.data.loader.update(num_threads=2, prefetch=4)
  if not path:
    config.data.name = "shapes"
  config.optim.allow_uninitialized = "^autoencoder|^text_encoder"  # there is nothing to load them from
  config.optim.warmup_steps = 5
  config.log_every, config.save_every, config.sample_every, config.eval_every = 5, 10, 20, 20
  config.checkpoint.keep_every = 0
  config.inference.generation_steps = 10
  config.sample_prompts = ("a red star", "a blue ring")
