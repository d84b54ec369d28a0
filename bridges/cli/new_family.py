"""`new-family`: family file, registered config and page of a model that has none yet; what is missing in them is red in the suite."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from ..errors import BridgeError, ConfigError
from . import shared


def new_family(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The family's name: a Python identifier in lower case.")],
    config: Annotated[Path, typer.Option(help="The published config.json, or a folder that holds it.")],
    model_id: Annotated[str, typer.Option(help="The hub id it was published under: ORG/NAME.")],
    source: Annotated[str, typer.Option(help="Where the config comes from, for the provenance table.")] = "TODO",
    root: Annotated[Path | None, typer.Option(help="The clone to write into (default: the one this runs from).")] = None,
) -> None:
    """Draft a family from a published config: bridges/families/NAME.py, the registered config, docs/models/NAME.md.

    Names and shapes are read off transformers' own model on the meta device; whatever is not certain becomes a TODO.
    """
    from .. import scaffold

    clone = _clone(root)
    published = config / "config.json" if config.is_dir() else config
    _check_names(name, model_id)
    read = shared.read_model_config(str(published))
    files = {
        clone / "bridges" / "families" / f"{name}.py": "family.py.j2",
        clone / "docs" / "models" / f"{name}.md": "page.md.j2",
    }
    registered = clone / "fixtures" / "configs" / f"{model_id.replace('/', '__')}.json"
    _nothing_there(read, [*files, registered])
    made = scaffold.draft(name, read, model_id.split("/")[-1])
    for path, template in files.items():
        path.write_text(scaffold.render(template, made))
    registered.write_text(published.read_text())
    _provenance(clone / "fixtures" / "configs" / "README.md", model_id, source)
    _tell([*files, registered], made, clone)


def _clone(root: Path | None) -> Path:
    clone = (root or Path(__file__).resolve().parents[2]).resolve()
    if not (clone / "bridges" / "families").is_dir() or not (clone / "docs" / "models").is_dir():
        raise BridgeError(f"{clone} is no clone of Shardproof (bridges/families and docs/models are not there); pass --root")
    return clone


def _check_names(name: str, model_id: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(f"family name {name!r} must be lower-case letters, digits and underscores: it names a Python file")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model_id):
        raise ConfigError(f"--model-id {model_id!r} must be ORG/NAME, as on the hub")


def _nothing_there(config: dict, files: list[Path]) -> None:
    from ..families import families

    for family in families().values():
        if taken := set(config.get("architectures") or ()) & set(family.architectures):
            raise ConfigError(f"{', '.join(sorted(taken))} belongs to family {family.name!r}: register the config there instead")
    if there := [f for f in files if f.exists()]:
        raise BridgeError(f"{there[0]} exists; remove it or choose another name")


def _provenance(readme: Path, model_id: str, source: str) -> None:
    """A row in the table of published configs, in its place by model id."""
    lines = readme.read_text().splitlines()
    row = f"| {model_id} | TODO | TODO | TODO | {source} | TODO | - |"
    rows = [i for i, line in enumerate(lines) if line.startswith("| ") and "/" in line.split("|")[1]]
    place = next((i for i in rows if lines[i].split("|")[1].strip().lower() > model_id.lower()), rows[-1] + 1)
    readme.write_text("\n".join([*lines[:place], row, *lines[place:]]) + "\n")


def _tell(files: list[Path], made, clone: Path) -> None:
    for path in files:
        shared.say(f"wrote {path.relative_to(clone)}")
    todo = [f"config field {key} = {value}" for key, value in made.unknown] + [f"tensor {n}" for n in made.leftover]
    for what in todo:
        shared.say(f"TODO {what}")
    shared.say(
        "next:\n"
        f"  pytest conformance --family {made.name} --check names      what is read and written\n"
        f"  pytest conformance --family {made.name} --check forward    settings and layout\n"
        f"  pytest conformance --family {made.name} --check config --check lineage --snapshot-update    then review the files it wrote\n"
        f"  pytest conformance --family {made.name} --certify          the gate\n"
        "  python -m shardproof.bridges.pages                         the page's tables"
    )
