"""Build the network of a config: the module with the parts that its objectives need, and its constant settings."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from diffdis_jax.common.params import Params, flatten, merge
from diffdis_jax.config.model import AUTO, ClipModel, Model
from diffdis_jax.config.objectives import Objective, task_of
from diffdis_jax.config.run import Run
from diffdis_jax.config.sections import ImageDiffusion, TextDiffusion
from diffdis_jax.errors import UserError
from diffdis_jax.method.alignment import AlignmentTransformer
from diffdis_jax.method.diffdis import DiffDis
from diffdis_jax.method.fusion import TextStream
from diffdis_jax.models import attention, clip
from diffdis_jax.models.autoencoder import Autoencoder
from diffdis_jax.models.clip import TOWERS, Clip
from diffdis_jax.models.layers import DTYPES
from diffdis_jax.models.lgr import LanguageGuidedHead
from diffdis_jax.models.text_encoder import TextEncoder
from diffdis_jax.models.unet import UNet
from diffdis_jax.parallel import sharding

# Text streams by `model.text_stream.kind`; an extension may add others.
TEXT_STREAMS: dict[str, type[TextStream]] = {"paper": TextStream}
HEAD_PREFIX = "head."  # the prefix of the paths of the head's parameters


def build_diffdis(model: Model, objectives: Sequence[str], rngs: nnx.Rngs) -> DiffDis:
  """Build the module of a DiffDis.

  Generation alone, the Stable Diffusion baseline, has no text stream and no alignment transformer. Reconstruction needs
  only the autoencoder.
  """
  task = task_of(objectives)
  common: dict[str, Any] = dict(dtype=DTYPES[model.dtype], rngs=rngs)
  autoencoder = Autoencoder(model.autoencoder, **common)
  # An autoencoder alone has no text encoder and no UNet.
  if task.network == "autoencoder":
    return DiffDis(autoencoder=autoencoder, temperature=model.temperature)
  text = model.text_encoder
  # The second token embeddings only affect e, which generation does not use.
  if not task.aligned:
    text = dataclasses.replace(text, token_embedding_weight=0.0)
  text_encoder = TextEncoder(text, remat="none", **common)
  unet = UNet(model, up_path=task.generates, **common)
  text_stream = alignment = None
  if task.aligned:
    # One fusion block for each attention block of the UNet's first half; none if fusion is off (Table 4).
    stream = TEXT_STREAMS[model.text_stream.kind if model.text_stream else "paper"]
    text_stream = stream(unet.fused_widths if model.fusion else (), model, **common)
    alignment = AlignmentTransformer(
      model.alignment, query_width=model.query_width, image_width=model.unet.widths[-1], **common
    )
  return DiffDis(
    autoencoder=autoencoder,
    text_encoder=text_encoder,
    unet=unet,
    text_stream=text_stream,
    alignment=alignment,
    head=build_head(model, rngs),
    temperature=model.temperature,
  )


def build_head(model: Model | ClipModel, rngs: nnx.Rngs) -> LanguageGuidedHead | None:
  """Build the language-guided head if the model has one."""
  if model.head is None:
    return None
  return LanguageGuidedHead(width=model.query_width, **vars(model.head), rngs=rngs)


def build_clip(model: ClipModel, rngs: nnx.Rngs) -> Clip:
  """Build CLIP's two towers."""
  common: dict[str, Any] = dict(dtype=DTYPES[model.dtype], remat=model.remat, rngs=rngs)
  return Clip(
    text_encoder=TextEncoder(model.text_encoder, **common),
    vision_encoder=TOWERS[model.vision_encoder.tower](model.vision_encoder, **common),
    head=build_head(model, rngs),
    temperature=model.temperature,
  )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Network:
  """The constant facts about a config's network, which training and inference share.

  Attributes:
    model: the sizes and switches of the network.
    objectives: the objectives of its training (config/objectives.py).
    image_size: side of the square images, pixels.
    max_length: the number of tokens of a caption.
    image_process, text_process: the two diffusion processes, which CLIP does not use.
    condition_timestep: t_z of the clean image in discrimination (appendix, Table 7), 0 to 1000.
    graphdef, abstract: the module's graph definition and abstract state, for `params.merge`.
  """

  model: Model | ClipModel
  objectives: tuple[str, ...]
  image_size: int
  max_length: int
  image_process: ImageDiffusion
  text_process: TextDiffusion
  condition_timestep: int
  graphdef: nnx.GraphDef
  abstract: nnx.State

  @property
  def task(self) -> Objective:
    """Return the properties of the objectives together."""
    return task_of(self.objectives)

  @classmethod
  def of(cls, run: Run) -> Network:
    """Return the network of a run. Only shapes are computed, and nothing is allocated."""
    graphdef, abstract = _abstract(run.model, run.objectives)
    return cls(
      model=run.model,
      objectives=run.objectives,
      image_size=run.image_size,
      max_length=run.data.max_length,
      image_process=run.image_diffusion,
      text_process=run.text_diffusion,
      condition_timestep=run.condition_timestep,
      graphdef=graphdef,
      abstract=abstract,
    )

  @functools.cached_property
  def shapes(self) -> Params:
    """Return parameter path -> ShapeDtypeStruct."""
    return flatten(self.abstract)

  @property
  def is_clip(self) -> bool:
    """Return whether this is a CLIP and not a DiffDis."""
    return isinstance(self.model, ClipModel)

  @property
  def dtype(self) -> Any:
    """Return the dtype of matrix products and convolutions."""
    return DTYPES[self.model.dtype]

  @property
  def matmul_precision(self) -> str:
    """Return the precision of products of f32 in every program of the network: default, high or highest."""
    if self.model.matmul_precision != AUTO:
      return self.model.matmul_precision
    return "highest" if self.model.dtype == "float32" else "default"

  @contextlib.contextmanager
  def tracing(self, mesh: Mesh) -> Iterator[None]:
    """Trace the block, or the decorated function, for the devices of `mesh`, with the network's precision and attention
    kernel."""
    with attention.by(self.model.attention_kernel), sharding.tracing(mesh, matmul_precision=self.matmul_precision):
      yield

  def counted(self) -> Network:
    """Return the same network without attention kernels, so that the operations of its traced programs can be
    counted."""
    return dataclasses.replace(self, model=dataclasses.replace(self.model, attention_kernel="xla"))

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """Return the shape [h, w, c] of an image's latent. Raise UserError for CLIP, which has none."""
    if isinstance(self.model, ClipModel):
      raise UserError("this run is a CLIP model, which has no autoencoder and so no latents; take a run of DiffDis")
    side = self.image_size // self.model.autoencoder.factor
    return side, side, self.model.autoencoder.latent_channels

  def with_params(self, params: Params) -> DiffDis | Clip:
    """Return the module with these parameters."""
    return merge(self.graphdef, self.abstract, params)

  def initialise(self, key: jax.Array) -> Params:
    """Return initial parameters. Under jit with out_shardings, they are created sharded."""
    if not isinstance(self.model, ClipModel):
      return flatten(initial_state(_builder(self.model, self.objectives), key))
    of_head = {path for path in self.shapes if path.startswith(HEAD_PREFIX)}
    params = clip.initialise(key, {path: leaf for path, leaf in self.shapes.items() if path not in of_head}, self.model)
    if of_head:
      built = flatten(initial_state(_builder(self.model, self.objectives), key))
      params |= {path: built[path] for path in of_head}
    return params


