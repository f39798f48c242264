"""Compare FID's and KID's arithmetic with torch-fidelity's and with cases whose value is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from diffdis_jax.errors import UserError
from diffdis_jax.evals.fid import distances


def draw(n: int, d: int, seed: int) -> np.ndarray:
  """Return features that are correlated, not negative, and of spectra as steep as real ones have."""
  rng = np.random.default_rng(seed)
  mixing = rng.normal(size=(d, d)) * np.arange(1, d + 1) ** -0.5
  return np.abs(rng.normal(size=(n, d)) @ mixing.T / 3 + 0.4 + 0.05 * seed).astype(np.float32)


def theirs(x: np.ndarray, y: np.ndarray) -> float:
  """Compute FID by torch-fidelity's formula since 0.4, by the eigenvalues of the product. scipy's sqrtm no longer takes
  the argument of its earlier one."""
  x, y = x.astype(np.float64), y.astype(np.float64)
  first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
  trace = np.sqrt(np.linalg.eigvals(first @ second).astype(complex)).real.sum()
  return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(first) + np.trace(second) - 2 * trace)


def ours(x: np.ndarray, y: np.ndarray) -> float:
  return distances.frechet(distances.gaussian(x), distances.gaussian(y))


# (n, m, d): more samples than dimensions; fewer, so that ranks are deficient; of one side alone; two samples.
COUNTS = [(700, 500, 64), (60, 80, 200), (300, 80, 200), (2, 3, 50)]


@pytest.mark.parametrize("n, m, d", COUNTS)
def test_fid_is_torch_fidelitys(n, m, d):
  x, y = draw(n, d, seed=1), draw(m, d, seed=2)
  assert ours(x, y) == pytest.approx(theirs(x, y), rel=1e-6)
  assert ours(y, x) == pytest.approx(ours(x, y), rel=1e-6)


def test_fid_of_gaussians_that_commute_is_exact():
  turn = np.linalg.qr(np.random.default_rng(0).normal(size=(30, 30)))[0]
  first, second = np.linspace(0.5, 4, 30), np.linspace(3, 1, 30)
  of = lambda shift, spread: distances.Gaussian(np.full(30, shift), turn @ np.diag(spread**2) @ turn.T, None)
  expected = 30 * 0.5**2 + np.square(first - second).sum()
  assert distances.frechet(of(0.5, first), of(0.0, second)) == pytest.approx(expected, rel=1e-9)


def test_moments_are_those_of_f64():
  x = (1000 + np.random.default_rng(0).normal(size=(100, 5))).astype(np.float32)
  moments = distances.gaussian(x)
  np.testing.assert_allclose(moments.mean, x.astype(np.float64).mean(axis=0), rtol=1e-14)
  np.testing.assert_allclose(moments.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9)
  assert moments.count == 100


@pytest.mark.parametrize("n, m, size", [(150, 130, 100), (1100, 1050, 1000)])
def test_kid_is_torch_fidelitys(n, m, size):
  x, y = draw(n, 48, seed=1), draw(m, 48, seed=2)
  in_f64 = (torch.from_numpy(z.astype(np.float64)) for z in (x, y))
  how = dict(kid_subsets=7, kid_subset_size=size, kid_degree=3, kid_gamma=None, kid_coef0=1, rng_seed=2020)
  expected = kid_features_to_metric(*in_f64, **how, verbose=False)
  kid = distances.kernel(x, y, subsets=7)
  if size < 1000:
    assert kid.subset_size == min(n, m)
    kid = distances.kernel(x, y, subsets=7, subset_size=size)
  assert kid.subset_size == size
  assert kid.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
  assert kid.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-6)


def test_kids_defaults_are_torch_fidelitys():
  from torch_fidelity.defaults import DEFAULTS

  names = ("kid_subsets", "kid_subset_size", "rng_seed")
  assert tuple(DEFAULTS[name] for name in names) == (distances.SUBSETS, distances.SUBSET_SIZE, distances.KERNEL_SEED)


def test_too_few_images():
  x = draw(5, 4, seed=1)
  with pytest.raises(UserError, match="1 image: a covariance takes at least 2"):
    distances.gaussian(x[:1])
  with pytest.raises(UserError, match="5 and 1 images: KID takes at least 2"):
    distances.kernel(x, x[:1])
  with pytest.raises(UserError, match="not finite"):
    distances.gaussian(np.full((3, 2), np.nan, np.float32))
