"""AutoBridge: detection and the public methods, under the names that code written for Megatron-Bridge uses."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, update_wrapper, wraps
from pathlib import Path
from typing import Any

from . import exporter, importer, parallel
from .architecture import Architecture
from .errors import BridgeError, ConfigError
from .families import families, find_family
from .held import as_chunks, held
from .io import torch_dist
from .io.files import whole_folder
from .io.quant.source import QuantisedSource, open_source
from .io.quant.writing import Quantising
from .io.sink import listed, write_companions, write_weights
from .io.source import SafetensorsSource
from .moves import Move
from .plan import ParallelPlan
from .provider import Provider

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ConversionTask:
    """One Megatron parameter of this rank and the moves that fill it (``explain`` prints them)."""

    param_name: str
    param_weight: Any
    sources: tuple[str, ...]
    moves: tuple[Move, ...]


class _on_class_too:
    """A method whose first argument is the instance, or None when it is called on the class."""

    def __init__(self, function):
        self.function = function
        update_wrapper(self, function)

    def __get__(self, instance, owner):
        return wraps(self.function)(partial(self.function, instance))


class AutoBridge:
    """A bridge between one Hugging Face model and megatron-core.

    Make it with `from_hf_pretrained` (a folder or hub id, with weights) or `from_hf_config` (no weights).
    """

    def __init__(self, config: Mapping[str, Any], folder: Path | None = None, *, allow_fields: tuple[str, ...] = ()):
        self.hf_config = copy.deepcopy(dict(config))
        self.folder = folder
        self.allow_fields = allow_fields
        self.family = find_family(config)
        self.architecture: Architecture = self.family.architecture(self.hf_config, allow_fields=allow_fields)
        self._source: SafetensorsSource | QuantisedSource | None = None
        self._recorded: dict[str, str] = {}
        self._recorded_copies: tuple[str, ...] = ()

    # -------------------------------------------------------------------------------------------------------- detection
    @classmethod
    def from_hf_pretrained(cls, path: str | Path, *, allow_fields: tuple[str, ...] = (), **hub: Any) -> AutoBridge:
        """Bridge for a local model folder, or a hub id (downloaded by huggingface_hub, which takes the other arguments).

        `allow_fields` names unknown config fields that you vouch for. Raises ConfigError, CheckpointError, UnknownArchitectureError.
        """
        folder = Path(path) if Path(path).is_dir() else _download(str(path), hub)
        return cls(read_config(folder), folder, allow_fields=allow_fields)

    @classmethod
    def from_hf_config(cls, config: Any, *, allow_fields: tuple[str, ...] = ()) -> AutoBridge:
        """Bridge without weights, from a transformers config object, a dict, or the path of a config.json or model folder."""
        if isinstance(config, str | Path):
            config = read_config(Path(config))
        elif hasattr(config, "to_dict"):
            config = from_transformers(config)
        return cls(config, allow_fields=allow_fields)

    @classmethod
    def can_handle(cls, path: str | Path, **hub: Any) -> bool:
        """Whether a registered family takes the model at `path`, every config field understood."""
        try:
            cls.from_hf_pretrained(path, **hub)
        except BridgeError:
            return False
        return True

    @classmethod
    def supports(cls, config: Any) -> bool:
        """Whether a registered family claims the config's architecture."""
        try:
            find_family(config if isinstance(config, Mapping) else config.to_dict())
        except BridgeError:
            return False
        return True

    @classmethod
    def list_supported_models(cls) -> list[str]:
        """Every architecture that some family claims, once."""
        return sorted({a for family in families().values() for a in family.architectures})

    # ----------------------------------------------------------------------------------------------------------- models
    @property
    def source(self) -> SafetensorsSource | QuantisedSource:
        """The weights, decoded where `quantization_config` says so. Raises BridgeError for a bridge made from a config alone."""
        if self.folder is None:
            raise BridgeError(
                "this bridge was made from a config and has no weights; use from_hf_pretrained, pass hf_path, or ask for load_weights=False"
            )
        if self._source is None:
            self._source = open_source(self.folder, self.hf_config)
        return self._source

    def to_megatron_provider(self, load_weights: bool = True) -> Provider:
        """The provider: change its settings, then `finalize` and `provide_distributed_model`. With `load_weights`, models it builds are
        filled from the checkpoint."""
        provider = Provider(self.architecture)
        if load_weights:
            provider.filled = True
            provider.register_pre_wrap_hook(lambda chunks: self._load(chunks, provider.architecture, self.source, None))
        if load_weights and self._config_lacks_dtype():
            provider.params_dtype = self.source.dtype(next(iter(self.architecture.hf_shapes())))
        return provider

    def to_megatron_model(self, load_weights: bool = True, *, plan: ParallelPlan | str = "", wrap_with_ddp: bool = False) -> list:
        """This rank's model chunks under `plan`, filled from the checkpoint."""
        provider = self.to_megatron_provider(load_weights).apply(plan).finalize()
        return provider.provide_distributed_model(wrap_with_ddp=wrap_with_ddp)

    @property
    def transformer_config(self):
        """megatron-core's TransformerConfig of the model on one rank."""
        return self.to_megatron_provider(load_weights=False).finalize().config

    # ---------------------------------------------------------------------------------------------------------- weights
    def load_hf_weights(self, model, hf_path: str | Path | None = None, *, progress: Progress | None = None):
        """Fill a built model (or its list of chunks) from this bridge's checkpoint, or from another of the same architecture; returns
        the model. Each rank reads the bytes of its own pieces. Raises CheckpointError, CoverageError."""
        source = self.source if hf_path is None else open_source(hf_path, _config_beside(Path(hf_path)))
        self._load(model, self.live(model), source, progress)
        return model

    def export_hf_weights(self, model, cpu: bool = True, show_progress: bool = False) -> Iterator[tuple[str, Any]]:
        """Stream (HF name, whole tensor) in checkpoint order, bit-exact, on every rank; all ranks must consume it to the end."""
        export = exporter.Export(model, self.live(model), cpu=cpu, stored=self.stored_dtypes())
        stream = self._with_copies(export, self.live(model))
        if not show_progress:
            return stream
        from .progress import tracked

        return tracked(stream, "exporting", len(export.entries))

    def export_hf_gradients(self, model, cpu: bool = True) -> Iterator[tuple[str, Any]]:
        """Stream (HF name, gradient) through the same moves as the weights (main_grad of DDP-wrapped models, else .grad)."""
        return iter(exporter.Export(model, self.live(model), value=exporter.gradient, cpu=cpu))

    def get_conversion_tasks(self, model) -> list[ConversionTask]:
        """What `load_hf_weights` would do on this rank, parameter by parameter."""
        return [
            ConversionTask(h.tensor.name, h.param, tuple(s.name for s in h.tensor.sources), h.moves)
            for h in held(model, self.live(model))
        ]

    # -------------------------------------------------------------------------------------------------- Hugging Face files
    def save_hf_pretrained(
        self,
        model,
        path: str | Path,
        *,
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
        quantize: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Write a complete model folder: weights, index, config.json of the model as it is now, and the source's small files.

        quantize: ``fp8-block`` writes linear weights as FP8 tiles with scales; without it weights are plain. Every rank calls it; rank 0
        writes. The folder appears when it is complete. Raises CheckpointError, ConfigError.
        """
        again = Quantising(quantize, self.live(model), self.hf_config) if quantize else None
        self._save(model, Path(path), max_shard_size, overwrite, progress, complete=True, again=again)

    def save_hf_weights(self, model, path: str | Path, *, max_shard_size: int | str = "5GB", overwrite: bool = False) -> None:
        """Write weights and index only."""
        self._save(model, Path(path), max_shard_size, overwrite, None, complete=False)

    def hf_config_for(self, model) -> dict[str, Any]:
        """config.json of a built model: the source's own spelling where nothing changed."""
        return self.family.rules.write(self.live(model).settings, self.hf_config)

    def _save(
        self, model, path: Path, max_shard_size, overwrite: bool, progress, *, complete: bool, again: Quantising | None = None
    ):
        export = exporter.Export(model, self.live(model), stored=self.stored_dtypes())
        stream = _reported(self._with_copies(export, self.live(model)), progress)
        failed = None
        if parallel.rank() == 0:
            entries = listed(export.entries, self.listed_copies(self.live(model)))
            config, tensors = self.hf_config_for(model), stream
            if again:
                entries, tensors, config = again.entries(entries), again.tensors(stream), again.config(config)
            try:
                with whole_folder(path, overwrite=overwrite) as folder:
                    write_weights(folder, entries, tensors, max_shard_size=max_shard_size)
                    if complete:
                        write_companions(folder, self.folder, config)
            except BridgeError as problem:
                failed = problem
        for _ in stream:  # what rank 0 did not take after a failure, and everything on the others: the stream is collective
            pass
        if failed := parallel.broadcast_object(failed):
            raise failed

    # -------------------------------------------------------------------------------------------------- Megatron checkpoints
    def save_megatron_model(self, model, path: str | Path, *, overwrite: bool = False) -> None:
        """Save as a torch_dist checkpoint that megatron-core's loaders read, with what is needed to rebuild or export the model."""
        torch_dist.save(as_chunks(model), path, record=self.record(model), source=self.folder, overwrite=overwrite)

    def record(self, model) -> dict[str, Any]:
        """What a torch_dist checkpoint needs beside the weights, to be exported or built again without this bridge."""
        return {
            "family": self.family.name,
            "hf_config": self.hf_config_for(model),
            "plan": str(parallel.running_plan()),
            "allow_fields": self.allow_fields,
            "stored_dtypes": self._stored_names(),
            "copies": [name for names in self.listed_copies(self.live(model)).values() for name in names],
        }

    def load_megatron_model(self, path: str | Path, *, plan: ParallelPlan | str = "", wrap_with_ddp: bool = False) -> list:
        """Build this rank's chunks under `plan` and fill them from a torch_dist checkpoint saved under any plan."""
        provider = self.to_megatron_provider(load_weights=False).apply(plan)
        provider.filled = True
        provider.params_dtype = self.dtype_of(path) or provider.params_dtype
        provider.finalize().register_pre_wrap_hook(lambda chunks: torch_dist.load(chunks, path))
        return provider.provide_distributed_model(wrap_with_ddp=wrap_with_ddp)

    def dtype_of(self, path: str | Path) -> str | None:
        """Dtype name of a torch_dist checkpoint's weights where config.json says none, else None."""
        return torch_dist.stored_dtype(path) if self._config_lacks_dtype() else None

    @classmethod
    def from_megatron(cls, path: str | Path) -> AutoBridge:
        """The bridge of a torch_dist checkpoint that this library saved: no Hugging Face folder is needed."""
        record = torch_dist.read_record(path)
        bridge = cls(record["hf_config"], allow_fields=tuple(record.get("allow_fields", ())))
        bridge.folder, bridge._recorded = Path(path) / torch_dist.RECORD, dict(record.get("stored_dtypes", {}))
        bridge._recorded_copies = tuple(record.get("copies", ()))
        return bridge

    @classmethod
    def import_ckpt(
        cls,
        hf_model_id: str | Path,
        megatron_path: str | Path,
        *,
        plan: ParallelPlan | str = "",
        overwrite: bool = False,
        **hub: Any,
    ) -> None:
        """Hugging Face folder (or hub id) -> torch_dist checkpoint, streamed; see `convert.import_folder`."""
        from .convert import import_folder

        import_folder(cls.from_hf_pretrained(hf_model_id, **hub), megatron_path, plan=plan, overwrite=overwrite)

    @_on_class_too
    def export_ckpt(bridge: AutoBridge | None, megatron_path: str | Path, hf_path: str | Path, **options: Any) -> None:
        """torch_dist checkpoint, saved under any plan -> Hugging Face folder, streamed; see `convert.export_folder`. Called on the class, the
        bridge is that of the checkpoint's own record; called on a bridge, its config and small files serve, also for checkpoints that
        megatron's trainer wrote."""
        from .convert import export_folder

        export_folder(bridge or AutoBridge.from_megatron(megatron_path), megatron_path, hf_path, **options)

    # --------------------------------------------------------------------------------------------------------- internals
    def _config_lacks_dtype(self) -> bool:
        """Weights say it then, wherever they come from: absent means float32 for no checkpoint."""
        return self.hf_config.get("dtype") is None and self.hf_config.get("torch_dtype") is None

    def _load(self, model, architecture: Architecture, source: SafetensorsSource, progress: Progress | None) -> None:
        importer.load(model, source, architecture, left_out=self.left_out(architecture), progress=progress)

    def left_out(self, architecture: Architecture) -> set[str]:
        """HF tensors that a model of `architecture` was built without on purpose: prediction layers."""
        return self.architecture.mtp_names() - architecture.mtp_names()

    def live(self, model) -> Architecture:
        """The architecture of a built model: its provider's (models built elsewhere: this bridge's), in the dtype it has now and with the
        kind of expert modules it has. A stage of layers that do nothing has no parameters."""
        chunks = as_chunks(model)
        chunk, parameter = chunks[0], next((p for chunk in chunks for p in chunk.parameters()), None)
        architecture = getattr(chunk, "hf_architecture", self.architecture)
        now = {} if parameter is None else {"params_dtype": str(parameter.dtype).split(".")[-1]}
        if "moe_grouped_gemm" in architecture.settings:
            now["moe_grouped_gemm"] = chunk.config.moe_grouped_gemm
        return Architecture(self.family, {**architecture.settings, **now})

    def _stored_names(self) -> dict[str, str]:
        """HF name -> dtype name of what Megatron keeps in fp32 and the source holds in another type; from a checkpoint's record where there
        is no Hugging Face folder."""
        if self.folder is None or not any(self.folder.glob("*.safetensors")):
            return self._recorded
        wide = self.architecture.hf_wide()
        return {n: dtype for n in wide if n in self.source and (dtype := self.source.dtype(n)) != "float32"}

    def stored_dtypes(self) -> dict[str, Any]:
        """HF name -> torch dtype that the source has for what Megatron keeps in fp32."""
        import torch

        return {name: getattr(torch, dtype) for name, dtype in self._stored_names().items()}

    def listed_copies(self, architecture: Architecture) -> dict[str, list[str]]:
        """Tensor -> the copies of it that the source lists (a tied head, embeddings in prediction layers): the export lists them too. From a
        checkpoint's record where there is no Hugging Face folder."""
        weights = self.folder is not None and any(self.folder.glob("*.safetensors"))
        listed = self.source if weights else self._recorded_copies
        found: dict[str, list[str]] = {}
        for name, original in architecture.copies().items():
            if name in listed:
                found.setdefault(original, []).append(name)
        return found

    def _with_copies(self, stream, architecture: Architecture):
        copies = self.listed_copies(architecture)
        for name, tensor in stream:
            yield name, tensor
            for copy_name in copies.get(name, ()):
                yield copy_name, tensor.clone()


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model folder (or the file itself). Raises ConfigError."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist; a Hugging Face model folder has a config.json") from None
    except json.JSONDecodeError as broken:
        raise ConfigError(f"{file} is no JSON ({broken})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file} holds a {type(config).__name__}; a config.json is an object")
    return config


def _config_beside(folder: Path) -> dict[str, Any]:
    """config.json of a folder that may hold weights alone."""
    return read_config(folder) if (folder / "config.json").exists() else {}


def from_transformers(config) -> dict[str, Any]:
    """A transformers config object as config.json would hold it."""
    return json.loads(config.to_json_string(use_diff=True)) | {"architectures": config.architectures}


def _download(name: str, hub: dict) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.py", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **hub))
    except Exception as offline:
        raise ConfigError(
            f"{name!r} is neither a local folder nor a model the hub client can fetch ({type(offline).__name__}: {offline})"
        ) from offline


def _reported(stream, progress: Progress | None):
    for name, tensor in stream:
        if progress:
            progress(name)
        yield name, tensor
