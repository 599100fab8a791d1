"""A decoder in ONNX Runtime on the CPU.

Graphs are taken by the names of their inputs, as the exporters of Hugging Face and of onnxruntime-genai give
them: `input_ids`, and where there are any `attention_mask`, `position_ids` and `past_key_values.N.key` /
`.value` with outputs `present.N.key` / `.value`; the logits are the output `logits`. With `cache_position` the
keys and values lie in a cache of fixed length (onnx_cache.py).

Products with block-quantized weights (MatMulNBits) run at accuracy level 1, fp32 activations, for parity, and
at level 4, activations rounded to 8 bits, for speed (docs/ContribOperators.md of onnxruntime,
`accuracy_level`). The level set here is the session's, for weights that the graph holds as DequantizeLinear;
a MatMulNBits node that is in the file has its own, for which the graph is given with another one.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, MissingPackageError
from lconvert.formats.json_object import read_object
from lconvert.formats.onnx_reader import OnnxFile
from lconvert.validators.runtimes import Generation, Purpose, fits, graph, onnx_session, short
from lconvert.validators.runtimes.onnx_cache import POSITION, Fixed

#: Keys and values between two runs: arrays by input, or a cache of fixed length.
Past = Mapping[str, Any] | Fixed

_ACCURACY_LEVEL: Mapping[Purpose, str] = {"parity": "1", "speed": "4"}
_ACCURACY_OPTION = "session.qdq_matmulnbits_accuracy_level"  # onnxruntime_session_options_config_keys.h
#: Where external data lies for a graph that is given as bytes (the same file).
_FOLDER_OPTION = "session.model_external_initializers_file_folder_path"
#: Graphs with their weights inside are run as they are.
_GRAPH_BYTES = 64 << 20
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_TYPES: Mapping[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}
_ROWS_BYTES = 128 << 20  # logits that one run makes


def prepare() -> None:
    """Import what the class here needs."""
    package()


def package() -> Any:
    """The onnxruntime module. Official builds send events to their maker and leave a file among the temporary ones, unless this is
    said before they are imported (Privacy.md of onnxruntime)."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module("onnxruntime")
    except ImportError:
        raise MissingPackageError(
            "ONNX Runtime is not installed, so nothing was proven in it: pip install 'lconvert[onnx]'"
        ) from None


def _at_level(path: Path, file: OnnxFile | None, level: str) -> str | bytes:
    """The file, or its graph where MatMulNBits nodes have another accuracy level than is asked for, with that one."""
    if file is None or path.stat().st_size > _GRAPH_BYTES:
        return str(path)
    found = [
        a
        for n in file.proto.graph.node
        if n.op_type == "MatMulNBits"
        for a in n.attribute
        if a.name == "accuracy_level"
    ]
    if all(str(a.i) == level for a in found):
        return str(path)
    for a in found:
        a.i = int(level)
    made: bytes = file.proto.SerializeToString()
    return made


#: What helps, by what ONNX Runtime says.
_REMEDIES = {
    "NOT_IMPLEMENTED": "its CPU provider has no kernel for these types: export with --fp32 or --fp16",
    "is till opset": "export with an opset that it knows, or upgrade onnxruntime",
}
#: Where in its sources something failed, with the C++ signature.
_PLACE = re.compile(r"/onnxruntime_src/\S+ .*?\)(?: const)? (?=[A-Z])")


def _said(e: Exception) -> str:
    """The runtime's reason to refuse a graph, and what to do about it."""
    help = next((f"; {text}" for part, text in _REMEDIES.items() if part in str(e)), "")
    return f"({short(Exception(_PLACE.sub('', str(e))))}){help}"


