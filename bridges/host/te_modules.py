"""Pure-torch stand-ins of Transformer Engine's linear layers and norms, as megatron-core subclasses them.

Names, shapes, dtypes and parallel attributes are Transformer Engine's (tests/test_host_te_names.py compares them with the real
Python); the arithmetic is the textbook's, with half types computed in fp32 and rounded once, and fp64 kept.

Shapes: activations ``[s, b, h]`` (or ``[tokens, h]``), weights ``[out, in]`` of this rank's shard.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F


def wide(x: torch.Tensor) -> torch.Tensor:
    """The tensor in the type its sums are made in: fp32 for half types, and fp32 and fp64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, kind: str, zero_centered: bool
) -> torch.Tensor:
    """RMSNorm or LayerNorm over the last dim; ``zero_centered`` means the weight is stored less 1. Returns x's dtype."""
    x_wide, gain = wide(x), wide(weight) + 1 if zero_centered else wide(weight)
    if kind == "RMSNorm":
        # the weight is applied before the one rounding, as in TE's kernels; HF rounds first, then applies it
        return (x_wide * torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps) * gain).to(x.dtype)
    shift = None if bias is None else wide(bias).to(x_wide.dtype)
    return F.layer_norm(x_wide, (x.shape[-1],), gain.to(x_wide.dtype), shift, eps).to(x.dtype)


def mark_partition(parameter: torch.Tensor, dim: int) -> None:
    """Write the attributes by which megatron knows a tensor-parallel parameter."""
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, 1


class NoExtraState:
    """TE's checkpoint entry ``_extra_state`` (fp8 scales), always empty here: production checkpoints have the key."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        pass


class TransformerEngineBaseModule(NoExtraState, torch.nn.Module):
    """What TE's base class shows to megatron: extra state, fp8 flags, the tensor-parallel group."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8 = self.fp8_calibration = self.primary_weights_in_fp8 = False
        self.fp8_meta = {"fp8_checkpoint": False}
        self.tp_group, self.tp_size, self.tp_group_initialized = None, 1, False
        self.save_original_input = False

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass

    def backward_dw(self) -> None:
        """Delayed weight gradients: none are ever pending here."""

    def set_tensor_parallel_group(self, group: Any) -> None:
        self.tp_group, self.tp_group_initialized = group, True

    def _join(self, group: Any, size: int) -> None:
        self.set_tensor_parallel_group(group)
        self.tp_size = group.size() if group is not None else size


def _initialise(parameter: torch.Tensor, init_method: Callable | None, tracker: Callable | None, rng_name: str | None) -> None:
    """Draw the values under megatron's RNG tracker, in the order TE draws them; nothing to draw on meta."""
    if parameter.is_meta or init_method is None:
        return
    fork = nullcontext() if tracker is None else tracker().fork(rng_name) if rng_name else tracker().fork()
    with fork, torch.no_grad():
        init_method(parameter)


def _share(total: int, parts: int, what: str) -> int:
    if total % parts:
        raise ValueError(f"{what} {total} is not a multiple of the tensor-parallel size {parts}: change one of them")
    return total // parts


class _Norm(NoExtraState, torch.nn.Module):
    kind = ""

    def __init__(
        self, normalized_shape=None, eps=1e-5, sequence_parallel=None, params_dtype=None, zero_centered_gamma=False,
        hidden_size=None, device=None, dtype=None, **kwargs,
    ) -> None:  # fmt: skip
        super().__init__()
        size = hidden_size if normalized_shape is None else normalized_shape
        self.eps, self.zero_centered_gamma, self.sequence_parallel = eps, zero_centered_gamma, sequence_parallel
        self._sm_margins: dict = {}
        where = {"device": device, "dtype": params_dtype or dtype}
        self.weight = torch.nn.Parameter(torch.empty(size, **where))
        if self.kind == "LayerNorm":  # TE's RMSNorm has no attribute "bias" at all
            self.bias = torch.nn.Parameter(torch.empty(size, **where))
        self.reset_parameters()
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.fill_(0 if self.zero_centered_gamma else 1)
            if self.kind == "LayerNorm":
                self.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return norm(x, self.weight, getattr(self, "bias", None), self.eps, self.kind, self.zero_centered_gamma)


