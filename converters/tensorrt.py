"""TensorRT engines out of ONNX graphs: what is asked of the builder, what it says, and what is written.

Two back ends with one interface: `tensorrt` builds for GPUs of the host it runs on, `tensorrt_rtx` ahead of time for compute capabilities
that are named, without a GPU. Neither runs the engine here, and the label of every report says so. Flags and profiles:
IBuilderConfig and IOptimizationProfile of NvInfer.h.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lconvert import __version__, interrupt
from lconvert.converters import trt_messages, trt_rules
from lconvert.errors import InputError, MissingPackageError, OptionError, OutputError, UnsupportedError
from lconvert.formats import onnx_reader
from lconvert.formats.onnx_reader import OnnxFile
from lconvert.plan import manifest_path


@dataclass(frozen=True)
class Backend:
    """A TensorRT package. label: what a build of it is, and is not."""

    name: str
    install: str
    label: str


BACKENDS: Mapping[str, Backend] = {
    "tensorrt": Backend("tensorrt", "pip install tensorrt (on a host with NVIDIA's driver)", "TensorRT {version}, built on this host, not run"),
    "tensorrt_rtx": Backend("tensorrt_rtx", "pip install 'lconvert[tensorrt]' (Linux or Windows, x86_64)", "TensorRT-RTX {version}, ahead of time, not run"),
}  # fmt: skip

Range = tuple[int, int, int]


@dataclass(frozen=True)
class Options:
    """batch, sequence, past: least, usual and most of a dimension. sms: compute capabilities (89, 120); () for the host's GPU.
    hardware: none, ampere+ or same. refit: none, identical, all or individual; strip leaves weights out of the plan, for refit to put
    back. workspace: bytes, level: of the builder's optimization."""

    backend: str = "auto"
    batch: Range = (1, 1, 1)
    sequence: Range = (1, 1, 512)
    past: Range = (0, 0, 1024)
    sms: tuple[int, ...] = ()
    timing_cache: str = ""
    version_compatible: bool = False
    hardware: str = "none"
    strip: bool = False
    refit: str = "none"
    weight_streaming: bool = False
    sparse: bool = False
    workspace: int | None = None
    level: int | None = None

    def __post_init__(self) -> None:
        if self.backend not in ("auto", *BACKENDS):
            raise OptionError(f"backend {self.backend!r}; choose auto, {', '.join(BACKENDS)}")
        for name, least in (("batch", 1), ("sequence", 1), ("past", 0)):
            low, usual, most = getattr(self, name)
            if not least <= low <= usual <= most:
                raise OptionError(
                    f"{name} {low}:{usual}:{most}; give {least} or more as min:opt:max, ascending"
                )
        for name, table in (("hardware", _HARDWARE), ("refit", _REFIT)):
            if getattr(self, name) not in table:
                raise OptionError(f"{name} {getattr(self, name)!r}; choose {', '.join(table)}")
        if self.strip and self.refit == "none":
            object.__setattr__(self, "refit", "identical")


_HARDWARE = {"none": "NONE", "ampere+": "AMPERE_PLUS", "same": "SAME_COMPUTE_CAPABILITY"}
_REFIT = {"none": "", "identical": "REFIT_IDENTICAL", "all": "REFIT", "individual": "REFIT_INDIVIDUAL"}
REFIT_WARNING = (
    "refit all/individual: TensorRT's guide warns of wrong numbers (a product's bias dropped) even before a refit; identical has none of it"
)  # fmt: skip


def span(text: str) -> Range:
    """'1:8:64', or one number for all three."""
    found = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}):(\d{1,9}))?", text.strip())
    if not found:
        raise OptionError(f"{text!r}: expected min:opt:max, such as 1:8:64, or one number")
    low = int(found[1])
    return low, int(found[2] or low), int(found[3] or low)


