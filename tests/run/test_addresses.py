"""Addresses and folders that a command refuses before it does anything."""

from __future__ import annotations

import re

import pytest

from diffdis_jax import config
from diffdis_jax.common import buckets
from diffdis_jax.errors import UserError
from tests import tiny


@pytest.mark.parametrize(
  "where, answer",
  [
    ("s3://b/run", "give a local path or gs://BUCKET/FOLDER"),
    ("S3://b/run", "give a local path or gs://BUCKET/FOLDER"),
    ("http://host/run", "give a local path or gs://BUCKET/FOLDER"),
    ("az://b", "give a local path or gs://BUCKET/FOLDER"),
    ("gs:/b/run", "give a local path or gs://BUCKET/FOLDER"),
    ("gs://", "give a local path or gs://BUCKET/FOLDER"),
    ("gs:///b", "give a local path or gs://BUCKET/FOLDER"),
    ("file:///data/run", "give /data/run"),
  ],
)
def test_an_address_that_cannot_be_read_is_one_line(where, answer):
  with pytest.raises(UserError, match=f"{where} is no address that can be read; {answer}$"):
    buckets.check(where)


@pytest.mark.parametrize("special", "#?*[")
def test_a_character_that_the_libraries_take_for_another_thing_is_refused(special):
  """No checkpoint could be written below a name with a #, which was said after the steps before the first save."""
  with pytest.raises(UserError, match=re.escape(f"gs://b/run{special}1/x has a {special}, which no")):
    buckets.check(f"gs://b/run{special}1/x")


@pytest.mark.parametrize("where, meant", [("~/runs/a", "/home/me/runs/a"), ("~", "/home/me")])
def test_a_tilde_that_the_shell_has_left_makes_no_folder_of_that_name(monkeypatch, where, meant):
  monkeypatch.setenv("HOME", "/home/me")
  with pytest.raises(UserError, match=f"the shell leaves the ~ of {where} as it is behind a =; give {meant}$"):
    buckets.check(where)


@pytest.mark.parametrize(
  "where",
  [
    "",
    "run",
    "./~/run",
    "~0.5 of it",
    "a~b",
    "/a/b",
    "a:b/c",
    "hf:ORG/NAME",
    "10.0.0.1:8476",
    "./s3:/x",
    "a red star: yes",
  ],
)
def test_what_is_no_address_passes(where):
  buckets.check(where)


def test_an_address_in_an_evaluation_is_refused_too():
  section = '{"name": "a", "task": "retrieval", "data": {"path": "s3://b", "split": "test"}}'
  with pytest.raises(UserError, match="s3://b is no address"):
    config.with_evals(tiny.get_config().lock(), [section])
