from __future__ import annotations

import pytest

from tests import mutations


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: f"{mutation.file}: {mutation.new}")
def test_can_still_be_made(mutation):
  assert mutation.is_possible(), f"{mutation.old!r} should stand once in {mutation.file}"
  assert all((mutations.ROOT / file).exists() for file in mutation.tests.split())


@pytest.mark.slow
@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: f"{mutation.file}: {mutation.new}")
def test_is_noticed(mutation):
  outcome = mutations.run(mutation)
  assert outcome.caught, outcome.by
