"""DeepSeek-V2 (transformers `DeepseekV2ForCausalLM`): latent attention, routed and shared experts, dense layers first.

V2 weighs experts by a softmax over all of them, and chooses among groups by the best expert of each. What V3 has in
common with it is here too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from lconvert.errors import UnsupportedError
from lconvert.ir import Attention, Decoder, Layer, Mla, Mlp, Moe, Rope

from .common import (
    Arch,
    Gguf,
    Keys,
    Loss,
    activation,
    hf_rope,
    name,
    parse_rope,
    rope_parameters,
    yarn_attention,
    yarn_mscale,
)
from .llama import NAMES as LLAMA_NAMES
from .llama import base_config, decoder
from .llamacpp import graph, map_layers

_ATTENTION = "model.layers.{i}.self_attn."
_MLP = "model.layers.{i}.mlp."
_LINK = "https://github.com/ggml-org/llama.cpp/blob/master/src/models/deepseek2.cpp"
_GROUPS = "https://github.com/ggml-org/llama.cpp/blob/master/src/llama-graph.cpp"

NAMES = (
    *(n for n in LLAMA_NAMES if not n.hf.endswith(("k_proj.weight", "v_proj.weight"))),
    name(_ATTENTION + "q_a_proj.weight", "layers.{i}.attn.q_a"),
    name(_ATTENTION + "q_a_layernorm.weight", "layers.{i}.attn.q_a_norm"),
    name(_ATTENTION + "q_b_proj.weight", "layers.{i}.attn.q_b"),
    name(_ATTENTION + "kv_a_proj_with_mqa.weight", "layers.{i}.attn.kv_a"),
    name(_ATTENTION + "kv_a_layernorm.weight", "layers.{i}.attn.kv_a_norm"),
    name(_ATTENTION + "kv_b_proj.weight", "layers.{i}.attn.k_b", "layers.{i}.attn.v_b", layout="grouped"),
    name(_MLP + "gate.weight", "layers.{i}.moe.router"),
    name(_MLP + "shared_experts.gate_proj.weight", "layers.{i}.moe.shared.gate"),
    name(_MLP + "shared_experts.up_proj.weight", "layers.{i}.moe.shared.up"),
    name(_MLP + "shared_experts.down_proj.weight", "layers.{i}.moe.shared.down"),
    name(_MLP + "experts.{e}.gate_proj.weight", "layers.{i}.moe.experts.{e}.gate"),
    name(_MLP + "experts.{e}.up_proj.weight", "layers.{i}.moe.experts.{e}.up"),
    name(_MLP + "experts.{e}.down_proj.weight", "layers.{i}.moe.experts.{e}.down"),
)


# --- config ----------------------------------------------------------------------------------------------


def attention(keys: Keys, kv_heads: int | None, layout: Literal["half", "interleaved"]) -> Attention:
    """Latent attention; `kv_heads` is the config class's default, None as many as heads."""
    heads = keys.size("num_attention_heads")
    found = keys.size("num_key_value_heads", kv_heads) or heads
    if found != heads:
        raise UnsupportedError(
            f"{keys.where}: num_key_value_heads is {found}, but each of the {heads} heads has keys of its own"
        )
    turning, rest = keys.size("qk_rope_head_dim", 64), keys.size("qk_nope_head_dim", 128)
    keys.must("head_dim", turning)
    keys.must("qk_head_dim", rest + turning)
    rope = parse_rope(
        keys,
        rope_parameters(keys),
        turning,
        context=keys.size("max_position_embeddings"),
        layout=layout,
        allowed=("default", "linear", "yarn"),
    )
    if rope.dim != turning:
        raise UnsupportedError(
            f"{keys.where}: partial_rotary_factor turns {rope.dim} of {turning} dimensions"
        )
    bias = keys.flag("attention_bias", False)
    return Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=rest + turning,
        scale=scale(rest + turning, rope),
        rope=rope,
        qkv_bias=bias,
        o_bias=bias,
        mla=Mla(
            q_rank=keys.window("q_lora_rank", absent=1536),  # null: no latent of queries
            kv_rank=keys.size("kv_lora_rank", 512),
            v_dim=keys.size("v_head_dim", 128),
        ),
    )


def scale(head_dim: int, rope: Rope) -> float:
    """DeepSeek's attention scale: YaRN with mscale_all_dim raises it (transformers `yarn_apply_mscale`)."""
    m = (
        yarn_mscale(rope.factor, rope.mscale_all_dim)
        if rope.scaling != "none" and rope.mscale_all_dim
        else 1.0
    )
    out: float = head_dim**-0.5 * m * m
    return out