def _builder(model: Model | ClipModel, objectives: tuple[str, ...]) -> Callable[[nnx.Rngs], DiffDis | Clip]:
  """Return a function from rngs to the module with initial parameters."""
  if isinstance(model, ClipModel):
    return functools.partial(build_clip, model)
  return functools.partial(build_diffdis, model, objectives)


@functools.lru_cache(maxsize=64)  # commands and tests build the same network several times
def _abstract(model: Model | ClipModel, objectives: tuple[str, ...]) -> tuple[nnx.GraphDef, nnx.State]:
  return abstract_module(_builder(model, objectives))


class _Rngs(nnx.Rngs):
  """nnx.Rngs that makes the same keys in blocks, and counts them in Python.

  nnx's counter asks a traced value for its sharding, which raises an error that walks the whole trace. The time then
  grows with the square of the number of parameters: half a minute instead of two seconds for Stable Diffusion v1. And
  a separate fold_in for each parameter nearly doubles the compilation time of the program.
  """

  _BLOCK = 1024

  def __init__(self, key: jax.Array):
    super().__init__(key)
    self._count = itertools.count()
    self._keys = functools.cache(self._make_block)

  def params(self) -> jax.Array:
    block, index = divmod(next(self._count), self._BLOCK)
    return self._keys(block)[index]

  def _make_block(self, block: int) -> jax.Array:
    first = block * self._BLOCK
    keys = jax.vmap(jax.random.fold_in, (None, 0))(self.default.key[...], jnp.arange(first, first + self._BLOCK))
    # Without the barrier, the compiler would compute every key again wherever it is used.
    return jax.lax.optimization_barrier(keys)


def abstract_module(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef, nnx.State]:
  """Return a module's graph definition and shapes without allocating anything."""
  return nnx.split(nnx.eval_shape(lambda: build(_Rngs(jax.random.key(0)))))


def initial_state(build: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> nnx.State:
  """Return the initial state of the module that `build` gives."""
  return nnx.state(build(_Rngs(key)))
