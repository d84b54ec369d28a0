"""Toys: small models with a published model's structure, whose shapes and weights hide nothing."""

from .geometry import GEOMETRIES, toy_config
from .lint import lint
from .weights import loud, write_toy

__all__ = ["GEOMETRIES", "lint", "loud", "toy_config", "write_toy"]
