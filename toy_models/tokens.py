"""Token ids brought inside a toy's vocabulary: distinct where they were, out of the way of the suite's tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

LOW = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FIELD = re.compile(r"_token_(id|ids|index)$|^codec_\w+_id$|^image_patch_token$|^tts_\w+_token_id$")


def small_tokens(config: Mapping[str, Any], vocab: int) -> dict[str, Any]:
    """The config with every token id below `vocab`: padding 0, begin 1, end 2, other published ids from the top down, one each."""
    ids: dict[int, int] = {}
    return _small(config, ids, vocab)


def _small(config: Mapping[str, Any], ids: dict[int, int], vocab: int) -> dict[str, Any]:
    out = {}
    for key, value in config.items():
        if isinstance(value, dict):
            out[key] = _small(value, ids, vocab)
        elif key in LOW and value is not None:
            out[key] = LOW[key]
        elif FIELD.search(key) and isinstance(value, int):
            out[key] = ids.setdefault(value, vocab - 1 - len(ids))
        else:
            out[key] = value
    return out
