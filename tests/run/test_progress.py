from __future__ import annotations

from diffdis_jax.run import progress


def test_a_line_now_and_then_with_what_is_left(monkeypatch):
  clock = [0.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
  monkeypatch.setattr(progress.logging, "info", lambda text, *values: lines.append(text % values))
  lines: list[str] = []
  done = progress.Progress("embedded", 1000, "images")
  done.pass_over(100)
  for clock[0] in (4.0, 9.0, 11.0, 12.0, 30.0):
    done.add(100)
  assert lines == [
    "embedded 400 of 1000 images, 37 ms each, 22 seconds left",
    "embedded 600 of 1000 images, 60 ms each, 24 seconds left",
  ]
  clock[0] = 3030.0
  done.add(1)
  assert lines[-1] == "embedded 601 of 1000 images, 6.05 s each, 40 minutes left"
