"""The checker of types and shapes at run time: beartype, with whole numbers allowed where a float is wanted."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
