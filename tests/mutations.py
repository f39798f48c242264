"""One-line mistakes, each of which a fast test must notice: python -m tests.mutations [NUMBER ...]

Each is made in a copy of the repository, in which the test files nearest to it run. Prints which caught it; exits with
1 where one was not. `tests/test_mutations.py` holds that each can still be made, and runs all with the slow tests.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", "site", "*.pyc", "docs")


@dataclasses.dataclass(frozen=True)
class Mutation:
  """`old`, which stands once in a file of the package, becomes `new`; `tests` are the files nearest to it."""

  file: str
  old: str
  new: str
  tests: str

  def is_possible(self) -> bool:
    return (ROOT / "diffdis_jax" / self.file).read_text().count(self.old) == 1


LOSSES, GRADCACHE = "tests/method/test_losses.py", "tests/training/test_gradcache.py"
SAMPLERS, SCHEDULES = "tests/method/test_samplers.py", "tests/method/test_schedules.py"
LONG_TAIL, LOADER = "tests/training/test_long_tail.py", "tests/data/test_loader.py tests/data/test_labelled_loader.py"
SHARDING, CHECKPOINT = "tests/parallel/test_sharding.py", "tests/run/test_checkpoint.py"
ATTENTION, DISTANCES = "tests/models/test_attention.py", "tests/evals/test_distances.py"
ZERO_SHOT, NEAREST = "tests/evals/test_zero_shot.py", "tests/evals/test_nearest.py"
RANDAUGMENT, OPTIM = "tests/data/test_randaugment.py", "tests/training/test_optim.py"
TRANSFORMS, MIXING = "tests/data/test_transforms.py", "tests/training/test_mixing.py"
MUTATIONS = (
  # Losses.
  Mutation("method/losses.py", "1.0 - log_variance)", "1.0 + log_variance)", LOSSES),
  Mutation("method/losses.py", "usable = square > _MIN_SQUARE", "usable = square > -1.0", LOSSES),
  Mutation("method/losses.py", "excess = jnp.maximum(logit_scale", "excess = jnp.minimum(logit_scale", LOSSES),
  Mutation("method/losses.py", "temperature(logit_scale), jnp", "jnp.exp(logit_scale), jnp", LOSSES),
  Mutation("method/losses.py", "dropped is None else ~dropped", "dropped is None else dropped", LOSSES),
  Mutation("method/losses.py", "loss=0.5 * (query_to_text.loss.mean()", "loss=0.5 * (text_to_query.mean()", LOSSES),
  Mutation("method/losses.py", "rows.captions[:, None] != their", "rows.captions[:, None] == their", LOSSES),
  # GradCache.
  Mutation("training/gradcache.py", "rows.noise)) / batch_size", "rows.noise)) * 1", GRADCACHE),
  Mutation("training/gradcache.py", "gradient[LOGIT_SCALE] += of_scale", "gradient[LOGIT_SCALE] += 0", GRADCACHE),
  Mutation("training/gradcache.py", "self.run.loss.ita_weight * found.loss", "found.loss", GRADCACHE),
  # Samplers, schedules, guidance.
  Mutation("method/samplers.py", "x_t, prediction = s_prev / s,", "x_t, prediction = s / s_prev,", SAMPLERS),
  Mutation("method/samplers.py", "prediction = a_prev / a, s_prev -", "prediction = a_prev / a, s_prev +", SAMPLERS),
  Mutation("method/schedules.py", "(NUM_TIMESTEPS // num_steps) + 1", "(NUM_TIMESTEPS // num_steps)", SAMPLERS),
  Mutation("method/schedules.py", "/ 1.008 * np.pi / 2) ** 2", "/ 1.008 * np.pi / 2)", SCHEDULES),
  Mutation(
    "method/schedules.py", "(x_t - s * prediction) / (process.gamma * a)", "(x_t - s * prediction) / a", SCHEDULES
  ),
  Mutation(
    "method/guidance.py",
    "Guided(unconditional + scale *",
    "Guided(conditional + scale *",
    "tests/method/test_guidance.py",
  ),
  # Figures.
  Mutation("evals/distances.py", "covariance / (count - 1)", "covariance / count", DISTANCES),
  Mutation("evals/distances.py", "float(distance - 2 * np.sqrt", "float(distance - np.sqrt", DISTANCES),
  Mutation("evals/distances.py", "(k.sum() - np.trace(k)) / (m * (m - 1))", "k.sum() / (m * m)", DISTANCES),
  Mutation(
    "evals/zero_shot.py",
    "ensemble = mean / np.linalg.norm(mean, axis=-1",
    "ensemble = mean / np.linalg.norm(mean, axis=0",
    ZERO_SHOT,
  ),
  Mutation("evals/zero_shot.py", "(ranks < 5).mean()", "(ranks <= 5).mean()", ZERO_SHOT),
  Mutation("evals/zero_shot.py", "hits[counts > 0] / counts[counts > 0]", "hits / counts.clip(1)", ZERO_SHOT),
  Mutation("evals/base.py", "~own & ~(scores < best)", "~own & (scores > best)", "tests/evals/test_base.py"),
  Mutation("evals/nearest.py", "(places < end) & ~jnp.isnan", "(places <= end) & ~jnp.isnan", NEAREST),
  Mutation("evals/nearest.py", "(own * scores).sum(axis=1) / own.sum(axis=1)", "(own * scores).sum(axis=1)", NEAREST),
  # Long-tailed.
  Mutation(
    "training/long_tail/objectives.py",
    "result((1.0 - section.distill_weight)",
    "result((0.0 + section.distill_weight)",
    LONG_TAIL,
  ),
  Mutation("training/long_tail/losses.py", "same / same.sum(axis=1, keepdims=True)", "same / same.sum()", LONG_TAIL),
  Mutation(
    "training/long_tail/losses.py", "smoothing * log_p.mean(axis=1)", "smoothing * log_p.sum(axis=1)", LONG_TAIL
  ),
  Mutation("training/long_tail/mixing.py", "beta(of_cutmix, cutmix)", "beta(of_cutmix, mixup or cutmix)", MIXING),
  Mutation("training/long_tail/mixing.py", "randint(column,", "randint(row,", MIXING),
  Mutation("models/lgr.py", "scores, axis=-1, where=there)", "scores, axis=-1)", "tests/models/test_lgr.py"),
  # Data.
  Mutation(
    "data/loader.py",
    "first + place for place in self.places",
    "first + row for row, _ in enumerate(self.places)",
    LOADER,
  ),
  Mutation("data/loader.py", ".seed(seed + i).shuffle()", ".seed(seed).shuffle()", LOADER),
  Mutation("data/loader.py", "** sampling_exponent, 0.0)", "* sampling_exponent, 0.0)", LOADER),
  Mutation("data/randaugment.py", 'size[name == "TranslateY"]', 'size[name == "TranslateX"]', RANDAUGMENT),
  Mutation("data/transforms.py", "math.radians(rng.uniform(", "math.sin(rng.uniform(", TRANSFORMS),
  Mutation("data/randaugment.py", "rng.random() < 0.5", "rng.random() < 0.6", RANDAUGMENT),
  # Devices, state.
  Mutation("parallel/sharding.py", "if data % slices:", "if slices % data:", SHARDING),
  Mutation("parallel/sharding.py", 'scatter_dimension=stored[path].index("fsdp")', "scatter_dimension=0", SHARDING),
  Mutation(
    "run/checkpoint.py",
    'sign=1 if kept.best_is == "max" else -1)',
    'sign=-1 if kept.best_is == "max" else 1)',
    CHECKPOINT,
  ),
  Mutation(
    "models/attention.py", "weight = jax.nn.sigmoid(score - lse)", "weight = jax.nn.sigmoid(lse - score)", ATTENTION
  ),
  Mutation(
    "models/attention.py", "mean = mean - of_lse * scale / total", "mean = mean + of_lse * scale / total", ATTENTION
  ),
  Mutation(
    "training/optim.py",
    "optax.incremental_update(new, old, 1.0 - rate)",
    "optax.incremental_update(new, old, rate)",
    OPTIM,
  ),
  Mutation("training/optim.py", "(1.0 + step) / (10.0 + step)", "(1.0 + step) / (1.0 + step)", OPTIM),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Whether the tests failed with a mutation, and which one did."""

  caught: bool
  by: str


