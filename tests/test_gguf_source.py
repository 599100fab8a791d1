"""GGUF as a source, and QTensors carried into GGUF: bytes, values and logits survive."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lconvert
from lconvert.cli import main
from lconvert.converters import hf
from lconvert.converters.gguf_carry import carry
from lconvert.errors import UnsupportedError
from lconvert.executor import execute
from lconvert.formats import gguf
from lconvert.formats.gguf_blocks import SCHEMES
from lconvert.ir import E2M1, E4M3, UE4M3, Model, QTensor, Tensor, dense, int_grid
from lconvert.kernels.qtensor import dequantize, values
from tests.checkpoints import write_llama
from tests.conftest import DEMO

FLOATS = ("F32", "F16", "BF16")
#: Types that need an importance matrix to be written.
VERY_LOW = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama") / "model", num_key_value_heads=2)


def _written(checkpoint: Path, out: Path, type_: str) -> Path:
    if type_ in FLOATS:
        return lconvert.convert(checkpoint, out, ftype=type_, name="m").paths[0]
    imatrix = None
    if type_ in VERY_LOW:
        rng = np.random.default_rng(0)
        columns = {"ffn_down": 512}
        names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        imatrix = {
            f"blk.{i}.{n}.weight": rng.gamma(1, size=(1, columns.get(n, 256))).astype(np.float32)
            for i in range(2)
            for n in names
        }
    rules = [(r"^output\.weight", "Q6_K"), ("token_embd", "Q4_0"), ("blk", type_)]
    return lconvert.convert(
        checkpoint, out, ftype="Q8_0", tensor_types=rules, name="m", imatrix=imatrix,
        output_tensor_type="Q6_K", token_embedding_type="Q4_0",
    ).paths[0]  # fmt: skip


@pytest.mark.parametrize("type_", [*FLOATS, *sorted(SCHEMES)])
def test_gguf_to_gguf_is_byte_identical(type_: str, checkpoint: Path, tmp_path: Path) -> None:
    first = _written(checkpoint, tmp_path / "a.gguf", type_)
    stored = {t.type for t in gguf.read(first).tensors.values()}
    assert type_ in stored
    again = lconvert.convert(first, tmp_path / "b.gguf", name="m")
    assert {i.verdict.kind for i in again.plan.items()} == {"exact"}
    a, b = gguf.read(first), gguf.read(again.paths[0])
    assert list(a.tensors) == list(b.tensors)
    for name in a.tensors:
        assert a.tensors[name].type == b.tensors[name].type
        assert gguf.raw(a, name).load().tobytes() == gguf.raw(b, name).load().tobytes(), name


def test_rotary_order_and_traits_come_back(checkpoint: Path, tmp_path: Path) -> None:
    source = lconvert.read(checkpoint)
    found = lconvert.read(_written(checkpoint, tmp_path / "a.gguf", "F32"))
    assert found.arch == source.arch
    for name, entry in source.entries.items():
        assert np.array_equal(values(found.entries[name].data), values(entry.data)), name


def test_gguf_to_hugging_face_loads_into_transformers(tmp_path: Path) -> None:
    """Q4_K_M -> IR -> folder -> transformers gives the logits of the dequantized artifact."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from lconvert.forward import Forward
    from lconvert.validators.runtimes.hf import Transformers

    artifact = lconvert.convert(DEMO, tmp_path / "m.gguf", ftype="Q4_K_M").paths[0]
    model = lconvert.read(artifact)
    assert any("reconstructed" in line for line in model.report)
    execute(hf.plan(model), tmp_path / "hf")
    ids = list(range(3, 60))
    loaded = Transformers(tmp_path / "hf").logits(ids)
    assert np.array_equal(loaded, Forward(model).logits(ids))
    again = lconvert.read(tmp_path / "hf")
    for name, entry in model.entries.items():
        assert np.array_equal(values(again.entries[name].data), values(entry.data)), name


def test_dense_folder_round_trip_keeps_bytes(tmp_path: Path) -> None:
    source = lconvert.read(DEMO)
    artifact = lconvert.convert(source, tmp_path / "m.gguf", ftype="BF16").paths[0]
    execute(hf.plan(lconvert.read(artifact), "BF16"), tmp_path / "hf")
    again = lconvert.read(tmp_path / "hf")
    for name, entry in source.entries.items():
        assert isinstance(entry.data, Tensor) and isinstance(again.entries[name].data, Tensor)
        assert np.array_equal(again.entries[name].data.load(), entry.data.load()), name
    assert again.tokenizer is not None and source.tokenizer is not None
    from lconvert.validators.runtimes.hf import reference_tokenizer

    a, b = reference_tokenizer(source.tokenizer), reference_tokenizer(again.tokenizer)
    for text in ("It was the best of times,\n it was 1859 <|eot_id|> of", "naïve café -- 'tis"):
        assert a.encode(text).ids == b.encode(text).ids


