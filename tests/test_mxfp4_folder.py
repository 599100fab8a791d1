"""gpt-oss in its own layout as a target: bytes of the released storage, values of transformers, logits of vLLM."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import lconvert
from lconvert import kernels
from lconvert.cli import cli
from lconvert.converters import checkpoint, gguf, gguf_mixture, kinds, mxfp4_experts, targets
from lconvert.errors import InputError, OptionError, UnsupportedError
from lconvert.executor import execute
from lconvert.forward import Forward
from lconvert.ir import Model, QTensor, Tensor, dense
from lconvert.kernels.qtensor import values
from lconvert.passes import kv, rtn
from lconvert.plan import SIDE, Plan, refusals
from lconvert.validators.logits import log_softmax
from tests.conftest import DEMO, ROOT

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from safetensors.torch import load_file
from transformers import Mxfp4Config

from tests import arch_cases, case_models, mxfp4_models, random_models

CASE = {c.name: c for c in arch_cases.load()}["gpt_oss-experts"]
PYTHON = Path(os.environ.get("LCONVERT_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random gpt-oss as it is released, with a tokenizer."""
    vocab = json.loads((DEMO / "config.json").read_text())["vocab_size"]
    case = replace(CASE, config=CASE.config | {"vocab_size": vocab})
    out = mxfp4_models.build(case, tmp_path_factory.mktemp("mxfp4") / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, out / name)
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return lconvert.read(folder)


@pytest.fixture(scope="module")
def plain() -> Model:
    """A gpt-oss of which nothing is quantized."""
    return lconvert.read(case_models.folder("gpt_oss-experts"))


def written(model: Model, target: str, out: Path, **options: Any) -> Plan:
    plan = targets.plan(model, target, out.name, **options)
    assert refusals(plan) == []
    return execute(plan, out).plan


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def scale(q: QTensor) -> np.ndarray:
    assert isinstance(q.scale, QTensor)
    return q.scale.codes.load()


def assert_same_experts(a: Model, b: Model) -> None:
    """Equal codes and exponents, and nothing else quantized."""
    for name, entry in a.entries.items():
        x, y = entry.data, b.entries[name].data
        assert (
            isinstance(x, QTensor) == isinstance(y, QTensor) == (".experts." in name and "bias" not in name)
        )
        if isinstance(x, QTensor) and isinstance(y, QTensor):
            assert np.array_equal(x.codes.load(), y.codes.load()), name
            assert np.array_equal(scale(x), scale(y)), name
        assert np.array_equal(values(x), values(y)), name


# --- carrying --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["vllm", "tensorrt-llm", "mxfp4"])
def test_a_released_folder_is_written_byte_for_byte(
    target: str, folder: Path, model: Model, tmp_path: Path
) -> None:
    done = written(model, target, tmp_path / "m")
    assert {i.verdict.kind for i in done.items()} == {"exact"}
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert config(tmp_path / "m") == config(folder)
    held = {
        i.name.removeprefix("model.layers.0.mlp.experts."): i.held
        for i in done.items()
        if ".0.mlp.e" in i.name
    }
    assert held["gate_up_proj_blocks"] == "mxfp4, groups of 32" and held["gate_up_proj_scales"] == SIDE


def test_gguf_goes_there_and_back(folder: Path, model: Model, tmp_path: Path) -> None:
    """HF -> GGUF -> folder: the experts' bytes of the source. -> GGUF again: the same file."""
    types = gguf_mixture.Options(ftype="COPY")
    execute(gguf.plan(model, "a.gguf", gguf.Options(types)), tmp_path)
    carried = lconvert.read(tmp_path / "a.gguf")
    done = written(carried, "vllm", tmp_path / "m")
    packed = {i.name: i.verdict.kind for i in done.items() if i.held}
    assert len(packed) == 12 and set(packed.values()) == {"exact"}
    back = lconvert.read(tmp_path / "m")
    assert_same_experts(carried, back)
    ours, theirs = load_file_bits(tmp_path / "m"), load_file_bits(folder)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[n], theirs[n]) for n in theirs), "BF16 through F32 and back as well"
    execute(gguf.plan(back, "b.gguf", gguf.Options(types)), tmp_path)
    again = lconvert.read(tmp_path / "b.gguf")
    assert_same_experts(carried, again)


