"""`toy`: a small model folder with a published model's structure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError, nearest
from . import shared

DTYPES = ("float32", "bfloat16", "float16")


def toy(
    config: shared.Config,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The model folder to write.")],
    geometry: Annotated[
        str,
        typer.Option(help="Which coincidences of production to copy: default has none. Or sizes: heads6-groups3-dim12-layers7."),
    ] = "default",
    seed: Annotated[int, typer.Option(help="Another seed, other weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="Type of the saved weights: float32, bfloat16 or float16.")] = "float32",
    overwrite: shared.Overwrite = False,
) -> None:
    """Write a small model folder with the structure of CONFIG.

    Telling sizes and loud weights, saved by transformers.
    """
    from shardproof.toy_models import toy_config, write_toy

    from ..io.files import whole_folder

    if dtype not in DTYPES:
        raise ConfigError(f"no dtype {dtype!r}{nearest(dtype, DTYPES)}; there are {', '.join(DTYPES)}")
    _check_geometry(geometry)
    published = shared.read_model_config(config)
    try:
        small = toy_config(published, geometry)
    except (KeyError, ValueError) as lacking:
        raise ConfigError(f"no toy can be made from {config}: {lacking}") from lacking
    shared.free_output(folder, overwrite)
    with shared.only_results_on_stdout(), whole_folder(folder, overwrite=overwrite) as partial:
        _write(write_toy, small, partial, seed, dtype)
    shared.say(f"{folder}: {_sizes(small)}, geometry {geometry}, seed {seed}, {dtype}")


def _check_geometry(geometry: str) -> None:
    from shardproof.toy_models import GEOMETRIES
    from shardproof.toy_models.text import parse

    try:
        _ = geometry in GEOMETRIES or parse(geometry)
    except KeyError as unknown:
        named = f"no geometry {geometry!r}{nearest(geometry, GEOMETRIES)}; there are {', '.join(GEOMETRIES)}"
        raise ConfigError(f"{named}; or sizes: {unknown}") from unknown


def _sizes(config: dict) -> str:
    from shardproof.toy_models.decoder import section_of
    from shardproof.toy_models.layers import layer_count

    section = section_of(config)
    return f"{layer_count(section)} layers, hidden {section['hidden_size']}"


def _write(write_toy, config: dict, folder: Path, seed: int, dtype: str) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        write_toy(config, folder, seed=seed, dtype=dtype)
    except (KeyError, ValueError) as refused:
        raise ConfigError(f"transformers does not build {config.get('model_type')!r}: {refused}") from refused
