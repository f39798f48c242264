"""Whatever bytes a download leaves behind, reading them ends in a record or in the documented error.

FUZZ_EXAMPLES=100000 makes it long.
"""

import json
import os

import pytest

from diffdis_jax.data import records
from diffdis_jax.data.prepare import pairs
from diffdis_jax.data.prepare.pairs import RawPair
from tests.raw_pairs import faults, picture

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

FAULTS = faults()
fuzz = settings(
  max_examples=int(os.environ.get("FUZZ_EXAMPLES", 50)),
  deadline=None,
  database=None,
  suppress_health_check=list(HealthCheck),
)
spoiling = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=4)


def spoil(data: bytes, changes: list[tuple[int, int]], cut: int) -> bytes:
  spoiled = bytearray(data or b"\x00")
  for place, value in changes:
    spoiled[place % len(spoiled)] = value
  return bytes(spoiled[: len(spoiled) - cut % len(spoiled)])


def read_image(data: bytes) -> None:
  try:
    image = records.read_image(data)
  except records.Unusable as error:
    assert str(error) in records.REASONS
  else:
    assert image.mode == "RGB" and min(image.size) >= records.MIN_SIDE


@fuzz
@given(st.sampled_from(sorted(FAULTS)), spoiling, st.just(0) | st.integers(0, 2000))
def test_spoiled_images(name, changes, cut):
  read_image(spoil(FAULTS[name][0], changes, cut))


@fuzz
@given(st.binary(max_size=60), st.binary(max_size=60))
def test_noise_as_caption_and_metadata(caption, metadata):
  try:
    record, _ = pairs.to_record(RawPair("k", picture(0), caption, metadata))
  except records.Unusable as error:
    assert str(error) in records.REASONS
  else:
    assert record["caption"].strip() and isinstance(json.loads(record["metadata"]), dict)
