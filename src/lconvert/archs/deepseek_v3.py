"""DeepSeek-V3 and R1 (transformers `DeepseekV3ForCausalLM`): V2 whose experts are weighed by a sigmoid.

A correction vector takes part in the choice of experts and not in their weights; groups count their two best experts.
The layers for multi-token prediction after the last one (model.layers.61 of the published models) are inert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from lconvert.errors import UnsupportedError
from lconvert.ir import Decoder, Layer, Moe

from .common import Arch, Gguf, Keys, activation, name
from .deepseek_v2 import NAMES as V2_NAMES
from .deepseek_v2 import (
    attention,
    config,
    experts,
    gguf_keys,
    in_groups,
    interleaved,
    losses,
    with_dense_layers,
)
from .llama import decoder

_EXTRA = "num_nextn_predict_layers"


def _traits(keys: Keys) -> Decoder:
    keys.inert(_EXTRA, "num_mtp_layers")
    keys.must("scoring_func", "sigmoid")
    keys.must("topk_method", "noaux_tc")
    moe = replace(
        experts(keys, 1, 2048, activation(keys, "hidden_act")),
        scoring="sigmoid",
        normalize=keys.flag("norm_topk_prob", True),
        correction=True,
    )
    moe = in_groups(keys, moe, keys.size("n_group", 8), keys.size("topk_group", 4), "top2")
    layout: Literal["half", "interleaved"] = "interleaved" if keys.flag("rope_interleave", True) else "half"
    d = decoder(keys, Layer(attention(keys, 128, layout), moe))
    return with_dense_layers(keys, d, 3, 18432)


def _config(d: Decoder) -> dict[str, Any]:
    a, m = d.default.attention, d.default.mlp
    assert isinstance(m, Moe) and a.rope is not None
    if not m.correction:
        raise UnsupportedError("transformers' DeepSeek-V3 always corrects the scores of its experts")
    own = {"rope_interleave": a.rope.layout == "interleaved", "topk_method": "noaux_tc", _EXTRA: 0}
    return config(d, ARCH.hf_class) | own


def _extra_layers(config: Mapping[str, Any]) -> int:
    count = config.get(_EXTRA, config.get("num_mtp_layers", 1))
    return count if isinstance(count, int) else 0


ARCH = Arch(
    model_type="deepseek_v3",
    hf_class="DeepseekV3ForCausalLM",
    traits=_traits,
    config=_config,
    names=(
        *V2_NAMES,
        name("model.layers.{i}.mlp.gate.e_score_correction_bias", "layers.{i}.moe.correction.bias"),
    ),
    gguf=Gguf(
        "deepseek2", keys=gguf_keys, losses=losses, restore=interleaved, moe=True, sigmoid=True, scales=False
    ),
    inert_tensors=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    extra_layers=_extra_layers,
)
