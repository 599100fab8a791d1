"""NF4 with double quantization: bitsandbytes' own result, from rtn and as a grid for GPTQ, and what targets make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lconvert
from lconvert import recipe
from lconvert.converters import onnx, targets
from lconvert.errors import OptionError
from lconvert.ir import QTensor, Tensor, dense
from lconvert.kernels.qtensor import dequantize, effective
from lconvert.passes import gptq, rtn
from lconvert.passes.rtn_float import Peak, quantized
from lconvert.primitives import doubled, grids
from lconvert.primitives import gptq as method
from lconvert.primitives.job import Calibration, Job
from lconvert.primitives.placement import Placed
from tests.conftest import DEMO, ROOT


def of(w: Any, group: int = 64) -> QTensor:
    return quantized(dense(w), "nf4dq", group, Peak(()))


def theirs(w: Any, group: int) -> tuple[Any, Any]:
    """bitsandbytes' packed weight and its state."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    return functional.quantize_4bit(torch.from_numpy(w), blocksize=group, compress_statistics=True, quant_type="nf4")  # fmt: skip


def codes(q: QTensor) -> Any:
    assert isinstance(q.scale, QTensor)
    return q.scale.codes.read(0, q.shape[0]).reshape(-1)


def test_the_map_is_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    ours = np.array(doubled.dynamic_map().values, np.float32)
    np.testing.assert_array_equal(ours, functional.create_dynamic_map().numpy())


def compared(w: Any, group: int) -> float:
    """The share of scales with bitsandbytes' code. Everything is equal bit for bit there; elsewhere ours is nearer, and bitsandbytes makes
    the same of it: its library for CPUs finds codes by a coarse table, which may end beside the nearest one."""
    from bitsandbytes import functional

    packed, state = theirs(w, group)
    q = of(w, group)
    got, found = dequantize(q), functional.dequantize_4bit(packed, state).numpy()
    ours, other = codes(q), state.absmax.numpy().reshape(-1).copy()
    same = ours == other
    wide = np.repeat(same, group).reshape(w.shape)
    np.testing.assert_array_equal(got[wide], found[wide])
    state.absmax = torch.from_numpy(ours.copy())
    np.testing.assert_array_equal(got, functional.dequantize_4bit(packed, state).numpy())
    table, absmax = np.array(doubled.dynamic_map().values), np.abs(w).reshape(-1, group).max(-1)
    outer = np.repeat(state.state2.absmax.numpy(), 256)[: len(absmax)].astype(np.float64)
    mine, yours = (np.abs(table[c] * outer + float(state.offset) - absmax)[~same] for c in (ours, other))
    assert (mine < yours).all()
    return float(same.mean())


@pytest.mark.parametrize(
    ("shape", "group"), [((64, 256), 64), ((48, 320), 64), ((20, 96), 32), ((3, 64), 64), ((256, 512), 128)]
)
def test_the_weights_are_bitsandbytes_bit_for_bit(shape: tuple[int, int], group: int) -> None:
    """Runs of 256 scales within rows, across rows, and short ones at the end."""
    rng = np.random.default_rng(shape[0])
    w = (rng.standard_normal(shape) * np.exp(rng.uniform(-3, 0, (shape[0], 1)))).astype(np.float32)
    assert compared(w, group) > 0.99


def test_the_weights_of_a_model_are_bitsandbytes() -> None:
    model = lconvert.read(DEMO)
    shares = [compared(effective(model.entries[f"layers.{i}.{n}"]).copy(), 64) for i, n in enumerate(("attn.q", "mlp.up", "mlp.down"))]  # fmt: skip
    assert min(shares) > 0.99 and shares[1:] == [1.0, 1.0]


