"""Small models whose matrices are quantized in every way that checkpoints are: the sources of the general carry matrix.

Weights are random, scales have all bits of their mantissa in use as calibrated methods leave them, so that a cell of the matrix
says what such a checkpoint meets, and not what happens to fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import numpy as np

from lconvert.archs import find
from lconvert.archs.common import Keys
from lconvert.converters.mxfp4_experts import EXPERTS
from lconvert.ir import Entry, Model, QTensor, Tensor, dense
from lconvert.kernels import quantize
from lconvert.passes import activations, kv, rtn
from lconvert.spec import roles

_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
#: What makes a gpt-oss of it: the experts of a layer are one tensor, for which formats have a layout or none.
_GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "head_dim": 32,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "rope_theta": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


@cache
def plain(family: str = "llama") -> Model:
    """A model of one layer with random weights in BF16; every input width is a multiple of 256. family: llama or gpt_oss."""
    config = _CONFIG if family == "llama" else _CONFIG | _GPT_OSS
    arch = find(family).traits(Keys(config))
    rng = np.random.default_rng(3)

    def entry(name: str, shape: tuple[int, ...]) -> Entry:
        x = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        x = 1 + x if "norm" in name else x
        bits = quantize("BF16", x.reshape(-1, shape[-1])).view(np.uint16)
        return Entry(name, dense(bits.reshape(shape), "BF16"))

    entries = {name: entry(name, shape) for name, shape in roles(arch).items()}
    return Model(arch, config, entries, name="kind", source="kind")


def matrices(model: Model) -> dict[str, Entry]:
    """The linear modules inside the layers."""
    return {n: e for n, e in model.entries.items() if n.startswith("layers.") and len(e.shape) == 2}


def rounded(grid: str, group: int | str = 128) -> Model:
    return rtn.run(plain(), rtn.Options(grid=grid, group=group))


def with_full_scales(model: Model, dtype: str = "F16") -> Model:
    rng = np.random.default_rng(8)
    new = {}
    for name, e in matrices(model).items():
        q = e.data
        assert isinstance(q, QTensor) and isinstance(q.scale, Tensor)
        x = q.scale.load().astype(np.float32) * rng.uniform(0.75, 1.25, q.scale.shape).astype(np.float32)
        scale = dense(x.astype(np.float16)) if dtype == "F16" else dense(x)
        new[name] = replace(e, data=replace(q, scale=scale))
    return model.with_entries(new)


def with_act_order(model: Model, ending: str = "") -> Model:
    """Columns of matrices whose names end so assigned to groups in random order."""
    rng = np.random.default_rng(4)
    new = {}
    for name, e in matrices(model).items():
        q = e.data
        assert isinstance(q, QTensor)
        if name.endswith(ending):
            g_idx = rng.permutation(np.arange(q.shape[1]) // q.block[1]).astype(np.int32)
            new[name] = replace(e, data=replace(q, g_idx=dense(g_idx)))
    return model.with_entries(new)


def with_globals(model: Model, *, tied: bool) -> Model:
    """NVFP4 whose global scales are no powers of two, equal within fused modules or not."""
    new = {}
    for at, (name, e) in enumerate(matrices(model).items()):
        q = e.data
        assert isinstance(q, QTensor) and isinstance(q.scale, QTensor)
        scale = dense(np.full((1, 1), 3e-5 * (1 if tied else 1 + at), np.float32))
        new[name] = replace(e, data=replace(q, scale=replace(q.scale, scale=scale)))
    return model.with_entries(new)


def with_float_zeros(model: Model) -> Model:
    """Zero points between the integers, as HQQ chooses them."""
    new = {}
    for name, e in matrices(model).items():
        q = e.data
        assert isinstance(q, QTensor) and q.zero is not None
        zero = dense((q.zero.load() + np.float32(0.37)).astype(np.float16))
        new[name] = replace(e, data=replace(q, zero=zero))
    return model.with_entries(new)


def _fp8(model: Model) -> Model:
    return activations.run(model, activations.Options("fp8"))


def released_gpt_oss() -> Model:
    """gpt-oss with its experts in MXFP4 and all else plain."""
    return rtn.run(plain("gpt_oss"), rtn.Options(grid="MXFP4", targets=EXPERTS))


#: What a checkpoint holds -> a model that holds it.
KINDS: Mapping[str, Callable[[], Model]] = {
    "plain bf16": plain,
    "int4 g32 (GPTQ)": lambda: with_full_scales(rounded("int4", 32)),
    "int4 g128 (GPTQ)": lambda: with_full_scales(rounded("int4", 128)),
    "int4 g128, short scales": lambda: rounded("int4", 128),
    "int4 g128, f32 scales (ModelOpt)": lambda: with_full_scales(rounded("int4", 128), "F32"),
    "int4 g32, act-order": lambda: with_act_order(with_full_scales(rounded("int4", 32))),
    "uint4 g32 (AWQ)": lambda: with_full_scales(rounded("uint4", 32)),
    "uint4 g32, short scales": lambda: rounded("uint4", 32),
    "int2 g32": lambda: with_full_scales(rounded("int2", 32)),
    "int3 g128": lambda: with_full_scales(rounded("int3", 128)),
    "int8 per row": lambda: with_full_scales(rounded("int8", -1)),
    "W8A8": lambda: activations.run(rounded("int8", -1), activations.Options("int8")),
    "float zero points (HQQ)": lambda: with_float_zeros(rounded("uint4", 64)),
    "FP8 per row, dynamic": lambda: _fp8(rounded("fp8", -1)),
    "FP8 per tensor, weights": lambda: rounded("fp8", "tensor"),
    "FP8 block, dynamic": lambda: activations.run(
        rounded("fp8", "block"), activations.Options("fp8", group=128)
    ),
    "FP8 and FP8 cache": lambda: kv.run(_fp8(rounded("fp8", -1)), kv.Options()),
    "NVFP4, power-of-2 global": lambda: rounded("fp4"),
    "NVFP4 (ModelOpt)": lambda: with_globals(rounded("fp4"), tied=True),
    "NVFP4, untied globals": lambda: with_globals(rounded("fp4"), tied=False),
    "MXFP4": lambda: rounded("MXFP4", 32),
    "MXFP4 experts (gpt-oss)": released_gpt_oss,
    "nf4 (bitsandbytes)": lambda: rounded("nf4", 64),
    "Q4_0": lambda: rounded("Q4_0", 32),
    "Q4_1": lambda: rounded("Q4_1", 32),
    "Q5_0": lambda: rounded("Q5_0", 32),
    "Q8_0": lambda: rounded("Q8_0", 32),
    "Q4_K": lambda: rounded("Q4_K", 32),
    "Q6_K": lambda: rounded("Q6_K", 32),
    "IQ4_NL": lambda: rounded("IQ4_NL", 32),
    "TQ2_0": lambda: rounded("TQ2_0", 256),
}