def load_file_bits(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor as integers: NumPy has no bfloat16."""
    found = load_file(folder / "model.safetensors")
    return {n: (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy() for n, t in found.items()}


def test_an_expert_is_produced_alone(model: Model) -> None:
    """Slabs are experts, and making one reads no row of another."""
    seen: list[tuple[str, int, int]] = []

    def watched(name: str, t: Tensor) -> Tensor:
        def read(start: int, stop: int) -> Any:
            seen.append((name, start, stop))
            return t.read(start, stop)

        return replace(t, read=read)

    new = {
        n: replace(e, data=replace(e.data, codes=watched(n, e.data.codes)))
        for n, e in model.entries.items()
        if isinstance(e.data, QTensor)
    }
    plan = targets.plan(model.with_entries(new), "vllm", "m")
    item = next(i for i in plan.items() if i.name == "model.layers.1.mlp.experts.gate_up_proj_blocks")
    assert not seen, "a plan reads no codes"
    assert (item.rows, item.row_bytes) == (4, 192 * 4 * 16)
    found = item.produce(2, 3).data
    assert {n for n, a, b in seen if b > a} == {f"layers.1.moe.experts.2.{p}" for p in ("gate", "up")}
    assert np.array_equal(found, item.produce(0, 4).data[2:3])


def test_the_plan_chooses_by_the_model(model: Model, plain: Model) -> None:
    """Plain experts, and every other family, go where they went."""
    assert mxfp4_experts.wanted(model) and not mxfp4_experts.wanted(plain)
    names = {i.name for i in targets.plan(plain, "vllm", "m").items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    other = targets.plan(kinds.rounded("MXFP4", 32), "vllm", "m")
    assert json.loads(other.files[0].head)["quantization_config"]["format"] == "mxfp4-pack-quantized"
    text = " ".join(refusals(targets.plan(kinds.rounded("MXFP4", 32), "mxfp4", "m")))
    assert "only gpt-oss has this layout, for its experts; --to vllm writes compressed-tensors" in text


# --- rounding --------------------------------------------------------------------------------------------


def test_the_flag_rounds_experts_alone(plain: Model, tmp_path: Path) -> None:
    """Codes are ggml's quantizer's; router, attention and head stay as they are; the error is measured."""
    changed = targets.recipe("mxfp4", targets.VLLM).apply(plain)
    done = written(changed, "vllm", tmp_path / "m", original=plain)
    back = lconvert.read(tmp_path / "m")
    assert_same_experts(changed, back)
    for name, entry in plain.entries.items():
        q = back.entries[name].data
        if isinstance(q, QTensor):
            x = values(entry.data)
            assert np.array_equal(
                values(q), kernels.dequantize("MXFP4", kernels.quantize("MXFP4", x), x.shape[1])
            )
        else:
            assert isinstance(entry.data, Tensor) and np.array_equal(entry.data.load(), q.load()), name
    item = next(i for i in done.items() if i.name == "model.layers.2.mlp.experts.gate_up_proj_blocks")
    assert item.verdict.kind == "quantized"
    role = "layers.2.moe.experts.{}.{}"
    roles = [role.format(e, p) for e in range(4) for p in ("gate", "up")]
    exact, now = (
        np.concatenate([values(m.entries[r].data)[::16] for r in roles]).astype(np.float64)
        for m in (plain, back)
    )
    want = float(np.sqrt(np.square(now - exact).sum() / np.square(exact).sum()))
    assert item.verdict.error == pytest.approx(want, rel=1e-6) and 0.05 < want < 0.2
    assert {i.verdict.kind for i in done.items() if i is not item and "_blocks" not in i.name} == {"exact"}


def test_the_command_line(tmp_path: Path) -> None:
    def run(*words: object) -> None:
        done = CliRunner().invoke(cli, [*map(str, words), "--no-validate", "--no-card"])
        assert done.exit_code == 0, done.output

    run("hf-to-vllm", case_models.folder("gpt_oss-experts"), "--mxfp4", "-o", tmp_path / "a")
    assert config(tmp_path / "a")["quantization_config"]["quant_method"] == "mxfp4"
    run("hf-to-trtllm", tmp_path / "a", "-o", tmp_path / "b")
    run("convert", tmp_path / "b", "--to", "mxfp4", "-o", tmp_path / "c")
    first, *others = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert all(first == other for other in others)


# --- what has no place -----------------------------------------------------------------------------------


def said(model: Model, target: str = "vllm", **options: Any) -> str:
    return " ".join(refusals(targets.plan(model, target, "m", **options)))


def test_quantized_attention_is_refused_or_stored_plain(model: Model, tmp_path: Path) -> None:
    """As in GGUF files whose attention is Q8_0."""
    mixed = rtn.run(model, rtn.Options(grid="Q8_0", targets=r".*\.attn\.[qkvo]|embed"))
    plan = targets.plan(mixed, "vllm", "m")
    assert len([i for i in plan.items() if i.verdict.kind == "refused"]) == 13
    assert "it is int8, groups of 32, and beside MXFP4 experts everything is plain" in refusals(plan)[0]
    done = written(mixed, "vllm", tmp_path / "m", allow_requantize=True)
    kind = {i.name: i.verdict for i in done.items()}
    assert kind["model.layers.0.mlp.experts.down_proj_blocks"].kind == "exact"
    rounded = kind["model.layers.0.self_attn.q_proj.weight"]
    assert rounded.kind == "rounded" and rounded.error is not None and 0 < rounded.error < 2**-8


def test_experts_of_another_grid(model: Model, tmp_path: Path) -> None:
    """A stack is packed as a whole: one expert that is not MXFP4 refuses it, or is rounded again."""
    one = "layers.1.moe.experts.2.up"
    q = rtn.quantized(dense(values(model.entries[one].data)), rtn.Options(grid="int4", group=32))
    mixed = model.with_entries({one: replace(model.entries[one], data=q)})
    assert f"{one} is int4, groups of 32, and gpt-oss's MXFP4 folders hold nothing else for experts" in said(
        mixed
    )
    done = written(mixed, "vllm", tmp_path / "m", allow_requantize=True)
    verdicts = {
        i.name.partition(".mlp.experts.")[2]: i.verdict
        for i in done.items()
        if i.name.startswith("model.layers.1")
    }
    assert (
        verdicts["gate_up_proj_blocks"].kind == "requantized" and verdicts["down_proj_blocks"].kind == "exact"
    )
    error = verdicts["gate_up_proj_blocks"].error
    assert error is not None and 0 < error < 0.1
    back = lconvert.read(tmp_path / "m")
    untouched = "layers.1.moe.experts.1.up"
    assert np.array_equal(values(model.entries[untouched].data), values(back.entries[untouched].data))


def test_plain_experts_beside_packed_ones(model: Model) -> None:
    one = "layers.0.moe.experts.3.down"
    mixed = model.with_entries(
        {one: replace(model.entries[one], data=dense(values(model.entries[one].data)))}
    )
    for options in ({}, {"allow_requantize": True}):
        assert f"{one} is plain" in said(mixed, **options) and "hf-to-vllm --mxfp4" in said(mixed, **options)


def test_runtimes_take_bfloat16_only(model: Model) -> None:
    with pytest.raises(OptionError, match="dtype F16: vllm serves MXFP4 experts in bfloat16 only"):
        targets.plan(model, "vllm", "m", dtype="F16")
    assert said(model, "mxfp4", dtype="F16") == ""
    half = replace(model, config=dict(model.config) | {"dtype": "float16"})
    plan = targets.plan(half, "vllm", "m")
    assert json.loads(plan.files[0].head)["dtype"] == "bfloat16"


def test_a_quantized_cache_is_refused(model: Model) -> None:
    with pytest.raises(UnsupportedError, match="has no words for a quantized KV cache"):
        targets.plan(kv.run(model, kv.Options()), "vllm", "m")


def test_a_scale_of_nan_is_not_written(model: Model, tmp_path: Path) -> None:
    """GGUF's blocks can hold one, which ggml reads as a number and transformers does not."""
    one = "layers.0.moe.experts.1.down"
    q = model.entries[one].data
    assert isinstance(q, QTensor) and isinstance(q.scale, QTensor)
    codes = scale(q).copy()
    codes[3, 1] = 255
    bad = replace(q, scale=replace(q.scale, codes=dense(codes, origin="here")))
    plan = targets.plan(model.with_entries({one: replace(model.entries[one], data=bad)}), "vllm", "m")
    with pytest.raises(InputError, match="here: row 3, block 1: its scale is NaN"):
        execute(plan, tmp_path / "m")
    assert not (tmp_path / "m" / "model.safetensors").exists()


# --- the list of plain modules ---------------------------------------------------------------------------


def listed(folder: Path, out: Path, names: Any) -> Path:
    shutil.copytree(folder, out)
    found = config(out)
    found["quantization_config"]["modules_to_not_convert"] = names
    (out / "config.json").write_text(json.dumps(found))
    return out


@pytest.mark.parametrize(
    "name",
    ["model.layers.*.mlp", "model.layers.0.mlp.experts", "experts", "model.layers.1", "model.layers.[0-1]."],
)
def test_packed_experts_cannot_be_on_the_list(name: str, folder: Path, tmp_path: Path) -> None:
    bad = listed(folder, tmp_path / "m", ["lm_head", name])
    with pytest.raises(
        InputError, match=r"modules_to_not_convert says .*, which leaves .*\.mlp\.experts plain, but"
    ):
        lconvert.read(bad)


def test_the_list_means_what_transformers_reads(folder: Path, tmp_path: Path) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    module = "model.layers.0.mlp.experts"
    patterns = ["model.layers.*.self_attn", "model.layers", "model.layer", "mlp", "xperts", "model.layers.0.ml", r"model\.layers\.\d",
                "model.layers.*.mlp.exp", "model.layers.0.", "", "lm_head|model"]  # fmt: skip
    for i, pattern in enumerate(patterns):
        out = listed(folder, tmp_path / str(i), [pattern])
        converted = all(should_convert_module(module.replace("0", str(k)), [pattern]) for k in range(3))
        if converted:
            lconvert.read(out)
        else:
            with pytest.raises(InputError, match=r"modules_to_not_convert (says|is)"):
                lconvert.read(out)


def test_a_damaged_list(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="modules_to_not_convert is 'lm_head', expected a list of names"):
        lconvert.read(listed(folder, tmp_path / "a", "lm_head"))
    with pytest.raises(InputError, match="no valid regular expression"):
        lconvert.read(listed(folder, tmp_path / "b", ["model.layers.("]))
    with pytest.raises(UnsupportedError, match="may take too long"):
        lconvert.read(listed(folder, tmp_path / "c", ["(m+)+$"]))


# --- consumers -------------------------------------------------------------------------------------------


def test_transformers_loads_the_same_numbers(model: Model, tmp_path: Path) -> None:
    written(model, "vllm", tmp_path / "m")
    stated = config(tmp_path / "m")["quantization_config"]
    assert Mxfp4Config.from_dict(stated).to_dict() == stated
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m",
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.bfloat16,
        local_files_only=True,
    )
    found = {n: p.detach().float().numpy() for n, p in loaded.named_parameters()}
    for i, layer in model.arch.each():
        fused, down = (found[f"model.layers.{i}.mlp.experts.{n}_proj"] for n in ("gate_up", "down"))
        for e in range(layer.mlp.experts):  # type: ignore[union-attr]
            for part, theirs in (("gate", fused[e, :, ::2]), ("up", fused[e, :, 1::2]), ("down", down[e])):
                ours = values(model.entries[f"layers.{i}.moe.experts.{e}.{part}"].data)
                assert np.array_equal(ours.view(np.int32), np.ascontiguousarray(theirs.T).view(np.int32))
    assert np.array_equal(found["model.embed_tokens.weight"], values(model.entries["embed"].data))