def experts(keys: Keys, shared: int, hidden: int, act: str) -> Moe:
    """What V2 and V3 spell alike; `shared` and `hidden` are the config classes' defaults."""
    keys.inert("pretraining_tp", "ep_size", "seq_aux", "aux_loss_alpha")  # of training and its machines
    keys.must("moe_layer_freq", 1)
    hidden = keys.size("moe_intermediate_size", hidden)
    return Moe(
        experts=keys.size("n_routed_experts"),
        top_k=keys.size("num_experts_per_tok"),
        hidden=hidden,
        activation=act,
        scale=keys.positive("routed_scaling_factor", 1.0),
        shared=keys.size("n_shared_experts", shared) * hidden,
    )


def in_groups(keys: Keys, moe: Moe, groups: int, best: int, score: Literal["max", "top2"]) -> Moe:
    """Experts of the best groups only; where all groups are, there are none."""
    return moe if best >= groups else replace(moe, groups=groups, top_groups=best, group_score=score)


def with_dense_layers(keys: Keys, d: Decoder, count: int, hidden: int) -> Decoder:
    """The first `count` layers with a plain MLP of `hidden`; both are the config class's defaults."""
    count = keys.int("first_k_dense_replace", count)
    hidden = keys.size("intermediate_size", hidden)
    if not 0 <= count < d.layers:
        raise UnsupportedError(
            f"{keys.where}: first_k_dense_replace is {count} of {d.layers} layers, which leaves none with experts"
        )
    plain = replace(d.default, mlp=Mlp("gated", d.default.mlp.activation, hidden))
    return replace(d, overrides=dict.fromkeys(range(count), plain))


def _traits(keys: Keys) -> Decoder:
    keys.must("scoring_func", "softmax")
    keys.must("mlp_bias", False)
    # transformers ignores it, DeepSeek's own code does not.
    keys.must("norm_topk_prob", False)
    moe = replace(experts(keys, 2, 1407, activation(keys, "hidden_act")), normalize=False)
    if keys.must("topk_method", "greedy", "group_limited_greedy") == "greedy":
        keys.inert("n_group", "topk_group")
    else:
        moe = in_groups(keys, moe, keys.size("n_group"), keys.size("topk_group"), "max")
    d = decoder(keys, Layer(attention(keys, None, "interleaved"), moe))
    return with_dense_layers(keys, d, 0, 11008)


def config(d: Decoder, hf_class: str) -> dict[str, Any]:
    """The config.json keys that V2 and V3 have in common."""
    a, m = d.default.attention, d.default.mlp
    assert isinstance(m, Moe) and a.mla is not None and a.rope is not None
    dense = next(iter(d.overrides.values()), d.default)
    return base_config(d, hf_class) | {
        "attention_bias": a.o_bias,
        "first_k_dense_replace": len(d.overrides),
        "head_dim": a.rope.dim,
        "intermediate_size": dense.mlp.hidden,
        "kv_lora_rank": a.mla.kv_rank,
        "moe_intermediate_size": m.hidden,
        "n_group": m.groups,
        "n_routed_experts": m.experts,
        "n_shared_experts": m.shared // m.hidden,
        "norm_topk_prob": m.normalize,
        "num_experts_per_tok": m.top_k,
        "q_lora_rank": a.mla.q_rank,
        "qk_nope_head_dim": a.head_dim - a.rope.dim,
        "qk_rope_head_dim": a.rope.dim,
        "rope_parameters": hf_rope(a.rope, a.rope.dim, d.context),
        "routed_scaling_factor": m.scale,
        "scoring_func": m.scoring,
        "topk_group": m.top_groups,
        "v_head_dim": a.mla.v_dim,
    }


def _config(d: Decoder) -> dict[str, Any]:
    m = d.default.mlp
    assert isinstance(m, Moe)
    if m.normalize or m.correction:
        what = "normalized weights" if m.normalize else "a correction of scores"
        raise UnsupportedError(f"transformers' DeepSeek-V2 has no {what} of its experts")
    method = "group_limited_greedy" if m.groups > 1 else "greedy"
    return config(d, ARCH.hf_class) | {"topk_method": method}


# --- llama.cpp -------------------------------------------------------------------------------------------

#: Layer counts that llama.cpp takes for models without a latent of queries (deepseek2.cpp, is_lite).
_LITE = (26, 27)


def _graph_scale(d: Decoder, layer: Layer) -> float:
    """The graph's kq_scale: it squares what multiplies cos and sin too, and knows of no linear scaling."""
    a = layer.attention
    rope, m = a.rope, 1.0
    if rope is not None and rope.scaling == "yarn":
        m = yarn_attention(rope) * yarn_mscale(rope.factor, rope.mscale_all_dim)
    elif rope is not None and rope.scaling == "linear":
        m = yarn_mscale(rope.factor)
    out: float = a.head_dim**-0.5 * m * m
    return out


