"""SmolLM3 (transformers `SmolLM3ForCausalLM`): Llama where some layers, every fourth by default, have no rope."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lconvert.errors import InputError
from lconvert.ir import Decoder, Layer, Mlp

from .common import Arch, Gguf, Keys, Loss, activation, show
from .llama import NAMES, attention, base_config, decoder
from .llamacpp import graph
from .qwen2 import sliding_layers, window_config

_LINK = "https://github.com/ggml-org/llama.cpp/blob/master/src/models/smollm3.cpp"
_GRAPH = graph("smollm3.cpp", qkv_bias="optional", partial_rope=False)

#: llama.cpp leaves rope out of every layer of this number.
_STEP = 4


def _roped(keys: Keys) -> list[bool]:
    """Which layers turn their queries and keys."""
    n, step = keys.size("num_hidden_layers"), keys.size("no_rope_layer_interval", _STEP)
    listed = keys.items("no_rope_layers", int)
    if listed is None:
        return [bool((i + 1) % step) for i in range(n)]
    if len(listed) < n or not all(v in (0, 1) for v in listed):
        raise InputError(
            f"{keys.where}: no_rope_layers must be {n} of 0 (no rope) and 1 (rope), found {show(listed)}"
        )
    return [bool(v) for v in listed[:n]]


def _traits(keys: Keys) -> Decoder:
    keys.inert("pretraining_tp", "max_window_layers")
    bias = keys.flag("attention_bias", False)
    act, hidden = activation(keys, "hidden_act"), keys.size("intermediate_size")
    mlp = Mlp("gated", act, hidden, keys.flag("mlp_bias", False))
    layer = Layer(attention(keys, qkv_bias=bias, o_bias=bias, theta=2e6), mlp)
    on, size = keys.flag("use_sliding_window", False), keys.window("sliding_window", absent=None)
    window = size if on else None
    roped = _roped(keys)
    sliding = sliding_layers(keys, window, lambda i: not roped[i])
    overrides = {}
    for i, turns in enumerate(roped):
        rope = layer.attention.rope if turns else None
        own = replace(layer.attention, rope=rope, window=window if i in sliding else None)
        if own != layer.attention:
            overrides[i] = replace(layer, attention=own)
    return replace(decoder(keys, layer, tied=True), overrides=overrides)


def _config(d: Decoder) -> dict[str, Any]:
    assert isinstance(d.default.mlp, Mlp)
    return (
        base_config(d, ARCH.hf_class)
        | window_config(d)
        | {
            "attention_bias": d.default.attention.o_bias,
            "mlp_bias": d.default.mlp.bias,
            "pad_token_id": None,  # the class's default is beyond a small vocabulary
            "no_rope_layers": [int(layer.attention.rope is not None) for _, layer in d.each()],
        }
    )


def _losses(d: Decoder) -> tuple[Loss, ...]:
    without = [i for i, layer in d.each() if layer.attention.rope is None]
    if without == list(range(_STEP - 1, d.layers, _STEP)):
        return _GRAPH(d)
    reason = (
        f"llama.cpp's graph leaves rope out of every layer number {_STEP}; the model out of layers {without}"
    )
    return (*_GRAPH(d), Loss("no_rope_layers", reason, link=_LINK))


def _restore(d: Decoder) -> Decoder:
    plain = replace(d.default, attention=replace(d.default.attention, rope=None))
    return replace(d, overrides={i: plain for i in range(_STEP - 1, d.layers, _STEP)})


ARCH = Arch(
    model_type="smollm3",
    hf_class="SmolLM3ForCausalLM",
    traits=_traits,
    config=_config,
    names=NAMES,
    gguf=Gguf("smollm3", permute=True, losses=_losses, restore=_restore),
)
