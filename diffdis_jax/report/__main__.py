"""Shows a run, or several side by side, as one HTML file.

  diffdis report --workdir=runs/demo/diffdis --out=report.html

The file holds everything and loads nothing: curves, sample images, evaluations, data, parameters, config, restarts and
cost. It can be written while the run is running. --workdir=DIR,DIR2 shows runs side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags, logging

from diffdis_jax.common import cli, files
from diffdis_jax.errors import UserError
from diffdis_jax.report import page
from diffdis_jax.report.read import read

FLAGS = flags.FLAGS
MOST_RUNS = 8  # that have a colour of their own


def define_flags() -> None:
  flags.DEFINE_list("workdir", None, "folder of a run, or several, separated by commas", required=True)
  flags.DEFINE_string("out", None, "HTML file to write", required=True)


def main(argv: Sequence[str]) -> None:
  report(FLAGS.workdir, FLAGS.out)


def report(paths: Sequence[str], out: str) -> None:
  """Write the page of these workdirs; a file `out` that is there is replaced.

  Raises UserError: no run in one of them, one that is named twice, too many, or `out` cannot be written.
  """
  # With or without a slash at its end it is the same folder, which would stand beside itself.
  paths = [path.rstrip("/") for path in paths if path]
  if len(set(paths)) < len(paths):
    raise UserError(f"--workdir={','.join(paths)} names a folder twice")
  if not 1 <= len(paths) <= MOST_RUNS:
    raise UserError(f"--workdir names {len(paths)} folders; it should be one to {MOST_RUNS}, with commas between them")
  # Before runs are read, which takes minutes of a long one in a bucket.
  files.check_out(out)
  runs = [read(path, name) for path, name in zip(paths, page.names_of(paths), strict=True)]
  text = page.render(runs)
  files.write_out(out, text)
  logging.info("%s, %.1f MB", out, len(text.encode()) / 1e6)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
