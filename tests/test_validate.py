"""The proof itself: it passes on good artifacts, notices bad ones, and says what it did not prove."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lconvert
from lconvert import kernels
from lconvert.errors import InputError, MissingPackageError, OptionError
from lconvert.formats import gguf
from lconvert.ir import Tensor, dense
from lconvert.validators import gates, parity
from lconvert.validators import report as report_module
from lconvert.validators.logits import compare, log_softmax, windows
from tests.conftest import DEMO

needs_runtimes = [
    pytest.importorskip(name, reason=f"{name} is not installed")
    for name in ("torch", "transformers", "llama_cpp", "gguf")
]


def test_compiled_kernels_are_loaded() -> None:
    assert kernels.native_available(), "the compiled kernels are missing: NumPy would do the work"
    assert kernels.isa() != "reference"


def test_q4_k_m_holds_q4_k_and_q6_k(artifacts: Path) -> None:
    types = {t.type for t in gguf.read(artifacts / "Q4_K_M.gguf").tensors.values()}
    assert types == {"F32", "Q4_K", "Q6_K"}


@pytest.mark.parametrize(
    ("ftype", "lowest", "highest"), [("F32", 0, 1e-10), ("Q8_0", 1e-5, 1e-3), ("Q4_K_M", 1e-3, 3e-2)]
)
def test_good_artifacts_pass(artifacts: Path, ftype: str, lowest: float, highest: float) -> None:
    report = lconvert.validate(DEMO, artifacts / f"{ftype}.gguf", max_windows=2)
    assert report.passed and report.exit_code == 0, [c for c in report.checks if c.passed is False]
    assert lowest <= report.stats("cost")["kld"]["mean"] <= highest
    assert {c.tier for c in report.checks} == set(parity.TIERS)
    assert not report.not_proven
    tensors = report.details["tensors"]
    assert tensors["max_difference"] == 0
    assert all(r["stock_blocks"] in (None, 1.0) and not r["damaged"] for r in tensors["table"])
    data = json.loads(json.dumps(report.to_json()))
    assert data["schema"] == report_module.SCHEMA and data["passed"] is True
    if ftype != "F32":
        assert report.stats("graph")["kld"]["mean"] <= 1e-10
        assert report.stats("fidelity")["kld"]["mean"] < report.stats("cost")["kld"]["mean"]


def test_validation_does_not_use_our_reading_for_the_reference(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Break every weight that lconvert reads from the folder: the logits against transformers do not change."""
    from lconvert.validators.runtimes import hf

    used = []
    real = hf.Transformers.__init__

    def watched(self: hf.Transformers, folder: str | Path, **kw: object) -> None:
        used.append(str(folder))
        real(self, folder, **kw)  # type: ignore[arg-type]

    monkeypatch.setattr(hf.Transformers, "__init__", watched)
    report = lconvert.validate(DEMO, artifacts / "F32.gguf", max_windows=1, tiers=["logits"], cache=False)
    assert used == [str(DEMO)] and report.passed


