"""Layer by layer: faults planted in files are named at their layer, and nothing is named in good artifacts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert.archs.common import binds
from lconvert.archs.llama import ARCH as LLAMA
from lconvert.errors import InputError
from lconvert.forward import hf_tensor
from lconvert.ir import Model, Rope, dense
from lconvert.validators import layers
from lconvert.validators.traits import differences
from tests import arch_cases, random_models
from tests.conftest import DEMO

gguf = pytest.importorskip("gguf")
pytest.importorskip("torch")
pytest.importorskip("transformers")

TYPES = ("F32", "Q8_0", "Q4_K_M", "Q2_K")


@pytest.fixture(scope="module")
def original() -> Model:
    return lconvert.read(DEMO)


@pytest.fixture(scope="module")
def ids(original: Model) -> list[int]:
    return [0, *(int(i) for i in np.random.default_rng(5).integers(3, original.arch.vocab - 8, 95))]


@pytest.fixture(scope="module")
def good(original: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    for ftype in TYPES:
        lconvert.convert(original, folder / f"{ftype}.gguf", ftype=ftype)
    return folder


# --- faults, planted in the file by the gguf package alone -----------------------------------------------


class Editor:
    """A GGUF file whose tensors and keys are changed in place."""

    def __init__(self, path: Path):
        self.reader = gguf.GGUFReader(path, "r+")
        self.tensors = {t.name: t for t in self.reader.tensors}

    def raw(self, name: str) -> Any:
        """Bytes as (rows, row bytes), writable."""
        data = self.tensors[name].data
        return data.view(np.uint8).reshape(data.shape[0], -1)

    def swap(self, a: str, b: str) -> None:
        x, y = self.raw(a), self.raw(b)
        held = x.copy()
        x[:], y[:] = y.copy(), held

    def scale(self, name: str, factor: float) -> None:
        tensor = self.tensors[name]
        if tensor.tensor_type.name == "F32":
            tensor.data[:] *= np.float32(factor)
            return
        assert tensor.tensor_type.name == "Q8_0"
        blocks = self.raw(name).reshape(-1, 34)
        scales = blocks[:, :2].copy().view(np.float16)
        blocks[:, :2] = (scales * np.float16(factor)).view(np.uint8)

    def key(self, name: str, value: float) -> None:
        self.reader.fields[name].parts[-1][:] = value


def _zero_k(e: Editor) -> None:
    e.raw("blk.1.attn_k.weight")[:16] = 0


def _permute_q(e: Editor) -> None:
    """One head's rotary order undone, as by a missing permutation."""
    raw = e.raw("blk.0.attn_q.weight")
    rows = raw.shape[0] // 4
    raw[:rows] = raw[:rows].reshape(rows // 2, 2, -1).swapaxes(0, 1).reshape(rows, -1).copy()


def _norm(e: Editor) -> None:
    e.tensors["blk.2.ffn_norm.weight"].data[:] += 1


FAULTS: dict[str, tuple[Callable[[Editor], None], Any, tuple[str, ...]]] = {
    "gate and up swapped": (
        lambda e: e.swap("blk.1.ffn_gate.weight", "blk.1.ffn_up.weight"),
        1,
        ("layers.1.mlp.gate", "layers.1.mlp.up"),
    ),
    "o scaled": (lambda e: e.scale("blk.2.attn_output.weight", 1.05), 2, ("layers.2.attn.o",)),
    "k rows zero": (_zero_k, 1, ("layers.1.attn.k",)),
    "q permuted": (_permute_q, 0, ("layers.0.attn.q",)),
    "norm plus one": (_norm, 2, ("layers.2.mlp_norm",)),
    "output norm": (lambda e: e.scale("output_norm.weight", 1.02), "head", ("norm",)),
    "k and v swapped": (
        lambda e: e.swap("blk.0.attn_k.weight", "blk.0.attn_v.weight"),
        0,
        ("layers.0.attn.k", "layers.0.attn.v"),
    ),
}


@pytest.mark.parametrize("ftype", ["F32", "Q8_0"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_at_its_layer_alone(
    good: Path, tmp_path: Path, original: Model, ids: list[int], fault: str, ftype: str
) -> None:
    path = Path(shutil.copy(good / f"{ftype}.gguf", tmp_path))
    plant, layer, tensors = FAULTS[fault]
    editor = Editor(path)
    plant(editor)
    del editor
    report = layers.compare(original, lconvert.read(path), ids)
    assert report.first_broken == layer
    assert report.broken == (layer,), "layers after the fault are not blamed for it"
    [found] = [x for x in report.layers if x.layer == layer]
    assert found.tensors == tensors
    assert found.own_error > found.explained_error
    assert not report.differences
    after = [x for x in report.layers[report.layers.index(found) :] if x.layer != "head"]
    assert all(x.relative_error > 1e-4 for x in after), "the cumulative error does stay"


def test_every_broken_layer_is_named(good: Path, tmp_path: Path, original: Model, ids: list[int]) -> None:
    path = Path(shutil.copy(good / "Q4_K_M.gguf", tmp_path))
    editor = Editor(path)
    editor.swap("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight")
    editor.swap("blk.2.ffn_gate.weight", "blk.2.ffn_up.weight")
    raw = editor.raw("token_embd.weight")
    raw[:] = np.roll(raw, 1, axis=0)
    del editor
    report = layers.compare(original, lconvert.read(path), ids)
    assert (
        report.broken == ("embed", 0, 2, "head") and report.first_broken == "embed"
    )  # tied: both use the matrix
    assert [x.tensors for x in report.layers] == [
        ("embed",),
        ("layers.0.mlp.gate", "layers.0.mlp.up"),
        (),
        ("layers.2.mlp.gate", "layers.2.mlp.up"),
        ("embed",),
    ]


@pytest.mark.parametrize("ftype", ["F32", "Q8_0"])
def test_a_wrong_trait_is_named_and_so_are_the_layers(
    good: Path, tmp_path: Path, original: Model, ids: list[int], ftype: str
) -> None:
    path = Path(shutil.copy(good / f"{ftype}.gguf", tmp_path))
    editor = Editor(path)
    editor.key("llama.rope.freq_base", 500000.0)
    del editor
    report = layers.compare(original, lconvert.read(path), ids)
    assert report.differences == ("rope.theta: 10000 in the original, 500000 in the artifact",)
    assert report.broken == (0, 1, 2)
    assert all(not x.tensors for x in report.layers), "the weights are right"


@pytest.mark.parametrize("ftype", TYPES)
def test_nothing_is_named_in_good_artifacts(good: Path, original: Model, ids: list[int], ftype: str) -> None:
    seen: list[int] = []
    report = layers.compare(original, lconvert.read(good / f"{ftype}.gguf"), ids, lambda: seen.append(1))
    assert report.first_broken is None and not report.differences and not report.notes
    assert [x.layer for x in report.layers] == ["embed", 0, 1, 2, "head"]
    assert len(seen) == 9
    own = [x.own_error for x in report.layers]
    if ftype == "F32":
        assert max(own) <= 1e-6 and max(x.relative_error for x in report.layers) <= 1e-6
    else:
        assert min(own) > 1e-3
        assert all(x.own_error <= 1.001 * x.explained_error for x in report.layers), (
            "ours is the plain encoder"
        )
    assert [x.input_relative_error for x in report.layers[1:]] == [
        x.relative_error for x in report.layers[:-1]
    ]


def test_importance_weights_are_no_fault(original: Model, ids: list[int], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    widths = {
        "attn_q": 0,
        "attn_k": 0,
        "attn_v": 0,
        "attn_output": 0,
        "ffn_gate": 0,
        "ffn_up": 0,
        "ffn_down": 1,
    }
    sizes = (original.arch.hidden, original.arch.default.mlp.hidden)
    matrix = {
        f"blk.{i}.{name}.weight": np.exp(rng.standard_normal(sizes[k])).astype(np.float32)
        for i in range(3)
        for name, k in widths.items()
    }
    matrix["token_embd.weight"] = np.ones(sizes[0], np.float32)
    for ftype in ("Q4_K_M", "IQ3_XXS", "IQ2_XXS"):
        lconvert.convert(original, tmp_path / "a.gguf", ftype=ftype, imatrix=matrix, force=True)
        report = layers.compare(original, lconvert.read(tmp_path / "a.gguf"), ids)
        assert report.first_broken is None, ftype


def test_half_floats_of_an_fp32_original_are_no_fault(tmp_path: Path) -> None:
    case = next(c for c in arch_cases.load() if c.model_type == "gemma3_text")
    folder = random_models.build(replace(case, dtype="float32"), tmp_path / "m")
    model = lconvert.read(folder)
    for ftype in ("F16", "BF16"):
        lconvert.convert(model, tmp_path / f"{ftype}.gguf", ftype=ftype)
        report = layers.compare(model, lconvert.read(tmp_path / f"{ftype}.gguf"), random_models.prompt(case))
        assert report.first_broken is None and not report.differences, ftype
        assert 1e-5 < max(x.own_error for x in report.layers) < 1e-2


@pytest.mark.parametrize(
    "model_type", ["gemma2", "gpt2", "mixtral", "phi3", "cohere", "falcon", "mistral", "deepseek_v3"]
)
def test_architectures(model_type: str, tmp_path: Path) -> None:
    """Of every kind: norms + 1, fused and transposed weights, experts, windows, parallel blocks, exact GELU."""
    cases = [c for c in arch_cases.load() if c.model_type == model_type]
    case = cases[-1] if model_type == "mistral" else cases[0]
    model = lconvert.read(random_models.build(case, tmp_path / "m"))
    lconvert.convert(model, tmp_path / "a.gguf", ftype="F32", allow_loss=case.losses)
    report = layers.compare(model, lconvert.read(tmp_path / "a.gguf"), random_models.prompt(case))
    assert report.first_broken is None and not report.differences
    assert max(x.own_error for x in report.layers) <= layers.FLOOR / 10
    if model_type == "mistral":  # llama.cpp ignores the window: compared as far as it does not matter
        assert report.tokens == model.arch.default.attention.window
        assert report.notes[0].startswith("sliding_window: ")
    if model_type == "falcon":
        assert report.notes[0].startswith("gelu_erf: ")


def test_the_reference_values_are_transformers_hidden_states(
    original: Model, good: Path, ids: list[int]
) -> None:
    """Cumulative errors against output_hidden_states of models that transformers has loaded whole."""
    import torch
    from transformers import AutoModelForCausalLM

    artifact = lconvert.read(good / "Q8_0.gguf")
    report = layers.compare(original, artifact, ids)
    states = []
    for weights in (None, artifact):
        model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32, local_files_only=True).eval()
        if weights is not None:
            bound = {b.hf: torch.from_numpy(hf_tensor(weights, b)) for b in binds(LLAMA.names, weights.arch)}
            model.load_state_dict(bound, strict=False)
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_hidden_states=True)
        states.append([h[0].double().numpy() for h in out.hidden_states])
    for i in range(original.arch.layers - 1):  # the last one of transformers is behind the final norm
        a, b = states[1][i + 1], states[0][i + 1]
        ratio = np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)
        assert report.layers[i + 1].relative_error == pytest.approx(np.sqrt(np.mean(ratio**2)), rel=1e-3)
        assert report.layers[i + 1].max_difference == pytest.approx(np.abs(a - b).max(), rel=1e-3)


def test_json_is_plain_and_finite(original: Model, ids: list[int]) -> None:
    entry = original.entries["layers.1.mlp.down"]
    broken = dense(np.full(entry.shape, np.nan, np.float32))
    artifact = original.with_entries({entry.name: replace(entry, data=broken)})
    report = layers.compare(original, artifact, ids)
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["first_broken"] == 1 and data["broken"][0] == 1
    assert data["layers"][2]["tensors"] == ["layers.1.mlp.down"]
    assert set(data["layers"][0]) >= {
        "layer",
        "relative_error",
        "cosine",
        "max_difference",
        "input_relative_error",
    }


def test_other_shapes_and_no_text_are_errors(original: Model, ids: list[int]) -> None:
    fewer = replace(original, entries={n: e for n, e in original.entries.items() if n != "layers.2.attn.q"})
    with pytest.raises(InputError, match=r"layers\.2\.attn\.q is absent here and 256x256 there"):
        layers.compare(original, fewer, ids)
    with pytest.raises(InputError, match="no tokens to compare layers on"):
        layers.compare(original, original, [])


# --- traits ----------------------------------------------------------------------------------------------


def _changed(model: Model, **attention: Any) -> Any:
    d = model.arch
    return replace(d, default=replace(d.default, attention=replace(d.default.attention, **attention)))


def test_traits_that_differ_are_named(original: Model) -> None:
    d = original.arch
    rope = d.default.attention.rope
    assert rope is not None
    scaled = replace(rope, scaling="linear", factor=2.0)
    for other, line in (
        (_changed(original, window=64), "attention.window: none in the original, 64 in the artifact"),
        (_changed(original, softcap=50.0), "attention.softcap: none in the original, 50 in the artifact"),
        (_changed(original, rope=None), "rope: rotary in the original, none in the artifact"),
        (_changed(original, rope=scaled), "rope.scaling: none in the original, linear in the artifact"),
        (replace(d, context=64), f"context: {d.context} in the original, 64 in the artifact"),
        (replace(d, logit_scale=0.5), "logit_scale: 1 in the original, 0.5 in the artifact"),
    ):
        assert differences(d, other) == [line]
    one = replace(d, overrides={1: replace(d.default, attention=replace(d.default.attention, window=9))})
    assert differences(d, one) == ["layer 1: attention.window: none in the original, 9 in the artifact"]
    two = replace(d, overrides={i: one.overrides[1] for i in (0, 1)})
    assert differences(d, two) == ["layers 0-1: attention.window: none in the original, 9 in the artifact"]


def test_what_is_the_same_function_is_no_difference(original: Model) -> None:
    d = original.arch
    rope = d.default.attention.rope
    assert rope is not None
    for other in (
        replace(d, family="mistral"),
        replace(d, norm_offset=1.0),
        replace(d, norm_eps=float(np.float32(d.norm_eps))),
        _changed(original, window=d.context),
        _changed(original, rope=replace(rope, factor=8.0, original_context=99)),
        replace(d, overrides={0: d.default}),
    ):
        assert differences(d, other) == []
    yarn = Rope(theta=1e4, dim=32, scaling="yarn", factor=4.0, original_context=64)
    formula = 0.1 * float(np.log(4.0)) + 1
    a, b = (_changed(original, rope=replace(yarn, attention_factor=x)) for x in (None, formula))
    assert differences(a, b) == []
