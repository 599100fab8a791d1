"""Our GGUF files hold the bytes of llama.cpp's own pipeline.

Two oracles: convert_hf_to_gguf.py for names, order and dense bytes; llama_model_quantize for types and blocks. The
second runs on our unquantized file, whose graph is proven by parity (tests/test_archs.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert.formats import gguf
from tests import upstream
from tests.checkpoints import LLAMA, random_tensors, write_tensors
from tests.conftest import DEMO

needs_quantizer = pytest.mark.skipif(
    upstream.quantizer_available() is not None,
    reason=f"llama.cpp's quantizer: {upstream.quantizer_available()}",
)
needs_converter = pytest.mark.skipif(
    upstream.available() is not None, reason=f"llama.cpp's converter: {upstream.available()}"
)

FTYPES = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q3_K_M", "Q2_K", "Q8_0", "Q4_0", "IQ4_XS", "MXFP4_MOE")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
_SMALL = dict(LLAMA, vocab_size=512, hidden_size=256, head_dim=32, num_hidden_layers=3)
_DEEPSEEK = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "first_k_dense_replace": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 640, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
_YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
#: Shapes that exercise the rules: tied and untied output, GQA >= 4, experts (8 of them have rules of their own),
#: 80 layers (llama.cpp files that under 70B), rows that are no multiple of 256.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _SMALL,
    "llama-tied-gqa8": _SMALL | {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "llama-odd-rows": _SMALL | {"intermediate_size": 352, "hidden_size": 288, "num_attention_heads": 9,
                                "num_key_value_heads": 3},
    "llama-80-layers": _SMALL | {"num_hidden_layers": 80, "intermediate_size": 256, "head_dim": 16,
                                 "num_key_value_heads": 2},
    "qwen3": {k: v for k, v in _SMALL.items() if k not in ("architectures", "rope_theta")}
    | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "rope_parameters": _ROPE,
       "tie_word_embeddings": True, "attention_bias": False, "use_sliding_window": False},
    "gemma3": {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "vocab_size": 512, "hidden_size": 256,
        "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 64, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 64, "sliding_window": 128, "tie_word_embeddings": True, "attention_bias": False,
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}},
    },
    "mixtral-4": {k: v for k, v in _SMALL.items() if k not in ("architectures", "num_hidden_layers")}
    | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4,
       "num_experts_per_tok": 2, "num_hidden_layers": 3, "intermediate_size": 256},
    "mixtral-8": {k: v for k, v in _SMALL.items() if k not in ("architectures", "num_hidden_layers")}
    | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8,
       "num_experts_per_tok": 2, "num_hidden_layers": 2, "intermediate_size": 256},
    "gpt-oss": {
        "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "vocab_size": 512, "hidden_size": 256,
        "intermediate_size": 288, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 1,
        "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 256,
        "sliding_window": 128, "rope_parameters": _ROPE,
    },
    # Heads of 256 + 32 and 64: keys (transposed) and values out of the latent have blocks of their own widths.
    "deepseek_v3": _DEEPSEEK
    | {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "moe_intermediate_size": 128,
       "num_hidden_layers": 4, "q_lora_rank": 96, "kv_lora_rank": 256, "qk_nope_head_dim": 256, "qk_rope_head_dim": 32,
       "v_head_dim": 64, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3,
       "n_shared_experts": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "scoring_func": "sigmoid",
       "topk_method": "noaux_tc", "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "deepseek_v2": _DEEPSEEK
    | {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "moe_intermediate_size": 256,
       "num_hidden_layers": 3, "q_lora_rank": 128, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
       "v_head_dim": 32, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
       "n_shared_experts": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": False, "scoring_func": "softmax",
       "topk_method": "greedy", "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
}  # fmt: skip


def _write(folder: Path, config: dict[str, Any], dtype: str, seed: int = 1) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    write_tensors(folder / "model.safetensors", random_tensors(config, dtype, seed))
    return folder


def _tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    file = gguf.read(path)
    return {n: (t.type, t.shape, gguf.raw(file, n).load().tobytes()) for n, t in file.tensors.items()}


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    a, b = _tensors(ours), _tensors(theirs)
    assert list(a) == list(b), "names or order differ"
    different = []
    for name, (type_, shape, data) in a.items():
        assert (type_, shape) == b[name][:2], f"{name}: {type_} {shape}, llama.cpp {b[name][:2]}"
        if name == "rope_freqs.weight":
            x, y = np.frombuffer(data, "<f4"), np.frombuffer(b[name][2], "<f4")
            assert (np.abs(x.view("<i4") - y.view("<i4")) == 0).all(), "rope_freqs differ"
        elif data != b[name][2]:
            different.append(f"{name} {type_}")
    assert not different, f"bytes differ: {different}"


@pytest.fixture(scope="module", params=[(c, d) for c in CONFIGS for d in ("BF16", "F32") if c == "llama" or d == "BF16"],
                ids=lambda p: f"{p[0]}-{p[1]}")  # fmt: skip
def unquantized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """(checkpoint, our GGUF in the checkpoint's own type)"""
    name, dtype = request.param
    folder = _write(tmp_path_factory.mktemp(name) / "model", CONFIGS[name], dtype)
    out = folder.parent / "dense.gguf"
    lconvert.convert(folder, out, ftype=dtype, name="m")
    return folder, out


@needs_quantizer
@pytest.mark.parametrize("ftype", FTYPES)
def test_one_pass_equals_llama_quantize(unquantized: tuple[Path, Path], ftype: str, tmp_path: Path) -> None:
    folder, dense = unquantized
    theirs = upstream.quantize(dense, tmp_path / "theirs.gguf", ftype, nthread=2)
    ours = tmp_path / "ours.gguf"
    lconvert.convert(folder, ours, ftype=ftype, name="m")
    assert_same_tensors(ours, theirs)


@needs_quantizer
@pytest.mark.parametrize("ftype", ["Q4_K_M", "Q2_K", "IQ4_XS", "Q4_0", "Q5_1"])
def test_with_an_importance_matrix(tmp_path: Path, ftype: str) -> None:
    folder = _write(tmp_path / "model", CONFIGS["mixtral-4"], "BF16")
    lconvert.convert(folder, tmp_path / "dense.gguf", ftype="BF16", name="m")
    rng = np.random.default_rng(3)
    imatrix = {}
    for name, info in gguf.read(tmp_path / "dense.gguf").tensors.items():
        if name.startswith("blk.") and len(info.shape) > 1 and "ffn_gate_inp" not in name:
            experts = info.shape[0] if len(info.shape) == 3 else 1
            imatrix[name] = rng.gamma(0.5, size=(experts, info.shape[-1])).astype(np.float32)
    theirs = upstream.quantize(
        tmp_path / "dense.gguf", tmp_path / "theirs.gguf", ftype, imatrix=imatrix, nthread=2
    )
    lconvert.convert(folder, tmp_path / "ours.gguf", ftype=ftype, name="m", imatrix=imatrix)
    assert_same_tensors(tmp_path / "ours.gguf", theirs)


@needs_quantizer
@pytest.mark.parametrize(
    "options",
    [
        {"pure": True},
        {"leave_output_tensor": True},
        {"output_tensor_type": "Q8_0", "token_embedding_type": "Q5_K"},
        {"tensor_types": [("attn_v", "Q8_0")]},  # takes attn_v out of the counter: later layers shift
        {"tensor_types": [(r"blk\.1\.ffn_down", "F16"), ("ffn_up", "Q3_K")]},
    ],
    ids=lambda o: "-".join(o),
)
def test_options_of_llama_quantize(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = _write(tmp_path / "model", CONFIGS["llama"], "BF16")
    lconvert.convert(folder, tmp_path / "dense.gguf", ftype="BF16", name="m")
    theirs = upstream.quantize(
        tmp_path / "dense.gguf", tmp_path / "theirs.gguf", "Q4_K_M", nthread=2, **options
    )
    lconvert.convert(folder, tmp_path / "ours.gguf", ftype="Q4_K_M", name="m", **options)
    assert_same_tensors(tmp_path / "ours.gguf", theirs)


#: Keys that llama.cpp does not read, or that name the tool; "file_type" of unquantized files is upstream's guess.
_UNREAD = ("general.size_label", "general.finetune", "general.basename", "general.name", "general.type",
           "general.quantization_version", "general.file_type", "general.languages", "general.license",
           "general.tags", "general.sampling", "general.version", "general.organization")  # fmt: skip


def _metadata(path: Path) -> dict[str, Any]:
    found = {k: v for k, v in gguf.read(path).metadata.items() if not k.startswith(_UNREAD)}
    return {k: (v.kind, list(v.data) if v.kind == "array" else v.data) for k, v in found.items()}  # type: ignore[arg-type]


@needs_converter
@pytest.mark.parametrize(
    "name", ["demo", "llama3-rope", "mixtral", "qwen3", "deepseek_v2", "deepseek_v3", "gpt-oss"]
)
def test_converter_and_quantizer_together(name: str, tmp_path: Path) -> None:
    """The whole upstream pipeline, checkpoint to Q4_K_M, against our single pass; and the metadata."""
    folder = tmp_path / "model"
    if name == "demo":
        shutil.copytree(DEMO, folder)
    else:
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 64, "rope_theta": 500000.0}  # fmt: skip
        vocab = json.loads((DEMO / "config.json").read_text())["vocab_size"]
        changed: dict[str, Any] = {"vocab_size": vocab}
        base = {"llama3-rope": "llama", "mixtral": "mixtral-8"}.get(name, name)
        if name == "llama3-rope":
            changed |= {
                "rope_parameters": scaling,
                "head_dim": 64,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            }
        config = {
            k: v
            for k, v in (CONFIGS[base] | changed).items()
            if not (k == "rope_theta" and "rope_parameters" in changed)
        }
        _write(folder, config, "BF16")
        for file in TOKENIZER_FILES:
            if (DEMO / file).exists():
                shutil.copy(DEMO / file, folder / file)
    dense = upstream.convert(folder, tmp_path / "dense.gguf", "bf16", pre="llama-bpe")
    theirs = upstream.quantize(dense, tmp_path / "theirs.gguf", "Q4_K_M", nthread=2)
    lconvert.convert(folder, tmp_path / "ours.gguf", ftype="Q4_K_M")
    assert_same_tensors(tmp_path / "ours.gguf", theirs)
    ours_meta, theirs_meta = _metadata(tmp_path / "ours.gguf"), _metadata(theirs)
    wrong = {k: (ours_meta.get(k), v) for k, v in theirs_meta.items() if ours_meta.get(k) != v}
    assert not wrong, f"metadata that llama.cpp reads differs (ours, theirs): {wrong}"


@needs_converter
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_dense_bytes_equal_the_converter(dtype: str, tmp_path: Path) -> None:
    folder = _write(tmp_path / "model", CONFIGS["llama"] | {"vocab_size": 2048}, dtype)
    for file in TOKENIZER_FILES:
        if (DEMO / file).exists():
            shutil.copy(DEMO / file, folder / file)
    theirs = upstream.convert(folder, tmp_path / "theirs.gguf", dtype.lower(), pre="llama-bpe")
    lconvert.convert(folder, tmp_path / "ours.gguf", ftype=dtype)
    a, b = _tensors(tmp_path / "ours.gguf"), _tensors(theirs)
    assert a.keys() == b.keys()
    assert all(a[n] == b[n] for n in a)