def test_a_folder_that_transformers_refuses_is_an_error_and_not_read_by_us(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def refuse(*args: object, **options: object) -> None:
        raise ValueError("not this one")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(InputError, match=r"transformers does not run it \(ValueError: not this one\)"):
        lconvert.validate(DEMO, artifacts / "F32.gguf", max_windows=1, tiers=["logits"], cache=False)


def test_a_reference_that_lconvert_read_itself_is_named(artifacts: Path) -> None:
    report = lconvert.validate(
        artifacts / "F32.gguf", artifacts / "Q8_0.gguf", max_windows=1, tiers=["logits"]
    )
    assert report.passed
    assert any("lconvert read its weights itself" in line for line in report.notes)


def _broken(tmp_path: Path, change: str) -> Path:
    """An F32 artifact of the demo model with one thing wrong."""
    model = lconvert.read(DEMO)
    entries = dict(model.entries)

    def swap(a: str, b: str) -> None:
        x, y = entries[a], entries[b]
        entries[a], entries[b] = replace(x, data=y.data), replace(y, data=x.data)

    if change == "gate and up swapped":
        swap("layers.1.mlp.gate", "layers.1.mlp.up")
    elif change == "k and v swapped":
        swap("layers.0.attn.k", "layers.0.attn.v")
    elif change == "one norm weight off":
        data = entries["layers.2.mlp_norm"].data
        assert isinstance(data, Tensor)
        x = (data.load().astype(np.uint32) << 16).view(np.float32).copy()
        x[7] *= 1.5
        entries["layers.2.mlp_norm"] = replace(entries["layers.2.mlp_norm"], data=dense(x))
    elif change == "wrong rope base":
        layer = model.arch.default
        assert layer.attention.rope is not None
        rope = replace(layer.attention.rope, theta=20000.0)
        layer = replace(layer, attention=replace(layer.attention, rope=rope))
        model = replace(model, arch=replace(model.arch, default=layer))
    elif change == "wrong epsilon":
        model = replace(model, arch=replace(model.arch, norm_eps=1e-3))
    elif change == "tokens permuted":
        assert model.tokenizer is not None
        data = json.loads(json.dumps(model.tokenizer.json))
        data["model"]["merges"] = data["model"]["merges"][:-200]
        model = replace(model, tokenizer=replace(model.tokenizer, json=data))
    model = replace(model, entries=entries)
    return lconvert.convert(model, tmp_path / "broken.gguf", ftype="F32").paths[0]


@pytest.mark.parametrize(
    ("change", "tiers"),
    [
        ("gate and up swapped", {"tensors", "logits"}),
        ("k and v swapped", {"tensors", "logits"}),
        ("one norm weight off", {"tensors", "logits"}),
        ("wrong rope base", {"structure", "logits"}),
        ("wrong epsilon", {"structure", "logits"}),
        ("tokens permuted", {"tokens"}),
    ],
)
def test_bad_artifacts_fail(change: str, tiers: set[str], tmp_path: Path) -> None:
    report = lconvert.validate(DEMO, _broken(tmp_path, change), max_windows=1)
    assert {c.tier for c in report.checks if c.passed is False} == tiers
    assert not report.passed and report.exit_code == 1


def test_damaged_blocks_fail(artifacts: Path, tmp_path: Path) -> None:
    """One flipped bit in a stored scale of the quantized file."""
    path = tmp_path / "m.gguf"
    shutil.copy(artifacts / "Q8_0.gguf", path)
    info = gguf.read(path).tensors["blk.0.ffn_down.weight"]
    with open(path, "r+b") as f:
        f.seek(info.offset + 1)
        byte = f.read(1)[0]
        f.seek(info.offset + 1)
        f.write(bytes([byte ^ 0x10]))
    report = lconvert.validate(DEMO, path, max_windows=1)
    assert not report.passed


def test_a_missing_runtime_is_said_plainly(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    report = lconvert.validate(DEMO, artifacts / "Q8_0.gguf")
    assert report.passed and report.exit_code == 0
    assert len(report.not_proven) == 2
    assert all(
        "llama.cpp is not installed, so nothing was proven in it: pip install" in x for x in report.not_proven
    )
    report = lconvert.validate(DEMO, artifacts / "Q8_0.gguf", require=["llamacpp"])
    assert report.exit_code == 3


def test_a_missing_gguf_package_is_an_error_with_advice(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'lconvert\[llamacpp\]'"):
        lconvert.validate(DEMO, artifacts / "Q8_0.gguf", tiers=["tensors"])


def test_wrong_arguments(artifacts: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="unknown tier speed; tiers: structure, tensors, tokens, logits"):
        lconvert.validate(DEMO, artifacts / "F32.gguf", tiers=["speed"])
    with pytest.raises(OptionError, match="not an artifact that a runtime loads"):
        lconvert.validate(DEMO, tmp_path)
    with pytest.raises(OptionError, match="unknown runtime tensorflow; runtimes: llama"):
        lconvert.validate(DEMO, artifacts / "F32.gguf", runtimes=["tensorflow"])
    with pytest.raises(OptionError, match="vllm loads hf artifacts, not gguf"):
        lconvert.validate(DEMO, artifacts / "F32.gguf", runtimes=["vllm"])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"latin\.txt: cannot be read as UTF-8 text"):
        lconvert.validate(DEMO, artifacts / "F32.gguf", text=tmp_path / "latin.txt")
    (tmp_path / "g.yaml").write_text("cost: []")
    with pytest.raises(OptionError, match=r"g\.yaml: not a gates file"):
        lconvert.validate(DEMO, artifacts / "F32.gguf", gates=tmp_path / "g.yaml")


def test_stricter_gates_fail(artifacts: Path, tmp_path: Path) -> None:
    own = dict(gates.shipped())
    own["cost"] = [{"bits": 9.0, "kld_mean": 1e-9}]
    own["cost_follows_stock"] = 0
    (tmp_path / "g.yaml").write_text(json.dumps(own))
    report = lconvert.validate(
        DEMO, artifacts / "Q8_0.gguf", max_windows=1, gates=tmp_path / "g.yaml", tiers=["logits"]
    )
    assert report.exit_code == 1


# --- the statistics --------------------------------------------------------------------------------------


def test_kl_divergence_is_torchs() -> None:
    import torch

    rng = np.random.default_rng(0)
    p, q = (rng.standard_normal((50, 300)).astype(np.float32) * 3 for _ in range(2))
    ids = [int(i) for i in rng.integers(0, 300, 50)]
    stats = compare({"p": lambda x: p, "q": lambda x: q}, [("p", "q")], [ids])["p", "q"]
    log_p, log_q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (p, q))
    kld = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    assert np.isclose(stats.kld_mean, kld.mean().item(), rtol=1e-12)
    assert np.isclose(stats.kld_max, kld.max().item(), rtol=1e-12)
    assert np.isclose(stats.data["kld"]["median"], np.median(kld.numpy()), rtol=1e-12)
    assert stats.same_top1 == (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    nll = torch.nn.functional.nll_loss(log_p[:-1], torch.tensor(ids[1:]))
    assert np.isclose(stats.data["ppl"]["reference"], nll.exp().item(), rtol=1e-12)


def test_equal_models_are_at_distance_zero() -> None:
    x = np.random.default_rng(1).standard_normal((9, 40)).astype(np.float32)
    stats = compare({"a": lambda ids: x, "b": lambda ids: x}, [("a", "b")], [list(range(9))])["a", "b"]
    assert stats.kld_max == 0 and stats.same_top1 == 1 and stats.max_logprob_difference == 0
    assert stats.data["ppl"]["ratio"] == 1 and stats.data["max_logit_difference"] == 0
    assert stats.data["flips"] == 0 and stats.data["p_correct"]["rms_delta"] == 0


def test_log_softmax_of_huge_logits_is_finite() -> None:
    x = np.array([[1e4, -1e4, 9.9e3]], np.float32)
    assert np.isfinite(log_softmax(x)).all() and np.isclose(np.exp(log_softmax(x)).sum(), 1)


def test_windows_start_with_bos_and_drop_the_tail() -> None:
    assert windows(range(10), 4, 99, None) == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]
    assert windows(range(10), 4, None, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(range(2), 4, 99, None) == [[99, 0, 1]]


def test_gates_follow_bits_per_weight() -> None:
    g = gates.shipped()
    found = [gates.cost_gate(g, bits) for bits in (8.5, 6.56, 5.5, 4.9, 3.9, 2.6, 2.1)]
    assert found == sorted(found) and len(set(found)) == len(found)
    assert gates.float_gate(g, "silu", "llama.cpp") == 1e-10
