"""All faults, by name, in the order of their classes."""

from . import (
    attention,
    config,
    equivalents,
    flops,
    gradients,
    io,
    layout,
    names,
    norms,
    parallel,
    pipeline,
    resources,
    rope,
    router,
    scale,
    state,
    stream,
    tie_vocab,
    values,
)
from .base import Fault

_MODULES = (
    *(names, layout, norms, rope, attention, router, tie_vocab, pipeline, parallel, gradients),
    *(config, stream, values, io, state, resources, flops, scale, equivalents),
)
FAULTS: dict[str, Fault] = {fault.name: fault for module in _MODULES for fault in module.FAULTS}