class RMSNorm(_Norm):
    """``transformer_engine.pytorch.RMSNorm``: ``[..., h]`` to ``[..., h]``."""

    kind = "RMSNorm"


class LayerNorm(_Norm):
    """``transformer_engine.pytorch.LayerNorm``: ``[..., h]`` to ``[..., h]``."""

    kind = "LayerNorm"


class Linear(TransformerEngineBaseModule):
    """``transformer_engine.pytorch.Linear``, with TE's own communication when tensor parallel.

    ``parallel_mode``: "column" shards the output features, "row" the input features, None neither. With
    ``sequence_parallel`` the input of a column layer and the output of a row layer are sharded over dim 0.
    """

    def __init__(
        self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None, tp_size=1,
        get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True, return_bias=False,
        params_dtype=None, parallel_mode=None, device="cuda", **kwargs,
    ) -> None:  # fmt: skip
        super().__init__()
        self._join(tp_group, tp_size)
        self._set_sizes(in_features, out_features, parallel_mode)
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.use_bias, self.return_bias, self.apply_bias = bias, return_bias, bias and not return_bias
        self._make_norm(device, params_dtype)
        self._make_weight(device, params_dtype, init_method, get_rng_state_tracker, rng_tracker_name)
        self._make_bias(device, params_dtype)

    def _set_sizes(self, in_features: int, out_features: int, parallel_mode: str | None) -> None:
        self.parallel_mode, self.in_features, self.out_features = parallel_mode, in_features, out_features
        if parallel_mode == "column":
            self.out_features = _share(out_features, self.tp_size, "out_features")
        elif parallel_mode == "row":
            self.in_features = _share(in_features, self.tp_size, "in_features")

    def _make_norm(self, device: Any, dtype: Any) -> None:
        """A plain linear layer has none. Its place is here: TE registers the norm before the weight."""

    def _make_weight(self, device: Any, dtype: Any, init_method: Any, tracker: Any, rng_name: Any) -> None:
        self.weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, device=device, dtype=dtype))
        _initialise(self.weight, init_method, tracker, rng_name)
        mark_partition(self.weight, 1 if self.parallel_mode == "row" else 0)

    def _make_bias(self, device: Any, dtype: Any) -> None:
        if not self.use_bias:
            self.bias = torch.empty(0, device=device, dtype=dtype)
            return
        self.bias = torch.nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype))
        if self.parallel_mode == "row":
            self.bias.sequence_parallel = self.sequence_parallel
        elif self.parallel_mode == "column":
            mark_partition(self.bias, 0)

    def forward(self, x: torch.Tensor, is_first_microbatch: Any = None, **kwargs: Any) -> Any:
        y = self._multiply(x)
        return (y, self.bias) if self.return_bias else y

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias if self.apply_bias else None
        if self.tp_size == 1 or self.tp_group is None or self.parallel_mode is None:
            return F.linear(x, self.weight, bias)
        if self.parallel_mode == "column":
            return F.linear(self._gathered(x), self.weight, bias)
        y = self._reduced(F.linear(x, self.weight))
        return y if bias is None else y + bias

    def _gathered(self, x: torch.Tensor) -> torch.Tensor:
        from megatron.core.tensor_parallel import mappings

        if self.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(x, group=self.tp_group)
        return mappings.copy_to_tensor_model_parallel_region(x, group=self.tp_group)

    def _reduced(self, y: torch.Tensor) -> torch.Tensor:
        from megatron.core.tensor_parallel import mappings

        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(y, group=self.tp_group)
        return mappings.reduce_from_tensor_model_parallel_region(y, group=self.tp_group)


