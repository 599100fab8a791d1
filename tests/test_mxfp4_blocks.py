"""gpt-oss as it is released: MXFP4 experts against transformers' own unpacking, through lconvert, to llama.cpp and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import lconvert
from lconvert.archs import find
from lconvert.archs.common import Name, binds
from lconvert.converters import hf, hf_experts
from lconvert.errors import InputError, UnsupportedError
from lconvert.executor import execute
from lconvert.formats import mxfp4_blocks, safetensors
from lconvert.forward import Forward, hf_tensor
from lconvert.ir import Model, QTensor, Tensor, concat_rows, dense
from lconvert.kernels.qtensor import dequantize, values
from tests import arch_cases, upstream
from tests.checkpoints import write_tensors
from tests.conftest import DEMO

for package in ("llama_cpp", "torch", "transformers"):
    pytest.importorskip(package, reason=f"{package} is not installed")
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests import mxfp4_models, random_models
from tests.built_models import kld
from tests.test_byte_equality import TOKENIZER_FILES, assert_same_tensors
from tests.test_byte_equality import _metadata as metadata

CASES = {c.name: c for c in arch_cases.load()}
CASE = CASES["gpt_oss-experts"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mxfp4_models.build(CASE, tmp_path_factory.mktemp("mxfp4") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return lconvert.read(folder)


# --- values ----------------------------------------------------------------------------------------------


def _every_code(experts: int = 2) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """All 256 pairs of codes under every scale that is a number: (E, 255, 16, 16) and (E, 255, 16)."""
    blocks = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    scales = np.arange(255, dtype=np.uint8).reshape(1, 255, 1)
    return np.tile(blocks, (experts, 255, 1, 1)), np.tile(scales, (experts, 1, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_value_is_transformers(dtype: torch.dtype) -> None:
    """Every code under every scale but NaN, subnormal numbers and overflow included."""
    blocks, scales = _every_code()
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=dtype)
    q = mxfp4_blocks.raised(dense(blocks.reshape(-1, 16, 16)), dense(scales.reshape(-1, 16)))
    with np.errstate(over="ignore"):
        ours = dequantize(q).reshape(2, 255, -1)
    reference = theirs.float().transpose(1, 2).numpy()
    assert np.array_equal(ours.view(np.int32), reference.view(np.int32))


def test_packed_is_the_inverse() -> None:
    blocks, scales = _every_code(1)
    q = mxfp4_blocks.raised(dense(blocks[0]), dense(scales[0]))
    assert mxfp4_blocks.fits(q)
    back = mxfp4_blocks.packed(q)
    assert np.array_equal(back[0].load(), blocks[0]) and np.array_equal(back[1].load(), scales[0])
    assert np.array_equal(back[0].read(7, 9), blocks[0, 7:9])


def test_what_does_not_fit() -> None:
    blocks, scales = _every_code(1)
    q = mxfp4_blocks.raised(dense(blocks[0]), dense(scales[0]))
    assert isinstance(q.scale, QTensor)
    scaled = replace(q, scale=replace(q.scale, scale=dense(np.full((1, 1), 2, np.float32))))
    assert not mxfp4_blocks.fits(scaled)
    assert not mxfp4_blocks.fits(replace(q, scale=dense(np.ones((255, 16), np.float32))))


def test_a_scale_of_nan_is_damage() -> None:
    blocks, scales = _every_code(1)
    scales = scales.copy()
    scales[0, 3, 5] = 255
    q = mxfp4_blocks.raised(dense(blocks[0]), dense(scales[0], origin="here"))
    dequantize(q, 0, 3)
    with pytest.raises(InputError, match="here: row 3, block 5: its scale is NaN"):
        dequantize(q, 2, 4)


# --- the folder ------------------------------------------------------------------------------------------


def test_entries_are_transformers_weights(folder: Path, model: Model) -> None:
    loaded = {n: p.detach() for n, p in random_models.reference(folder).named_parameters()}
    for i, layer in model.arch.each():
        prefix = f"model.layers.{i}.mlp.experts."
        fused, down = loaded[prefix + "gate_up_proj"], loaded[prefix + "down_proj"]
        for e in range(layer.mlp.experts):  # type: ignore[union-attr]
            role = f"layers.{i}.moe.experts.{e}."
            for part, theirs in (("gate", fused[e, :, ::2]), ("up", fused[e, :, 1::2]), ("down", down[e])):
                data = model.entries[role + part].data
                assert isinstance(data, QTensor)
                assert np.array_equal(values(data), theirs.T.numpy()), role + part
    assert any("quantized: mxfp4" in line for line in model.report)
    assert "quantization_config" not in model.config


def test_forward_is_transformers(folder: Path, model: Model) -> None:
    ids = random_models.prompt(CASE)
    theirs = random_models.logits(random_models.reference(folder), ids)
    assert np.array_equal(Forward(model).logits(ids), theirs)


def test_rows_come_in_any_slab(model: Model) -> None:
    """Rows that alternate in the file are the same whatever range is read."""
    data = model.entries["layers.1.moe.experts.2.up"].data
    whole = values(data)
    for start, stop in ((0, 1), (5, 5), (7, 60), (95, 96)):
        assert np.array_equal(values(data, start, stop), whole[start:stop])


def _edited(folder: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the folder with its tensors changed."""
    shutil.copytree(folder, out)
    tensors = safetensors_torch().load_file(out / "model.safetensors")
    change(tensors)
    safetensors_torch().save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def safetensors_torch() -> Any:
    import safetensors.torch

    return safetensors.torch


