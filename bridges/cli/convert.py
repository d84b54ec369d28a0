"""`import` and `export`: Hugging Face folder <-> torch_dist checkpoint, alone or under torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import PlanError
from ..progress import advancing
from . import shared


def import_(
    hf_dir: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A Hugging Face model folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The torch_dist checkpoint to write; loads under any plan.")],
    plan: shared.Plan = "",
    overwrite: shared.Overwrite = False,
    allow_field: shared.AllowField = None,
    as_json: shared.Json = False,
) -> None:
    """Import a model folder into a torch_dist checkpoint.

    Alone it is one rank; for a plan of several: torchrun --nproc-per-node N -m shardproof.bridges.cli import ... --plan tp2,pp2
    """
    watch = shared.Stopwatch()
    with shared.only_results_on_stdout():
        from ..auto import AutoBridge

        bridge = AutoBridge.from_hf_pretrained(shared.existing_folder(hf_dir), allow_fields=tuple(allow_field or ()))
        parsed = _checked(bridge.architecture, plan)
        shared.free_output(out, overwrite)
        with shared.fast_imports():
            from .. import importer
            from ..convert import import_folder

            shared.megatron()
            importer.check_source(bridge.source, bridge.architecture)  # before ranks are joined: all fail alike, rank 0 says it
        with advancing("importing", len(bridge.architecture.tensors())) as advance:
            done = import_folder(
                bridge, out, plan=parsed, overwrite=overwrite, wrote=lambda key: (watch.mark_first(), advance(key))
            )
        report = _report(bridge, parsed, watch, out) | {"bytes_read": _total(done)}
    _finish(report, as_json)


def export(
    megatron_dir: Annotated[Path, typer.Argument(metavar="MEGATRON_DIR", help="A torch_dist checkpoint.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The Hugging Face folder to write.")],
    hf: Annotated[Path | None, typer.Option(metavar="HF_DIR", help="Take config and small files from there.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    quantize: Annotated[
        str | None, typer.Option(metavar="KIND", help="Quantise linear weights: fp8-block. Plain without it.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the checkpoint's files with their SHA-256 meanwhile.")
    ] = True,
    plan: shared.Plan = "",
    overwrite: shared.Overwrite = False,
    allow_field: shared.AllowField = None,
    as_json: shared.Json = False,
) -> None:
    """Export a torch_dist checkpoint to a model folder.

    The checkpoint may have been saved under any plan. With --quantize fp8-block linear weights are written as FP8 tiles with scales, in the
    tiles and with the exceptions of HF_DIR's quantization_config where it has some.
    """
    watch = shared.Stopwatch()
    with shared.only_results_on_stdout():
        from ..auto import AutoBridge
        from ..io import torch_dist
        from ..io.quant.writing import Quantising
        from ..io.sink import parse_size

        shared.existing_folder(megatron_dir)
        torch_dist.iteration_folder(megatron_dir)
        if hf:
            bridge = AutoBridge.from_hf_pretrained(shared.existing_folder(hf), allow_fields=tuple(allow_field or ()))
        else:
            bridge = AutoBridge.from_megatron(megatron_dir)
        parsed = _checked(bridge.architecture, plan)
        shared.free_output(out, overwrite)
        parse_size(max_shard_size)
        if quantize:
            Quantising(quantize, bridge.architecture, bridge.hf_config)  # refuses before the model is built
        with shared.fast_imports():
            from ..convert import export_folder

            shared.megatron()
        with advancing("exporting", len(bridge.architecture.hf_shapes())) as advance:
            options = {
                "plan": parsed,
                "max_shard_size": max_shard_size,
                "overwrite": overwrite,
                "quantize": quantize,
                "verify": verify,
            }
            export_folder(bridge, megatron_dir, out, **options, wrote=lambda name: (watch.mark_first(), advance(name)))
        report = _report(bridge, parsed, watch, out)
    _finish(report, as_json)


def _checked(architecture, plan: str):
    """The plan, possible for the model and for the ranks that run."""
    from ..plan import ParallelPlan

    parsed, ranks = ParallelPlan.parse(plan), shared.launched_ranks()
    architecture.check(parsed)
    if ranks % parsed.world_size:
        running = "this process is one" if ranks == 1 else f"there are {ranks}"
        raise PlanError(
            f"plan {parsed} needs {parsed.world_size} ranks or a multiple of them; {running}; start it with"
            f" torchrun --nproc-per-node {parsed.world_size} -m shardproof.bridges.cli"
        )
    return parsed


def _total(mine: int) -> int:
    from .. import parallel

    return sum(parallel.all_gather_object(mine))


def _report(bridge, plan, watch: shared.Stopwatch, out: Path) -> dict:
    from .. import host, parallel

    size = {"family": bridge.family.name, "plan": str(plan), "ranks": parallel.world_size(), "out": str(out)}
    size |= {"tensors": len(bridge.architecture.hf_shapes())}
    return size | {"host": host.record().as_dict(), "seconds_to_first_tensor": watch.first, "seconds": watch.seconds()}


def _finish(report: dict, as_json: bool) -> None:
    shared.leave_ranks()
    if as_json:
        return shared.emit(report)
    read = f", {shared.amount(report['bytes_read'])}B read" if "bytes_read" in report else ""
    ranks = shared.counted(report["ranks"], "rank")
    shared.say(f"{report['out']}: {report['family']}, {report['tensors']} tensors{read}, plan {report['plan']} on {ranks}")
    shared.say(f"{report['seconds']:.1f} s since launch, first tensor after {report['seconds_to_first_tensor']:.1f} s")
    shared.say(f"ran on {host_text(report['host'])}")


def host_text(host: dict) -> str:
    """What ran, in one line: a stand-in is never read as the real thing."""
    kernels = [f"{name} {version}" for name, version in host["kernels"].items() if version != "stand-in"]
    parts = [f"{name.replace('_', ' ')} {host[name]}" for name in ("torch", "megatron_core", "transformer_engine")]
    return ", ".join([host["device"], *parts, *kernels])
