"""Texts of the model card, with places for what a run says; model_card.py fills them."""

# What both kinds have below their own beginning.
REST = """
## Training

{training}

## Figures

{figures}

## Known failures

{failures}

## Config

```json
{config}
```
"""

DIFFDIS = """---
library_name: diffusers
pipeline_tag: {tag}
tags: [diffdis, stable-diffusion, jax]
---
# DiffDis

One UNet that generates images from text and aligns images with text, by denoising a text embedding under the condition
of an image ({paper},
ICCV 2023, [arXiv 2308.09306](https://arxiv.org/abs/2308.09306)). An independent implementation, diffdis_jax, wrote it:
{what}.
{samples}
## Use

It needs `pip install torch "diffusers>=0.35.2" transformers ftfy`. The model's code comes with it: {code}.

```python
{load}
```
{uses}{jax}"""

# One block of code goes on from the one before.
LOAD = """from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("{address}", custom_pipeline="{address}", trust_remote_code=True)"""

GENERATES = """image = pipe({prompt}, num_inference_steps={steps}, guidance_scale={guidance}).images[0]"""

OPENS = """
from diffusers.utils import load_image
image = load_image("photo.png")"""

CLASSIFIES = """
Classify images among any texts; `templates` are prompts with `{{}}` where the name goes:

```python
print(pipe.classify(image, {names}, templates=["{{}}"]).labels)
```

`pipe.rank(images, text)` orders images by a text. `pipe.embed_images(images)` and `pipe.embed_texts(texts)` give the
vectors that are compared. Images are PIL images, tensors or lists of them, of any size; `generator` makes the noise
that an embedding starts from.
"""

ONLY_CLASSIFIES = """
It was trained for discrimination alone: it classifies, and generates no images.
"""

ONLY_GENERATES = """
It was trained for generation alone: it generates, and does not classify.
"""

PLAIN = """
`StableDiffusionPipeline.from_pretrained("{address}")` loads the half that generates, with no code from here.
"""

PATCHES = """
diffusers' own StableDiffusionPipeline cannot load it: its autoencoder folds patches of {patch} × {patch} pixels into
channels, which takes the code that comes with it.
"""

# diffusers asks the hub for the version of a repository's code even where all of it is in the cache.
OFFLINE = """
To use it offline, call `huggingface_hub.snapshot_download("{repo}")` once, and give `from_pretrained` the folder that
it returns in both places.
"""

HEAD = """
`head.safetensors` is the head of long-tailed recognition, which the pipeline does not use.
"""

FAILURES = """The paper says of its own model, which was trained on CC3M:

- Watermarks: photographs of CC3M often carry them, and the model generates them too.
- People and animals are its weakest subjects.

Expect the same of any model that was trained on CC3M. On what this one was trained is said above; whether it fails in
the same ways was not measured. No safety checker comes with it, and the biases of its training data are in it."""

PLAIN_FAILURES = "The biases of its training data are in it; they were not measured."

JAX = """
## In JAX

```
diffdis import_weights --source={source} --out=RUN
```
"""

AUTOENCODER = """---
library_name: diffusers
tags: [autoencoder, diffdis, jax]
---
# The autoencoder of a DiffDis

It was trained alone, and neither generates nor classifies. diffdis_jax wrote it: {what}.

## Use

It needs `pip install torch "diffusers>=0.35.2" transformers`. The model's code comes with it: {code}.

```python
{load}

from diffusers.utils import load_image
pixels = pipe.image_processor.preprocess(load_image("photo.png"))
latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
```
"""

CLIP = """---
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags: [clip, jax]
---
# CLIP

Two towers that embed images and texts side by side, trained as the baseline of {paper}
(ICCV 2023). diffdis_jax wrote it: {what}.

## Loading

```python
from transformers import CLIPModel, CLIPProcessor
model, processor = CLIPModel.from_pretrained("{address}"), CLIPProcessor.from_pretrained("{address}")
```

```python
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("{open_clip}")
tokenizer = open_clip.get_tokenizer("{open_clip}")
```
{jax}"""
