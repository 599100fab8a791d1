"""Plans of quantized folders, from every kind of source: what is written is read back equal, or nothing is written at all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert import executor
from lconvert.converters import checkpoint, lcir, matrix, targets
from lconvert.converters.kinds import matrices, plain, rounded, with_act_order, with_full_scales, with_globals
from lconvert.errors import InputError, OptionError, OutputError, UnsupportedError
from lconvert.executor import execute
from lconvert.ir import E4M3, ActSpec, Entry, KVSpec, Model, QTensor, Tensor, dense, int_grid
from lconvert.kernels.qtensor import effective, values
from lconvert.passes import kv, rtn
from lconvert.plan import SIDE, Plan, refusals
from tests import case_models
from tests.conftest import DEMO, ROOT
from tests.int_checkpoints import FIXTURES
from tests.test_carry_matrix import WRITTEN


def written(model: Model, target: str, folder: Path, **options: Any) -> tuple[Plan, Model]:
    """The plan after it was carried out, and the artifact read back."""
    out = folder / ("m.gguf" if target == "gguf" else "m")
    plan = targets.plan(model, target, out.name, **options)
    assert refusals(plan) == []
    done = execute(plan, folder if target == "gguf" else out).plan
    return done, lconvert.read(out)


def same_matrices(a: Model, b: Model) -> None:
    for name, e in a.entries.items():
        if isinstance(e.data, QTensor):
            assert isinstance(b.entries[name].data, QTensor), f"{name} was dequantized"
            assert np.array_equal(effective(e), effective(b.entries[name])), name


# --- architectures ---------------------------------------------------------------------------------------

#: Fused projections, transposed matrices, experts, a tied head, norms per head, latent attention, one matrix for all heads.
_CASES = ("phi3-plain", "gpt2-tied", "mixtral-experts", "gemma3_text-pattern", "qwen3-gqa", "llama-biases",
          "deepseek_v3-groups", "falcon-7b", "gpt_neox-parallel", "qwen3_moe-experts")  # fmt: skip


@pytest.mark.parametrize("preset", ["w4a16", "w4a16-asym", "fp8", "nvfp4a16", "gptq", "awq"])
@pytest.mark.parametrize("case", _CASES)
def test_every_architecture_is_read_back_equal(case: str, preset: str, tmp_path: Path) -> None:
    model = lconvert.read(case_models.folder(case))
    p = targets.VLLM[preset]
    group = 32 if preset.startswith(("w4", "gptq", "awq")) else None
    changed = targets.recipe(preset, targets.VLLM, group=group).apply(model)
    if case == "gpt2-tied" and preset == "fp8":
        plan = targets.plan(changed, "vllm", "m", original=model)
        assert "transposed" in " ".join(refusals(plan))
        return
    done, back = written(changed, targets.for_vllm(p.format), tmp_path, original=model)
    same_matrices(changed, back)
    assert back.arch == model.arch
    for i in done.items():
        if i.held and i.verdict.kind == "quantized":
            assert i.verdict.error is not None and 0.001 < i.verdict.error < 0.3, i.name
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for name, e in changed.entries.items():
        if isinstance(e.data, Tensor) and config["dtype"] == "bfloat16" and e.data.dtype == "BF16":
            assert np.array_equal(values(e.data), values(back.entries[name].data)), name


def test_the_error_is_that_of_the_source_and_not_of_the_pass(tmp_path: Path) -> None:
    """Against the model before rounding, over the measured rows."""
    model = plain()
    changed = rtn.run(model, rtn.Options(grid="int3", group=32))
    done, back = written(changed, "vllm", tmp_path, original=model)
    item = next(i for i in done.items() if i.name.endswith("down_proj.weight_packed"))
    name = "layers.0.mlp.down"
    exact, now = (values(m.entries[name].data)[::16].astype(np.float64) for m in (model, back))
    want = float(np.sqrt(np.square(now - exact).sum() / np.square(exact).sum()))
    assert item.verdict.error == pytest.approx(want, rel=1e-6) and want > 0.1


def test_stacked_experts_are_not_dequantized_unasked() -> None:
    """gpt-oss stores its experts in one tensor: no format here holds them quantized."""
    model = lconvert.read(case_models.folder("gpt_oss-experts"))
    changed = rtn.run(model, rtn.Options(grid="int4", group=32))
    plan = targets.plan(changed, "vllm", "m", original=model)
    text = " ".join(refusals(plan))
    assert "experts are stored in one tensor" in text and "--to dense" in text
    assert refusals(targets.plan(changed, "vllm", "m", allow_requantize=True)) == []
    only = rtn.run(model, rtn.Options(grid="int4", group=32, ignore=r".*\.experts\..*"))
    assert refusals(targets.plan(only, "vllm", "m", original=model)) == []


# --- one IR in between -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gptq_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ folder: act-order in down_proj, 8 bits in layer 1's attention, scales with all bits of F16."""
    folder = tmp_path_factory.mktemp("gptq")
    model = with_act_order(with_full_scales(rounded("int4", 32)), ".down")
    written(model, "gptq", folder)
    return folder / "m"


