"""Configs as they were released, and configs that make no sense.

Released config.json files are written by older transformers; what today's transformers makes of them must have the
same traits, and so must the config that lconvert reconstructs. The dictionaries hold the keys of well-known releases.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import transformers

import lconvert
from lconvert.archs import find
from lconvert.archs.common import Keys
from lconvert.errors import InputError, UnsupportedError
from lconvert.ir import Decoder
from tests import random_models
from tests.arch_cases import Case
from tests.arch_cases.stablelm import SMALL

_QWEN = {
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 20,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "vocab_size": 152064,
}
_MOE = _QWEN | {"model_type": "qwen3_moe", "num_experts": 16, "head_dim": 128, "moe_intermediate_size": 768}
_STABLELM = {
    "model_type": "stablelm",
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "layer_norm_eps": 1e-05,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rope_theta": 10000,
    "vocab_size": 50304,
}
_COHERE = {
    "model_type": "cohere",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "layer_norm_eps": 1e-05,
    "logit_scale": 0.8333333333333334,
    "max_position_embeddings": 8192,
    "num_attention_heads": 64,
    "num_hidden_layers": 40,
    "num_key_value_heads": 64,
    "rope_theta": 8000000.0,
    "vocab_size": 256000,
}
_SMOL = {
    "model_type": "smollm3",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "max_position_embeddings": 65536,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "vocab_size": 128256,
}

#: name -> (config, losses that converting it to GGUF has)
RELEASED: Mapping[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "qwen2.5": (_QWEN | {"model_type": "qwen2", "use_mrope": False, "use_sliding_window": False}, ()),
    "qwen2.5-yarn": (
        _QWEN
        | {
            "model_type": "qwen2",
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
            "sliding_window": 131072,
        },
        (),
    ),
    "qwen2-sliding": (
        _QWEN | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8192},
        ("sliding_window",),
    ),
    "qwen3": (_QWEN | {"model_type": "qwen3", "sliding_window": None, "rope_scaling": None}, ()),
    "qwen3-moe": (_MOE | {"mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True}, ()),
    "qwen3-moe-dense": (
        _MOE | {"mlp_only_layers": [3], "decoder_sparse_step": 2},
        ("expert_weights", "dense_layers"),
    ),
    "olmo2": (
        {
            "model_type": "olmo2",
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 500000,
            "vocab_size": 100352,
        },
        (),
    ),
    "granite-3": (
        {
            "model_type": "granite",
            "attention_multiplier": 0.0078125,
            "embedding_multiplier": 12.0,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 12800,
            "logits_scaling": 13.0,
            "max_position_embeddings": 131072,
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "residual_multiplier": 0.22,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000000.0,
            "tie_word_embeddings": True,
            "vocab_size": 49159,
        },
        (),
    ),
    "stablelm-3b": (_STABLELM, ()),
    "stablelm-2-12b": (
        _STABLELM | {"partial_rotary_factor": 0.5, "qk_layernorm": True, "use_parallel_residual": True},
        (),
    ),
    "command-r": (_COHERE | {"model_max_length": 131072}, ()),
    "command-r-plus": (_COHERE | {"num_hidden_layers": 64, "use_qk_norm": True}, ()),
    "smollm3": (_SMOL | {"no_rope_layers": [1, 1, 1, 0] * 9, "pretraining_tp": 2, "rope_theta": 5e6}, ()),
    "smollm3-windows": (
        _SMOL | {"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 4096},
        ("sliding_window", "no_rope_layers"),
    ),
}


def traits(config: Mapping[str, Any]) -> Decoder:
    keys = Keys(config)
    d = find(config["model_type"]).traits(keys)
    keys.finish()
    return d


def rewritten(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as today's transformers saves it."""
    saved: dict[str, Any] = (
        transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_diff_dict()
    )
    return saved


@pytest.mark.parametrize("name", RELEASED)
def test_released(name: str) -> None:
    config, losses = RELEASED[name]
    d = traits(config)
    assert traits(rewritten(config)) == d
    arch = find(config["model_type"])
    made = arch.config(d)
    assert traits(made) == d
    assert traits(rewritten(made)) == d
    assert tuple(loss.name for loss in arch.gguf.losses(d)) == losses


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen2.5", {"layer_types": ["full_attention"] * 3}, "layer_types must be 28 of sliding_attention"),
        (
            "qwen2.5",
            {"layer_types": ["sliding_attention"] * 28},
            "28 layers are sliding_attention, but there is no",
        ),
        ("qwen3-moe", {"mlp_only_layers": 3}, "mlp_only_layers must be a list of layer numbers, found 3"),
        ("granite-3", {"residual_multiplier": 0}, "residual_multiplier is 0, which leaves nothing"),
        ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers must be 36 of 0 \(no rope\) and 1"),
    ],
)
def test_senseless(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        traits(RELEASED[name][0] | change)


def test_unknown_position_scheme() -> None:
    with pytest.raises(UnsupportedError, match="use_mrope = True is not supported"):
        traits(RELEASED["qwen2.5"][0] | {"use_mrope": True})


def test_norms_of_heads_in_two_types(tmp_path: Path) -> None:
    """The norms of the heads become one entry, so they cannot be stored in different types."""
    folder = random_models.build(Case("heads", "stablelm", SMALL | {"qk_layernorm": True}), tmp_path)
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    odd = "model.layers.0.self_attn.q_layernorm.norms.2.weight"
    tensors[odd] = tensors[odd].astype(np.float16)
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"q_layernorm\.norms\.0.* stored as F32, its neighbours as "):
        lconvert.read(folder)
