"""Small GPTQ and AWQ checkpoints written without lconvert's packing: bit streams as Python integers.

And what tests of other quantized formats need as well: arrays as stored tensors, noise, any config, peers' fixtures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

import lconvert
from lconvert.errors import LconvertError
from lconvert.formats import safetensors
from lconvert.formats.scheme import Part, Scheme, Stored
from lconvert.ir import Model, QTensor, Tensor, dense, int_grid
from lconvert.kernels.qtensor import dequantize, values
from tests.checkpoints import LLAMA, random_tensors, write_tensors

FIXTURES = Path(__file__).parent / "fixtures"
LAYOUTS = FIXTURES / "int_layouts"
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
}
#: Output i of eight lies in nibble AWQ_NIBBLE[i] of its word (AutoAWQ awq/utils/packing_utils.py AWQ_REVERSE_ORDER).
AWQ_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)
Arrays = dict[str, NDArray[Any]]


def stream(values: Any, bits: int) -> list[int]:
    """The 32-bit words of whole numbers one after another, lowest bits first, as signed integers."""
    total = sum(int(v) << (i * bits) for i, v in enumerate(values))
    count = -(-len(values) * bits // 32)
    words = [(total >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
    return [w - (1 << 32) if w >> 31 else w for w in words]


def awq_words(values: Any) -> list[int]:
    """The words of nibbles in AWQ's order, eight to a word."""
    shuffled = np.zeros(len(values), int)
    for i, v in enumerate(values):
        shuffled[i // 8 * 8 + AWQ_NIBBLE[i % 8]] = v
    return stream(shuffled, 4)


def gptq(codes: Any, zeros: Any, scales: Any, bits: int, version: int = 1, g_idx: Any = None) -> Arrays:
    """GPTQ's arrays of unsigned codes (N, K), zero points (N, G) and scales (N, G); v1 wraps a zero point of 0."""
    k, count = codes.shape[1], zeros.shape[1]
    index = np.arange(k) // (k // count) if g_idx is None else g_idx
    stored = (zeros.astype(int) - (version == 1)) % (1 << bits)
    return {
        "qweight": np.array([stream(row, bits) for row in codes], np.int32).T.copy(),
        "qzeros": np.array([stream(column, bits) for column in stored.T], np.int32),
        "scales": scales.T.copy(),
        "g_idx": np.asarray(index, np.int32),
    }


def awq(codes: Any, zeros: Any, scales: Any) -> Arrays:
    """AWQ gemm's arrays of the same."""
    return {
        "qweight": np.array([awq_words(column) for column in codes.T], np.int32),
        "qzeros": np.array([awq_words(column) for column in zeros.T], np.int32),
        "scales": scales.T.copy(),
    }


def draw(
    rng: np.random.Generator, shape: tuple[int, int], bits: int, group: int, sym: bool, lowest: int = 1
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Random unsigned codes (N, K), zero points (N, G) and F16 scales (N, G)."""
    n, k = shape
    count = 1 if group == -1 else k // group
    codes = rng.integers(0, 1 << bits, shape).astype(np.uint8)
    zeros = np.full((n, count), 1 << (bits - 1), np.uint8)
    if not sym:
        zeros = rng.integers(lowest, 1 << bits, (n, count)).astype(np.uint8)
    scales = (rng.random((n, count)) * 0.01 + 0.001).astype(np.float16)
    return codes, zeros, scales


def meaning(codes: Any, zeros: Any, scales: Any, g_idx: Any = None) -> NDArray[np.float32]:
    """(code - zero) * scale, one fp32 product per weight."""
    k, count = codes.shape[1], zeros.shape[1]
    index = np.arange(k) // (k // count) if g_idx is None else np.asarray(g_idx)
    whole = codes.astype(np.int64) - zeros.astype(np.int64)[:, index]
    out: NDArray[np.float32] = whole.astype(np.float32) * scales.astype(np.float32)[:, index]
    return out


def quantized(
    codes: Any, zeros: Any, scales: Any, bits: int, group: int, sym: bool, g_idx: Any = None
) -> QTensor:
    """The QTensor of the same numbers."""
    held = (codes.astype(int) - (1 << (bits - 1))).astype(np.int8) if sym else codes
    index = None if g_idx is None else dense(np.asarray(g_idx, np.int32))
    zero = None if sym else dense(zeros)
    return QTensor(
        codes.shape, dense(held), int_grid(bits, sym), (1, group), dense(scales), zero, g_idx=index
    )


def parts(
    arrays: Mapping[str, NDArray[Any] | tuple[str, NDArray[Any]]], seen: list[tuple[int, int]] | None = None
) -> dict[str, Part]:
    """Arrays as the stored tensors of a module: of the type they are given with, else uint16 as BF16 and others as they are.

    seen: takes down which columns were read.
    """

    def part(name: str, dtype: str | None, array: NDArray[Any]) -> Part:
        def columns(start: int, stop: int) -> NDArray[Any]:
            if seen is not None:
                seen.append((start, stop))
            return array[:, start:stop]

        held: Any = "U8" if dtype and dtype.startswith("F8") else dtype
        data = dense(array.copy(), held or ("BF16" if array.dtype == np.uint16 else None), origin=name)
        return Part(dtype or data.dtype, data, columns, f"file: tensor {name}")

    return {name: part(name, *(x if isinstance(x, tuple) else (None, x))) for name, x in arrays.items()}


def noise(count: int, seed: int) -> NDArray[np.uint8]:
    """Bytes that a peer's script makes again without NumPy's generators."""
    x = (np.arange(count, dtype=np.uint64) + np.uint64(seed * 1000003)) * np.uint64(0x9E3779B97F4A7C15)
    return ((x >> np.uint64(33)) & np.uint64(0xFF)).astype(np.uint8)


def fingerprint(x: NDArray[Any], length: int = 16) -> str:
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()[:length]


def stored_bytes(stored: Stored) -> tuple[str, tuple[int, ...], bytes]:
    """What a Writer's tensor leaves in a file."""
    return stored.dtype, stored.shape, np.ascontiguousarray(stored.read(0, stored.shape[0])).tobytes()


def array_bytes(array: NDArray[Any]) -> tuple[str, tuple[int, ...], bytes]:
    return dense(array).dtype, array.shape, array.tobytes()


def layout_cases(pattern: str) -> list[tuple[str, str]]:
    """(peer, case) of the packed fixtures whose case begins with `pattern`."""
    out = []
    for path in sorted(LAYOUTS.glob("*.safetensors")):
        names = {name.rpartition(".")[0] for name in safetensors.read_header(path).tensors}
        out += [(path.stem, name) for name in sorted(names) if name.startswith(pattern)]
    return out


def layout(peer: str, case: str) -> Arrays:
    """The arrays of one packed fixture."""
    file = safetensors.read_header(LAYOUTS / f"{peer}.safetensors")
    found = {n.rpartition(".")[2]: n for n in file.tensors if n.rpartition(".")[0] == case}
    return {suffix: safetensors.tensor(file, name).load() for suffix, name in found.items()}


Encode = Callable[[str, tuple[int, int], np.random.Generator], Mapping[str, NDArray[Any]] | None]


def write_folder(
    folder: Path, encode: Encode, config: Mapping[str, Any], side: Mapping[str, Any] | None = None
) -> Path:
    """A tiny Llama whose linear modules hold what `encode(module, shape, rng)` returns; None leaves one plain.

    side: quantize_config.json.
    """
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    model = dict(LLAMA) | TINY
    tensors = random_tensors(model, "F16")
    for name in [n for n in tensors if n.endswith(("_proj.weight", "lm_head.weight"))]:
        module = name.removesuffix(".weight")
        found = encode(module, tensors[name][1].shape, rng)
        if found is not None:
            del tensors[name]
            tensors |= {f"{module}.{suffix}": (dense(a).dtype, a) for suffix, a in found.items()}
    (folder / "config.json").write_text(json.dumps(model | {"quantization_config": dict(config)}))
    if side is not None:
        (folder / "quantize_config.json").write_text(json.dumps(dict(side)))
    write_tensors(folder / "model.safetensors", tensors)
    return folder


def values_of(data: Tensor | QTensor) -> NDArray[np.float32]:
    assert isinstance(data, QTensor)
    return dequantize(data)


#: Values that a config out of the wild may hold under any key.
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from((4, 32, -1, "gemm")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def configs(keys: Sequence[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Changes of a config: any JSON under a few of `keys`."""
    return st.dictionaries(st.sampled_from(keys), JSON, max_size=3)


def read_or_refused(
    scheme: Callable[[], Scheme], arrays: Mapping[str, NDArray[Any]], shape: tuple[int, ...]
) -> None:
    """Whatever a config says, the module is read, with all its numbers, or refused by an error of lconvert's."""
    try:
        weight = scheme().weight("model.layers.0.mlp.up_proj", parts(arrays), shape)
        assert weight is not None
        values_of(weight.data)
    except LconvertError as e:
        assert str(e)


def trained(shared: Path, name: str) -> Iterator[tuple[str, QTensor, dict[str, Tensor]]]:
    """The quantized modules of a shared checkpoint that GPTQModel made of wiki-mistral: names, numbers, stored tensors.

    Their values are near the original's.
    """
    folder = shared / "checkpoints" / name
    if not folder.is_dir():
        pytest.skip(f"shared checkpoint {name} is missing")
    model, original = lconvert.read(folder), lconvert.read(shared / "models" / "wiki-mistral")
    file = safetensors.read_header(folder / "model.safetensors")
    for role, entry in model.entries.items():
        if isinstance(q := entry.data, QTensor):
            w, reference = dequantize(q), values(original.entries[role].data)
            assert 0.08 < np.linalg.norm(w - reference) / np.linalg.norm(reference) < 0.13
            module = entry.provenance[0].split()[0]
            found = [n for n in file.tensors if n.rpartition(".")[0] == module]
            yield module, q, {n.rpartition(".")[2]: safetensors.tensor(file, n) for n in found}


def peer_folders(method: str) -> list[Path]:
    """The checkpoints among the fixtures that a peer wrote under this quant_method."""
    found = sorted(p.parent for p in (FIXTURES / "peers").glob("*/oracle.json"))
    return [p for p in found if f'"quant_method": "{method}"' in (p / "config.json").read_text()]


def compare_with_oracle(model: Model, folder: Path) -> None:
    """Every quantized weight against the peer's own dequantization: the digest of its fp32 values, or, where the peer computed
    in 16 bits, a sample within the rounding of that type. A peer that multiplies by the identity makes every zero positive."""
    oracle = json.loads((folder / "oracle.json").read_text())["tensors"]
    found = {
        e.provenance[0].split()[0]: e.data for e in model.entries.values() if isinstance(e.data, QTensor)
    }
    assert found.keys() == {name.removesuffix(".weight") for name in oracle}
    for name, expected in oracle.items():
        w = dequantize(found[name.removesuffix(".weight")])
        assert list(w.shape) == expected["shape"]
        if expected["computed_in"] == "float32":
            digests = {hashlib.sha256(x.astype("<f4").tobytes()).hexdigest() for x in (w, w + np.float32(0))}
            assert expected["sha256"] in digests, name
            continue
        sample = w.reshape(-1)[np.arange(len(expected["sample"])) * 7919 % w.size]
        bound = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[expected["computed_in"]]
        np.testing.assert_allclose(sample, expected["sample"], rtol=bound, atol=2.0**-25, err_msg=name)