_EXPERTS = "model.layers.0.mlp.experts."


def test_damage_is_named(folder: Path, tmp_path: Path) -> None:
    lost = _edited(folder, tmp_path / "a", lambda t: t.pop(_EXPERTS + "down_proj_scales"))
    with pytest.raises(
        InputError, match=r"the tensor .*down_proj_scales is missing; the checkpoint is incomplete"
    ):
        lconvert.read(lost)

    def shorten(t: dict[str, Any]) -> None:
        t[_EXPERTS + "gate_up_proj_blocks"] = t[_EXPERTS + "gate_up_proj_blocks"][:, :-2].contiguous()

    with pytest.raises(
        InputError, match=r"is U8 of shape \(4, 190, 4, 16\), the configuration implies U8 of \(4, 192"
    ):
        lconvert.read(_edited(folder, tmp_path / "b", shorten))

    def widen(t: dict[str, Any]) -> None:
        t[_EXPERTS + "down_proj_scales"] = t[_EXPERTS + "down_proj_scales"].short()

    with pytest.raises(InputError, match=r"down_proj_scales is I16 of shape"):
        lconvert.read(_edited(folder, tmp_path / "c", widen))


def test_unknown_keys_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["block_size"] = 16
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="unknown key 'block_size'"):
        lconvert.read(tmp_path / "m")


def test_columns_must_fill_blocks() -> None:
    with pytest.raises(InputError, match="48 input features do not divide into MXFP4 blocks of 32"):
        mxfp4_blocks.shapes(2, (64, 48))


# --- llama.cpp -------------------------------------------------------------------------------------------