_GRAPH = graph("deepseek2.cpp", scale=_graph_scale, routed=True)


def losses(d: Decoder) -> tuple[Loss, ...]:
    return (*_GRAPH(d), *_latent_losses(d))


def _latent_losses(d: Decoder) -> Iterator[Loss]:
    a, m = d.default.attention, d.default.mlp
    assert isinstance(m, Moe) and a.mla is not None and a.rope is not None
    if a.rope.layout == "half":
        reason = "turns neighbouring dimensions of queries and keys; the model turns those half a head apart"
        yield Loss("rope_layout", f"llama.cpp's graph {reason}", link=_LINK)
    if a.mla.norm_eps != d.norm_eps:
        reason = f"norms latents with {d.norm_eps:g}; the model with {a.mla.norm_eps:g}"
        yield Loss("latent_eps", f"llama.cpp's graph {reason}", link=_LINK)
    if m.groups > 1 and m.group_score == "max":
        reason = "ranks groups by their two best experts; the model by the best one"
        yield Loss("expert_groups", f"llama.cpp's graph {reason}", link=_GROUPS)
    if a.mla.q_rank is not None and d.layers in _LITE:
        reason = (
            f"takes a model of {d.layers} layers for one without a latent of queries, which this model has"
        )
        yield Loss("lite_layers", f"llama.cpp's graph {reason}", link=_LINK)


def gguf_keys(d: Decoder) -> dict[str, tuple[str, Any] | None]:
    """llama.cpp holds latent attention as one key of kv_rank + rope.dim for all heads, its values inside of it."""
    a, m = d.default.attention, d.default.mlp
    assert isinstance(m, Moe) and a.mla is not None and a.rope is not None
    dense = next(iter(d.overrides.values()), d.default)
    out: dict[str, tuple[str, Any] | None] = {
        "feed_forward_length": ("u32", dense.mlp.hidden),
        "leading_dense_block_count": ("u32", len(d.overrides)),
        "attention.head_count_kv": ("u32", 1),
        "attention.key_length": ("u32", a.mla.kv_rank + a.rope.dim),
        "attention.value_length": ("u32", a.mla.kv_rank),
        "attention.key_length_mla": ("u32", a.head_dim),
        "attention.value_length_mla": ("u32", a.mla.v_dim),
        "attention.kv_lora_rank": ("u32", a.mla.kv_rank),
        "expert_feed_forward_length": ("u32", m.hidden),
        "expert_shared_count": ("u32", m.shared // m.hidden),
        "expert_weights_scale": ("f32", m.scale),
        "expert_gating_func": ("u32", {"softmax": 1, "sigmoid": 2}[m.scoring]),
    }
    if a.mla.q_rank is not None:
        out["attention.q_lora_rank"] = ("u32", a.mla.q_rank)
    elif d.layers not in _LITE:
        out["attention.q_lora_rank"] = ("u32", 0)  # the loader wants the key
    if m.normalize:
        out["expert_weights_norm"] = ("bool", True)
    if m.groups == 1 or m.top_groups < m.groups:  # llama.cpp refuses to choose all of several
        out["expert_group_count"] = ("u32", m.groups)
        out["expert_group_used_count"] = ("u32", m.top_groups)
    if a.rope.scaling == "yarn" and a.rope.mscale_all_dim:
        # With this key llama.cpp multiplies cos and sin by attn_factor alone; it divides the key by 0.1 when it reads it.
        turn = yarn_attention(a.rope)
        out["rope.scaling.yarn_log_multiplier"] = ("f32", 0.1 * a.rope.mscale_all_dim)
        out["rope.scaling.attn_factor"] = None if math.isclose(turn, 1.0, rel_tol=1e-12) else ("f32", turn)
    return out


def interleaved(d: Decoder) -> Decoder:
    """The graph's rotary layout."""

    def turn(layer: Layer) -> Layer:
        a = layer.attention
        assert a.rope is not None
        return replace(layer, attention=replace(a, rope=replace(a.rope, layout="interleaved")))

    return map_layers(d, turn)


def _restore(d: Decoder) -> Decoder:
    """V2 ranks groups by their best expert, whatever llama.cpp does."""
    m = d.default.mlp
    if isinstance(m, Moe) and m.groups > 1:
        d = replace(d, default=replace(d.default, mlp=replace(m, group_score="max")))
    return interleaved(d)


ARCH = Arch(
    model_type="deepseek_v2",
    hf_class="DeepseekV2ForCausalLM",
    traits=_traits,
    config=_config,
    names=NAMES,
    gguf=Gguf("deepseek2", keys=gguf_keys, losses=losses, restore=_restore, moe=True, scales=False),
    inert_tensors=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