def run(mutation: Mutation) -> Outcome:
  """Makes the mistake in a copy, and runs the tests there until one fails."""
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder) / "repository"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT, symlinks=True)
    file = copy / "diffdis_jax" / mutation.file
    file.write_text(file.read_text().replace(mutation.old, mutation.new))
    done = subprocess.run(
      [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutation.tests.split()],
      cwd=copy,
      env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
      capture_output=True,
      text=True,
    )
  failed = [line.split(" ")[1] for line in done.stdout.splitlines() if line.startswith("FAILED")]
  # Nothing but a failed test counts: a copy in which no test could start would catch everything.
  return Outcome(done.returncode == 1 and bool(failed), failed[0] if failed else done.stdout[-300:])


def main(numbers: list[str]) -> int:
  chosen = [int(number) for number in numbers] or range(len(MUTATIONS))
  survived = 0
  for number in chosen:
    outcome = run(MUTATIONS[number])
    survived += not outcome.caught
    said = f"caught by {outcome.by}" if outcome.caught else f"SURVIVED {outcome.by}"
    sys.stdout.write(f"{number:2d} {MUTATIONS[number].file}: {MUTATIONS[number].new}: {said}\n")
    sys.stdout.flush()
  sys.stdout.write(f"{len(chosen) - survived} of {len(chosen)} caught\n")
  return int(survived > 0)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
