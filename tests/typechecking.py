"""The checker of annotations that conftest.py installs: beartype, to which an int is a float too, as PEP 484 has it."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