def test_the_proof_passes_and_has_a_second_reading(folder: Path, model: Model, tmp_path: Path) -> None:
    written(model, "vllm", tmp_path / "m")
    report = lconvert.validate(folder, tmp_path / "m", tiers=("structure", "tensors"), threads=1)
    assert report.passed, [c for c in report.checks if c.passed is False]
    found = {c.name: c.value for c in report.checks}
    decoded = found["independent dequantization, bit by bit"]
    assert "max |difference| 0 over 36 modules, by lconvert's second decoder" in decoded
    assert found["carried"].startswith("36 exact of 36")
    assert not any("second decoder" in n or "dequantization" in n for n in report.not_proven)


needs_vllm = pytest.mark.skipif(
    not PYTHON.exists(), reason="the vLLM environment is missing: LCONVERT_VLLM_PYTHON, .venv-vllm"
)


@needs_vllm
def test_vllm_knows_the_config(model: Model, tmp_path: Path) -> None:
    written(model, "vllm", tmp_path / "m")
    code = (
        "import json, sys; from types import SimpleNamespace as N; "
        "from vllm.model_executor.layers.quantization import get_quantization_config as get; "
        "c = json.load(open(sys.argv[1])); q = c['quantization_config']; "
        "m = get('gpt_oss_mxfp4').override_quantization_method(q, None, N(**c)); "
        "print('FOUND', m, *(type(get(n).from_config(q)).__name__ for n in (q['quant_method'], m)))"
    )
    done = subprocess.run(
        [PYTHON, "-E", "-P", "-c", code, tmp_path / "m" / "config.json"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert "FOUND gpt_oss_mxfp4 Mxfp4Config GptOssMxfp4Config" in done.stdout, done.stderr[-2000:]


@needs_vllm
def test_vllm_serves_it(folder: Path, model: Model, tmp_path: Path) -> None:
    """The engine with its MXFP4 kernels, which take bfloat16: as far from fp32 as it is with plain bfloat16 experts."""
    if not torch.cpu._is_amx_tile_supported():
        pytest.skip("this processor has no AMX, which vLLM's MXFP4 experts need on a CPU")
    from lconvert.validators.runtimes import open_runtime
    from lconvert.validators.runtimes.remote import workers

    written(model, "vllm", tmp_path / "mxfp4")
    execute(checkpoint.plan(model, checkpoint.Options(format="dense", dtype="BF16")), tmp_path / "plain")
    ids = random_models.prompt(CASE)
    exact = log_softmax(Forward(model).logits(ids))
    distance, info = {}, {}
    with workers():
        for name, dtype in (("mxfp4", "auto"), ("plain", "bfloat16")):
            runtime = open_runtime(
                "vllm", tmp_path / name, context=256, threads=1, python=PYTHON, options={"dtype": dtype}
            )
            found = log_softmax(runtime.logits(ids))
            info[name] = runtime.info()
            distance[name] = float(np.median((np.exp(exact) * (exact - found)).sum(-1)))
            runtime.close()
    assert info["mxfp4"]["quantization"] == "gpt_oss_mxfp4"
    assert distance["mxfp4"] < 2 * distance["plain"] < 0.01