class LayerNormLinear(Linear):
    """``transformer_engine.pytorch.LayerNormLinear``: a norm and a linear layer with the names of one module."""

    def __init__(
        self, in_features, out_features, eps=1e-5, *, normalization="LayerNorm", zero_centered_gamma=False,
        return_layernorm_output=False, **kwargs,
    ) -> None:  # fmt: skip
        # before torch's own __init__, which a plain attribute allows: the base class calls _make_norm
        self._norm_options = (eps, normalization, zero_centered_gamma, return_layernorm_output)
        super().__init__(in_features, out_features, **kwargs)
        for parameter in (self.layer_norm_weight, self.layer_norm_bias):
            if parameter is not None:
                parameter.sequence_parallel = self.sequence_parallel

    def _make_norm(self, device: Any, dtype: Any) -> None:
        self.eps, self.normalization, self.zero_centered_gamma, self.return_layernorm_output = self._norm_options
        fill = torch.zeros if self.zero_centered_gamma else torch.ones
        self.layer_norm_weight = torch.nn.Parameter(fill(self.in_features, device=device, dtype=dtype))
        self.layer_norm_bias = None
        if self.normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(self.in_features, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor, is_first_microbatch: Any = None, **kwargs: Any) -> Any:
        weight, bias = self.layer_norm_weight, self.layer_norm_bias
        normed = norm(x, weight, bias, self.eps, self.normalization, self.zero_centered_gamma)
        out = super().forward(normed)
        if not self.return_layernorm_output:
            return out
        return (*out, normed) if isinstance(out, tuple) else (out, normed)


class GroupedLinear(TransformerEngineBaseModule):
    """``transformer_engine.pytorch.GroupedLinear``: one weight per local expert, ``weight0`` .. ``weight{n-1}``.

    ``forward(x, m_splits)``: ``x [tokens, in]`` sorted by expert, ``m_splits[i]`` of its rows belong to expert i. It does not
    communicate, as TE's does not: megatron's dispatcher gathers and scatters.
    """

    def __init__(
        self, num_gemms, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None,
        tp_size=1, get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True, return_bias=False,
        params_dtype=None, parallel_mode=None, device="cuda", single_grouped_weight=False, single_grouped_bias=False,
        **kwargs,
    ) -> None:  # fmt: skip
        super().__init__()
        if single_grouped_weight or single_grouped_bias:
            raise NotImplementedError("the transformer_engine stand-in keeps one weight per expert: leave single_grouped_* off")
        self._join(tp_group, tp_size)
        self.parallel_mode, self.num_gemms = parallel_mode, num_gemms
        self.in_features, self.out_features = in_features, out_features
        if parallel_mode == "column":
            self.out_features = _share(out_features, self.tp_size, "out_features")
        elif parallel_mode == "row":
            self.in_features = _share(in_features, self.tp_size, "in_features")
        self.use_bias, self.return_bias, self.apply_bias = bias, return_bias, bias and not return_bias
        self.single_grouped_weight = self.single_grouped_bias = False
        for i in range(num_gemms):
            self._make_expert(i, device, params_dtype, init_method, get_rng_state_tracker, rng_tracker_name)

    def _make_expert(self, i: int, device: Any, dtype: Any, init_method: Any, tracker: Any, rng_name: Any) -> None:
        weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, device=device, dtype=dtype))
        _initialise(weight, init_method, tracker, rng_name)
        mark_partition(weight, 1 if self.parallel_mode == "row" else 0)
        self.register_parameter(f"weight{i}", weight)
        if self.use_bias:
            bias = torch.nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype))
            self.register_parameter(f"bias{i}", bias)
        else:
            setattr(self, f"bias{i}", torch.empty(0, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor, m_splits: Any, is_first_microbatch: Any = None, **kwargs: Any) -> Any:
        sizes = m_splits.tolist() if torch.is_tensor(m_splits) else list(m_splits)
        parts = torch.split(x.reshape(-1, x.shape[-1]), sizes)
        y = torch.cat([F.linear(part, *self._expert(i)) for i, part in enumerate(parts)]).view(*x.shape[:-1], self.out_features)
        if not self.return_bias:
            return y
        return y, [getattr(self, f"bias{i}") for i in range(self.num_gemms)] if self.use_bias else None

    def _expert(self, i: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return getattr(self, f"weight{i}"), getattr(self, f"bias{i}") if self.apply_bias else None
