"""`toy`: a small model folder with a published model's structure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError, nearest
from . import shared


def toy(
    config: shared.Config,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The model folder to write.")],
    geometry: Annotated[str, typer.Option(help="Which coincidences of production to copy: default has none.")] = "default",
    seed: Annotated[int, typer.Option(help="Another seed, other weights.")] = 0,
    overwrite: shared.Overwrite = False,
) -> None:
    """Write a small model folder with the structure of CONFIG.

    Telling sizes and loud weights, saved by transformers.
    """
    from shardproof.toy_models import GEOMETRIES, toy_config, write_toy

    from ..io.files import whole_folder

    if geometry not in GEOMETRIES:
        raise ConfigError(f"no geometry {geometry!r}{nearest(geometry, GEOMETRIES)}; there are {', '.join(GEOMETRIES)}")
    published = shared.read_model_config(config)
    try:
        small = toy_config(published, geometry)
    except (KeyError, ValueError) as lacking:
        raise ConfigError(f"no toy can be made from {config}: {lacking}") from lacking
    shared.free_output(folder, overwrite)
    with shared.only_results_on_stdout(), whole_folder(folder, overwrite=overwrite) as partial:
        _write(write_toy, small, partial, seed)
    shared.say(f"{folder}: {small['num_hidden_layers']} layers, hidden {small['hidden_size']}, geometry {geometry}, seed {seed}")


def _write(write_toy, config: dict, folder: Path, seed: int) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        write_toy(config, folder, seed=seed)
    except (KeyError, ValueError) as refused:
        raise ConfigError(f"transformers does not build {config.get('model_type')!r}: {refused}") from refused
