"""The genai dialect: the same function in the operators of onnxruntime-genai, every integer kept, traits that it lacks named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx is not installed")

import lconvert
from lconvert.converters import onnx, onnx_presets, onnx_source
from lconvert.converters.kinds import rounded
from lconvert.errors import UnsupportedError
from lconvert.executor import execute
from lconvert.formats import onnx_reader
from lconvert.ir import QTensor
from lconvert.kernels.qtensor import effective, values
from lconvert.plan import refusals
from tests import case_models
from tests.conftest import DEMO
from tests.quantized_models import SOURCES

#: Sources whose integers MatMulNBits has room for.
PACKED = (
    "int4 g32 (GPTQ)",
    "int4 g32, act-order",
    "uint4 g32 (AWQ)",
    "int2 g32",
    "int8 per row",
    "Q4_0",
    "Q8_0",
)
GENAI = onnx.Options("genai")


def made(flag: str, folder: Path, options: onnx.Options = GENAI) -> Path:
    model = lconvert.read(DEMO)
    execute(onnx.plan(onnx_presets.recipe(flag, "genai").apply(model) if flag else model, options), folder)
    return folder


@pytest.mark.parametrize("flag", ["", "int4", "int8"])
def test_it_is_the_source(flag: str, tmp_path: Path) -> None:
    for name in ("onnxruntime", "torch", "transformers", "tokenizers"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    options = {"context": 96, "max_windows": 2, "greedy": (2, 8), "cache": tmp_path / "logits"}
    report = lconvert.validate(DEMO, made(flag, tmp_path / "m"), threads=1, **options)  # type: ignore[arg-type]
    assert not [c for c in report.checks if c.passed is False]
    assert any(c.name.startswith("padding on the right") and c.passed for c in report.checks)
    assert any("onnxruntime-genai's own loop" in line for line in report.not_proven)
    if flag:  # at fp32 activations, whatever level the nodes have
        assert report.stats("fidelity")["kld"]["mean"] < 1e-11
        assert report.stats("served")["kld"]["mean"] != report.stats("cost")["kld"]["mean"]


@pytest.mark.parametrize("flag", ["", "int4"])
def test_onnxruntime_genai_says_the_same(flag: str, tmp_path: Path) -> None:
    """Greedy text in its own loop, with the buffer that past and present share, against transformers on the same numbers."""
    genai = pytest.importorskip(
        "onnxruntime_genai", reason="onnxruntime-genai is not installed (extra genai)"
    )
    pytest.importorskip("transformers", reason="transformers is not installed")
    from lconvert.validators.runtimes import open_runtime

    folder = made(flag, tmp_path / "m")
    prompt, count = [2042, 100, 200, 300, 401], 20
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens([prompt])
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(i) for i in generator.get_sequence(0)][len(prompt) :]
    if flag:  # activations of 8 bits there: the same graph at the same level
        runtime = open_runtime("onnxruntime", folder / "model.onnx", purpose="speed")
    else:
        runtime = open_runtime("transformers", DEMO)
    assert found == list(runtime.generate(prompt, count).ids)[: len(found)] and len(found) > 8
    runtime.close()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_batches_in_its_loop(shared: bool, last: bool, tmp_path: Path) -> None:
    """Prompts of different lengths, filled on the right as onnxruntime-genai does, say what each says alone; with logits of the last
    tokens alone, which are not in the last column; and with keys and values in a buffer of their own or a shared one."""
    genai = pytest.importorskip(
        "onnxruntime_genai", reason="onnxruntime-genai is not installed (extra genai)"
    )
    folder = made("", tmp_path / "m", onnx.Options("genai", last_logit=last))
    stated = json.loads((folder / "genai_config.json").read_text())
    stated["search"]["past_present_share_buffer"] = shared
    (folder / "genai_config.json").write_text(json.dumps(stated))
    model = genai.Model(str(folder))

    def text(prompts: list[list[int]], steps: int = 10) -> list[list[int]]:
        width = max(map(len, prompts))
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=width + steps, batch_size=len(prompts), do_sample=False)
        generator = genai.Generator(model, params)
        pad = stated["model"]["pad_token_id"]
        generator.append_tokens(np.array([p + [pad] * (width - len(p)) for p in prompts], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [[int(i) for i in generator.get_sequence(k)][width:] for k in range(len(prompts))]

    long, short = [2042, 100, 200, 300, 401], [2042, 7, 9]
    alone = [text([p])[0] for p in (long, short)]
    assert text([long, short]) == alone and len(alone[1]) > 5


@pytest.mark.parametrize("kind", [k for k in SOURCES if "gpt-oss" not in k])
def test_every_kind_is_read_back(kind: str, tmp_path: Path) -> None:
    model = SOURCES[kind]()
    try:
        plan = onnx.plan(model, GENAI)
    except UnsupportedError as e:
        assert "MatMulNBits multiplies floats" in str(e)
        return
    assert not refusals(plan)
    execute(plan, tmp_path / "m")
    found = onnx_source.read(onnx_reader.read(tmp_path / "m" / "model.onnx"))
    for role, entry in found.model.entries.items():
        assert np.array_equal(values(entry.data), effective(model.entries[role])), role
    kinds = {i.verdict.kind for i in plan.items()}
    assert kinds <= {"exact", "widened"}
    if kind in PACKED:
        assert isinstance(found.model.entries["layers.0.attn.q"].data, QTensor)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("gemma2-alternating", "norm offset"),
        ("gpt2-tied", "norm layer"),
        ("qwen3-gqa", r"norms of queries and keys \(head\) in layer 0"),
        ("mistral-window", "a window of"),
        ("mixtral-experts", "routed experts in layer 0"),
        ("phi3-long", "rotary scaling longrope"),
        ("olmo2-gqa", "norms of queries and keys"),
        ("granite-multipliers", "scale of"),
        ("deepseek_v2-lite", "latent attention"),
    ],
)
def test_a_trait_that_it_lacks_is_named(case: str, words: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"{words}.*--dialect ort has all of them"):
        onnx.plan(lconvert.read(case_models.folder(case)), GENAI)
    with pytest.raises(UnsupportedError, match="--prefill-only is for --dialect ort"):
        onnx.plan(lconvert.read(DEMO), onnx.Options("genai", prefill_only=True))


@pytest.mark.parametrize("case", ["llama-biases", "llama-llama3", "llama-yarn", "qwen2-gqa", "smollm3-yarn"])
def test_relatives_of_llama(case: str, tmp_path: Path) -> None:
    for name in ("onnxruntime", "torch", "transformers"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    source = case_models.folder(case)
    model = lconvert.read(source)
    try:
        plan = onnx.plan(model, GENAI)
    except UnsupportedError as e:
        assert "no rotary embedding" in str(e)
        return
    execute(plan, tmp_path / "m")
    options = {"context": 96, "max_windows": 2, "greedy": (1, 8), "cache": tmp_path / "logits"}
    tiers = ("structure", "tensors", "logits")
    report = lconvert.validate(source, tmp_path / "m", tiers=tiers, threads=1, **options)  # type: ignore[arg-type]
    assert not [c for c in report.checks if c.passed is False]


def test_its_configuration(tmp_path: Path) -> None:
    stated = json.loads((made("", tmp_path / "m") / "genai_config.json").read_text())
    d = lconvert.read(DEMO).arch
    inner = stated["model"]["decoder"]
    assert (inner["num_hidden_layers"], inner["head_size"], inner["num_key_value_heads"]) == (d.layers, 32, 4)
    assert stated["model"]["vocab_size"] == d.vocab and stated["model"]["context_length"] == d.context
    assert (
        stated["search"]["max_length"] == d.context and stated["search"]["past_present_share_buffer"] is True
    )


@pytest.mark.parametrize(("dtype", "kind"), [("F32", "widened"), ("F16", "rounded")])
def test_blocks_that_it_lacks_are_values_and_say_what_that_costs(dtype: str, kind: str) -> None:
    """Groups of 8 are no blocks of MatMulNBits: half precision rounds the values, and the verdict must not call that widened."""
    plan = onnx.plan(rounded("int4", 8), onnx.Options(dialect="genai", dtype=dtype))
    found = {i.verdict.kind for i in plan.items() if i.held == "plain"}
    reasons = {i.verdict.reason for i in plan.items() if i.held == "plain"}
    assert found == {kind} and reasons == {f"as {dtype} values: blocks that MatMulNBits lacks"}