# --- carried QTensors ------------------------------------------------------------------------------------


def _int4(rows: int, cols: int, group: int, rng: np.random.Generator) -> QTensor:
    """What a GPTQ-style tool would hand over: signed codes, fp16 scales, groups along the input dimension."""
    codes = rng.integers(-8, 8, (rows, cols), dtype=np.int8)
    scale = (rng.random((rows, cols // group)) * 0.01 + 0.001).astype(np.float16)
    return QTensor((rows, cols), dense(codes), int_grid(4, True), (1, group), dense(scale))


def _nvfp4(rows: int, cols: int, rng: np.random.Generator, global_scale: float) -> QTensor:
    """What ModelOpt hands over: E2M1 codes, E4M3 scales per 16, one fp32 scale per tensor."""
    codes = rng.integers(0, 16, (rows, cols)).astype(np.uint8)
    inner = rng.integers(40, 120, (rows, cols // 16)).astype(np.uint8)
    outer = dense(np.array([[global_scale]], np.float32))
    scale = QTensor((rows, cols // 16), dense(inner), E4M3, (-1, -1), outer)
    return QTensor((rows, cols), dense(codes), E2M1, (1, 16), scale)


def _replace_all(model: Model, make: object) -> Model:
    new = {}
    for name, entry in model.entries.items():
        if name.startswith("layers.") and len(entry.shape) == 2:
            new[name] = replace(entry, data=make(*entry.shape))  # type: ignore[operator]
    return model.with_entries(new)


def _fidelity(model: Model, path: Path) -> float:
    """Mean KLD of llama.cpp on the file against the model's own numbers in transformers."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from lconvert.forward import Forward
    from lconvert.validators.logits import compare
    from lconvert.validators.runtimes.llamacpp import LlamaCpp

    runtime = LlamaCpp(path, context=128)
    try:
        ids = [int(i) for i in np.random.default_rng(1).integers(0, model.arch.vocab, 100)]
        models = {"a": Forward(model).logits, "b": runtime.logits}
        return compare(models, [("a", "b")], [ids])["a", "b"].kld_mean
    finally:
        runtime.close()


@pytest.mark.parametrize(("group", "verdict"), [(32, "exact"), (128, "widened")])
def test_int4_arrives_as_q4_0(group: int, verdict: str, checkpoint: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    model = _replace_all(lconvert.read(checkpoint), lambda r, c: _int4(r, c, group, rng))
    result = lconvert.convert(model, tmp_path / "m.gguf")
    kinds = {i.name: (i.type, i.verdict.kind) for i in result.plan.items()}
    assert kinds["blk.0.attn_q.weight"] == ("Q4_0", verdict)
    back = lconvert.read(result.paths[0])
    for name, entry in model.entries.items():
        assert np.array_equal(values(back.entries[name].data), values(entry.data)), name
    assert _fidelity(model, result.paths[0]) < 2e-3


def test_nvfp4_arrives_with_its_global_scale(checkpoint: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    model = _replace_all(lconvert.read(checkpoint), lambda r, c: _nvfp4(r, c, rng, 0.0004))
    result = lconvert.convert(model, tmp_path / "m.gguf")
    kinds = {i.name: (i.type, i.verdict.kind) for i in result.plan.items()}
    assert kinds["blk.0.attn_q.weight"] == ("NVFP4", "exact")
    assert kinds["blk.0.attn_q.scale"] == ("F32", "exact")
    back = lconvert.read(result.paths[0])
    q, p = model.entries["layers.0.attn.q"].data, back.entries["layers.0.attn.q"].data
    assert isinstance(q, QTensor) and isinstance(p, QTensor)
    assert np.array_equal(q.codes.load(), p.codes.load())
    assert isinstance(p.scale, QTensor) and p.scale.grid == UE4M3
    for name, entry in model.entries.items():
        assert np.array_equal(values(back.entries[name].data), values(entry.data)), name
    assert _fidelity(model, result.paths[0]) < 2e-3


def test_q4_k_file_to_ir_is_the_independent_dequantization(checkpoint: Path, tmp_path: Path) -> None:
    package = pytest.importorskip("gguf", reason="the gguf package is not installed")
    path = _written(checkpoint, tmp_path / "m.gguf", "Q4_K")
    model = lconvert.read(path)
    reader = {t.name: t for t in package.GGUFReader(str(path)).tensors}
    o = model.entries["layers.1.attn.o"].data
    assert isinstance(o, QTensor) and isinstance(o.scale, QTensor) and o.scale.grid == int_grid(6, False)
    stored = reader["blk.1.attn_output.weight"]
    assert np.array_equal(dequantize(o), package.dequantize(stored.data, stored.tensor_type))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "Q4_0"),
        ({"scale": dense(np.full((4, 2), 1 / 3, np.float32))}, None),  # not an fp16 number
        ({"scale": dense(np.full((4, 2), 1e6, np.float32))}, None),
        ({"g_idx": dense(np.arange(64, dtype=np.int32) % 2)}, None),
        ({"zero": dense(np.full((4, 2), 8, np.uint8)), "grid": int_grid(4, False)}, "Q4_0"),
        ({"zero": dense(np.full((4, 2), 3, np.uint8)), "grid": int_grid(4, False)}, "Q4_1"),
        ({"zero": dense(np.full((4, 2), 3.5, np.float32))}, None),
    ],
)
def test_what_can_be_carried_exactly(change: dict[str, object], expected: str | None) -> None:
    rng = np.random.default_rng(4)
    unsigned = change.get("grid") == int_grid(4, False)
    codes = (
        rng.integers(0, 16, (4, 64)).astype(np.uint8)
        if unsigned
        else rng.integers(-8, 8, (4, 64), dtype=np.int8)
    )
    scale = dense(np.full((4, 2), 0.25, np.float16))
    q = replace(QTensor((4, 64), dense(codes), int_grid(4, True), (1, 32), scale), **change)  # type: ignore[arg-type]
    found = carry(q)
    assert (found.type if found else None) == expected


def test_asymmetric_int4_with_long_scales_goes_to_q5_0() -> None:
    """z * s does not fit fp16, so Q4_1 cannot hold the minima; 5 signed bits hold code - zero."""
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 16, (4, 64)).astype(np.uint8)
    scale = (rng.random((4, 2)) + 0.1).astype(np.float16)
    zero = dense(np.full((4, 2), 7, np.uint8))
    q = QTensor((4, 64), dense(codes), int_grid(4, False), (1, 32), dense(scale), zero)
    found = carry(q)
    assert found is not None and found.type == "Q5_0" and found.verdict.kind == "widened"
    assert np.array_equal(dequantize(found.tensor), dequantize(q))


def test_requantizing_is_refused_unless_allowed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _written(checkpoint, tmp_path / "a.gguf", "Q8_0")
    with pytest.raises(
        UnsupportedError, match="is quantized already, and Q4_0 cannot hold its values exactly"
    ):
        lconvert.convert(first, tmp_path / "b.gguf", ftype="Q4_0")
    assert not list(tmp_path.glob("b.gguf*"))
    for flags, code in (([], 2), (["--allow-requantize"], 0)):  # a dry run says so by its exit code, too
        monkeypatch.setattr("sys.argv", ["lconvert", "hf-to-gguf", str(first), "--q4_0", "--dry-run", *flags])
        with pytest.raises(SystemExit) as exit:
            main()
        assert exit.value.code == code
    result = lconvert.convert(first, tmp_path / "b.gguf", ftype="Q4_0", allow_requantize=True)
    item = next(i for i in result.plan.items() if i.name == "blk.0.attn_k.weight")
    assert item.verdict.kind == "requantized" and item.verdict.error is not None and item.verdict.error > 0.01


def test_experts_of_different_dtypes_are_stacked_in_fp32(tmp_path: Path) -> None:
    from tests.checkpoints import LLAMA, random_tensors, write_tensors

    config = {k: v for k, v in LLAMA.items() if k != "architectures"}
    config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
    config |= {"num_experts_per_tok": 2, "intermediate_size": 256}
    tensors = random_tensors(config)
    wide = random_tensors(config, "F32", seed=9)
    odd = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    tensors[odd] = wide[odd]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    write_tensors(tmp_path / "model" / "model.safetensors", tensors)
    model = lconvert.read(tmp_path / "model")
    result = lconvert.convert(model, tmp_path / "m.gguf")
    items = {i.name: (i.type, i.verdict.kind) for i in result.plan.items()}
    assert items["blk.0.ffn_gate_exps.weight"] == ("F32", "widened")
    assert items["blk.1.ffn_gate_exps.weight"] == ("BF16", "exact")
    back = lconvert.read(result.paths[0])
    for name, entry in model.entries.items():
        assert np.array_equal(values(back.entries[name].data), values(entry.data)), name
