"""Qwen2 and Qwen2.5 (transformers `Qwen2ForCausalLM`): Llama with query, key and value biases; optional windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lconvert.errors import InputError
from lconvert.ir import Decoder, Layer, Mlp

from .common import Arch, Gguf, Keys, activation, show
from .llama import NAMES, attention, base_config, decoder
from .llamacpp import graph


def sliding_layers(keys: Keys, window: int | None, default: Callable[[int], bool]) -> list[int]:
    """Layers with a sliding window: those of `layer_types`, or where `default` says so if there is a window."""
    n = keys.size("num_hidden_layers")
    kinds = keys.items("layer_types", str)
    if kinds is None:
        return [i for i in range(n) if window is not None and default(i)]
    known = ("sliding_attention", "full_attention")
    if len(kinds) != n or not all(k in known for k in kinds):
        raise InputError(f"{keys.where}: layer_types must be {n} of {', '.join(known)}, found {show(kinds)}")
    on = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]
    if on and window is None:
        raise InputError(
            f"{keys.where}: {len(on)} layers are sliding_attention, but there is no sliding_window"
        )
    return on


def with_windows(keys: Keys, d: Decoder) -> Decoder:
    """The decoder with Qwen's sliding windows: the layers from `max_window_layers` on, where they are switched on."""
    on, window = keys.flag("use_sliding_window", False), keys.window("sliding_window", absent=4096)
    first = keys.int("max_window_layers", 28)
    if not on:
        window = None
    sliding = replace(d.default, attention=replace(d.default.attention, window=window))
    return replace(d, overrides={i: sliding for i in sliding_layers(keys, window, lambda i: i >= first)})


def window_config(d: Decoder) -> dict[str, Any]:
    """The config.json keys that `with_windows` reads."""
    windows = [layer.attention.window for _, layer in d.each()]
    size = next((w for w in windows if w is not None), None)
    return {
        "use_sliding_window": size is not None,
        "sliding_window": size,
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows],
    }


def _traits(keys: Keys) -> Decoder:
    keys.must("use_mrope", False)
    mlp = Mlp("gated", activation(keys, "hidden_act"), keys.size("intermediate_size"))
    return with_windows(keys, decoder(keys, Layer(attention(keys, qkv_bias=True), mlp)))


ARCH = Arch(
    model_type="qwen2",
    hf_class="Qwen2ForCausalLM",
    traits=_traits,
    config=lambda d: base_config(d, "Qwen2ForCausalLM") | window_config(d),
    names=NAMES,
    gguf=Gguf("qwen2", losses=graph("qwen2.cpp", qkv_bias="optional", partial_rope=False, square=True)),
    inert_tensors=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
