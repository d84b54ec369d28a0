"""RMSNorm over a whole query or key projection, all heads together (OLMoE); megatron-core has it per head only.

Imports torch, so only a provider that builds such a model imports it.
"""

from __future__ import annotations

import torch


class FullWidthNorm(torch.nn.Module):
    """Takes the place of megatron-core's query or key norm: ``[S, B, heads of this rank, head dim]``, same shape out.

    The mean of squares is taken over the heads of all tensor-parallel ranks. Each rank holds the whole weight [heads * head dim] and uses
    the part of its own heads, because megatron-core sums the gradients of ``q_layernorm`` and ``k_layernorm`` over these ranks; it also
    holds for key heads that several ranks share.

    heads: TransformerConfig field with the number of heads of all ranks.
    """

    def __init__(self, hidden_size: int, config, eps: float, *, heads: str):
        super().__init__()
        self.eps, self.heads = eps, getattr(config, heads)
        meta = config.init_model_with_meta_device
        device = "meta" if meta else "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(self.heads * hidden_size, dtype=config.params_dtype, device=device))

    def forward(self, x_SBND: torch.Tensor) -> torch.Tensor:
        """Normalise in float32, scale in the input's dtype."""
        wide = x_SBND.float()
        square = _mean_over_ranks(wide.pow(2).mean((-2, -1), keepdim=True))
        return self._local(*x_SBND.shape[-2:]) * (wide * torch.rsqrt(square + self.eps)).to(x_SBND.dtype)

    def _local(self, heads: int, dim: int) -> torch.Tensor:
        from megatron.core import parallel_state as ps

        first = ps.get_tensor_model_parallel_rank() * self.heads // ps.get_tensor_model_parallel_world_size()
        return self.weight.view(-1, dim)[first : first + heads]


def _mean_over_ranks(local: torch.Tensor) -> torch.Tensor:
    """Mean over the tensor-parallel ranks; in backward its gradient is summed over them."""
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel import mappings

    group = ps.get_tensor_model_parallel_group()
    if group.size() == 1:
        return local
    whole = mappings.reduce_from_tensor_model_parallel_region(local, group=group)
    return mappings.copy_to_tensor_model_parallel_region(whole, group=group) / group.size()
