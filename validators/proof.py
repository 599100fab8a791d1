"""The state of one validation: both models, the options, and what has been found so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lconvert.converters.onnx_source import Found
from lconvert.errors import InputError, MissingPackageError, RuntimeFailure
from lconvert.formats import gguf as container
from lconvert.formats import onnx_reader
from lconvert.formats.json_object import read_object
from lconvert.ir import Decoder, Model, QTensor
from lconvert.passes.examples import is_arrays
from lconvert.validators import carried, stored
from lconvert.validators.logit_cache import file_hash, model_hash
from lconvert.validators.report import TIERS, Check
from lconvert.validators.runtimes import DEFAULT
from lconvert.validators.runtimes.config import settings


@dataclass(frozen=True)
class Options:
    """How to validate; the command line's options have the same names.

    context: tokens per window. max_windows: None for the whole text. runtimes: names, empty for the artifact's own.
    python: interpreter by runtime. cache: folder of reference logits, None for none. relative: compare with the stock
    encoder; curve: measure all its types. greedy: (prompts, tokens) of greedy continuation.
    """

    text: Path | None = None
    tiers: tuple[str, ...] = TIERS
    context: int = 512
    max_windows: int | None = 8
    threads: int | None = None
    require: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ()
    python: Mapping[str, Path] = field(default_factory=dict)
    timeout: float | None = None
    cache: Path | None = None
    relative: bool = True
    curve: bool = False
    greedy: tuple[int, int] = (4, 32)


@dataclass
class Proof:
    """What is known so far. `artifact` is None for formats that are not read into the IR, `graph` is where it came out of an ONNX
    file. `pruned`: a mask made weights of the source zero. `sha256` hashes a file once."""

    source: Model
    artifact: Model | None
    path: Path
    kind: str
    gates: dict[str, Any]
    options: Options
    progress: Callable[[str], None]
    graph: Found | None = None
    pruned: bool = False
    checks: list[Check] = field(default_factory=list)
    not_proven: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    missing_required: bool = False
    sha256: Callable[[Path], str] = field(default_factory=lambda: cache(file_hash))

    def add(
        self,
        tier: str,
        name: str,
        value: str,
        gate: str = "",
        passed: bool | None = None,
        *,
        measured: float | None = None,
        limit: float | None = None,
    ) -> None:
        self.checks.append(Check(tier, name, value, gate, passed, measured, limit))

    def at_most(
        self, tier: str, name: str, value: str, measured: float, limit: float, gate: str | None = None
    ) -> None:
        """A gate on a figure that must not be above its limit."""
        shown = f"<= {limit:g}" if gate is None else gate
        self.add(tier, name, value, shown, measured <= limit, measured=measured, limit=limit)

    def count(self, tier: str, name: str, wrong: Sequence[str], what: str) -> None:
        """A hard gate on a list of differences; the first few become notes."""
        value = f"{len(wrong)} differ" if wrong else what
        self.at_most(tier, name, value, len(wrong), 0, "0 differ")
        self.notes += [f"{name}: {text}" for text in wrong[:5]]

    def guarded(self, tier: str, what: str, work: Callable[[], None], runtime: str = "") -> None:
        """A missing package leaves a statement of what was not proven; a runtime that fails is a failed check."""
        try:
            work()
        except MissingPackageError as e:
            self.not_proven.append(f"{what}: {e}")
            if {runtime, runtime.replace(".", "")} & set(self.options.require) or (
                self.options.require and not runtime
            ):
                self.missing_required = True
        except RuntimeFailure as e:
            self.add(tier, what, str(e), "runs to the end", False)

    @cached_property
    def corpus(self) -> str:
        """The evaluation text; InputError for one that is unreadable or says nothing. Where a classifier is shown arrays, the built-in one."""
        arrays = self.options.text is not None and is_arrays(self.options.text)
        return read_text(None if arrays and not isinstance(self.source.arch, Decoder) else self.options.text)

    @cached_property
    def tokenizer(self) -> Any:
        """The source's tokenizer in the package `tokenizers`, None where it has none."""
        from lconvert.validators.runtimes.hf import reference_tokenizer

        return None if self.source.tokenizer is None else reference_tokenizer(self.source.tokenizer)

    @cached_property
    def header(self) -> container.GGUFFile | None:
        """Of an artifact that is a GGUF file."""
        return container.read(self.path) if self.kind == "gguf" else None

    @cached_property
    def files(self) -> list[Path]:
        """`stored.files` of the artifact."""
        return stored.files(self.path) if self.header is None else list(self.header.paths)

    @cached_property
    def source_hash(self) -> str | None:
        """Of the source's files, None where it came from none."""
        return model_hash(self.source.source) if Path(self.source.source).exists() else None

    @cached_property
    def quantized(self) -> bool:
        """Whether the artifact holds tensors on a grid, or states that activations or caches are quantized."""
        if self.kind == "onnx" and self.artifact is None:
            return _quantized_graph(self.path)
        return self.artifact is not None and carried.is_quantized(self.artifact)

    @cached_property
    def carries(self) -> bool:
        """Whether the source is quantized itself, so that its numbers are to be carried and not to be rounded."""
        return carried.is_quantized(self.source)

    @cached_property
    def default_runtime(self) -> str:
        """The runtime that the artifact is for. A quantized folder is vLLM's; without vLLM, transformers runs those of compressed-tensors."""
        if self.kind != "hf" or not self.quantized:
            return DEFAULT[self.kind]
        if "vllm" in self.options.python or settings("vllm").python or find_spec("vllm"):
            return "vllm"
        return self.substitute or "vllm"

    @property
    def substitute(self) -> str | None:
        """transformers, where it can run this quantized folder: with the package compressed-tensors."""
        if self.kind != "hf" or quantization_config(self.path).get("quant_method") != "compressed-tensors":
            return None
        elsewhere = self.options.python.get("transformers") or settings("transformers").python
        return "transformers" if elsewhere or find_spec("compressed_tensors") else None

    @cached_property
    def runtimes(self) -> tuple[str, ...]:
        """Those that were asked for, else the default one."""
        return self.options.runtimes or (self.default_runtime,)

    @cached_property
    def exactly_carried(self) -> bool:
        """Whether every number of a quantized source is the artifact's: the runtime is then all that can cost anything."""
        table = self.details.get("tensors", {}).get("table", ())
        close = (r["exact"] or (r["promised"] and r["relative_error"] < 1e-6) for r in table)
        return self.carries and bool(table) and all(close)

    @cached_property
    def expected(self) -> Model:
        """The source as the artifact's kind of file restates it: what its entries are compared with."""
        assert self.artifact is not None
        return carried.expected(self.source, self.artifact, self.kind)

    @property
    def rounded(self) -> bool:
        """Whether some float tensor is stored in a type that is neither the source's nor F32."""
        if self.artifact is None:
            return False
        return any(
            not isinstance(e.data, QTensor) and e.data.dtype not in ("F32", _dtype(self.source, name))
            for name, e in self.artifact.entries.items()
        )


