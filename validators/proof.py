"""The state of one validation: both models, the options, and what has been found so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lconvert.errors import InputError, MissingPackageError, RuntimeFailure
from lconvert.formats import gguf as container
from lconvert.ir import Model, QTensor
from lconvert.validators.report import TIERS, Check


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
    """What is known so far. `artifact` is None for formats that are not read into the IR."""

    source: Model
    artifact: Model | None
    path: Path
    kind: str
    gates: dict[str, Any]
    options: Options
    progress: Callable[[str], None]
    checks: list[Check] = field(default_factory=list)
    not_proven: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    missing_required: bool = False

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

    def count(self, tier: str, name: str, wrong: Sequence[str], what: str) -> None:
        """A hard gate on a list of differences; the first few become notes."""
        value = f"{len(wrong)} differ" if wrong else what
        self.add(tier, name, value, "0 differ", not wrong, measured=len(wrong), limit=0)
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

    def read_text(self) -> str:
        """The evaluation text; InputError for one that is unreadable or says nothing."""
        path = self.options.text
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

    @property
    def quantized(self) -> bool:
        """Whether the artifact holds tensors on a grid."""
        if self.kind == "onnx":
            return _quantized_graph(self.path)
        return self.artifact is not None and any(
            isinstance(e.data, QTensor) for e in self.artifact.entries.values()
        )

    @property
    def rounded(self) -> bool:
        """Whether some float tensor is stored in a type that is neither the source's nor F32."""
        if self.artifact is None:
            return False
        return any(
            not isinstance(e.data, QTensor) and e.data.dtype not in ("F32", _dtype(self.source, name))
            for name, e in self.artifact.entries.items()
        )


def builtin_text() -> str:
    """The public-domain excerpt that proofs use when no text is given."""
    return (Path(__file__).with_name("text") / "excerpt.txt").read_text(encoding="utf-8")


def _dtype(model: Model, role: str) -> str:
    data = model.entries[role].data
    return "" if isinstance(data, QTensor) else data.dtype


def files(path: Path) -> list[Path]:
    """The artifact's files: all shards of a split one, the weights of a folder, external data beside a graph."""
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file())
    if path.suffix == ".gguf":
        return list(container.read(path).paths)
    return sorted({path, *path.parent.glob(f"{path.name}*data")})


def _quantized_graph(path: Path) -> bool:
    """Whether an ONNX graph multiplies by quantized weights."""
    try:
        import onnx
    except ImportError:
        raise MissingPackageError("onnx is not installed: pip install 'lconvert[onnx]'") from None
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as e:  # noqa: BLE001 - protobuf has its own errors
        raise InputError(f"{path}: is not an ONNX file ({e})") from None
    return any(n.op_type in _QUANTIZED_NODES for n in graph.node)


_QUANTIZED_NODES = ("DequantizeLinear", "MatMulNBits", "MatMulInteger", "QMoE", "GatherBlockQuantized")
