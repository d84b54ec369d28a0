"""Small vision and audio towers beside a toy's decoder, and the places where one names the other's size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEPTH = 5
HEADS, TOWER_HEAD_DIM = 4, 20  # a multiple of 4: rotary positions on two axes
HIDDEN = HEADS * TOWER_HEAD_DIM
PATCH, IMAGE = 4, 16

# What each field of a tower becomes.
SMALL = (
    {key: DEPTH for key in ("depth", "num_hidden_layers", "vt_num_hidden_layers", "encoder_layers", "num_blocks")}
    | {key: HEADS for key in ("num_heads", "num_attention_heads", "vt_num_attention_heads", "encoder_attention_heads", "attention_heads")}
    | {key: HIDDEN for key in ("hidden_size", "embed_dim", "d_model", "vt_hidden_size", "mm_hidden_size", "qkv_hidden_size", "dim")}
    | {key: TOWER_HEAD_DIM for key in ("head_dim", "global_head_dim")}
    | {key: 2 * HIDDEN + 14 for key in ("intermediate_size", "encoder_ffn_dim", "vt_intermediate_size", "linear_units")}
    | {"patch_size": PATCH, "spatial_patch_size": PATCH, "image_size": IMAGE, "window_size": 4 * PATCH}
    | {key: 16 for key in ("num_position_embeddings", "position_embedding_size", "codebook_size", "semantic_codebook_size")}
    | {"init_pos_emb_height": 4, "init_pos_emb_width": 4, "num_mel_bins": 16, "max_source_positions": 16}
    | {"downsample_hidden_size": 12, "subsampling_conv_channels": 12, "codebook_dim": 24, "vector_quantization_hidden_dimension": 24}
    | {"decoder_dim": 96, "projector_input_dim": 26, "projector_output_dim": 26, "vision_output_dim": 26}
    | {"projector_hidden_size": 134, "num_embeds": 17}
    | {"enc_dim": 12, "enc_emb_dim": 12, "emb_dim": 26, "fullatt_block_indexes": [1, 3], "vocab_size": 37, "projection_hidden_size": 138}
)  # fmt: skip
# Fields that are the decoder's width where they were published so.
DECODER_WIDTH = (
    "out_hidden_size", "text_hidden_size", "output_dim", "projector_output_dim", "projection_dim", "thinker_hidden_size", "embedding_size",
    "hidden_size", "projector_hidden_size", "mm_hidden_size", "audio_encoder_output_size",
)  # fmt: skip
KEYS = ("vision_config", "audio_config", "sound_config", "code2wav_config", "dit_config", "bigvgan_config", "token2wav_config")


def small_tower(tower: Mapping[str, Any], published_width: int, width: int) -> dict[str, Any]:
    """A tower's config, small. published_width, width: hidden size of the published decoder and of the toy's."""
    out: dict[str, Any] = {}
    for key, value in tower.items():
        if isinstance(value, dict):
            out[key] = small_tower(value, published_width, width)
        elif key in DECODER_WIDTH and value == published_width and (key != "hidden_size" or "embed_dim" in tower):
            out[key] = width
        elif key == "num_key_value_heads":
            out[key] = HEADS if value == _heads(tower) else HEADS // 2
        elif isinstance(value, list):
            out[key] = _small_list(key, value)
        else:
            out[key] = SMALL.get(key, value) if value else value
    out |= {
        key[3:]: value for key, value in out.items() if key.startswith("vt_")
    }  # transformers' names for Kimi's, in its own class
    return out | _like_published(tower, out)


def _heads(tower: Mapping[str, Any]) -> int | None:
    return tower.get("num_heads") or tower.get("num_attention_heads")


def _small_list(key: str, value: list) -> list:
    if key == "deepstack_visual_indexes":
        return [n + 1 for n in range(len(value))]
    if key == "subsampling_conv_channels":
        return [12, 8][: len(value)]
    return SMALL.get(key, value) if value else value


def _like_published(tower: Mapping[str, Any], out: Mapping[str, Any]) -> dict[str, Any]:
    """Four times the width where the published MLP is (a pixel shuffle's channels), heads that make up the width where they did."""
    inner = {"intermediate_size": "hidden_size", "encoder_ffn_dim": "d_model", "vt_intermediate_size": "vt_hidden_size"}
    fields = {k: 4 * out[w] for k, w in inner.items() if tower.get(k) and tower.get(w) and tower[k] == 4 * tower[w]}
    if tower.get("qkv_hidden_size") and tower.get("qkv_hidden_size") != tower.get("vt_hidden_size"):
        fields["qkv_hidden_size"] = HIDDEN + HEADS * 4
    return fields
