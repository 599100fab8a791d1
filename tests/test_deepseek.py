"""DeepSeek's latent attention on its way through GGUF: keys out of the latent stand transposed there, head by head.

What every architecture has to prove (parity, both ways round, mutations) is in test_archs.py and its neighbours.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
from numpy.typing import NDArray

import lconvert
from lconvert.archs import find
from lconvert.archs.common import Arch
from lconvert.converters import checkpoint as checkpoint_folder
from lconvert.converters import hf
from lconvert.converters.gguf_names import transposed, transposed_codes
from lconvert.errors import InputError, LconvertError, SpecError, UnsupportedError
from lconvert.executor import execute
from lconvert.formats import gguf
from lconvert.ir import E2M1, E4M3, Entry, Model, QTensor, Tensor, dense, int_grid
from lconvert.kernels.qtensor import values
from lconvert.passes import rtn
from lconvert.validators.tensors import check_gguf
from tests import upstream
from tests.checkpoints import random_tensors, write_tensors
from tests.test_byte_equality import CONFIGS, assert_same_tensors

V3 = CONFIGS["deepseek_v3"]
HEADS, REST, VALUES, LATENT = 4, 256, 64, 256
RNG = np.random.default_rng(11)


def write(
    folder: Path, config: Mapping[str, Any], extra: Mapping[str, NDArray[np.float32]] | None = None
) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(config, "BF16", 1) | {k: ("F32", v) for k, v in (extra or {}).items()}
    write_tensors(folder / "model.safetensors", tensors)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("deepseek") / "model", V3)


# --- transposed blocks -----------------------------------------------------------------------------------


def turned(x: NDArray[Any], rows: int) -> NDArray[Any]:
    return np.concatenate([m.T for m in x.reshape(-1, rows, x.shape[1])])


def quantized(rows: int, cols: int, block: tuple[int, int], *, nested: bool = False) -> QTensor:
    """Random codes, zeros and offsets with this block; `nested` scales are quantized themselves."""
    count = tuple(1 if b == -1 else n // b for n, b in zip((rows, cols), block, strict=True))
    scale: Tensor | QTensor = dense(RNG.random(count, dtype=np.float32) + 0.5)
    if nested:
        one = dense(np.full((1, 1), 0.25, np.float32))
        scale = QTensor(count, dense(RNG.integers(1, 100, count).astype(np.uint8)), E4M3, (-1, -1), one)
    codes = dense(RNG.integers(0, 16, (rows, cols)).astype(np.uint8))
    zero = dense(RNG.integers(0, 16, count).astype(np.uint8))
    offset = dense(RNG.standard_normal(count).astype(np.float32))
    return QTensor((rows, cols), codes, int_grid(4, False), block, scale, zero, offset)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "block", [(1, 16), (1, -1), (-1, -1), (8, 16), (-1, 16), (12, 8), (48, 1), (4, 1)], ids=str
)
def test_a_transposed_qtensor_is_the_same_numbers(block: tuple[int, int], nested: bool) -> None:
    """Three matrices of 16 x 32 on top of each other; a block of 12 or 48 rows lies across two of them."""
    q = quantized(48, 32, block, nested=nested)
    found = transposed_codes(q, 16)
    assert found is not None
    assert found.shape == (96, 16)
    assert np.array_equal(values(found), turned(values(q), 16))
    assert np.array_equal(values(found, 37, 61), turned(values(q), 16)[37:61])
    if block[0] in (1, 4, 8) and block[1] > 0:
        assert found.block == block[::-1]
        again = transposed_codes(found, 32)
        assert again is not None and again.block == block and np.array_equal(values(again), values(q))


def test_blocks_that_cannot_be_turned() -> None:
    q = quantized(32, 32, (1, 16))
    assert transposed_codes(replace(q, g_idx=dense(np.zeros(32, np.int32))), 16) is None
    short = replace(q, codes=dense(np.zeros((32, 24), np.uint8)), shape=(32, 24))
    assert transposed_codes(short, 16) is None  # the second block of a row has 8 columns


def test_a_transposed_tensor_reads_any_rows() -> None:
    x = RNG.standard_normal((48, 7)).astype(np.float32)
    t = transposed(dense(x), 16)
    want = turned(x, 16)
    assert t.shape == want.shape == (21, 16)
    for start, stop in ((0, 21), (3, 4), (6, 8), (20, 21), (5, 5)):
        assert np.array_equal(t.read(start, stop), want[start:stop])


# --- GGUF ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ftype", ["BF16", "Q8_0", "Q4_0", "Q4_K_M", "IQ4_XS"])
def test_gguf_to_gguf_is_byte_identical(ftype: str, checkpoint: Path, tmp_path: Path) -> None:
    lconvert.convert(checkpoint, tmp_path / "a.gguf", ftype=ftype, name="m")
    again = lconvert.convert(tmp_path / "a.gguf", tmp_path / "b.gguf", name="m")
    assert_same_tensors(tmp_path / "b.gguf", tmp_path / "a.gguf")
    assert {i.verdict.kind for i in again.plan.items()} == {"exact"}


def read_by_gguf(path: Path, name: str) -> NDArray[np.float32]:
    """A tensor of the file as the gguf package reads it."""
    t = next(t for t in package.GGUFReader(path).tensors if t.name == name)
    out: NDArray[np.float32] = package.dequantize(t.data, t.tensor_type)
    return out.reshape([int(n) for n in reversed(t.shape)])


@pytest.mark.parametrize("ftype", ["F32", "Q8_0", "Q4_K_M"])
def test_keys_and_values_of_the_latent(ftype: str, checkpoint: Path, tmp_path: Path) -> None:
    """Read back, they are kv_b_proj: of each head first the keys, transposed back, then the values."""
    lconvert.convert(checkpoint, tmp_path / "a.gguf", ftype=ftype, name="m")
    keys, held = (read_by_gguf(tmp_path / "a.gguf", f"blk.1.attn_{x}_b.weight") for x in "kv")
    assert keys.shape == (HEADS, LATENT, REST) and held.shape == (HEADS, VALUES, LATENT)
    want = np.concatenate([keys.swapaxes(1, 2), held], axis=1).reshape(-1, LATENT)
    artifact, source = lconvert.read(tmp_path / "a.gguf"), lconvert.read(checkpoint)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    (found,) = (t.produce(0, t.rows).data for t in hf.to_hf(artifact) if t.name == name)
    assert np.array_equal(np.asarray(found).view("<f4").reshape(want.shape), want)
    rows = {r.name: r for r in check_gguf(tmp_path / "a.gguf", artifact, source).table}
    row = rows["layers.1.attn.k_b"]
    assert row.kept if ftype == "F32" else (row.stock_blocks == 1 and not row.damaged)


@pytest.mark.skipif(upstream.quantizer_available() is not None, reason=str(upstream.quantizer_available()))
@pytest.mark.parametrize("ftype", ["Q4_K_M", "IQ4_XS"])
def test_importances_belong_to_transposed_columns(ftype: str, checkpoint: Path, tmp_path: Path) -> None:
    lconvert.convert(checkpoint, tmp_path / "dense.gguf", ftype="BF16", name="m")
    imatrix = {}
    for name, info in gguf.read(tmp_path / "dense.gguf").tensors.items():
        if name.startswith("blk.") and len(info.shape) > 1 and "ffn_gate_inp" not in name:
            count = info.shape[0] if len(info.shape) == 3 else 1
            imatrix[name] = RNG.gamma(0.5, size=(count, info.shape[-1])).astype(np.float32)
    theirs = upstream.quantize(tmp_path / "dense.gguf", tmp_path / "b.gguf", ftype, imatrix=imatrix)
    lconvert.convert(checkpoint, tmp_path / "a.gguf", ftype=ftype, name="m", imatrix=imatrix)
    assert_same_tensors(tmp_path / "a.gguf", theirs)


@pytest.fixture(scope="module")
def grouped(checkpoint: Path) -> Model:
    """Codes of 4 bits in groups of 32 along the input, as a quantized folder would hold them."""
    return rtn.run(
        lconvert.read(checkpoint), rtn.Options("int4", 32, targets=r".*\.(q_b|k_b|v_b|o|down|gate|up)")
    )


@pytest.mark.parametrize(("ftype", "kind"), [("Q4_0", "refused"), ("Q8_0", "refused"), ("COPY", "widened")])
def test_groups_along_the_input_of_transposed_keys(grouped: Model, ftype: str, kind: str) -> None:
    """They lie across the rows that the file has; values out of the same latent are carried."""
    plan = lconvert.plan_gguf(grouped, "x.gguf", ftype=ftype)
    verdicts = {i.name: i.verdict for i in plan.items()}
    assert verdicts["blk.0.attn_k_b.weight"].kind == kind
    if ftype != "Q8_0":
        assert {verdicts[f"blk.0.{n}.weight"].kind for n in ("attn_v_b", "attn_q_b", "attn_output")} == {
            "exact"
        }
    if kind == "refused":
        assert "is quantized already" in verdicts["blk.0.attn_k_b.weight"].reason


def test_transposed_keys_can_be_rounded_again(grouped: Model, checkpoint: Path, tmp_path: Path) -> None:
    rules = [("attn_q_a|kv_a_mqa", "BF16")]
    result = lconvert.convert(
        grouped, tmp_path / "a.gguf", ftype="Q4_0", tensor_types=rules, allow_requantize=True,
        token_embedding_type="F16", output_tensor_type="F16", name="m",
    )  # fmt: skip
    verdict = {i.name: i.verdict for i in result.plan.items()}["blk.2.attn_k_b.weight"]
    assert verdict.kind == "requantized" and verdict.error is not None and verdict.error < 0.1
    want = values(grouped.entries["layers.2.attn.k_b"].data)
    found = read_by_gguf(tmp_path / "a.gguf", "blk.2.attn_k_b.weight").reshape(-1, REST)
    assert np.abs(turned(want, REST) - found).max() <= 0.15 * np.abs(want).max()


def nvfp4(shape: tuple[int, int], scale: float) -> QTensor:
    codes = RNG.integers(0, 16, shape).astype(np.uint8)
    blocks = (shape[0], shape[1] // 16)
    inner = dense(RNG.integers(40, 80, blocks).astype(np.uint8))
    outer = QTensor(blocks, inner, E4M3, (-1, -1), dense(np.full((1, 1), scale, np.float32)))
    return QTensor(shape, dense(codes), E2M1, (1, 16), outer)


@pytest.mark.parametrize(("scale", "kind"), [(1.0, "exact"), (0.5, "refused")])
def test_scales_beside_nvfp4_blocks_are_not_carried(checkpoint: Path, scale: float, kind: str) -> None:
    """The graph of deepseek2 multiplies none of its matrices by them (src/models/deepseek2.cpp)."""
    model = lconvert.read(checkpoint)
    role = "layers.1.attn.q_a"
    model = model.with_entries({role: Entry(role, nvfp4(model.entries[role].shape, scale))})  # type: ignore[arg-type]
    found = {i.name: i for i in lconvert.plan_gguf(model, "x.gguf", ftype="COPY").items()}
    assert found["blk.1.attn_q_a.weight"].verdict.kind == kind
    assert "blk.1.attn_q_a.scale" not in found


WRONG: list[tuple[dict[str, Any], type[LconvertError], str]] = [
    ({"attention.kv_lora_rank": None}, InputError, "the required key 'deepseek2.attention.kv_lora_rank' is missing"),
    ({"attention.key_length_mla": None}, UnsupportedError, "are one tensor attn_kv_b, as llama.cpp's converter"),
    ({"attention.head_count_kv": ("u32", 4)}, InputError, "head_count_kv is 4, expected 1, as latent attention"),
    ({"attention.key_length": ("u32", 260)}, InputError, "key_length is 260, expected 288, as latent attention"),
    ({"attention.key_length_mla": ("u32", 32)}, InputError, "dimension_count is 32, expected fewer than the head's 32"),
    ({"attention.q_lora_rank": ("u32", 64)}, InputError, "the metadata implies"),
    ({"attention.q_lora_rank": ("u32", 0)}, InputError, r"tensor blk\.0\.attn_q\.weight is missing"),
    ({"expert_gating_func": ("u32", 3)}, UnsupportedError, "expert_gating_func 3 is not supported, only 1 and 2"),
    ({"expert_gating_func": ("bools", [True, False])}, InputError, "expert_gating_func is an array of 2, expected a number"),
    ({"expert_gating_func": ("u32", 1)}, UnsupportedError, "DeepSeek-V2 has no normalized weights"),
    ({"expert_group_count": ("u32", 3)}, SpecError, "8 experts, the best 2 of 3 groups: impossible"),
    ({"leading_dense_block_count": ("u32", 2)}, UnsupportedError, "leading_dense_block_count is 2"),
    ({"expert_shared_count": ("u32", 1)}, InputError, "ffn_gate_shexp.weight has shape"),
    ({"rope.scaling.yarn_log_multiplier": ("f32", -0.1)}, InputError, "yarn_log_multiplier is -0.1"),
    ({"expert_count": ("u32", 0)}, UnsupportedError, "a deepseek2 model without experts is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "error", "message"), WRONG, ids=lambda x: str(x)[:40])
def test_wrong_metadata(
    keys: dict[str, Any],
    error: type[LconvertError],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arch: Arch = find("deepseek_v3")
    wrong = replace(arch.gguf, keys=lambda d: {**arch.gguf.keys(d), **keys})
    with monkeypatch.context() as m:
        m.setattr(importlib.import_module("lconvert.archs.deepseek_v3"), "ARCH", replace(arch, gguf=wrong))
        lconvert.convert(checkpoint, tmp_path / "a.gguf", ftype="BF16", name="m")
    with pytest.raises(error, match=message):
        lconvert.read(tmp_path / "a.gguf")


# --- Hugging Face ----------------------------------------------------------------------------------------


def test_layers_for_multi_token_prediction_are_inert(tmp_path: Path) -> None:
    """As many as the config counts; a layer beyond these would be one that the config forgot."""
    extra = {
        "model.layers.4.eh_proj.weight": np.ones((4, 8), np.float32),
        "model.layers.4.mlp.gate.e_score_correction_bias": np.ones(8, np.float32),
    }
    one = write(tmp_path / "one", V3 | {"num_nextn_predict_layers": 1}, extra)
    model = lconvert.read(one)
    assert "inert tensors: model.layers.4.* (2, multi-token prediction)" in model.report
    assert model.entries.keys() == lconvert.read(write(tmp_path / "plain", V3)).entries.keys()
    many = write(tmp_path / "many", V3 | {"num_nextn_predict_layers": 1 << 60}, extra)
    assert lconvert.read(many).entries.keys() == model.entries.keys()  # at once: it counts what there is
    none = write(tmp_path / "none", V3 | {"num_nextn_predict_layers": 0}, extra)
    with pytest.raises(UnsupportedError, match=r"unknown tensor model\.layers\.4\.eh_proj\.weight"):
        lconvert.read(none)
    beyond = write(tmp_path / "beyond", V3, {"model.layers.5.eh_proj.weight": np.ones((4, 8), np.float32)})
    with pytest.raises(UnsupportedError, match=r"unknown tensor model\.layers\.5\.eh_proj\.weight"):
        lconvert.read(beyond)


def fp8_folder(folder: Path) -> dict[str, Any]:
    """V3 as DeepSeek publishes it: E4M3 in blocks of 128 x 128, the correction in F32, a layer for prediction.

    Returns what is stored, as torch tensors.
    """
    torch = pytest.importorskip("torch", reason="torch is not installed")
    save = pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file
    config = V3 | {"qk_nope_head_dim": 128, "v_head_dim": 128, "num_nextn_predict_layers": 1}
    kept = ("embed", "lm_head", "norm", "mlp.gate.")
    out = {}
    for name, (_, array) in random_tensors(config, "F32", 1).items():
        x = torch.from_numpy(np.array(array))
        if any(k in name for k in kept):
            out[name] = x if "correction" in name else x.bfloat16()
            continue
        rows, cols = (-(-n // 128) for n in x.shape)
        padded = torch.zeros(rows * 128, cols * 128)
        padded[: x.shape[0], : x.shape[1]] = x
        blocks = padded.reshape(rows, 128, cols, 128)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).reshape(padded.shape)
        out[name] = codes[: x.shape[0], : x.shape[1]].contiguous()
        out[name.removesuffix(".weight") + ".weight_scale_inv"] = scale
    extra = {"model.layers.4.eh_proj.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}
    extra["model.layers.4.eh_proj.weight_scale_inv"] = torch.ones(1, 1)
    folder.mkdir()
    save(out | extra, folder / "model.safetensors", metadata={"format": "pt"})
    scheme = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    return out


def test_fp8_blocks_come_back_bit_for_bit(tmp_path: Path) -> None:
    """kv_b is split by heads, a block of keys and one of values each, and put together again."""
    stored = fp8_folder(tmp_path / "a")
    torch, load = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch").load_file
    model = lconvert.read(tmp_path / "a")
    assert {model.entries[f"layers.2.attn.{x}_b"].data.block for x in "qkv"} == {(128, 128)}  # type: ignore[union-attr]
    plan = checkpoint_folder.plan(model, checkpoint_folder.Options("fp8"))
    assert {i.verdict.kind for i in plan.items()} == {"exact"}
    execute(plan, tmp_path / "b")
    back = load(tmp_path / "b" / "model.safetensors")
    assert back.keys() == stored.keys()
    for name, x in stored.items():
        assert back[name].dtype == x.dtype and torch.equal(
            back[name].view(torch.uint8), x.view(torch.uint8)
        ), name


def test_the_correction_stays_in_fp32(tmp_path: Path) -> None:
    """transformers holds it so in a model of any dtype; rounded, it would choose other experts."""
    fp8_folder(tmp_path / "a")
    execute(hf.plan(lconvert.read(tmp_path / "a"), "BF16"), tmp_path / "b")
    load = pytest.importorskip("safetensors.torch").load_file
    kinds = {n: str(t.dtype) for n, t in load(tmp_path / "b" / "model.safetensors").items()}
    assert {n.rpartition(".")[2] for n, t in kinds.items() if t == "torch.float32"} == {
        "e_score_correction_bias"
    }
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_group": 3}, "8 experts, the best 2 of 3 groups: impossible"),
        ({"n_group": 8, "topk_group": 4}, "groups of 1 experts have no two best ones"),
        ({"num_experts_per_tok": 5}, "top-5 of 2 groups of 2 experts is impossible"),
    ],
)
def test_impossible_routing(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=message):
        lconvert.read(write(tmp_path / "model", V3 | change))