#: Where config.json keeps what a tool did to the weights, and the side files of older checkpoints with the method they imply.
_CONFIG_KEYS = ("quantization_config", "compression_config")
_SIDE_FILES = {"quantize_config.json": "gptq", "hf_quant_config.json": "modelopt"}


def quantization_config(folder: Path) -> dict[str, Any]:
    """What a folder says about its quantization, with its quant_method; {} of a plain one."""
    found = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    for key in _CONFIG_KEYS:
        if isinstance(found.get(key), dict) and found[key]:
            return dict(found[key])
    for name, method in _SIDE_FILES.items():
        if found and (folder / name).is_file():
            return {"quant_method": method} | read_object(folder / name)
    return {}


def read_text(path: Path | None) -> str:
    """The text of a file, by default the built-in one; InputError for one that is unreadable or says nothing."""
    if path is None:
        return builtin_text()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise InputError(f"{path}: cannot be read as UTF-8 text ({reason})") from None
    if not text.strip():
        raise InputError(f"{path}: is empty; an evaluation text needs some paragraphs")
    return text


def builtin_text() -> str:
    """The public-domain excerpt that proofs use when no text is given."""
    return (Path(__file__).with_name("text") / "excerpt.txt").read_text(encoding="utf-8")


def _dtype(model: Model, role: str) -> str:
    data = model.entries[role].data
    return "" if isinstance(data, QTensor) else data.dtype


def _quantized_graph(path: Path) -> bool:
    """Whether an ONNX graph multiplies by quantized weights."""
    return any(n.op_type in _QUANTIZED_NODES for n in onnx_reader.read(path).proto.graph.node)


_QUANTIZED_NODES = ("DequantizeLinear", "MatMulNBits", "MatMulInteger", "QMoE", "GatherBlockQuantized")
