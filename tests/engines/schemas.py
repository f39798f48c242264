"""Check standard input against the schema of the program that reads it: schemas.py kubernetes|skypilot

test_schemas.py starts this file in environments that have these packages. The environment of the tests has none.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile

OLDEST = "1.31"  # Kubernetes that docs/clusters.md asks for


def check_kubernetes(text: str) -> str:
  """Check every object as strictly as an API server, which refuses unknown fields. Return the versions' names."""
  import kubernetes_validate
  import yaml

  versions = OLDEST, kubernetes_validate.latest_version()
  for given in yaml.safe_load_all(text):
    objects = check_jobset(given) if given["kind"] == "JobSet" else [given]
    for checked in objects:
      for version in versions:
        kubernetes_validate.validate(checked, version, strict=True)
  return "Kubernetes " + " and ".join(versions)


def check_jobset(given: dict) -> list[dict]:
  """Check by JobSet's own types, except for the jobs in it. Return those as objects of Kubernetes."""
  from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

  jobs = given["spec"]["replicatedJobs"]
  rest = {**given, "spec": {**given["spec"], "replicatedJobs": [{**job, "template": {}} for job in jobs]}}
  # The types leave out a field that they do not know.
  known = JobsetV1alpha2JobSet.model_validate(rest).to_dict()
  assert known == rest, f"JobSet knows of {rest} only {known}"
  return [{"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **job["template"]} for job in jobs]


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