def test_it_is_written_as_bitsandbytes_reads_it(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model = recipe.load("nf4-dq").apply(lconvert.read(DEMO))
    plan = targets.plan(model, "bitsandbytes", "out", original=model)
    assert {i.verdict.kind for i in plan.items()} == {"exact"}
    from lconvert.executor import execute

    execute(plan, tmp_path / "out", threads=1)
    stored = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    parts = {k.removeprefix(name + "."): v for k, v in stored.items() if k.startswith(name + ".")}
    state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    want = effective(model.entries["layers.1.mlp.up"])
    found = functional.dequantize_4bit(stored[name], state).float().numpy()
    bf16 = torch.from_numpy(want.copy()).bfloat16().float().numpy()
    np.testing.assert_array_equal(found, bf16)
    back = lconvert.read(tmp_path / "out").entries["layers.1.mlp.up"]
    np.testing.assert_array_equal(effective(back), want)


def test_what_other_targets_say() -> None:
    model = recipe.load("nf4-dq").apply(lconvert.read(DEMO))
    kinds = {}
    for name in ("gguf", "vllm", "gptq", "awq", "tensorrt-llm"):
        items = targets.plan(model, name, "x", original=model).items()
        (found,) = {
            (i.held or i.type, i.verdict.kind) for i in items if "attn_q." in i.name or "q_proj" in i.name
        }
        kinds[name] = found
    assert kinds["gguf"] == ("F32", "widened") and {k for n, (_, k) in kinds.items() if n != "gguf"} == {
        "refused"
    }
    held = {i.held for i in onnx.plan(model, onnx.Options(), model).items()}
    assert "plain" in held, "the values, dequantized"


# --- as a deployment grid --------------------------------------------------------------------------------


def test_the_grid_stores_what_it_fits_with_less_error_than_the_maxima() -> None:
    w = np.random.default_rng(3).standard_normal((40, 192)).astype(np.float32)
    g = grids.find(Placed("nf4dq", 64), 192)
    position, sides = g.nearest(torch.from_numpy(w))
    made = g.qtensor(position, sides, dense(w))
    stock = of(w)
    assert isinstance(made.scale, QTensor) and isinstance(made.scale.scale, Tensor)
    assert isinstance(stock.scale, QTensor) and (made.scale.grid, made.scale.block) == (
        stock.scale.grid,
        stock.scale.block,
    )
    np.testing.assert_array_equal(dequantize(made), g.values(position, sides).numpy())
    assert np.square(dequantize(made) - w).sum() < 0.97 * np.square(dequantize(stock) - w).sum()


@pytest.mark.parametrize("refine", [0, 3])
def test_gptq_never_loses_and_packs_what_it_computed(refine: int) -> None:
    rng = np.random.default_rng(5)
    w = torch.from_numpy(rng.standard_normal((48, 256)).astype(np.float32))
    x = torch.from_numpy(
        (rng.standard_normal((600, 256)) @ rng.standard_normal((256, 256))).astype(np.float32)
    )
    h = x.T @ x
    g = grids.find(Placed("nf4dq", 64), 256)
    settings = method.Settings(refine=refine)
    assert method.path(settings, g) == "weight"
    found = method.gptq(w, method.inputs(h, "weight", settings, "w"), g, settings)
    assert found.loss < 0.8 * found.nearest
    made = g.qtensor(found.position, found.sides, dense(w.numpy()))
    np.testing.assert_array_equal(dequantize(made), g.values(found.position, found.sides).numpy())


def test_gptq_in_a_model_reaches_bitsandbytes(tmp_path: Path) -> None:
    text = tmp_path / "calib.txt"
    text.write_text((ROOT / "README.md").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    model = gptq.run(lconvert.read(DEMO), gptq.Options("nf4dq", 64), Job(Calibration(str(text), 4, 64)))
    plan = targets.plan(model, "bitsandbytes", "out", original=model)
    assert {i.verdict.kind for i in plan.items()} == {"exact"}
    with pytest.raises(OptionError, match=r"order none: the scales of nf4dq:64 come of the whole matrix"):
        gptq.run(
            lconvert.read(DEMO), gptq.Options("nf4dq", 64, order="none"), Job(Calibration(str(text), 1, 8))
        )


@pytest.mark.parametrize("fill", [0.0, 0.5])
def test_matrices_without_a_spread(fill: float) -> None:
    w = np.full((4, 128), fill, np.float32)
    np.testing.assert_array_equal(dequantize(of(w)), w)


def test_placement() -> None:
    with pytest.raises(OptionError, match="expected a positive number"):
        rtn.Options("nf4dq", 0)
    with pytest.raises(OptionError, match="rows of 256 values do not divide into groups of 48"):
        rtn.run(lconvert.read(DEMO), rtn.Options("nf4dq", 48))
