"""Importance matrices that lconvert measures against what llama.cpp's own graph multiplies, and against its quantizer."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import lconvert
from lconvert.converters import gguf_importance
from lconvert.formats import imatrix
from lconvert.primitives import importance, text
from lconvert.primitives.job import Calibration, Job
from tests import case_models
from tests.conftest import DEMO

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


class GgmlTensor(ctypes.Structure):
    """ggml.h, struct ggml_tensor."""


GgmlTensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(GgmlTensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


class Multiplied:
    """Sums of squares and counts of what llama.cpp multiplies with each weight (tools/imatrix/imatrix.cpp, collect_imatrix)."""

    def __init__(self, path: Path, windows: list[list[int]], context: int):
        self.sums: dict[str, np.ndarray] = {}
        self.counts: dict[str, np.ndarray] = {}
        base = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))))
        base.ggml_op_name.restype = ctypes.c_char_p
        self._op = lambda t: base.ggml_op_name(t.op).decode()
        from lconvert.validators.runtimes.llamacpp import LlamaCpp

        LlamaCpp(path, context=256, threads=1).close()  # which sets the backend and its log up
        model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.n_threads = params.n_threads_batch = 2
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._see)
        params.cb_eval = self._callback
        params.type_k = params.type_v = 0  # F32: a cache in F16 moves what attn_output meets by 1e-4
        params.flash_attn_type = 0
        made = llama_cpp.llama_init_from_model(model, params)
        try:
            for ids in windows:
                llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(made), True)
                batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
                for i, token in enumerate(ids):
                    batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
                    batch.seq_id[i][0], batch.logits[i] = 0, 1
                batch.n_tokens = len(ids)
                assert llama_cpp.llama_decode(made, batch) == 0
                llama_cpp.llama_batch_free(batch)
        finally:
            llama_cpp.llama_free(made)
            llama_cpp.llama_model_free(model)

    def _see(self, tensor: Any, ask: bool, data: Any) -> bool:
        t = ctypes.cast(tensor, ctypes.POINTER(GgmlTensor)).contents
        op = self._op(t)
        if op not in ("MUL_MAT", "MUL_MAT_ID"):
            return not ask
        weight = t.src[0].contents
        name = weight.name.decode()
        if ask or not name.endswith(".weight"):
            return True
        x = t.src[1].contents
        values = np.lib.stride_tricks.as_strided(
            np.frombuffer((ctypes.c_char * (x.nb[3] * x.ne[3])).from_address(x.data), np.float32),
            tuple(x.ne)[::-1],
            tuple(x.nb)[::-1],
        )[0].astype(np.float64)  # (tokens, used or 1, cols), or (1, tokens, cols)
        experts = weight.ne[2] if op == "MUL_MAT_ID" else 1
        sums = self.sums.setdefault(name, np.zeros((experts, x.ne[0])))
        counts = self.counts.setdefault(name, np.zeros(experts))
        if op == "MUL_MAT":
            sums += (values.reshape(-1, x.ne[0]) ** 2).sum(0)
            counts += x.ne[1] * x.ne[2]
            return True
        chosen = t.src[2].contents
        for token in range(chosen.ne[1]):
            for k in range(chosen.ne[0]):
                at = chosen.data + token * chosen.nb[1] + k * chosen.nb[0]
                e = ctypes.c_int32.from_address(at).value
                sums[e] += values[token, k % values.shape[1]] ** 2
                counts[e] += 1
        return True


def measured(
    folder: Path, tmp_path: Path, ids: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> tuple[Mapping[str, imatrix.Sums], Multiplied]:
    model = lconvert.read(folder)
    shown = text.Windows(tuple(map(tuple, ids)))
    monkeypatch.setattr(text, "windows", lambda model, calibration: shown)
    found, _ = gguf_importance.sums(model, importance.measure(model, Job(Calibration("-"))))
    lconvert.convert(model, tmp_path / "f32.gguf", ftype="F32", name="m")
    return found, Multiplied(tmp_path / "f32.gguf", ids, len(ids[0]))


def random_ids(vocab: int, count: int, length: int) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [[int(i) for i in rng.integers(3, vocab, length)] for _ in range(count)]


@pytest.mark.parametrize("name", ["demo", "mixtral", "phi3"])
def test_sums_are_of_what_llama_cpp_multiplies(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests import arch_cases

    case = next((c.name for c in arch_cases.load() if c.model_type == name), "")
    folder = DEMO if name == "demo" else case_models.folder(case)
    vocab = lconvert.read(folder).decoder.vocab
    ours, theirs = measured(folder, tmp_path, random_ids(vocab, 2, 64), monkeypatch)
    assert ours.keys() == theirs.sums.keys() - {"token_embd.weight"}
    for weight, sums in ours.items():
        assert np.array_equal(sums.counts, theirs.counts[weight]), weight
        scale = theirs.sums[weight].max(axis=-1, keepdims=True)
        assert (np.abs(sums.squares - theirs.sums[weight]) <= 1e-4 * scale).all(), weight


def test_the_file_is_read_by_llama_cpps_reader_and_ours(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sums = {
        "blk.1.ffn_up_exps.weight": imatrix.Sums(rng.random((3, 64)) * 50, np.array([7, 0, 40])),
        "blk.0.attn_q.weight": imatrix.Sums(rng.random((1, 32)) * 50, np.array([1024])),
        "output.weight": imatrix.Sums(rng.random((1, 32)) * 50, np.array([1024])),
    }
    sums["blk.1.ffn_up_exps.weight"].squares[1] = 0
    path = tmp_path / "i.gguf"
    imatrix.write(path, sums, datasets=["a.txt"], chunks=2, chunk=512)
    reader = gguf.GGUFReader(path)
    assert [t.name for t in reader.tensors] == [n + s for n in sorted(sums) for s in (".in_sum2", ".counts")]
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["a.txt"]
    assert [reader.fields[f"imatrix.chunk_{k}"].contents() for k in ("count", "size")] == [2, 512]
    for t in reader.tensors:
        name, _, kind = t.name.rpartition(".")
        want = sums[name].squares if kind == "in_sum2" else sums[name].counts.reshape(-1, 1)
        assert np.array_equal(t.data, want.astype(np.float32)), t.name
    found = imatrix.read(path)
    assert (found.chunks, found.datasets) == (2, ("a.txt",))
    assert (found["blk.1.ffn_up_exps.weight"][1] == 1).all(), "an expert that saw nothing"
    assert np.allclose(found["blk.0.attn_q.weight"], sums["blk.0.attn_q.weight"].squares / 1024)
