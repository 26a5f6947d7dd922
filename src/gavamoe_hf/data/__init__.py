"""Records: read, check, split and generate them."""

from .errors import DataError
from .records import load_records
from .splits import random_split
from .synthetic import SyntheticConfig, SyntheticData, SyntheticTruth, generate_synthetic, write_synthetic

__all__ = [
    "DataError",
    "SyntheticConfig",
    "SyntheticData",
    "SyntheticTruth",
    "generate_synthetic",
    "load_records",
    "random_split",
    "write_synthetic",
]
