"""Distances between two sets of features: Fréchet's, of FID, and the kernel's, of KID. All in f64, on the host.

Of Inception's 2048 features they are FID and KID. Of other features they are other measures, under other names.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from diffdis_jax.errors import UserError

SUBSETS, SUBSET_SIZE, KERNEL_SEED = 100, 1000, 2020  # of KID, as torch-fidelity's defaults


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """Mean and covariance (with n - 1) of features, in f64, and of how many; None where a file does not say."""

  mean: Float[np.ndarray, " d"]
  covariance: Float[np.ndarray, "d d"]
  count: int | None


@dataclasses.dataclass(frozen=True)
class Kernel:
  """The kernel distance: mean and standard deviation over subsets, and their size."""

  mean: float
  std: float
  subset_size: int


def gaussian(features: Float[np.ndarray, "n d"]) -> Gaussian:
  """Return mean and covariance. Raises UserError: fewer than two rows, or values that are not finite."""
  count = len(features)
  if count < 2:
    raise UserError(f"{count} image{'s' * (count != 1)}: a covariance takes at least 2 images, and FID thousands")
  mean = features.mean(axis=0, dtype=np.float64)
  if not np.isfinite(mean).all():
    raise UserError("features that are not finite: the images or the weights are broken")
  # The mean first and the covariance of what is centred: E[xx] - E[x]E[x] loses digits, which FID needs.
  centred = features - mean
  return Gaussian(mean, centred.T @ centred / (count - 1), count)


def frechet(a: Gaussian, b: Gaussian) -> float:
  """Return |μ1 - μ2|² + tr S1 + tr S2 - 2 tr (S1 S2)^½.

  The last trace is that of (R S2 R)^½ where R R = S1: real and never negative, also where there are fewer samples than
  dimensions. A product's square root itself, as scipy's sqrtm takes it, is neither.
  """
  # Rounding makes the smallest eigenvalues of a covariance negative, here and below; they are 0.
  values, vectors = np.linalg.eigh(a.covariance)
  root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
  products = np.linalg.eigvalsh(root @ b.covariance @ root)
  distance = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance)
  return float(distance - 2 * np.sqrt(products.clip(0)).sum())


def kernel(
  x: Float[np.ndarray, "n d"],
  y: Float[np.ndarray, "m d"],
  *,
  subsets: int = SUBSETS,
  subset_size: int = SUBSET_SIZE,
  seed: int = KERNEL_SEED,
) -> Kernel:
  """Return KID: the unbiased MMD² with the kernel (x·y / d + 1)³, over random subsets. Unlike FID it has no bias by n.

  Subsets are those of torch-fidelity's metric_kid.py: `subset_size` rows without replacement, from one generator, x's
  before y's in each turn. Where there are fewer rows than `subset_size`, a subset is as large as the smaller set,
  all of which is in each of them: their deviation then says little.

  Raises UserError: fewer than two rows.
  """
  subset_size = min(subset_size, len(x), len(y))
  if subset_size < 2:
    raise UserError(f"{len(x)} and {len(y)} images: KID takes at least 2 of each")
  # The legacy generator, since only that draws the subsets that torch-fidelity draws.
  rng = np.random.RandomState(seed)
  estimates = []
  for _ in range(subsets):
    # x before y in each turn: the order of the draws is part of the figure.
    first, second = (rows[rng.choice(len(rows), subset_size, replace=False)].astype(np.float64) for rows in (x, y))
    estimates.append(_mmd(first, second))
  return Kernel(float(np.mean(estimates)), float(np.std(estimates)), subset_size)


def _mmd(x: Float[np.ndarray, "m d"], y: Float[np.ndarray, "m d"]) -> float:
  """Return the unbiased estimate: an element's kernel with itself does not count."""
  m, d = x.shape
  of = lambda a, b: (a @ b.T / d + 1) ** 3
  within = [(k.sum() - np.trace(k)) / (m * (m - 1)) for k in (of(x, x), of(y, y))]
  return float(within[0] + within[1] - 2 * of(x, y).mean())
