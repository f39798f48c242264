"""Test how cycles are read from schedules whose lines look as the TPU compiler writes them."""

from __future__ import annotations

from diffdis_jax.preflight import times


def schedule(*loops: tuple[int, int, int], length: int) -> list[str]:
  """Write a schedule of `length` bundles; a loop is (first bundle, the bundle that jumps back, turns)."""
  lines = ["= control target key start", "LB: loop body"]
  for n in range(length):
    parts = ["%v1 = vadd.f32 %v0, %v0"]
    for first, last, turns in loops:
      if n == last - 1:
        parts.append(f"%p{first}_p1 = scmp.ge.s32.totalorder %s7, {turns} /* loop exit test */")
      if n == last:
        parts.append(f"%9 = sbr.rel (!%p{first}_p1) target bundleno = {first} ({first:#x}), region = 5")
    lines.append(f"{hex(n) if n else 0}   : > {{ {' ;; '.join(parts)} }}")
  return lines


def test_straight_code_issues_a_bundle_a_cycle():
  assert times.cycles(schedule(length=17)) == 17


def test_a_branch_forwards_is_no_loop():
  lines = schedule(length=9)
  lines[4] += "  %1 = sbr.rel (%p1_p1) target bundleno = 7 (0x7)"
  assert times.cycles(lines) == 9


def test_a_loop_counts_as_often_as_it_turns():
  # Bundles 2 to 5 and the three after the branch: seven of 20. Two of the twelve turns only fill and drain the copies.
  assert times.cycles(schedule((2, 5, 12), length=20)) == 20 - 6 + 10 * 6
  assert times.cycles(schedule((2, 5, 2), length=20)) == 20 + 6


def test_loops_in_loops_and_after_each_other():
  inner = 9 - 4 + 3
  body = 14 - 2 + 3 - inner + 7 * inner
  assert times.cycles(schedule((4, 9, 7), (2, 14, 5), length=40)) == 40 - 15 + 3 * body
  first, second = 6 - 2 + 3, 26 - 20 + 3
  assert times.cycles(schedule((2, 6, 5), (20, 26, 6), length=40)) == 40 - first - second + 3 * first + 4 * second


def test_files_of_operations_alone_are_read(tmp_path):
  text = "\n".join(schedule(length=5))
  for name in ("fusion.12-01", "TLP-01", "<late-finalization>-01", "fusion.12-00-schedule-analysis_"):
    (tmp_path / f"1795-{name}-packed-bundles-post-ra.txt".replace("_-", "_")).write_text(text)
  (tmp_path / "1795-TLP-hlo.txt").write_text(text)
  assert times.cycles_by_operation(tmp_path) == {"fusion.12": 5}
