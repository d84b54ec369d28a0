"""Toys: small models with a published model's structure, whose shapes and weights hide nothing."""

from .folder import write_toy
from .geometry import COINCIDENCES, GEOMETRIES, toy_config, wanted
from .lint import lint
from .quiet import lint_weights
from .weights import loud

__all__ = ["COINCIDENCES", "GEOMETRIES", "lint", "lint_weights", "loud", "toy_config", "wanted", "write_toy"]
