"""The tests. `check` checks annotations at run time, and accepts an int for a float, as PEP 484 does."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
