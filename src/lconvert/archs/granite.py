"""Granite 3 (transformers `GraniteForCausalLM`): Llama with four multipliers, on embedding, attention, residuals, logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lconvert.errors import InputError
from lconvert.ir import Decoder, Layer, Mlp

from .common import Arch, Gguf, Keys, activation
from .llama import NAMES, attention, base_config, decoder
from .llamacpp import graph


def _divisor(logit_scale: float) -> float:
    """Granite and llama.cpp divide the logits; 12 digits undo the rounding of two reciprocals."""
    return float(f"{1 / logit_scale:.12g}")


def _multiplier(keys: Keys, name: str) -> float:
    """Zero would turn a part of the model off; llama.cpp takes it for "not given"."""
    value: float = keys.float(name, 1.0)
    if value == 0:
        raise InputError(f"{keys.where}: {name} is 0, which leaves nothing of the model")
    return value


def _traits(keys: Keys) -> Decoder:
    keys.inert("pretraining_tp")
    bias = keys.flag("attention_bias", False)
    att = replace(
        attention(keys, qkv_bias=bias, o_bias=bias), scale=_multiplier(keys, "attention_multiplier")
    )
    act, hidden = activation(keys, "hidden_act"), keys.size("intermediate_size")
    mlp = Mlp("gated", act, hidden, keys.flag("mlp_bias", False))
    return replace(
        decoder(keys, Layer(att, mlp)),
        embed_scale=_multiplier(keys, "embedding_multiplier"),
        residual_scale=_multiplier(keys, "residual_multiplier"),
        logit_scale=1 / _multiplier(keys, "logits_scaling"),
    )


def _config(d: Decoder) -> dict[str, Any]:
    assert isinstance(d.default.mlp, Mlp)
    return base_config(d, ARCH.hf_class) | {
        "attention_bias": d.default.attention.o_bias,
        "mlp_bias": d.default.mlp.bias,
        "attention_multiplier": d.default.attention.scale,
        "embedding_multiplier": d.embed_scale,
        "residual_multiplier": d.residual_scale,
        "logits_scaling": _divisor(d.logit_scale),
    }


def _keys(d: Decoder) -> dict[str, tuple[str, Any]]:
    return {
        "attention.scale": ("f32", d.default.attention.scale),
        "embedding_scale": ("f32", d.embed_scale),
        "residual_scale": ("f32", d.residual_scale),
        "logit_scale": ("f32", _divisor(d.logit_scale)),
    }


ARCH = Arch(
    model_type="granite",
    hf_class="GraniteForCausalLM",
    traits=_traits,
    config=_config,
    names=NAMES,
    gguf=Gguf(
        "granite",
        permute=True,
        keys=_keys,
        losses=graph(
            "granite.cpp",
            qkv_bias="optional",
            o_bias="optional",
            mlp_bias="optional",
            partial_rope=False,
            scale=lambda d, layer: layer.attention.scale,
            ropes=("none", "linear", "yarn", "llama3"),
        ),
        restore=lambda d: replace(d, logit_scale=1 / d.logit_scale),
    ),
)