class OnnxRuntime:
    """A decoder's .onnx file, with the tokenizer.json beside it where there is one.

    accuracy_level: of MatMulNBits, instead of the purpose's. batch_tokens: longer prompts run in chunks of
    this many, by default as many as make 128 MiB of logits; a graph without past inputs runs the whole prompt
    at once.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        context: int = 512,
        threads: int | None = None,
        purpose: Purpose = "parity",
        accuracy_level: int | None = None,
        batch_tokens: int | None = None,
    ):
        path = graph(Path(path))
        self._path, self._context = path, context
        self._tokenizer: Any = None
        self._level = str(accuracy_level) if accuracy_level is not None else _ACCURACY_LEVEL[purpose]
        self._session = self._open(path, context, purpose, threads)
        held = self._session.get_modelmeta().custom_metadata_map.get(
            "positions", ""
        )  # of rotary tables, ours
        if held.isascii() and held.isdigit() and len(held) < 12:
            self._context = min(context, int(held))
        self._inputs = {i.name: i for i in self._session.get_inputs()}
        self._outputs = [o.name for o in self._session.get_outputs()]
        self._past = {n: n.replace("past_key_values", "present") for n in self._inputs if _PAST.fullmatch(n)}
        self._check()
        vocab = next(o.shape[-1] for o in self._session.get_outputs() if o.name == "logits")
        #: whether the graph makes logits of the last token alone
        self._last = next(o.shape[1] for o in self._session.get_outputs() if o.name == "logits") == 1
        self._dtype = self._float()
        self._rows = (
            1
            if self._last
            else batch_tokens or max(1, _ROWS_BYTES // (4 * (vocab if isinstance(vocab, int) else 1 << 18)))
        )

    def _open(self, path: Path, context: int, purpose: Purpose, threads: int | None) -> Any:
        """The session. context: tokens that must fit."""
        self._package = package()
        options = self._package.SessionOptions()
        options.add_session_config_entry(_ACCURACY_OPTION, self._level)
        file = onnx_session.opened(path)
        self._settings = onnx_session.settings(file, purpose)
        for key, value in self._settings.items():
            options.add_session_config_entry(key, value)
        options.log_severity_level = 3  # errors
        if threads:
            options.intra_op_num_threads = threads
        try:
            model = _at_level(path, file, self._level)
            del file
            if isinstance(model, bytes):
                options.add_session_config_entry(_FOLDER_OPTION, str(path.resolve().parent))
            return self._package.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as e:  # noqa: BLE001 - its errors derive from Exception alone
            raise InputError(f"{path}: ONNX Runtime does not load it {_said(e)}") from None

    def _float(self) -> str:
        """The type of the logits."""
        kind = next(o.type for o in self._session.get_outputs() if o.name == "logits")
        return {"tensor(float)": "float32", "tensor(float16)": "float16"}.get(kind, "bfloat16")

    def _check(self) -> None:
        known = {
            "input_ids",
            "attention_mask",
            "position_ids",
            *self._past,
            *([POSITION] if self.fixed else []),
        }
        if "input_ids" not in self._inputs or "logits" not in self._outputs:
            raise InputError(
                f"{self._path}: not a decoder: inputs {sorted(self._inputs)}, outputs {self._outputs}; expected the "
                "input input_ids and the output logits"
            )
        if unknown := sorted(self._inputs.keys() - known):
            raise InputError(
                f"{self._path}: unknown inputs {', '.join(unknown)}; nothing says what to feed them"
            )
        if missing := sorted(set(self._past.values()) - set(self._outputs)):
            raise InputError(
                f"{self._path}: keys and values go in but do not come out: no {', '.join(missing)}"
            )
        for name, node in self._inputs.items():
            if node.type not in _TYPES:
                raise InputError(f"{self._path}: input {name} is a {node.type}, which cannot be fed")

    @property
    def caches(self) -> bool:
        """Whether keys and values go in and out, so that a prompt can be run in parts."""
        return bool(self._past)

    @property
    def batches(self) -> bool:
        """Whether several prompts can be one batch with a mask."""
        return "attention_mask" in self._inputs and not isinstance(self._inputs["input_ids"].shape[0], int)

    @property
    def pads(self) -> bool:
        """Whether prompts of different lengths can be one batch, with padding on the left."""
        return self.batches and "position_ids" in self._inputs

    @property
    def fixed(self) -> bool:
        """Whether keys and values lie in a cache of fixed length: cache_position is one number for each sequence."""
        place, ids = self._inputs.get(POSITION), self._inputs.get("input_ids")
        if place is None or ids is None:
            return False
        return bool(self._past) and list(place.shape) == list(ids.shape[:1])

    def empty(self, batch: int = 1, capacity: int | None = None) -> Past:
        """Keys and values of no tokens: (batch, heads, 0, width of a head), or a cache of so many positions [default: the
        context], all of ones, so that a slot that is seen before it is written shows.
        """
        out = {}
        for name in self._past:
            node = self._inputs[name]
            heads, width = self._heads(name, node.shape)
            held = node.shape[2] if isinstance(node.shape[2], int) else capacity or self._context
            shape = (batch, heads, held if self.fixed else 0, width)
            out[name] = np.ones(shape, _TYPES[node.type])
        return Fixed(self._package, self._session, self._past, out) if self.fixed else out

    def _heads(self, name: str, shape: Sequence[Any]) -> tuple[int, int]:
        """Heads of keys or values and their width: numbers of the input's shape, or else of genai_config.json beside the graph
        (onnxruntime-genai's builder leaves the width open from 0.18 on)."""
        found = [shape[1], shape[3]] if len(shape) == 4 else []
        side = self._path.parent / "genai_config.json"
        if found and not all(isinstance(n, int) for n in found) and side.is_file():
            model = read_object(side).get("model")
            said = model.get("decoder", {}) if isinstance(model, dict) else {}
            known = (said.get("num_key_value_heads"), said.get("head_size")) if isinstance(said, dict) else ()
            found = [a if isinstance(a, int) else b for a, b in zip(found, known, strict=False)]
        if len(found) != 2 or not all(isinstance(n, int) and 0 < n < 1 << 20 for n in found):
            raise InputError(
                f"{self._path}: input {name} has the shape {list(shape)}; expected (batch, heads, past, width) with fixed heads "
                "and width, there or in genai_config.json"
            )
        return found[0], found[1]

    def _run(self, ids: list[int], past: Past, at: int) -> tuple[Any, Past]:
        """Logits (1, tokens, vocab) of `ids` as positions from `at` on, and the keys and values after
        them.
        """
        positions = np.arange(at, at + len(ids))[None]
        return self.forward(np.array([ids]), np.ones((1, at + len(ids))), positions, past)

    def forward(
        self, ids: NDArray[Any], mask: NDArray[Any], positions: NDArray[Any], past: Past
    ) -> tuple[Any, Past]:
        """Logits (batch, tokens, vocab) of ids (batch, tokens) after a past, and the keys and values after them; a cache of fixed
        length is changed and given back. mask: (batch, tokens of the past and these)."""
        whole = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        if isinstance(past, Fixed):
            past.fits(ids.shape[1])
            whole[POSITION] = np.full(len(ids), past.taken)
        feed = {n: np.asarray(a, _TYPES[self._inputs[n].type]) for n, a in whole.items() if n in self._inputs}
        try:
            if isinstance(past, Fixed):
                out = [past.run(feed, ids.shape[1])]
            else:
                out = self._session.run(["logits", *self._past.values()], {**feed, **past})
        except Exception as e:  # noqa: BLE001 - its errors derive from Exception alone
            raise InputError(
                f"{self._path}: ONNX Runtime failed on {ids.shape[1]} tokens ({short(e)})"
            ) from None
        if out[0].ndim != 3 or out[0].shape[:2] != (len(ids), 1 if self._last else ids.shape[1]):
            raise InputError(
                f"{self._path}: logits have the shape {out[0].shape}, expected ({len(ids)}, tokens, vocabulary)"
            )
        return out[0], past if isinstance(past, Fixed) else dict(zip(self._past, out[1:], strict=True))

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        from lconvert.validators.runtimes.hf import encode, file_tokenizer

        if self._tokenizer is None:
            self._tokenizer = file_tokenizer(self._path.parent / "tokenizer.json")
        return encode(self._tokenizer, text, special=special)

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        fits(len(ids), self._context)
        if self._last and not self._past:
            alone = [self._run(ids[: n + 1], {}, 0)[0][0, -1] for n in range(len(ids))]
            return np.ascontiguousarray(alone, dtype=np.float32)
        rows = self._rows if self._past else len(ids)
        past = self.empty(capacity=len(ids) + 1)  # a write that is one off must show in the numbers
        out: NDArray[np.float32] | None = None
        for at in range(0, len(ids), rows):
            part, past = self._run(ids[at : at + rows], past, at)
            if len(ids) <= rows:
                return np.ascontiguousarray(part[0], dtype=np.float32)
            out = np.empty((len(ids), part.shape[2]), np.float32) if out is None else out
            out[at : at + rows] = part[0]
        assert out is not None
        return out

    def generate(self, ids: list[int], n: int) -> Generation:
        fits(len(ids) + n - 1 if ids else 0, self._context)
        start, made, seconds = time.perf_counter(), list[int](), list[float]()
        new, past, at = list(ids), self.empty(capacity=len(ids) + n), 0
        while len(made) < n:
            logits, past = self._run(new, past, at)
            made.append(int(logits[0, -1].argmax()))
            seconds.append(time.perf_counter() - start)
            if self._past:
                new, at = made[-1:], len(ids) + len(made) - 1
            else:
                new = [*ids, *made]
        return Generation(tuple(made), tuple(seconds))

    def info(self) -> dict[str, str]:
        options = self._session.get_session_options()
        return {
            "runtime": "onnxruntime",
            "onnxruntime": str(self._package.__version__),
            "device": ", ".join(self._session.get_providers()),
            "accuracy_level": self._level,
            "dtype": self._dtype,
            **{key.removeprefix("session."): value for key, value in self._settings.items()},
            "threads": str(options.intra_op_num_threads or "all"),
            "kv_cache": "of fixed length, in place"
            if self.fixed
            else "yes"
            if self._past
            else "no: every token runs the whole sequence",
        }

    def close(self) -> None:
        del self._session
