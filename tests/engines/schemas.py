"""Check standard input against the schema of the program that reads it: schemas.py kubernetes|skypilot

test_schemas.py starts this file in environments that have these packages. The environment of the tests has none.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile

OLDEST = "1.31"  # the oldest Kubernetes that docs/clusters.md supports


def check_kubernetes(text: str) -> str:
  """Check every object as strictly as an API server, which refuses unknown fields, and return the checked versions."""
  import kubernetes_validate
  import yaml

  versions = OLDEST, kubernetes_validate.latest_version()
  for resource in yaml.safe_load_all(text):
    objects = check_jobset(resource) if resource["kind"] == "JobSet" else [resource]
    for checked in objects:
      for version in versions:
        kubernetes_validate.validate(checked, version, strict=True)
  return "Kubernetes " + " and ".join(versions)


def check_jobset(jobset: dict) -> list[dict]:
  """Check an object by JobSet's own types, except for its jobs, which are returned as Kubernetes objects."""
  from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

  jobs = jobset["spec"]["replicatedJobs"]
  without_jobs = {**jobset, "spec": {**jobset["spec"], "replicatedJobs": [{**job, "template": {}} for job in jobs]}}
  # The types drop a field that they do not know.
  parsed = JobsetV1alpha2JobSet.model_validate(without_jobs).to_dict()
  assert parsed == without_jobs, f"JobSet knows of {without_jobs} only {parsed}"
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
