"""Run a command of the package with what the replication adds to it.

python -m replication train --config=replication/configs/scenes.py:autoencoder --workdir=runs/scenes/autoencoder
python -m replication evaluate --workdir=RUN --tasks=choice --out=choice.json
"""

import sys

from diffdis_jax import __main__ as diffdis
from replication import extensions

if __name__ == "__main__":
  extensions.add()
  sys.exit(diffdis.main(sys.argv[1:]))
