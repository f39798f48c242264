"""Holds what stands on standard input against the schema of the program that reads it: schemas.py kubernetes|skypilot

Started by test_schemas.py in environments that have these packages; the tests' own does not.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile

OLDEST = "1.31"  # Kubernetes that docs/clusters.md asks for


def check_kubernetes(text: str) -> str:
  """Every object, each as strictly as an API server: no field that it does not know. Returns what was compared with."""
  import kubernetes_validate
  import yaml

  versions = OLDEST, kubernetes_validate.latest_version()
  for given in yaml.safe_load_all(text):
    found = check_jobset(given) if given["kind"] == "JobSet" else [given]
    for each in found:
      for version in versions:
        kubernetes_validate.validate(each, version, strict=True)
  return "Kubernetes " + " and ".join(versions)


def check_jobset(given: dict) -> list[dict]:
  """By JobSet's own types, but for the jobs in it, which are returned as objects of Kubernetes."""
  from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

  jobs = given["spec"]["replicatedJobs"]
  rest = {**given, "spec": {**given["spec"], "replicatedJobs": [{**each, "template": {}} for each in jobs]}}
  # The types leave out what they do not know.
  known = JobsetV1alpha2JobSet.model_validate(rest).to_dict()
  assert known == rest, f"JobSet knows of {rest} only {known}"
  return [{"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **each["template"]} for each in jobs]


def check_skypilot(text: str) -> str:
  import sky

  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "task.yaml"
    path.write_text(text)
    task = sky.Task.from_yaml(str(path))
  (resources,) = task.resources
  return f"{task.num_nodes} x {resources.accelerators}, spot: {resources.use_spot}"


if __name__ == "__main__":
  check = {"kubernetes": check_kubernetes, "skypilot": check_skypilot}[sys.argv[1]]
  sys.stdout.write(check(sys.stdin.read()))