@pytest.mark.parametrize("target", [*WRITTEN, "dense"])
def test_through_the_ir_is_the_same_as_directly(target: str, gptq_source: Path, tmp_path: Path) -> None:
    direct = lconvert.read(gptq_source)
    execute(lcir.plan(direct, {}), tmp_path / "m.lcir")
    again = lconvert.read(tmp_path / "m.lcir")
    name = "m.gguf" if target == "gguf" else "m"
    plans = [targets.plan(m, target, name) for m in (direct, again)]
    assert refusals(plans[0]) == refusals(plans[1])
    assert [str(i.verdict) for i in plans[0].items()] == [str(i.verdict) for i in plans[1].items()]
    if refusals(plans[0]):
        return
    for side, plan in zip("ab", plans, strict=True):
        execute(plan, tmp_path / side if target == "gguf" else tmp_path / side / "m")
    for file in ("m.gguf",) if target == "gguf" else ("m/model.safetensors", "m/config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


# --- GGUF files ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["Q4_0", "Q8_0"])
def gguf_source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / f"demo-{request.param}.gguf"
    lconvert.convert(DEMO, path, ftype=request.param, pure=True)
    return path


@pytest.mark.parametrize("target", ["vllm", "compressed-tensors", "gptq", "gptq_v2", "awq", "gguf"])
def test_a_gguf_file_is_a_source(target: str, gguf_source: Path, tmp_path: Path) -> None:
    """Exactly its numbers, in the order of rows that Hugging Face's classes expect."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    model = lconvert.read(gguf_source)
    if target == "awq" and "Q8_0" in gguf_source.name:
        assert "4 bits" in " ".join(refusals(targets.plan(model, target, "m")))
        return
    done, back = written(model, target, tmp_path)
    kinds = {str(i.verdict.kind) for i in done.items() if i.held and "layers" in i.name}
    assert kinds <= {"exact"}
    reader = {t.name: t for t in gguf.GGUFReader(gguf_source).tensors}
    original = lconvert.read(DEMO)
    for i in range(3):
        for role, name in (("attn.q", "attn_q"), ("attn.k", "attn_k"), ("mlp.down", "ffn_down")):
            stored = reader[f"blk.{i}.{name}.weight"]
            theirs = gguf.quants.dequantize(stored.data, stored.tensor_type)
            if (
                name != "ffn_down"
            ):  # undo conversion/llama.py's permute: (heads, half, 2) back to (heads, 2, half)
                a = model.arch.layer(i).attention
                heads = a.heads if name == "attn_q" else a.kv_heads
                theirs = theirs.reshape(heads, a.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(theirs.shape)
            entry = f"layers.{i}.{role}"
            assert np.array_equal(effective(back.entries[entry]), theirs), entry
            w = values(original.entries[entry].data)
            assert np.linalg.norm(theirs - w) < 0.15 * np.linalg.norm(w), "rows are where they were"


# --- the model's dtype -----------------------------------------------------------------------------------


def _with_scales(change: Callable[[np.ndarray], np.ndarray], dtype: str = "F32") -> Model:
    """int4 in groups of 128 whose scales are changed."""
    model = rounded("int4", 128)
    new = {}
    for name, e in matrices(model).items():
        q = e.data
        assert isinstance(q, QTensor) and isinstance(q.scale, Tensor)
        x = change(q.scale.load().astype(np.float32))
        data = x.astype(np.float16) if dtype == "F16" else x.astype(np.float32)
        new[name] = replace(e, data=replace(q, scale=dense(data)))
    return model.with_entries(new)


def _dtype(plan: Plan) -> str:
    config = next(f for f in plan.files if f.name == "config.json")
    return str(json.loads(config.head)["dtype"])


def _kinds(plan: Plan) -> set[str]:
    return {str(i.verdict.kind) for i in plan.items() if i.held not in ("", SIDE)}


def test_scales_decide_the_dtype_of_the_model() -> None:
    full = with_full_scales(rounded("int4", 128))
    assert _dtype(targets.plan(full, "vllm", "m")) == "float16"
    assert _dtype(targets.plan(rounded("int4", 128), "vllm", "m")) == "bfloat16"
    wide = _with_scales(
        lambda s: np.exp2(np.rint(np.log2(np.maximum(s, 1e-9))) + 60)
    )  # powers of two beyond F16
    assert _dtype(targets.plan(wide, "vllm", "m")) == "bfloat16" and _kinds(
        targets.plan(wide, "vllm", "m")
    ) == {"exact"}


@pytest.mark.parametrize("target", ["vllm", "gptq", "awq", "compressed-tensors"])
def test_a_dtype_that_was_asked_for_rounds_and_says_so(target: str, tmp_path: Path) -> None:
    """F16 scales with all their bits, the model in bfloat16: the folder has the rounded ones, and the report their error."""
    full = with_full_scales(rounded("int4", 128))
    done, back = written(full, target, tmp_path, dtype="BF16")
    assert _dtype(done) == "bfloat16" and _kinds(done) == {"rounded"}
    errors = [
        i.verdict.error for i in done.items() if i.held and i.verdict.kind == "rounded" and i.verdict.error
    ]
    assert errors and all(1e-4 < e < 2.0**-8 for e in errors)
    for name, e in matrices(full).items():
        q = back.entries[name].data
        assert isinstance(q, QTensor) and isinstance(e.data, QTensor) and isinstance(q.scale, Tensor)
        assert q.scale.dtype == "BF16"
        w = values(e.data)
        assert 0 < np.abs(values(q) - w).max() <= 2.0**-8 * np.abs(w).max()


def test_scales_beyond_f16_are_refused_there() -> None:
    big = _with_scales(lambda s: s * np.float32(2.0**30))
    plan = targets.plan(big, "vllm", "m", dtype="F16")
    text = " ".join(refusals(plan))
    assert "is beyond F16" in text and "bfloat16" in text
    assert refusals(targets.plan(big, "vllm", "m")) == []


def test_subnormal_scales_are_exact_or_reported(tmp_path: Path) -> None:
    """Below 2^-14 F16 has fewer bits: what it holds is exact, what it does not is rounded with the error measured."""
    exact = _with_scales(lambda s: np.full_like(s, 2.0**-20 * 3), "F16")
    assert _kinds(targets.plan(exact, "gptq", "m", dtype="F16")) == {"exact"}
    tiny = _with_scales(lambda s: s * np.float32(2.0**-12 * 1.3))
    done, _ = written(tiny, "gptq", tmp_path, dtype="F16")
    assert _kinds(done) == {"rounded"}
    errors = [
        i.verdict.error for i in done.items() if i.verdict.kind == "rounded" and i.name.endswith("qweight")
    ]
    assert all(e is not None and e > 2.0**-12 for e in errors)


def test_formats_that_runtimes_do_not_cast_keep_their_scales() -> None:
    """FP8's scales are F32 parameters of their own in vLLM, whatever the model's dtype."""
    model = rounded("fp8", -1)
    for dtype in (None, "BF16", "F16"):
        assert _kinds(targets.plan(model, "vllm", "m", dtype=dtype)) == {"exact"}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"format": "gguf"}, "choose compressed-tensors"), ({"dtype": "F64"}, "choose BF16")],
)
def test_options_are_checked(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        checkpoint.Options(**options)
    with pytest.raises(OptionError, match="choose gguf"):
        targets.plan(plain(), "exl2", "m")


# --- fused modules ---------------------------------------------------------------------------------------


def test_parts_of_a_fused_matrix_that_differ(tmp_path: Path) -> None:
    """Phi-3's one qkv_proj out of q in 4 and v in 8 bits: widened to 8, exactly."""
    model = lconvert.read(case_models.folder("phi3-plain"))
    model = rtn.run(model, rtn.Options(grid="int8", group=64, targets=r".*\.(v|up)"))
    model = rtn.run(model, rtn.Options(grid="int4", group=32, targets=r".*\.(q|k|gate)"))
    done, back = written(model, "compressed-tensors", tmp_path)
    same_matrices(model, back)
    held = {i.name: i.held for i in done.items() if i.held}
    assert held["model.layers.0.self_attn.qkv_proj.weight_packed"] == "int8, groups of 32"
    assert _kinds(done) == {"widened"}


def test_a_plain_part_of_a_fused_matrix_is_refused_by_name() -> None:
    for case in ("phi3-plain", "qwen3-gqa"):
        model = lconvert.read(case_models.folder(case))
        model = rtn.run(model, rtn.Options(grid="int4", group=32, targets=r".*\.(q|v)"))
        text = " ".join(refusals(targets.plan(model, "vllm", "m")))
        assert "attn.k is not quantized" in text, text


@pytest.mark.parametrize("target", ["modelopt", "tensorrt-llm"])
def test_fp8_with_a_scale_per_tensor_and_untied_parts(target: str, tmp_path: Path) -> None:
    """ModelOpt's own FP8: q, k and v have a scale each, loaders take the largest. Never silently."""
    model = lconvert.read(FIXTURES / "peers" / "modelopt-fp8-kv")
    text = " ".join(refusals(targets.plan(model, target, "m")))
    assert "different scales per tensor" in text and "--allow-requantize" in text
    done, back = written(model, target, tmp_path, allow_requantize=True)
    kinds = {i.name: i.verdict for i in done.items() if i.name.endswith("_proj.weight")}
    assert {v.kind for v in kinds.values()} == {"exact", "requantized"}
    assert all(v.kind == "exact" or (v.error is not None and 1e-3 < v.error < 0.04) for v in kinds.values())
    for name, e in matrices(model).items():
        a, b = e.data, back.entries[name].data
        assert isinstance(a, QTensor) and isinstance(b, QTensor) and b.block == (-1, -1)
        assert np.abs(values(a) - values(b)).max() <= np.abs(values(a)).max() / 16
    scales = [back.entries[f"layers.0.attn.{r}"].data.scale.load()[0, 0] for r in "qkv"]  # type: ignore[union-attr]
    old = [model.entries[f"layers.0.attn.{r}"].data.scale.load()[0, 0] for r in "qkv"]  # type: ignore[union-attr]
    assert set(scales) == {max(old)} and len(set(old)) == 3


def test_act_order_of_other_groups_is_never_regrouped(tmp_path: Path) -> None:
    """GPTQ holds a g_idx per module, groups of 32 in q and of 64 in k: as they are, or refused."""
    model = with_act_order(with_full_scales(rounded("int4", 32)))
    other = with_act_order(with_full_scales(rounded("int4", 64)))
    name = "layers.0.attn.k"
    model = model.with_entries({name: other.entries[name]})
    plan = targets.plan(model, "gptq", "m")
    if not refusals(plan):
        execute(plan, tmp_path / "m")
        same_matrices(model, lconvert.read(tmp_path / "m"))
    else:
        assert "quantized differently" in refusals(plan)[0]


def test_a_divisor_is_carried_as_what_it_is(tmp_path: Path) -> None:
    """compressed-tensors stores the inverse of NVFP4's global scale: GGUF and ModelOpt hold the multiplier."""
    multiplied = with_globals(rounded("fp4"), tied=True)
    new = {}
    for n, e in matrices(multiplied).items():
        assert isinstance(e.data, QTensor) and isinstance(e.data.scale, QTensor)
        scale = replace(e.data.scale, scale=dense(np.float32([[23456.0]])), divisor=True)
        new[n] = replace(e, data=replace(e.data, scale=scale))
    model = multiplied.with_entries(new)
    for target, kinds in (
        ("compressed-tensors", {"exact"}),
        ("gguf", {"rounded"}),
        ("modelopt", {"rounded"}),
    ):
        done, back = written(model, target, tmp_path / target)
        found = {str(i.verdict.kind) for i in done.items() if any(s in new for s in i.sources)}
        assert found - {"exact"} == kinds - {"exact"}, target
        for n in new:
            a, b = effective(model.entries[n]), effective(back.entries[n])
            np.testing.assert_allclose(b, a, rtol=3e-7, err_msg=target)
    errors = [
        i.verdict.error for i in targets.plan(model, "gguf", "m.gguf").items() if i.verdict.kind == "rounded"
    ]
    assert errors and all(e is not None and 0 < e < 2.0**-23 for e in errors)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_block_scales_below_a_global_one_need_a_place_for_it(factor: float, tmp_path: Path) -> None:
    """MXFP4 has none: a QTensor with one is no MXFP4, whatever its structure."""
    model = rounded("MXFP4", 32)
    name = "layers.0.attn.o"
    q = model.entries[name].data
    assert isinstance(q, QTensor) and isinstance(q.scale, QTensor)
    scale = replace(q.scale, scale=dense(np.float32([[factor]])))
    model = model.with_entries({name: replace(model.entries[name], data=replace(q, scale=scale))})
    for target in ("gguf", "compressed-tensors"):
        _, back = written(model, target, tmp_path / target)
        assert np.array_equal(effective(model.entries[name]), effective(back.entries[name]))


@pytest.mark.parametrize("value", [8.0, 3.0])
def test_weights_over_a_scale_are_not_multiplied_by_it(value: float, tmp_path: Path) -> None:
    """BitNet's ternary weights divide by one scale."""
    codes = np.random.default_rng(0).integers(-1, 2, (256, 256)).astype(np.int8)
    q = QTensor(
        (256, 256), dense(codes), int_grid(2, True), (-1, -1), dense(np.float32([[value]])), divisor=True
    )
    model, name = plain(), "layers.0.attn.o"
    model = model.with_entries({name: replace(model.entries[name], data=q)})
    for target in WRITTEN:
        plan = targets.plan(model, target, "m.gguf" if target == "gguf" else "m")
        if refusals(plan):
            assert value == 3.0 or target not in ("gguf", "compressed-tensors", "gptq")
            continue
        out = tmp_path / target / ("m.gguf" if target == "gguf" else "m")
        execute(plan, out.parent if target == "gguf" else out)
        back = lconvert.read(out)
        assert np.array_equal(effective(back.entries[name]), codes / np.float32(value)), target


# --- the KV cache ----------------------------------------------------------------------------------------


def test_scales_of_the_cache_are_stored_for_every_layer(tmp_path: Path) -> None:
    for case, prefix in (
        ("qwen3-gqa", "model.layers"),
        ("phi3-plain", "model.layers"),
        ("falcon-7b", "transformer.h"),
    ):
        model = lconvert.read(case_models.folder(case))
        layers = model.arch.layers
        side = [
            ActSpec(E4M3, "tensor", False, scale=dense(np.arange(1, layers + 1, dtype=np.float32) / 8 / k))
            for k in (1, 3)
        ]
        changed = replace(rtn.run(model, rtn.Options(grid="fp8", group=-1)), kv=KVSpec(side[0], side[1]))
        done, back = written(changed, "vllm", tmp_path / case)
        names = [i.name for i in done.items() if i.name.endswith(("k_scale", "v_scale"))]
        assert len(names) == 2 * layers and all(n.startswith(prefix) for n in names)
        assert back.kv is not None
        for a, b in ((side[0], back.kv.k), (side[1], back.kv.v)):
            assert (
                a.scale is not None and b.scale is not None and np.array_equal(a.scale.load(), b.scale.load())
            )


def test_a_cache_alone_is_a_reason_for_a_config(tmp_path: Path) -> None:
    done, back = written(kv.run(plain(), kv.Options()), "vllm", tmp_path)
    assert back.kv is not None and all(isinstance(e.data, Tensor) for e in back.entries.values())
    assert json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert {i.verdict.kind for i in done.items()} == {"exact"}


@pytest.mark.parametrize("target", ["gptq", "awq"])
def test_a_cache_where_the_format_has_no_words(target: str) -> None:
    model = kv.run(rounded("int4" if target == "gptq" else "uint4", 128), kv.Options())
    with pytest.raises(UnsupportedError, match="no words for a quantized KV cache"):
        targets.plan(model, target, "m")
    found = matrix.verdicts(model, target)
    assert [v.kind for v in found] == ["refused"] and "KV cache" in found[0].reason


def test_a_plain_model_becomes_a_plain_folder(tmp_path: Path) -> None:
    for target in ("vllm", "tensorrt-llm", "gptq", "dense"):
        written(plain(), target, tmp_path / target)
        assert "quantization_config" not in json.loads((tmp_path / target / "m" / "config.json").read_text())
        assert not list((tmp_path / target / "m").glob("*quant*"))


# --- the command line ------------------------------------------------------------------------------------


def _lconvert(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = "from lconvert.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments], check=False, cwd=cwd, capture_output=True, text=True, timeout=120,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT / "src"), "LC_ALL": "C.UTF-8"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("target", "source", "words"),
    [
        ("awq", "int8", ("4 bits", "--allow-requantize", "--to dense")),
        ("vllm", "act-order", ("g_idx", "--allow-requantize", "--to dense")),
        ("fp8", "int8", ("E4M3", "--allow-requantize")),
        ("tensorrt-llm", "uint4", ("symmetric", "--allow-requantize")),
    ],
)
def test_a_refusal_is_one_line_with_code_2_and_leaves_nothing(
    target: str, source: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    made = {"int8": lambda: rounded("int8", -1), "uint4": lambda: with_full_scales(rounded("uint4", 128)),
            "act-order": lambda: with_act_order(with_full_scales(rounded("int4", 32)))}[source]()  # fmt: skip
    written(made, "gptq_v2", tmp_path)
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    done = _lconvert("convert", "m", "--to", target, "-o", "out", "--no-validate", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("lconvert: error: "), done.stderr
    assert all(w in lines[0] for w in words), lines[0]
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    dry = _lconvert("convert", "m", "--to", target, "-o", "out", "--dry-run", cwd=tmp_path)
    assert "refused" in dry.stdout + dry.stderr and not (tmp_path / "out").exists()


def test_damage_that_shows_while_writing_leaves_nothing(tmp_path: Path) -> None:
    """Zero points are looked at when a plan is made, codes and scales when they are written."""
    model = with_full_scales(rounded("int4", 128))
    name = "layers.0.mlp.down"
    q = model.entries[name].data
    assert isinstance(q, QTensor) and isinstance(q.scale, Tensor)
    x = q.scale.load().copy()
    x[200, 1] = np.nan
    model = model.with_entries({name: replace(model.entries[name], data=replace(q, scale=dense(x)))})
    written(model, "ir", tmp_path)
    for target in ("compressed-tensors", "gptq", "gguf"):
        done = _lconvert(
            "convert", "m", "--to", target, "-o", f"out-{target}.gguf", "--no-validate", cwd=tmp_path
        )
        left = [p for p in tmp_path.iterdir() if p.name.startswith("out")]
        assert done.returncode == 2 and not left, (target, done.stderr, left)
        assert "Traceback" not in done.stderr


def test_convert_and_its_launch_line(tmp_path: Path) -> None:
    written(with_full_scales(rounded("int4", 128)), "gptq", tmp_path)
    for target, line in (("vllm", "vllm serve out-vllm"), ("tensorrt-llm", "trtllm-serve out-tensorrt-llm")):
        done = _lconvert("convert", "m", "--to", target, "-o", f"out-{target}", "--no-validate", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert line in done.stdout
        files = {p.name for p in (tmp_path / f"out-{target}").iterdir()}
        assert {"config.json", "model.safetensors", "manifest.json"} <= files or any(
            "manifest" in f for f in files
        )


@pytest.mark.parametrize(
    ("preset", "given", "message"),
    [
        ("nvfp4", {}, "add --calibrate"),
        ("fp8-static", {}, "add --calibrate"),
        ("fp8", {"group": 64}, "--group does not apply"),
        ("fp8-block", {"group": 64}, "--group does not apply"),
        ("mxfp4", {"group": 64}, "--group does not apply"),
        ("dense", {}, ""),
        ("w4a16", {"group": 64}, ""),
    ],
)
def test_presets(preset: str, given: dict[str, Any], message: str) -> None:
    if message:
        with pytest.raises(OptionError, match=message):
            targets.recipe(preset, targets.VLLM, **given)
    else:
        steps = targets.recipe(preset, targets.VLLM, **given).steps
        assert len(steps) == len(targets.VLLM[preset].steps)


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    written(plain(), "dense", tmp_path)
    with pytest.raises(OutputError):
        execute(targets.plan(rounded("int4", 128), "vllm", "m"), tmp_path / "m")


def test_plain_matrices_are_copied_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slab at a time, with the bits of the source and never more of them in memory; norms and the like in one piece."""
    model = plain()
    data = model.entries["embed"].data
    assert isinstance(data, Tensor)
    asked: list[int] = []

    def read(start: int, stop: int) -> Any:
        asked.append(stop - start)
        return data.read(start, stop)

    counted = model.with_entries({"embed": Entry("embed", replace(data, read=read))})
    monkeypatch.setattr(executor, "SLAB_BYTES", 10 * 2 * data.shape[1])
    for target in ("dense", "vllm"):
        asked.clear()
        _, back = written(counted, target, tmp_path / target)
        assert asked == [10, 10, 10, 10, 10, 10, 4]
        same = back.entries["embed"].data
        assert isinstance(same, Tensor) and np.array_equal(same.load(), data.load())
    asked.clear()
    written(counted, "dense", tmp_path / "f16", dtype="F16")
    assert asked == [64], "what is rounded is made in one piece"


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    bits = np.zeros((64, 256), np.uint16)
    bits[37, 5] = 0x7FC0
    model = plain().with_entries({"embed": Entry("embed", dense(bits, "BF16", "here: tensor embed"))})
    message = r"here: tensor embed: value nan at row 37, column 5 is not finite; it cannot be stored as BF16 \(rows counted from 0\)"
    with pytest.raises(InputError, match=message):
        written(model, "dense", tmp_path)