def load(name: str = "auto") -> tuple[Backend, Any]:
    """The package: the one that is named, or the first that is installed. MissingPackageError says what to install."""
    for b in BACKENDS.values() if name == "auto" else (BACKENDS[name],):
        try:
            return b, importlib.import_module(b.name)
        except ImportError as e:
            if name != "auto" and e.name not in (None, b.name):
                raise MissingPackageError(
                    f"{b.name} is installed but does not load ({e}): {b.install}"
                ) from None
    wanted = list(BACKENDS) if name == "auto" else [name]
    how = " or ".join(BACKENDS[w].install for w in wanted)
    raise MissingPackageError(f"{' and '.join(wanted)}: not installed, so no engine can be built: {how}")


# --- building ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What was built. layers: of the parsed network by type and precision; kernels are chosen when an engine is loaded."""

    label: str
    backend: str
    version: str
    layers: Mapping[str, int]
    sizes: Mapping[str, int]
    seconds: Mapping[str, float]
    inputs: Mapping[str, Mapping[str, Any]]
    outputs: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "notes": list(self.notes)}


def dimensions(
    name: str, shape: Sequence[int], which: int, options: Options, *, cached: bool = True
) -> tuple[int, ...]:
    """An input's shape at the profile's least (0), usual (1) or most (2). UnsupportedError for an input that no exporter names so.

    cached: the graph has keys and values of the past as inputs. A cache of fixed length has that length (onnx_static.py).
    """
    batch, sequence, past = (getattr(options, k)[which] for k in ("batch", "sequence", "past"))
    if -1 not in shape:
        return tuple(shape)
    if name in ("input_ids", "position_ids", "token_type_ids"):
        return (batch, sequence)
    if name == "attention_mask":
        return (batch, sequence + past * cached if shape[1] == -1 else shape[1])
    if name.startswith("past_key_values.") and len(shape) == 4:
        return (batch, shape[1], past if shape[2] == -1 else shape[2], shape[3])
    if list(shape).count(-1) == 1 and shape[0] == -1:
        return (batch, *shape[1:])
    raise UnsupportedError(
        f"input {name} of shape {tuple(shape)}: its dynamic dimensions are not those of a decoder or a batch"
    )


def _configure(trt: Any, builder: Any, network: Any, options: Options) -> Any:
    config = builder.create_builder_config()
    flags = {
        "VERSION_COMPATIBLE": options.version_compatible,
        "EXCLUDE_LEAN_RUNTIME": options.version_compatible and trt.__name__ == "tensorrt_rtx",
        "STRIP_PLAN": options.strip,
        _REFIT[options.refit]: options.refit != "none",
        "WEIGHT_STREAMING": options.weight_streaming,
        "SPARSE_WEIGHTS": options.sparse,
    }
    for name in (n for n, wanted in flags.items() if wanted):
        if not hasattr(trt.BuilderFlag, name):
            raise OptionError(f"{trt.__name__} {trt.__version__} has no {name}; leave the option out")
        config.set_flag(getattr(trt.BuilderFlag, name))
    if options.hardware != "none":
        config.hardware_compatibility_level = getattr(
            trt.HardwareCompatibilityLevel, _HARDWARE[options.hardware]
        )
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.level is not None:
        config.builder_optimization_level = options.level
    if options.sms:
        known = {int(n[2:]): n for n in dir(getattr(trt, "ComputeCapability", None)) if re.fullmatch(r"SM\d+", n)}  # fmt: skip
        if not known:
            raise OptionError(f"{trt.__name__} builds for this host's GPU alone; leave --sm out")
        for sm in options.sms:
            if sm not in known:
                raise OptionError(
                    f"--sm {sm}: {trt.__name__} {trt.__version__} builds for {', '.join(map(str, sorted(known)))}"
                )
        config.num_compute_capabilities = len(options.sms)
        for i, sm in enumerate(options.sms):
            config.set_compute_capability(getattr(trt.ComputeCapability, known[sm]), i)
    profile = builder.create_optimization_profile()
    for name, given in _inputs(network, options).items():
        if given["dynamic"]:
            try:
                profile.set_shape(name, given["min"], given["opt"], given["max"])
            except (RuntimeError, TypeError) as e:
                raise UnsupportedError(
                    f"input {name}: no profile {given['min']} .. {given['max']} ({e})"
                ) from None
    config.add_optimization_profile(profile)
    return config


