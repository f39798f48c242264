"""The mesh, and the axes along which each parameter is split. No other file names a mesh axis.

Axes: `data` replicates parameters and splits the batch; `fsdp` splits both; `tensor` splits widths within a layer.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffdis_jax.common.params import first_match
from diffdis_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
# `fsdp` comes before `data`: in the other order, if all three axes exceed 1, XLA's partitioner (jaxlib 0.10 to 0.12)
# moves rows of a residual u + f(u) to other devices and adds them to the wrong rows.
BATCH = PartitionSpec(("fsdp", "data"))
REPLICATED = PartitionSpec()

# The first match wins. Kernels are [h, w, in, out] or [in, out], and embeddings [tokens, width].
RULES = (
  (r"^autoencoder\.(shift|scale)$|^logit_scale$|class_token$", REPLICATED),
  (r"^head\.", REPLICATED),  # small, and computed in f32, whereas `gathered` would cast it to the compute dtype
  (r"\.(bias|scale)$", REPLICATED),
  (r"conv|shortcut|proj_in|proj_out|quant|encoder_out|decoder_in", PartitionSpec(None, None, "fsdp", "tensor")),
  (r"\.patch\.kernel$", PartitionSpec(None, None, None, "tensor")),  # no axis divides three input channels
  (r"tokens\.embedding$", PartitionSpec("tensor", None)),  # `fsdp` would gather the table for a few rows
  (r"positions$", PartitionSpec("tensor", "fsdp")),
  (r"\.(out|fc2|fc_out|predictor|map_out)\.kernel$", PartitionSpec("tensor", "fsdp")),
  (r"\.(q|k|v|proj|fc1|fc_in|text_in|image_in|time|projection)\.kernel$", PartitionSpec("fsdp", "tensor")),
)


def make_mesh(*, data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
  """Arrange all devices as a mesh. An axis of -1 takes the devices that the others leave.

  If there are several slices, which a data centre's network connects, only `data` crosses slices.

  Raises:
    UserError: the product of the axes is not the number of devices, or `data` is no multiple of the slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
  shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
  if list(sizes.values()).count(-1) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise UserError(f"mesh {shown}: axes are positive, and at most one is -1")
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(devices) % fixed or (-1 not in sizes.values() and fixed != len(devices)):
    raise UserError(
      f"mesh {shown} takes {fixed} devices or, with an axis of -1, a multiple of them, but there are {len(devices)}"
    )
  shape = [len(devices) // fixed if size == -1 else size for size in sizes.values()]
  # GPUs count as one slice: XLA's order already puts `data` between hosts, and any axis may cross hosts.
  slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
  return Mesh(arrange(shape, devices, slices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(shape: Sequence[int], devices: Sequence[Any], slices: int) -> np.ndarray:
  """Arrange devices [data, fsdp, tensor], with slices one after another along `data`.

  Raises:
    UserError: `data` is no multiple of the slices.
  """
  # jax.make_mesh refuses an axis along a part of a torus's axis.
  if slices == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  data, *rest = shape
  if data % slices:
    raise UserError(
      f"mesh data={data} lies over {slices} slices, the only axis that may, so it must be a multiple of {slices}"
    )
  return mesh_utils.create_hybrid_device_mesh(
    (data // slices, *rest), (slices, 1, 1), devices, allow_split_physical_axes=True
  )


@contextlib.contextmanager
def tracing(mesh: Mesh, *, matmul_precision: str) -> Iterator[None]:
  """Trace the block, or the decorated function, for the devices of `mesh`, which need not be devices of this
  machine.

  Args:
    matmul_precision: default, high or highest, for matrix products and convolutions of f32, forwards and backwards,
      without their own precision.
  """
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), jax.default_matmul_precision(matmul_precision):
    yield


def check_batch(mesh: Mesh, batch_size: int, accumulate: int) -> None:
  """Raise UserError if the mesh cannot split the global batch evenly over devices and processes."""
  replicas, processes = mesh.shape["data"] * mesh.shape["fsdp"], jax.process_count()
  if replicas % processes:
    raise UserError(
      f"mesh data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} must be a multiple of the {processes} processes,"
      " each of which reads rows of its own; take a smaller tensor axis"
    )
  parts = replicas * accumulate
  if batch_size < 1 or batch_size % parts:
    near = max(1, round(batch_size / parts)) * parts
    raise UserError(
      f"batch_size is {batch_size}; data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} x accumulate={accumulate}"
      f" split it into {parts} parts, so it must be a multiple of {parts}, such as {near}"
    )


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  """Return the partition of a parameter, without axes that do not divide their dimension."""
  wanted = first_match(path, RULES, "sharding.RULES")
  return PartitionSpec(*(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(wanted, shape)))


def shardings(abstract: Any, mesh: Mesh, parameters: Mapping[str, Any]) -> Any:
  """Return the NamedSharding of every leaf. A leaf with a parameter's key and shape, also in the optimizer's state, has
  that parameter's sharding. All others are replicated, and so are all if the axes have one device."""
  whole = NamedSharding(mesh, REPLICATED)

  def of(key_path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    for key in reversed(key_path):
      path = key.key if isinstance(key, jax.tree_util.DictKey) else ""
      if path in parameters and parameters[path].shape == leaf.shape:
        place = NamedSharding(mesh, spec(path, leaf.shape, mesh))
        return whole if place.is_fully_replicated else place  # equal shardings compare equal
    return whole

  return jax.tree_util.tree_map_with_path(of, abstract)


def replicated(params: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Replicate arrays that every process has on all devices of the mesh."""
  place = NamedSharding(mesh, REPLICATED)
  # x=x, since the callback may be called after the loop has continued.
  return {path: jax.make_array_from_callback(x.shape, place, lambda i, x=x: x[i]) for path, x in params.items()}


def everywhere(x: jax.Array) -> jax.Array:
  """Replicate `x` on every device of the mesh for which code is traced, if there is one."""
  return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, REPLICATED)


def gathered(params: Mapping[str, jax.Array], mesh: Mesh, *, dtype: Any) -> dict[str, jax.Array]:
  """Return parameters in the form that layers use. Those that `fsdp` splits are gathered in the compute dtype, to which
  every layer casts its matrices. Their gradients are summed and split at once.

  Otherwise the compiler might gather f32, twice the bytes, or split a layer's activations instead.
  """

  def of(path: str, x: jax.Array) -> jax.Array:
    stored = spec(path, x.shape, mesh)
    if mesh.shape["fsdp"] == 1 or "fsdp" not in stored:
      return x
    used = PartitionSpec(*(None if axis == "fsdp" else axis for axis in stored))
    return _gather(x.astype(dtype), NamedSharding(mesh, stored), NamedSharding(mesh, used))

  return {path: of(path, x) for path, x in params.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, stored: NamedSharding, used: NamedSharding) -> jax.Array:
  return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, stored), used)


# The gradient is only constrained to the stored split, so that it is summed and split at once.
_gather.defvjp(
  lambda x, stored, used: (_gather(x, stored, used), None),
  lambda stored, used, _, gradient: (jax.lax.with_sharding_constraint(gradient, stored),),
)


def on_own_rows(f: Callable[..., Any], mesh: Mesh, summed: Mapping[str, Any]) -> Callable[..., Any]:
  """Return f(whole, rows) -> (sums, rows) that runs on each device's own rows, as if it were the only device.

  Only the `sums` are exchanged, after f: the compiler does not know that a sum in a loop is not needed before the loop
  ends, and would exchange it at each turn.

  Args:
    f: `whole` is a tree of arrays that the batch's axes do not split, and `rows` a tree of arrays whose first axis is
      the batch. Its `sums`, path -> array, are over the device's own rows.
    summed: the parameters of `sums`. These are added up over devices, and then split as the parameters are stored.
  """
  rows, stored = BATCH[0], {path: spec(path, x.shape, mesh) for path, x in summed.items()}

  def local(whole: Any, own: Any) -> Any:
    sums, results = f(whole, own)
    return {path: reduce(path, x) for path, x in sums.items()}, results

  def reduce(path: str, x: jax.Array) -> jax.Array:
    x = jax.lax.with_sharding_constraint(x, _only(stored[path], ("tensor",)))
    # Leave out axes of one device: a reduction over them would still be an operation.
    left = {axis for axis in rows if mesh.shape[axis] > 1}
    if "fsdp" in left and "fsdp" in stored[path]:
      x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=stored[path].index("fsdp"), tiled=True)
      left.remove("fsdp")
    return jax.lax.psum(x, tuple(sorted(left))) if left else x

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(REPLICATED, BATCH),
    out_specs=({path: _only(partition, ("fsdp",)) for path, partition in stored.items()}, BATCH),
    axis_names=set(rows),
    check_vma=False,  # the check would add each gradient up where it is computed
  )


def _only(partition: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
  return PartitionSpec(*(axis if axis in axes else None for axis in partition))


def each_own_rows(f: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
  """Return f(whole, rows) -> rows that runs on each device's own rows of the mesh for which code is traced, if any.

  `whole` is gathered on every device once, before f, and its gradient is summed once, after f, so that a loop in f
  exchanges nothing.

  Args:
    f: a function of two trees of arrays. The first axis in `rows` is the batch, a multiple of `batch_parts`.
  """

  @functools.wraps(f)
  def local(whole: Any, rows: Any) -> Any:
    own = _own_axes()
    if not own:
      return f(whole, rows)
    split = PartitionSpec(own)
    # Without the check of varying axes, as in `on_own_rows`.
    return jax.shard_map(f, in_specs=(REPLICATED, split), out_specs=split, axis_names=set(own), check_vma=False)(
      whole, rows
    )

  return local


def on_own_heads(f: Callable[..., Any]) -> Callable[..., Any]:
  """Return f, a function of arrays [b, h, ...] to such arrays, that runs on each device's own rows and heads of the
  mesh for which code is traced. It is for kernels, which the compiler cannot split. Nothing is exchanged.

  The batch must be a multiple of `batch_parts`. If `tensor` does not divide the heads, its devices all compute them.
  """

  @functools.wraps(f)
  def local(*arrays: Any) -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    if not free:
      return f(*arrays)
    heads = "tensor" if "tensor" in free and arrays[0].shape[1] % mesh.shape["tensor"] == 0 else None
    split = PartitionSpec(_own_axes() or None, heads)
    # Without the check of varying axes, since kernels do not declare those of their results.
    return jax.shard_map(f, in_specs=split, out_specs=split, axis_names=free, check_vma=False)(*arrays)

  return local


def _own_axes() -> tuple[str, ...]:
  """Return the axes that split a batch on the mesh for which code is traced, without those that are split already."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(axis for axis in BATCH[0] if axis in mesh.axis_names and axis not in mesh.manual_axes)


def batch_parts() -> int:
  """Return the number of parts of a batch on the mesh for which code is traced; 1 if there is none."""
  return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in _own_axes())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Return the sharding of arrays whose first axis is the batch."""
  return NamedSharding(mesh, BATCH)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
  """Return the places in a global batch of the rows on this process's devices, in order."""
  held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  return sorted({row for (rows,) in filter(None, held.values()) for row in range(batch_size)[rows]})


def to_global(batch: Mapping[str, np.ndarray | None], mesh: Mesh) -> dict[str, Any]:
  """Turn this process's `local_rows` of a batch into global arrays on the mesh; None stays None."""
  place = batch_sharding(mesh)
  return {
    name: None if rows is None else jax.make_array_from_process_local_data(place, rows) for name, rows in batch.items()
  }
