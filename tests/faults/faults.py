"""The faults: what converters have got wrong, each planted into one good artifact.

`tier` is the first tier of `lconvert validate` that must fail. Model names are those of models.py; type HF is a folder.
`python -P -m tests.faults.faults NAME GOOD BAD [DONOR]` plants one by hand.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Types
from numpy.typing import NDArray

from .changes import (
    added_tokens,
    as_type,
    blocks,
    changed,
    config,
    copy_scale,
    item,
    key,
    layers,
    lowest_bit,
    map_data,
    map_folder,
    map_values,
    mislabelled,
    new_key,
    other_end,
    other_eos,
    other_split,
    other_template,
    parts,
    permute_heads,
    plain_added_token,
    relabel,
    rename,
    reordered,
    reverse_blocks,
    roll,
    rope,
    set_number,
    shifted_offset,
    stale_head,
    swap,
    swap_blocks,
    swap_in_folder,
    swapped_items,
    swapped_merges,
    swapped_shape,
    take,
    transposed,
    unwoven,
    without,
    without_post_processor,
    woven,
)
from .planter import (
    Plant,
    Stored,
    bit,
    from_donor,
    in_bytes,
    in_folder,
    in_gguf,
    in_weights,
    padding,
)


@dataclass(frozen=True)
class Fault:
    """One fault in one artifact.

    tier: the first tier that must fail, in their order. says: part of the name of a failed check or, where the file is
    refused, of the message. donor: (model, type) of another good artifact that the fault takes something from.
    manifest: (model, type) of the artifact whose manifest lies beside the bad one; without one, the gates alone decide.
    silent: what the runtime computes is not changed, so that the logits cannot tell.
    """

    name: str
    model: str
    type: str
    tier: str
    plant: Plant
    says: str = ""
    donor: tuple[str, str] | None = None
    manifest: tuple[str, str] | None = None
    silent: bool = False

    @property
    def id(self) -> str:
        return f"{self.name} [{self.model} {self.type}]"


#: Faults of formats that lconvert does not write yet, and the name of the format: they become required with it.
PENDING: tuple[tuple[str, str], ...] = (
    ("GPTQ zero point off by one (v1 read as v2, and the other way round)", "gptq"),
    ("GPTQ g_idx ignored (act order)", "gptq"),
    ("AWQ nibble order", "awq"),
    ("AWQ input scales not folded", "awq"),
    ("NVFP4 global scales inverted", "nvfp4"),
    ("NVFP4 global scales untied between fused projections", "nvfp4"),
    ("FP8 weight scale inverted", "fp8"),
    ("KV cache scale wrong", "kv"),
    ("ONNX: initializer transposed", "onnx"),
    ("ONNX: zero point packed in the other nibble", "onnx"),
    ("ONNX: position ids shifted by one", "onnx"),
)


# --- the table -------------------------------------------------------------------------------------------

Q8, Q4K, Q6K = 34, 144, 210  # bytes of a block
ADD, UNUSED, NORMAL = gguf.GGUFValueType, 5, 1
U32, F32, BOOL, STRING = ADD.UINT32, ADD.FLOAT32, ADD.BOOL, ADD.STRING
_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
_TOKENS, _KINDS, _MERGES = (f"tokenizer.ggml.{n}" for n in ("tokens", "token_type", "merges"))


def _no_bias(x: NDArray[Any]) -> NDArray[Any]:
    return np.zeros_like(x)


ROWS = (
    # rows and matrices in the wrong place
    Fault("q/k permutation missing", "demo", "F32", "tensors", in_gguf(permute_heads(unwoven))),
    Fault("q/k permutation missing", "mistral", "Q8_0", "tensors", in_gguf(permute_heads(unwoven))),
    Fault("q/k permutation doubled", "demo", "Q4_K_M", "tensors", in_gguf(permute_heads(woven))),
    Fault("q/k permutation where none belongs", "qwen3", "Q4_K_M", "tensors", in_gguf(permute_heads(woven))),
    Fault("gate and up swapped", "demo", "Q4_K_M", "tensors",
          in_gguf(swap("blk.{}.ffn_gate.weight", "blk.{}.ffn_up.weight"))),
    Fault("gate and up swapped", "granite", "Q3_K_M", "tensors",
          in_gguf(swap("blk.{}.ffn_gate.weight", "blk.{}.ffn_up.weight"))),
    Fault("halves of gate_up swapped", "phi3", "Q8_0", "tensors",
          in_gguf(map_data(parts(512, 512, order=(1, 0)), "ffn_up"))),
    Fault("k and v swapped", "demo", "Q8_0", "tensors",
          in_gguf(swap("blk.{}.attn_k.weight", "blk.{}.attn_v.weight"))),
    Fault("k and v swapped", "qwen2", "F16", "tensors",
          in_gguf(swap("blk.{}.attn_k.weight", "blk.{}.attn_v.weight"))),
    Fault("fused qkv put together as q, v, k", "phi3", "Q4_K_M", "tensors",
          in_gguf(map_data(parts(256, 128, 128, order=(0, 2, 1)), "attn_qkv"))),
    Fault("fused qkv bias put together as k, q, v", "gpt2", "Q8_0", "tensors",
          in_gguf(map_data(parts(256, 256, 256, order=(1, 0, 2)), "attn_qkv.bias"))),
    Fault("square matrix transposed", "demo", "F32", "tensors",
          in_gguf(map_data(transposed, "blk.1.attn_output.weight"))),
    Fault("square matrix transposed (Conv1D taken for Linear)", "gpt2", "Q8_0", "tensors",
          in_gguf(map_values(transposed, "attn_output.weight"))),
    Fault("heads of queries shifted by one", "llama", "Q6_K", "tensors", in_gguf(map_data(roll(64), "attn_q."))),
    Fault("key heads in the wrong order", "olmo2", "Q8_0", "tensors", in_gguf(map_data(roll(64), "attn_k."))),
    Fault("two layers swapped", "demo", "Q6_K", "tensors", in_gguf(layers((0, 2, 1)))),
    Fault("one layer repeated", "llama3-rope", "Q4_0", "tensors", in_gguf(layers((0, 1, 1, 3)))),
    Fault("embedding rows shifted by one", "demo", "Q4_K_M", "tensors", in_gguf(map_data(roll(1), "token_embd"))),
    Fault("learned positions shifted by one", "gpt2", "F32", "tensors", in_gguf(map_data(roll(1), "position_embd"))),
    Fault("padding rows of the vocabulary zeroed", "llama", "Q8_0", "tensors",
          in_gguf(map_data(lambda x: np.concatenate([x[:512], np.zeros_like(x[512:])]), "token_embd"))),
    Fault("tensor of another seed's model", "llama", "Q4_K_M", "tensors",
          from_donor(take("blk.1.ffn_down.weight")), donor=("llama-other-seed", "Q4_K_M")),
    Fault("all tensors of another seed's model", "llama", "Q8_0", "tensors", from_donor(take("")),
          donor=("llama-other-seed", "Q8_0")),
    Fault("all matrices of another seed's model", "llama", "Q2_K", "tensors", from_donor(take("attn_", "ffn_")),
          donor=("llama-other-seed", "Q2_K")),
    Fault("stale head: the embedding in its place", "llama", "F32", "tensors",
          in_gguf(lambda f: f.tensors.update({"output.weight": f.tensors["token_embd.weight"]}))),
    Fault("untied head with a stale copy", "demo", "F32", "structure", in_gguf(stale_head), says="head"),
    Fault("experts permuted", "mixtral", "Q8_0", "tensors", in_gguf(map_data(roll(1), "exps"))),
    Fault("experts permuted", "qwen3_moe", "Q4_K_M", "tensors", in_gguf(map_data(roll(2), "exps"))),
    Fault("rows of the router permuted", "mixtral", "Q4_K_M", "tensors", in_gguf(map_data(roll(1), "ffn_gate_inp"))),
)  # fmt: skip

VALUES = (
    # numbers
    Fault("norm +1 forgotten", "gemma3", "F32", "tensors", in_gguf(map_data(lambda x: x - 1, "norm"))),
    Fault("norm +1 forgotten", "gemma2", "Q8_0", "tensors", in_gguf(map_data(lambda x: x - 1, "norm"))),
    Fault("norm +1 doubled", "gemma2", "Q4_K_M", "tensors", in_gguf(map_data(lambda x: x + 1, "norm"))),
    Fault("norm +1 where none belongs", "qwen3", "Q8_0", "tensors", in_gguf(map_data(lambda x: x + 1, "norm"))),
    Fault("norms of two places swapped", "gemma2", "Q8_0", "tensors",
          in_gguf(swap("blk.{}.post_attention_norm.weight", "blk.{}.post_ffw_norm.weight"))),
    Fault("q and k norms swapped", "qwen3", "Q4_K_M", "tensors",
          in_gguf(swap("blk.{}.attn_q_norm.weight", "blk.{}.attn_k_norm.weight"))),
    Fault("q norm dropped (ones)", "gemma3", "Q8_0", "tensors", in_gguf(map_data(np.ones_like, "attn_q_norm"))),
    Fault("bias dropped: queries", "qwen2", "F32", "tensors", in_gguf(map_data(_no_bias, "attn_q.bias"))),
    Fault("bias dropped: values of one layer", "qwen2", "Q4_K_M", "tensors",
          in_gguf(map_data(_no_bias, "blk.1.attn_v.bias"))),
    Fault("bias dropped: a layer norm's", "starcoder2", "Q8_0", "tensors",
          in_gguf(map_data(_no_bias, "output_norm.bias"))),
    Fault("bias dropped: an MLP's", "gpt_neox", "Q8_0", "tensors", in_gguf(map_data(_no_bias, "ffn_down.bias"))),
    Fault("embedding scaled in the file too", "gemma3", "F32", "tensors",
          in_gguf(map_values(lambda x: x * 16, "token_embd"))),
    Fault("every scale 1% off", "demo", "Q8_0", "tensors",
          in_gguf(map_values(lambda x: x * np.float32(1.01), "blk.1.ffn_up"))),
    Fault("every scale 1% off", "phi3", "Q8_0", "tensors",
          in_gguf(map_values(lambda x: x * np.float32(1.01), "blk.1.ffn_up"))),
    Fault("blocks of every row in reverse", "demo", "Q8_0", "tensors",
          in_gguf(map_data(reverse_blocks(Q8), "blk.1.attn_q"))),
    Fault("blocks of every row in reverse", "llama", "Q4_K_M", "tensors",
          in_gguf(map_data(reverse_blocks(Q4K), "blk.0.ffn_down.weight"))),
    Fault("two blocks of one row swapped", "demo", "Q8_0", "tensors",
          in_gguf(swap_blocks("blk.0.ffn_down.weight", Q8, 3, 4))),
    Fault("two blocks of one row swapped", "granite", "Q6_K", "tensors",
          in_gguf(swap_blocks("blk.1.ffn_down.weight", Q6K, 10, 11))),
    Fault("scale of the neighbouring block", "demo", "Q8_0", "tensors",
          in_gguf(copy_scale("blk.1.ffn_down.weight", Q8, slice(0, 2), 7, 8))),
    Fault("scale of the neighbouring block", "mistral", "Q4_K_M", "tensors",
          in_gguf(copy_scale("blk.0.ffn_gate.weight", Q4K, slice(0, 4), 100, 101))),
    Fault("sub-scales of the neighbouring block", "llama", "Q4_K_M", "tensors",
          in_gguf(copy_scale("blk.0.ffn_gate.weight", Q4K, slice(4, 16), 100, 101))),
    Fault("scale of the neighbouring block", "qwen2", "Q6_K", "tensors",
          in_gguf(copy_scale("blk.1.ffn_down.weight", Q6K, slice(208, 210), 20, 21))),
    Fault("scale of the neighbouring block", "smollm3", "Q3_K_M", "tensors",
          in_gguf(copy_scale("blk.0.ffn_gate.weight", 110, slice(96, 108), 20, 21))),
    Fault("scale of the neighbouring block", "stablelm", "Q2_K", "tensors",
          in_gguf(copy_scale("blk.0.ffn_up.weight", 84, slice(0, 16), 20, 21))),
    Fault("one byte flipped: scale of a block", "demo", "Q8_0", "tensors",
          bit("blk.2.attn_output.weight", 100, 1, 0x04)),
    Fault("one byte flipped: lowest bits of a scale", "llama", "Q8_0", "tensors",
          bit("blk.1.attn_output.weight", 100, 0, 0xFF)),
    Fault("one byte flipped: a code", "demo", "Q8_0", "tensors", bit("blk.0.ffn_up.weight", 200, 9, 0xFF)),
    Fault("one bit flipped: lowest of a code", "demo", "Q8_0", "tensors", bit("blk.0.ffn_up.weight", 200, 9, 0x01)),
    Fault("one byte flipped: codes", "demo", "Q4_K_M", "tensors", bit("blk.1.ffn_up.weight", 50, 60, 0xFF)),
    Fault("one byte flipped: codes", "cohere", "Q4_K_M", "tensors", bit("blk.1.ffn_up.weight", 50, 60, 0xFF)),
    Fault("one bit flipped: a code", "llama", "Q4_K_M", "tensors", bit("blk.1.ffn_up.weight", 51, 61, 0x02)),
    Fault("one byte flipped: sub-scale", "qwen3", "Q4_K_M", "tensors", bit("blk.0.ffn_up.weight", 5, 6, 0x21)),
    Fault("one byte flipped: codes", "granite", "Q6_K", "tensors", bit("blk.1.ffn_up.weight", 50, 60, 0xFF)),
    Fault("one byte flipped: codes", "stablelm", "Q4_0", "tensors", bit("blk.1.ffn_up.weight", 50, 10, 0xFF)),
    Fault("one byte flipped: codes", "olmo2", "Q2_K", "tensors", bit("blk.1.ffn_up.weight", 50, 40, 0xFF)),
    Fault("one byte flipped: codes", "qwen3", "Q3_K_M", "tensors", bit("blk.1.ffn_up.weight", 50, 40, 0xFF)),
    Fault("one byte flipped: codes", "phi3", "IQ4_NL", "tensors", bit("blk.1.ffn_up.weight", 50, 10, 0xFF)),
    Fault("one byte flipped: codes", "mistral", "IQ4_XS", "tensors", bit("blk.1.ffn_up.weight", 50, 20, 0xFF)),
    Fault("one byte flipped: codes", "llama", "TQ2_0", "tensors", bit("blk.1.ffn_up.weight", 50, 11, 0xFF)),
    Fault("one byte flipped: codes", "demo", "Q4_K_M imatrix", "tensors", bit("blk.1.ffn_up.weight", 50, 60, 0xFF)),
    Fault("one byte flipped: codes", "qwen3", "Q4_K_M imatrix", "tensors", bit("blk.1.ffn_up.weight", 50, 60, 0xFF)),
    Fault("scale of the neighbouring block", "llama", "Q4_K_M imatrix", "tensors",
          in_gguf(copy_scale("blk.0.ffn_gate.weight", Q4K, slice(0, 16), 100, 101))),
    Fault("two blocks swapped", "olmo2", "Q3_K_M imatrix", "tensors",
          in_gguf(swap_blocks("blk.0.ffn_up.weight", 110, 10, 11))),
    Fault("gate and up swapped", "mistral", "IQ3_S imatrix", "tensors",
          in_gguf(swap("blk.{}.ffn_gate.weight", "blk.{}.ffn_up.weight"))),
    Fault("gate and up swapped", "granite", "IQ2_XS imatrix", "tensors",
          in_gguf(swap("blk.{}.ffn_gate.weight", "blk.{}.ffn_up.weight"))),
    Fault("two blocks swapped", "mistral", "IQ3_S imatrix", "tensors",
          in_gguf(swap_blocks("blk.0.ffn_up.weight", 110, 10, 11))),
    Fault("two blocks swapped", "granite", "IQ2_XS imatrix", "tensors",
          in_gguf(swap_blocks("blk.0.ffn_up.weight", 74, 10, 11))),
    Fault("scale of a block four times too large", "mistral", "IQ3_S imatrix", "tensors",
          bit("blk.1.ffn_up.weight", 51, 1, 0x08)),
    Fault("one byte flipped: low nibble of a code byte", "mistral", "IQ4_XS imatrix", "tensors",
          bit("blk.1.ffn_up.weight", 50, 20, 0x0F)),
    Fault("one bit flipped: exponent", "demo", "F32", "tensors", bit("blk.0.attn_q.weight", 1000, 3, 0x20)),
    Fault("one bit flipped: lowest of a mantissa", "demo", "F32", "tensors", bit("blk.0.attn_q.weight", 1000, 0, 1)),
    Fault("one bit flipped: lowest of a mantissa, in a norm", "cohere", "Q4_K_M", "tensors",
          bit("blk.1.attn_norm.weight", 10, 0, 1)),
    Fault("one bit flipped: lowest of a mantissa", "falcon", "F16", "tensors", bit("blk.1.ffn_up.weight", 77, 0, 1)),
    Fault("NaN in a matrix", "demo", "F32", "tensors", in_gguf(set_number("blk.1.ffn_up.weight", 99, np.nan)),
          says="infinite"),
    Fault("infinity in a norm", "smollm3", "Q4_K_M", "tensors",
          in_gguf(set_number("blk.1.attn_norm.weight", 9, np.inf)), says="infinite"),
    Fault("NaN as the scale of a block", "starcoder2", "Q8_0", "tensors",
          in_gguf(blocks("blk.1.ffn_up.weight", Q8, lambda x: x[3].__setitem__(slice(0, 2), (0x00, 0x7E)))),
          says="infinite"),
    Fault("bytes of F16 numbers swapped", "falcon", "F16", "tensors",
          in_gguf(map_data(lambda x: x.byteswap(), "blk.0.ffn_up.weight"))),
    Fault("F16 numbers labelled BF16", "gpt_neox", "F16", "tensors",
          in_gguf(relabel("blk.0.ffn_up.weight", Types.BF16))),
    Fault("rounded twice: Q8_0 by way of Q4_0", "demo", "Q8_0", "tensors",
          in_gguf(as_type("blk.1.ffn_down.weight", Types.Q8_0, Types.Q4_0))),
    Fault("rounded twice: Q5_0 by way of Q4_0", "qwen2", "Q5_0", "tensors",
          in_gguf(as_type("blk.1.ffn_down.weight", Types.Q5_0, Types.Q4_0))),
    Fault("rounded twice: F16 by way of Q8_0", "mistral", "F16", "tensors",
          in_gguf(as_type("blk.1.ffn_down.weight", Types.F16, Types.Q8_0))),
    Fault("fewer bits than the mixture promises", "demo", "Q4_K_M", "structure",
          in_gguf(as_type("blk.2.ffn_down.weight", Types.Q4_0)), silent=True),
    Fault("fewer bits than the mixture promises", "gpt2", "Q8_0", "structure",
          in_gguf(as_type("blk.1.ffn_down.weight", Types.Q4_0)), silent=True),
)  # fmt: skip

TRAITS = (
    # metadata
    Fault("rope theta", "demo", "F32", "structure", in_gguf(key(".rope.freq_base", 500000.0))),
    Fault("rope theta", "qwen3", "Q4_K_M", "structure", in_gguf(key(".rope.freq_base", 10001.0))),
    Fault("rope theta of the local layers dropped", "gemma3", "F32", "structure",
          in_gguf(without(".rope.freq_base_swa"))),
    Fault("rope scaling dropped: llama 3", "llama3-rope", "F32", "structure", in_gguf(without("rope_freqs.weight"))),
    Fault("rope factors shifted: llama 3", "llama3-rope", "Q8_0", "structure",
          in_gguf(map_data(roll(1), "rope_freqs"))),
    Fault("rope scaling dropped: linear", "llama-linear", "Q8_0", "structure",
          in_gguf(without(".rope.scaling.type", ".rope.scaling.factor"))),
    Fault("rope factor wrong: YaRN", "llama-yarn", "F32", "structure", in_gguf(key(".rope.scaling.factor", 8.0))),
    Fault("original context wrong: YaRN", "llama-yarn", "Q8_0", "structure",
          in_gguf(key(".rope.scaling.original_context_length", 4096))),
    Fault("rope factors dropped: LongRoPE", "phi3-partial", "F32", "structure",
          in_gguf(without("rope_factors_long.weight", "rope_factors_short.weight"))),
    Fault("long and short rope factors swapped", "phi3-partial", "Q8_0", "structure",
          in_gguf(lambda f: swap("rope_factors_long.weight", "rope_factors_short.weight")(f))),
    Fault("partial rotary factor wrong", "stablelm", "F32", "structure", in_gguf(key(".rope.dimension_count", 32))),
    Fault("partial rotary factor ignored", "gpt_neox", "Q8_0", "structure",
          in_gguf(key(".rope.dimension_count", 64))),
    Fault("sliding window changed", "gemma2", "F32", "structure", in_gguf(key(".attention.sliding_window", 128))),
    Fault("sliding window off by one", "gemma3", "Q8_0", "structure", in_gguf(key(".attention.sliding_window", 63))),
    Fault("sliding window on the wrong layers", "gemma3", "F32", "structure",
          in_gguf(key(".attention.sliding_window_pattern", 3))),
    Fault("soft cap of attention dropped", "gemma2", "F32", "structure", in_gguf(key(".attn_logit_softcapping", 50.0))),
    Fault("soft cap of the head dropped", "gemma2", "Q8_0", "structure", in_gguf(without(".final_logit_softcapping"))),
    Fault("head not scaled", "cohere", "F32", "structure", in_gguf(key(".logit_scale", 1.0))),
    Fault("head scale inverted", "granite", "Q8_0", "structure", in_gguf(changed(".logit_scale", lambda x: 1 / x))),
    Fault("attention not scaled", "granite", "F32", "structure", in_gguf(without(".attention.scale"))),
    Fault("embedding not scaled", "granite", "Q4_K_M", "structure", in_gguf(key(".embedding_scale", 1.0))),
    Fault("residuals not scaled", "granite", "F16", "structure", in_gguf(key(".residual_scale", 1.0))),
    Fault("parallel residual lost", "gpt_neox", "F32", "structure", in_gguf(key(".use_parallel_residual", False))),
    Fault("one expert instead of two", "mixtral", "F32", "structure", in_gguf(key(".expert_used_count", 1))),
    Fault("experts' weights scaled", "mixtral", "Q8_0", "structure",
          in_gguf(new_key(".expert_weights_scale", 0.5, F32))),
    Fault("norm epsilon 1e-6 for 1e-5", "demo", "F32", "structure",
          in_gguf(key(".attention.layer_norm_rms_epsilon", 1e-6))),
    Fault("norm epsilon 1e-5 for 1e-3", "starcoder2", "Q4_K_M", "structure",
          in_gguf(key(".attention.layer_norm_epsilon", 1e-5))),
    Fault("stale context length", "demo", "Q4_K_M", "structure", in_gguf(key(".context_length", 2048)), silent=True),
    Fault("stale context length", "qwen3", "Q8_0", "structure", in_gguf(key(".context_length", 256)), silent=True),
    Fault("stale head count", "demo", "F32", "structure", in_gguf(key(".attention.head_count", 4))),
    Fault("stale head count for keys", "mistral", "Q8_0", "structure", in_gguf(key(".attention.head_count_kv", 4))),
    Fault("stale layer count", "demo", "Q8_0", "structure", in_gguf(key(".block_count", 2))),
    Fault("stale layer count", "llama3-rope", "F32", "structure", in_gguf(key(".block_count", 5))),
    Fault("stale feed-forward length", "olmo2", "Q8_0", "structure", in_gguf(key(".feed_forward_length", 1024))),
    Fault("stale vocabulary size", "llama", "Q8_0", "structure", in_gguf(key(".vocab_size", 512)), silent=True),
    Fault("wrong file type", "demo", "Q4_K_M", "structure", in_gguf(key("general.file_type", 7)), silent=True),
    Fault("wrong file type", "phi3", "Q8_0", "structure", in_gguf(key("general.file_type", 1)), silent=True),
    Fault("wrong architecture", "qwen2", "Q8_0", "structure", in_gguf(lambda f: rename(f, "llama"))),
    Fault("wrong architecture", "stablelm", "F32", "structure", in_gguf(lambda f: rename(f, "gptneox"))),
    Fault("tensor missing", "qwen2", "F32", "structure", in_gguf(without("blk.1.attn_k.bias"))),
    Fault("tensor nobody asked for", "llama", "F32", "structure",
          in_gguf(lambda f: f.tensors.update({"blk.0.attn_q.bias": Stored(np.full(256, 0.1, np.float32), Types.F32)}))),
    Fault("file cut short", "demo", "Q4_K_M", "structure", in_bytes(lambda raw: raw[:-1000]), says="cut short"),
    Fault("file cut by one byte", "granite", "F16", "structure", in_bytes(lambda raw: raw[:-1]), says="cut short"),
    Fault("offset of a tensor shifted", "demo", "F32", "structure", in_bytes(shifted_offset)),
    Fault("dimensions in the other order", "cohere", "F32", "structure", in_bytes(swapped_shape)),
    Fault("file changed after its manifest", "demo", "Q4_K_M", "structure",
          bit("blk.1.ffn_up.weight", 50, 60, 1), says="sha256", manifest=("demo", "Q4_K_M"), silent=True),
    Fault("manifest of another artifact", "demo", "F32", "structure", in_gguf(), says="manifest",
          manifest=("demo", "Q4_K_M"), silent=True),
)  # fmt: skip

TEXT = (
    # tokenizer and chat template
    Fault("wrong BOS", "demo", "F32", "tokens", in_gguf(key("tokenizer.ggml.bos_token_id", 2043))),
    Fault("BOS missing", "llama", "Q8_0", "tokens", in_gguf(without("tokenizer.ggml.bos_token_id"))),
    Fault("wrong EOS", "demo", "Q4_K_M", "tokens", in_gguf(key("tokenizer.ggml.eos_token_id", 2044))),
    Fault("wrong EOS", "qwen3", "Q8_0", "tokens", in_gguf(key("tokenizer.ggml.eos_token_id", 511))),
    Fault("wrong padding token", "granite", "Q8_0", "tokens", in_gguf(key("tokenizer.ggml.padding_token_id", 511))),
    Fault("BOS not added", "demo", "F32", "tokens", in_gguf(key("tokenizer.ggml.add_bos_token", False))),
    Fault("EOS added", "demo", "F32", "tokens", in_gguf(key("tokenizer.ggml.add_eos_token", True))),
    Fault("BOS not added", "phi3", "Q4_K_M", "tokens", in_gguf(key("tokenizer.ggml.add_bos_token", False))),
    Fault("wrong pre-tokenizer", "demo", "F32", "tokens", in_gguf(key("tokenizer.ggml.pre", "gpt-2"))),
    Fault("wrong pre-tokenizer", "llama", "Q8_0", "tokens", in_gguf(key("tokenizer.ggml.pre", "deepseek-llm"))),
    Fault("pre-tokenizer missing", "mistral", "Q8_0", "tokens", in_gguf(without("tokenizer.ggml.pre"))),
    Fault("added token no longer special", "demo", "F32", "tokens", in_gguf(item(_KINDS, 2044, NORMAL))),
    Fault("added token unused", "qwen2", "F32", "tokens", in_gguf(item(_KINDS, 509, UNUSED))),
    Fault("added token renamed", "olmo2", "Q8_0", "tokens", in_gguf(item(_TOKENS, 509, "<|im_start|>"))),
    Fault("two merges reordered", "demo", "F32", "tokens", in_gguf(swapped_items(_MERGES, 0, 20))),
    Fault("two merges reordered", "llama", "Q4_K_M", "tokens", in_gguf(swapped_items(_MERGES, 8, 30))),
    Fault("last merge missing", "cohere", "Q8_0", "tokens", in_gguf(changed(_MERGES, lambda x: x[:-1]))),
    Fault("two tokens swapped", "stablelm", "Q8_0", "tokens", in_gguf(swapped_items(_TOKENS, 300, 301))),
    Fault("vocabulary shifted by one", "gpt_neox", "Q8_0", "tokens",
          in_gguf(changed(_TOKENS, lambda x: [x[-1], *x[:-1]]))),
    Fault("wrong chat template", "demo", "Q4_K_M", "tokens", in_gguf(key("tokenizer.chat_template", _TEMPLATE))),
    Fault("chat template missing", "demo", "F32", "tokens", in_gguf(without("tokenizer.chat_template"))),
    Fault("chat template without its turns' end", "mixtral", "Q8_0", "tokens",
          in_gguf(changed("tokenizer.chat_template", lambda x: x.replace("<|end|>", "")))),
    Fault("chat template loses a trim", "gemma2", "Q8_0", "tokens",
          in_gguf(changed("tokenizer.chat_template", lambda x: x.replace(" | trim", "")))),
)  # fmt: skip

FOLDERS = (
    # Hugging Face folders
    Fault("rope theta", "llama", "HF", "structure", in_folder(rope(rope_theta=500000.0))),
    Fault("rope scaling dropped", "llama3-rope", "HF", "structure", in_folder(rope(rope_type="default"))),
    Fault("partial rotary factor wrong", "stablelm", "HF", "structure", in_folder(rope(partial_rotary_factor=0.5))),
    Fault("norm epsilon", "olmo2", "HF", "structure", in_folder(config(rms_norm_eps=1e-6))),
    Fault("k and v swapped", "mistral", "HF", "tensors",
          in_folder(swap_in_folder("model.layers.{}.self_attn.k_proj.weight",
                                   "model.layers.{}.self_attn.v_proj.weight"))),
    Fault("gate and up swapped", "qwen3", "HF", "tensors",
          in_folder(swap_in_folder("model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"))),
    Fault("square matrix transposed", "granite", "HF", "tensors",
          in_folder(map_folder(transposed, "layers.1.self_attn.o_proj"))),
    Fault("q/k permutation of GGUF left in", "demo", "HF", "tensors",
          in_folder(lambda f: (map_folder(lambda x: x[woven(256, 8)], "q_proj")(f),
                               map_folder(lambda x: x[woven(128, 4)], "k_proj")(f), None)[-1])),
    Fault("head tied although it is not", "llama", "HF", "structure", in_folder(config(tie_word_embeddings=True))),
    Fault("bias dropped", "qwen2", "HF", "tensors", in_folder(map_folder(_no_bias, "layers.0.self_attn.q_proj.bias"))),
    Fault("wrong BOS in the config", "llama", "HF", "tokens", in_folder(config(bos_token_id=7)), silent=True),
    Fault("wrong EOS in the config", "demo", "HF", "tokens", in_folder(config(eos_token_id=7)), silent=True),
    Fault("soft cap dropped", "gemma2", "HF", "structure", in_folder(config(final_logit_softcapping=None))),
    Fault("sliding window ignored", "gemma3", "HF", "structure",
          in_folder(config(layer_types=["full_attention"] * 3))),
    Fault("multiplier lost", "granite", "HF", "structure", in_folder(config(residual_multiplier=1.0))),
    Fault("head not scaled", "cohere", "HF", "structure", in_folder(config(logit_scale=1.0))),
    Fault("one expert instead of two", "mixtral", "HF", "structure", in_folder(config(num_experts_per_tok=1))),
    Fault("router normalisation lost", "qwen3_moe", "HF", "structure", in_folder(config(norm_topk_prob=False))),
    Fault("wrong activation", "llama", "HF", "structure", in_folder(config(hidden_act="gelu"))),
    Fault("stale context length", "demo", "HF", "structure", in_folder(config(max_position_embeddings=4096)), silent=True),
    Fault("stale layer count", "demo", "HF", "structure", in_folder(config(num_hidden_layers=2))),
    Fault("stale head count", "demo", "HF", "structure", in_folder(config(num_attention_heads=4, head_dim=64))),
    Fault("bf16 numbers labelled f16", "demo", "HF", "tensors", in_folder(mislabelled)),
    Fault("one bit flipped: lowest of a mantissa", "phi3", "HF", "tensors",
          in_folder(map_folder(lowest_bit, "layers.1.mlp.down_proj"))),
    Fault("tensor missing", "starcoder2", "HF", "structure",
          in_folder(lambda f: (f.tensors.pop("model.layers.1.mlp.c_fc.bias"), None)[-1])),
    Fault("tensor of another model's width", "phi3", "HF", "structure",
          in_folder(map_folder(lambda x: x[:, :128], "layers.0.mlp.down_proj"))),
    Fault("file cut short", "olmo2", "HF", "structure", in_weights(lambda raw: raw[:-100])),
    Fault("two merges reordered", "llama", "HF", "tokens", in_folder(swapped_merges)),
    Fault("added token missing", "qwen3", "HF", "tokens", in_folder(plain_added_token)),
    Fault("wrong EOS", "llama", "HF", "tokens", in_folder(other_eos)),
    Fault("wrong EOS for generation", "demo", "HF", "tokens", in_folder(other_end)),
    Fault("BOS not added", "llama", "HF", "tokens", in_folder(without_post_processor)),
    Fault("added tokens no longer special", "qwen3", "HF", "tokens", in_folder(added_tokens(special=False))),
    Fault("added tokens strip what is before them", "qwen2", "HF", "tokens", in_folder(added_tokens(lstrip=True))),
    Fault("wrong pre-tokenizer", "demo", "HF", "tokens", in_folder(other_split)),
    Fault("wrong chat template", "llama", "HF", "tokens", in_folder(other_template)),
)  # fmt: skip


SHARED_FAULTS = (
    # on trained models and a SentencePiece vocabulary outside the repository, where they are
    Fault("q/k permutation missing", "wiki-mistral", "Q4_K_M", "tensors", in_gguf(permute_heads(unwoven))),
    Fault("norm +1 forgotten", "wiki-gemma3", "Q8_0", "tensors", in_gguf(map_data(lambda x: x - 1, "norm"))),
    Fault("sliding window changed", "wiki-gemma3", "F32", "structure",
          in_gguf(changed(".attention.sliding_window", lambda x: x // 2))),
    Fault("experts permuted", "wiki-mixtral", "Q4_K_M", "tensors", in_gguf(map_data(roll(1), "exps"))),
    Fault("learned positions shifted by one", "wiki-gpt2", "Q8_0", "tensors",
          in_gguf(map_data(roll(1), "position_embd"))),
    Fault("scale of the neighbouring block", "wiki-llama-12m", "Q4_K_M", "tensors",
          in_gguf(copy_scale("blk.3.ffn_gate.weight", Q4K, slice(0, 16), 100, 101))),
    Fault("scores of two tokens swapped", "stories260K", "F32", "tokens",
          in_gguf(swapped_items("tokenizer.ggml.scores", 265, 300))),
    Fault("space prefix lost", "stories260K", "Q8_0", "tokens",
          in_gguf(new_key("tokenizer.ggml.add_space_prefix", False, BOOL))),
)  # fmt: skip

#: Damage that hides in what coarse types lose anyway, where nobody can know how the file was encoded: only the manifest's hash
#: is sure to show it.
HIDDEN = (
    Fault("one byte flipped: codes", "mistral", "IQ3_S imatrix", "structure",
          bit("blk.1.ffn_up.weight", 50, 20, 0xFF), says="sha256", manifest=("mistral", "IQ3_S imatrix")),
    Fault("one byte flipped: codes", "granite", "IQ2_XS imatrix", "structure",
          bit("blk.1.ffn_up.weight", 50, 20, 0xFF), says="sha256", manifest=("granite", "IQ2_XS imatrix")),
    Fault("two bits flipped: lowest of two codes", "llama", "Q4_0 imatrix", "structure",
          bit("blk.1.ffn_up.weight", 50, 10, 0x11), says="sha256", manifest=("llama", "Q4_0 imatrix")),
    Fault("lowest byte of a scale", "mistral", "IQ3_S imatrix", "structure",
          bit("blk.1.ffn_up.weight", 51, 0, 0xFF), says="sha256", manifest=("mistral", "IQ3_S imatrix")),
)  # fmt: skip

#: Changes that change nothing: llama.cpp must give the same ids and exactly the same logits.
EQUIVALENT = (
    Fault("keys and tensors in another order", "demo", "Q4_K_M", "", in_gguf(reordered)),
    Fault("keys and tensors in another order", "gemma2", "Q8_0", "", in_gguf(reordered)),
    Fault("key llama.cpp does not read for this architecture", "qwen3_moe", "F32", "",
          in_gguf(new_key(".expert_weights_norm", False, BOOL))),
    Fault("pre-tokenizer that differs in digits, of which no merge speaks", "llama", "Q8_0", "",
          in_gguf(key("tokenizer.ggml.pre", "llama-bpe"))),
    Fault("pre-tokenizer that differs where no merge of the vocabulary reaches", "olmo2", "Q8_0", "",
          in_gguf(key("tokenizer.ggml.pre", "gpt-2"))),
    Fault("another name", "granite", "Q4_K_M", "", in_gguf(key("general.name", "another"))),
    Fault("garbage between tensors", "llama-yarn", "Q8_0", "", padding),
)  # fmt: skip


FAULTS: tuple[Fault, ...] = ROWS + VALUES + TRAITS + TEXT + FOLDERS


def main(name: str, good: str, bad: str, donor: str | None = None) -> None:
    fault = next(f for f in FAULTS if name in (f.name, f.id))
    fault.plant(Path(good), Path(bad), Path(donor) if donor else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