def _parse(trt: Any, builder: Any, logger: Any, path: Path) -> tuple[Any, Any]:
    strong = int(getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", 0))
    network = builder.create_network(1 << strong)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        said = [f"{e.node_name() or 'the graph'} ({e.node_operator() or 'initializer'}): {trt_messages.short(e.desc())}" for e in errors[:3]]  # fmt: skip
        raise UnsupportedError(f"{path}: the parser refuses {'; '.join(said) or 'the graph'}")
    return network, parser  # weights belong to the parser


def _layers(network: Any) -> dict[str, int]:
    """Layers by type and the type of their first output."""
    found: Counter[str] = Counter()
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        kind = str(layer.type).rpartition(".")[2]
        types = str(layer.get_output_type(0)).rpartition(".")[2] if layer.num_outputs else "-"
        found[f"{kind} {types}"] += 1
    return dict(sorted(found.items(), key=lambda kv: (-kv[1], kv[0])))


def _run(trt: Any, builder: Any, network: Any, config: Any, progress: Callable[[str], None] | None) -> Any:
    """The serialized engine, or None. Ctrl-C cancels it between two steps of the builder."""
    stopped = False

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if progress:
                progress(name)

        def phase_finish(self, name: str) -> None:
            pass

        def step_complete(self, name: str, step: int) -> bool:
            return not stopped

    monitor = Monitor()
    config.progress_monitor = monitor
    with interrupt.deferred() as check, ThreadPoolExecutor(1, thread_name_prefix="builder") as pool:
        future = pool.submit(builder.build_serialized_network, network, config)
        try:
            return interrupt.result(future, check)
        except KeyboardInterrupt:
            stopped = True
            raise


def build(
    source: str | Path,
    output: str | Path,
    options: Options = Options(),
    *,
    force: bool = False,
    told: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[Report, dict[str, Any]]:
    """Write the engine of an ONNX file and its manifest; returns the report and the manifest.

    told: more for the manifest (where the graph comes from). Raises InputError, UnsupportedError (a rule, the parser or the builder
    refuses), OptionError, MissingPackageError, OutputError; nothing is left behind then.
    """
    path, out = Path(source), Path(output)
    refuse_output(out, force)
    backend, trt = load(options.backend)
    model = onnx_reader.read(path)
    if not options.sms and trt.__name__ == "tensorrt_rtx":
        options = replace(options, sms=targets(model))
    trt_rules.require(model, options.sms)
    held, wanted = positions(model), options.sequence[2] + options.past[2]
    if held is not None and wanted > held:
        raise OptionError(
            f"sequence and past reach {wanted} positions, the graph has {held}; lower the profile's most"
        )
    logger, messages = trt_messages.logger(trt)
    notes = [REFIT_WARNING] if options.refit in ("all", "individual") else []
    start = time.perf_counter()
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore", DeprecationWarning)
        builder = trt.Builder(logger)
        network, parser = _parse(trt, builder, logger, path)
        parsed = time.perf_counter()
        config = _configure(trt, builder, network, options)
        cache = _with_cache(trt, config, options, notes)
        made = _run(trt, builder, network, config, progress)
    built = time.perf_counter()
    if made is None:
        raise UnsupportedError(
            f"{path}: no engine: {trt_messages.explain(messages, 'the builder gave no reason')}"
        )
    notes += dict.fromkeys(
        trt_messages.short(m.text)
        for m in messages
        if m.severity == "warning" and not trt_messages.NOISE.search(m.text)
    )
    report = Report(
        backend.label.format(version=trt.__version__),
        trt.__name__,
        trt.__version__,
        _layers(network),
        {"onnx": sum(p.stat().st_size for p in model.files), "plan": made.nbytes},
        {"parse": round(parsed - start, 3), "build": round(built - parsed, 3)},
        _inputs(network, options),
        {o.name: _port(o) for o in map(network.get_output, range(network.num_outputs))},
        tuple(notes[:20]),
    )
    del parser
    data = memoryview(made)
    manifest = {
        "format": "lconvert-engine/1",
        "lconvert": __version__,
        "label": report.label,
        "engine": {"name": out.name, "size": made.nbytes, "sha256": hashlib.sha256(data).hexdigest()},
        "onnx": {"name": path.name, "sha256": model.digest()},
        "options": {k: list(v) if isinstance(v, tuple) else v for k, v in vars(options).items()},
        "built_for": [f"SM{sm}" for sm in options.sms] or ["the GPU of the host that built it"],
        **(told or {}),
        "report": report.to_json(),
    }
    _write(out, data, manifest)
    if cache is not None:
        _replace(Path(options.timing_cache), bytes(config.get_timing_cache().serialize()))
    return report, manifest


def targets(model: OnnxFile) -> tuple[int, ...]:
    """What RTX builds for if nothing is said: Ampere to Blackwell, as far as they have the graph's types."""
    return trt_rules.targets(model, (80, 86, 89, 120))


def ahead_of_time() -> tuple[Backend, Any]:
    """The package that needs no GPU, or else the one there is."""
    try:
        return load("tensorrt_rtx")
    except MissingPackageError:
        return load()


def parse(path: Path, backend: str = "auto") -> dict[str, int]:
    """Layers of the network that the parser makes, by type and precision; UnsupportedError where it refuses the graph."""
    _, trt = load(backend)
    logger, _ = trt_messages.logger(trt)
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore", DeprecationWarning)
        builder = trt.Builder(logger)
        network, parser = _parse(trt, builder, logger, path)
        found = _layers(network)
        del network, parser
    return found


def _with_cache(trt: Any, config: Any, options: Options, notes: list[str]) -> Any:
    """The timing cache of a file, or a new one; None without the option, or where the back end has none."""
    if not options.timing_cache:
        return None
    if trt.__name__ == "tensorrt_rtx":
        notes.append(
            "TensorRT-RTX has no timing cache (it times nothing ahead of time); the file is left alone"
        )
        return None
    path = Path(options.timing_cache)
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise InputError(f"{path}: is no timing cache of {trt.__name__} {trt.__version__}; remove it")
    return cache


def _inputs(network: Any, options: Options) -> dict[str, dict[str, Any]]:
    given = [network.get_input(i) for i in range(network.num_inputs)]
    cached = any(i.name.startswith("past_key_values.") for i in given)
    found = {}
    for i in given:
        shape = tuple(i.shape)
        three = [list(dimensions(i.name, shape, w, options, cached=cached)) for w in range(3)]
        kind = _port(i) | {"dynamic": -1 in shape}
        found[i.name] = kind | dict(zip(("min", "opt", "max"), three, strict=True))
    return found


def _port(tensor: Any) -> dict[str, Any]:
    return {"type": str(tensor.dtype).rpartition(".")[2], "shape": list(tensor.shape)}


def positions(model: onnx_reader.OnnxFile) -> int | None:
    """How many positions the tables of a graph hold: those that position_ids choose rows of."""
    rows = {t.name: t.shape[0] for t in model.tensors.values() if t.shape}
    found = [rows[n.input[0]] for n in model.proto.graph.node if n.op_type == "Gather" and len(n.input) > 1 and n.input[1] == "position_ids" and n.input[0] in rows]  # fmt: skip
    return min(found, default=None)


# --- files -------------------------------------------------------------------------------------------------


def refuse_output(out: Path, force: bool) -> None:
    """OutputError for an engine that cannot be written there."""
    if out.is_dir():
        raise OutputError(f"{out}: is a folder; name a file such as model.plan")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"{out}: its folder does not exist; make it first")
    for path in (out, manifest_path(out)):
        if path.exists() and not force:
            raise OutputError(f"{path}: exists; --force replaces it")


def _write(out: Path, data: Any, manifest: Mapping[str, Any]) -> None:
    _replace(out, data)
    _replace(manifest_path(out), (json.dumps(manifest, indent=1) + "\n").encode())


def _replace(path: Path, data: Any) -> None:
    """All of a file or nothing of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise OutputError(f"{path}: cannot be written ({e.strerror or e})") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """The builder's compiler prints to the process's stderr beside the logger; that goes nowhere."""
    import sys

    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