def test_gguf_holds_the_same_numbers(model: Model, tmp_path: Path) -> None:
    """As it is: MXFP4 blocks, exact, back as the same codes. Dequantized to F32: transformers' logits."""
    from lconvert.validators.runtimes.llamacpp import LlamaCpp

    result = lconvert.convert(model, tmp_path / "m.gguf")
    kinds = {i.name: (i.type, i.verdict.kind) for i in result.plan.items()}
    for part in ("gate", "up", "down"):
        assert kinds[f"blk.2.ffn_{part}_exps.weight"] == ("MXFP4", "exact")
        assert kinds[f"blk.2.ffn_{part}_exps.bias"] == ("F32", "widened")
    assert kinds["blk.0.attn_sinks.weight"] == ("F32", "widened")
    back = lconvert.read(tmp_path / "m.gguf")
    assert back.arch == model.arch
    for name, entry in model.entries.items():
        a, b = entry.data, back.entries[name].data
        if isinstance(a, QTensor):
            assert isinstance(b, QTensor) and mxfp4_blocks.fits(b)
            assert np.array_equal(a.codes.load(), b.codes.load()), name
            assert np.array_equal(a.scale.codes.load(), b.scale.codes.load()), name  # type: ignore[union-attr]
        assert np.array_equal(values(a), values(b)), name

    lconvert.convert(model, tmp_path / "f32.gguf", ftype="F32")
    ids = random_models.prompt(CASE)
    runtime = LlamaCpp(tmp_path / "f32.gguf", context=256, threads=2)
    try:
        assert kld(Forward(model).logits(ids), runtime.logits(ids)).mean() < 1e-10
    finally:
        runtime.close()


@pytest.mark.skipif(upstream.available() is not None, reason=f"llama.cpp's converter: {upstream.available()}")
@pytest.mark.parametrize("packed", [True, False], ids=["mxfp4", "dense"])
def test_bytes_are_the_converters(packed: bool, tmp_path: Path) -> None:
    vocab = json.loads((DEMO / "config.json").read_text())["vocab_size"]
    case = replace(CASE, config=CASE.config | {"vocab_size": vocab, "num_hidden_layers": 2})
    folder = (mxfp4_models if packed else random_models).build(case, tmp_path / "model")
    for file in TOKENIZER_FILES:
        if (DEMO / file).exists():
            shutil.copy(DEMO / file, folder / file)
    theirs = upstream.convert(folder, tmp_path / "theirs.gguf", "bf16", pre="llama-bpe")
    lconvert.convert(folder, tmp_path / "ours.gguf", **({} if packed else {"ftype": "BF16"}))
    # Both keep the source's type; upstream writes tensors in the order of the source, llama.cpp's quantizer by name.
    copied = upstream.quantize(theirs, tmp_path / "copied.gguf", "COPY")
    assert_same_tensors(tmp_path / "ours.gguf", copied)
    ours_meta, theirs_meta = metadata(tmp_path / "ours.gguf"), metadata(copied)
    wrong = {k: (ours_meta.get(k), v) for k, v in theirs_meta.items() if ours_meta.get(k) != v}
    assert not wrong, f"metadata that llama.cpp reads differs (ours, theirs): {wrong}"
    # The published files: experts as they are, everything else in Q8_0.
    mixed = upstream.quantize(theirs, tmp_path / "mixed.gguf", "MXFP4_MOE")
    done = lconvert.convert(folder, tmp_path / "ours-mixed.gguf", ftype="MXFP4_MOE")
    assert_same_tensors(tmp_path / "ours-mixed.gguf", mixed)
    experts = {i.verdict.kind for i in done.plan.items() if i.type == "MXFP4"}
    assert experts == {"exact" if packed else "quantized"}


