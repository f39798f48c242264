"""The tests. `check` checks annotations at run time; as in PEP 484, it accepts an int where a float is annotated."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
