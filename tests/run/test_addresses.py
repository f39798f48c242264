"""Test that commands refuse a bad address or folder before they do anything."""

from __future__ import annotations

import re

import pytest

from diffdis_jax import config
from diffdis_jax.common import buckets
from diffdis_jax.errors import UserError
from tests import tiny


@pytest.mark.parametrize(
  "where, message",
  [
    ("S3://b/run", "S3://b/run is no address that can be read; give a local path or gs://BUCKET/FOLDER"),
    ("http://host/run", "http://host/run is no address that can be read; give a local path or gs://BUCKET/FOLDER"),
    ("gs:/b/run", "gs:/b/run is no address that can be read; give a local path or gs://BUCKET/FOLDER"),
    ("gs:///b", "gs:///b is no address that can be read; give a local path or gs://BUCKET/FOLDER"),
    ("file:///data/run", "file:///data/run is no address that can be read; give /data/run"),
    # The libraries interpret these characters, so the first save would fail.
    *((f"gs://b/run{special}1/x", f"gs://b/run{special}1/x has a {special}, which no") for special in "#?*["),
    ("~/runs/a", "the shell leaves the ~ of ~/runs/a as it is behind a =; give /home/me/runs/a"),
  ],
)
def test_a_wrong_address_is_refused_in_one_line(monkeypatch, where, message):
  monkeypatch.setenv("HOME", "/home/me")
  with pytest.raises(UserError, match=re.escape(message)):
    buckets.check(where)


def test_an_address_in_an_evaluation_is_refused_and_other_texts_pass():
  section = '{"name": "a", "task": "retrieval", "data": {"path": "s3://b", "split": "test"}}'
  with pytest.raises(UserError, match="s3://b is no address"):
    config.with_evals(tiny.get_config().lock(), [section])
  for text in ("", "./~/run", "~0.5 of it", "/a/b", "a:b/c", "hf:ORG/NAME", "10.0.0.1:8476", "./s3:/x", "a star: yes"):
    buckets.check(text)
