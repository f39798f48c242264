"""Install programs that stand in for gcloud and kubectl and record how they are called."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
NAMES = ("gcloud", "srun", "scontrol", "kubectl")
_PROGRAM = """#!{python} -IS
import json, os, pathlib, sys
folder = pathlib.Path({folder!r})
call = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
stdin = sys.stdin.read() if "-" in call else None
with (folder / "calls.jsonl").open("a") as file:
  file.write(json.dumps({{"call": call, "stdin": stdin}}) + chr(10))
for number, (key, answers) in enumerate(json.loads((folder / "answers.json").read_text()).items()):
  if key in " ".join(call):
    with (folder / f"seen{{number}}").open("a+") as seen:
      seen.seek(0)
      count = len(seen.read())
      seen.write(".")
    answer = answers[min(count, len(answers) - 1)]
    sys.stdout.write(answer["stdout"])
    sys.exit(answer["code"])
"""


@dataclasses.dataclass(frozen=True)
class Answer:
  stdout: str = ""
  code: int = 0


class Programs:
  """A folder of these programs, which comes first on PATH."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    for name in NAMES:
      (folder / name).write_text(_PROGRAM.format(python=sys.executable, folder=str(folder)))
      (folder / name).chmod(0o755)
    self.answer({})

  def answer(self, answers: Mapping[str, Sequence[Answer]]) -> None:
    """Set answers by key: the n-th call that contains a key gets its n-th answer, later calls the last one."""
    queues = {key: [dataclasses.asdict(answer) for answer in queue] for key, queue in answers.items()}
    (self.folder / "answers.json").write_text(json.dumps(queues))

  def environment(self, **variables: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}", "DELAY": "0", **variables}

  def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    options: dict[str, Any] = dict(capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    command = ["bash", f"launch/{script}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=self.environment(**variables), **options)

  @property
  def records(self) -> list[dict]:
    path = self.folder / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  @property
  def calls(self) -> list[list[str]]:
    return [record["call"] for record in self.records]


def wait_for(path: pathlib.Path, *, seconds: float = 20) -> None:
  deadline = time.monotonic() + seconds
  while not path.exists():
    assert time.monotonic() < deadline, f"no {path.name} after {seconds} seconds"
    time.sleep(0.02)