# --- other stacks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("layout", ["stacked", "alternating"])
def test_stacks_of_every_layout(layout: Any, transpose: bool, model: Model, tmp_path: Path) -> None:
    """What other checkpoints do: gate and up one after the other or in turns, matrices (out, in) or (in, out)."""
    expert = "layers.{i}.moe.experts.{e}."
    names = (Name("x.{i}.w", (expert + "gate", expert + "up"), layout, transpose=transpose, bias=".b"),)
    found = {b.hf: b for b in binds(names, model.arch)}
    assert list(found) == [f"x.{i}.w{end}" for i in range(3) for end in ("", ".b")]
    rng = np.random.default_rng(1)
    stored = {n: ("F32", rng.standard_normal(b.shape).astype(np.float32)) for n, b in found.items()}
    write_tensors(tmp_path / "m.safetensors", stored)
    file = safetensors.read_header(tmp_path / "m.safetensors")
    for name, bind in found.items():
        rows = hf_experts.dense(bind, file, name)
        array = stored[name][1]
        gates = array.swapaxes(1, 2) if bind.transpose else array
        half = gates.shape[1] // 2
        split = (gates[:, :half], gates[:, half:]) if layout == "stacked" else (gates[:, ::2], gates[:, 1::2])
        parts: list[Tensor] = []
        for role, ((start, stop),) in bind.parts:
            e, side = int(role.split(".")[4]), role.split(".")[5] == "up"
            assert np.array_equal(rows.read(start, stop), split[side][e]), role
            parts.append(dense(split[side][e].copy()))
        assert np.array_equal(concat_rows(tuple(parts)).load(), rows.load())
        assert np.array_equal(rows.read(start - 3, stop - 1), rows.load()[start - 3 : stop - 1])
        entries = {
            role: replace(model.entries[role], data=part)
            for (role, _), part in zip(bind.parts, parts, strict=True)
        }
        assert np.array_equal(hf_tensor(model.with_entries(entries), bind), array), "the inverse"


def test_stored_again_byte_for_byte(folder: Path, model: Model) -> None:
    """What is read is what was stored, in any slab of experts."""
    stored = safetensors_torch().load_file(folder / "model.safetensors")
    listed = [b for b in binds(find("gpt_oss").names, model.arch) if len(b.shape) == 3]
    made = {name: t for b in listed for name, t in (hf_experts.store_mxfp4(model, b) or {}).items()}
    assert made.keys() == {n for n in stored if n.endswith(mxfp4_blocks.SUFFIXES)}
    for name, t in made.items():
        want = stored[name].numpy()
        assert (t.dtype, t.shape) == ("U8", want.shape)
        assert np.array_equal(t.read(0, len(want)), want), name
        assert np.array_equal(t.read(1, 3), want[1:3]), name


def test_rows_in_turns_in_any_slab() -> None:
    x = dense(np.arange(48, dtype=np.int32).reshape(24, 2))
    there = hf_experts.part_by_part(x, 3, 2)
    assert there.load()[:8, 0].tolist() == [0, 4, 8, 12, 2, 6, 10, 14]
    back = hf_experts.in_turns(there, 3, 2)
    for start in range(25):
        for stop in range(start, 25):
            assert np.array_equal(back.read(start, stop), x.read(start, stop)), (start, stop)
            assert np.array_equal(there.read(start, stop), there.load()[start:stop])


def test_other_grids_are_not_stored(model: Model) -> None:
    one = "layers.0.moe.experts.1.up"
    plain = model.with_entries(
        {one: replace(model.entries[one], data=dense(values(model.entries[one].data)))}
    )
    stacks = {b.hf: b for b in binds(find("gpt_oss").names, model.arch)}
    assert hf_experts.store_mxfp4(plain, stacks[_EXPERTS + "gate_up_proj"]) is None
    assert hf_experts.store_mxfp4(plain, stacks[_EXPERTS + "down_proj"]) is not None


def test_what_is_no_stack(tmp_path: Path) -> None:
    write_tensors(tmp_path / "m.safetensors", {"v": ("F32", np.zeros(4, np.float32))})
    file = safetensors.read_header(tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"tensor 'v' of shape \(4,\) is no stack"):
        safetensors.stacked(file, "v")


def test_dense_folder_of_a_packed_one(model: Model, tmp_path: Path) -> None:
    """Written plain, transformers loads the same numbers."""
    execute(hf.plan(model, "BF16"), tmp_path / "m")
    back = lconvert.read(tmp_path / "m")
    for name, entry in model.entries.items():
        assert np.array_equal(values(entry.data), values(back.entries[name].data)), name
    ids = random_models.prompt(CASE)
    theirs = random_models.logits(random_models.reference(tmp_path / "m"), ids)
    assert np.array_equal(theirs, Forward(model).logits(ids))
