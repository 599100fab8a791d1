"""What quantized Hugging Face folders are asked besides: a second reading of their codes, and what serving runtimes assume of them.

Runtimes load q/k/v and gate/up as one matrix: where scales that exist once per tensor differ in it, vLLM takes the largest
without a word. Scales of weights alone are cast to the model's dtype when they are loaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lconvert.archs import find
from lconvert.archs.common import Bind, binds
from lconvert.converters import checkpoint, fusion, hf
from lconvert.converters.checkpoint_dtype import casts
from lconvert.converters.checkpoint_modules import FORMATS
from lconvert.converters.regrid import holds
from lconvert.errors import InputError, LconvertError
from lconvert.formats import safetensors
from lconvert.formats.json_object import read_object
from lconvert.formats.scheme import Held
from lconvert.forward import hf_tensor
from lconvert.interpreters import interpreter
from lconvert.ir import Model, QTensor, Tensor
from lconvert.kernels.qtensor import values
from lconvert.passes import fused
from lconvert.plan import Plan, refusals
from lconvert.validators import ct_worker, foreign, second_experts, second_reading
from lconvert.validators.proof import Proof, quantization_config
from lconvert.validators.runtimes.config import settings

#: Names of converters.checkpoint.FORMATS by quant_method, where they are another.
_FORMAT_OF: Mapping[str, str] = {"modelopt_fp4": "modelopt"}


def method(proof: Proof) -> str:
    """quant_method of the artifact, "" of a plain one."""
    return str(quantization_config(proof.path).get("quant_method", "")) if proof.kind == "hf" else ""


def weights_alone(proof: Proof) -> bool:
    """Whether the artifact's format has no place for the quantization of activations and caches."""
    return proof.kind == "hf" and method(proof) in ("", "gptq", "awq", "bitsandbytes", "auto-round", "mxfp4")


# --- structure ---------------------------------------------------------------------------------------------


def structure(proof: Proof) -> None:
    """Fused modules, scales that the model's dtype must hold, and the config in the eyes of the package that defines it."""
    assert proof.artifact is not None
    if not proof.quantized:
        return
    entries = proof.artifact.entries
    if any(isinstance(e.data, QTensor) for e in entries.values()):
        proof.count("structure", "fused modules", list(untied(proof.artifact)), "alike, with tied scales")
        wrong = list(cast_away(proof))
        proof.count("structure", "scales in the model's dtype", wrong, "hold")
    if proof.kind == "hf" and method(proof):
        wrong, uncompared = misstated(proof)
        if uncompared:
            proof.not_proven.append(
                f"structure: config and tensors against what a writer would state: {uncompared}"
            )
        if wrong or not uncompared:
            proof.count("structure", "config and tensors", wrong, "as the format's writer states them")


#: Keys of a quantization_config that runtimes act on and that the tensors themselves decide.
_DECIDED = (
    "bits",
    "group_size",
    "desc_act",
    "sym",
    "lm_head",
    "zero_point",
    "quant_algo",
    "weight_block_size",
)
#: Tensors that loaders do without.
_OPTIONAL = (".g_idx", "_scale_ub")


def misstated(proof: Proof) -> tuple[list[str], str]:
    """What the folder says of itself against what our writer would say of the same tensors: a claim that nothing bears out (an
    act-order, zero points, a quantized head), or a tensor under a name that loaders do not look for. Besides, why there was
    nothing to compare with, "" where there was."""
    assert proof.artifact is not None
    name, stated = _FORMAT_OF.get(method(proof), method(proof)), quantization_config(proof.path)
    if name == "gptq" and stated.get("checkpoint_format") == "gptq_v2":
        name = "gptq_v2"
    wrong = list(_bare_caches(proof.artifact))
    if name not in FORMATS:
        return wrong, f"lconvert does not write {name}"
    dtype = hf.stated_dtype(read_object(proof.path / "config.json"))
    try:
        plan = checkpoint.plan(proof.artifact, checkpoint.Options(format=name, dtype=dtype))
    except LconvertError as e:
        return wrong, str(e)
    if refused := refusals(plan):
        return wrong, refused[0]
    return wrong + list(_against(proof, plan, name, stated)), ""


def _bare_caches(model: Model) -> Iterator[str]:
    """Static scales of the KV cache that are announced and not stored."""
    sides = () if model.kv is None else (("keys", model.kv.k), ("values", model.kv.v))
    if bare := [side for side, spec in sides if not spec.dynamic and spec.scale is None]:
        yield f"KV cache: static scales of {' and '.join(bare)} are announced and not stored; a runtime takes 1"


def _against(proof: Proof, plan: Plan, name: str, stated: Mapping[str, Any]) -> Iterator[str]:
    assert proof.artifact is not None
    ours = json.loads(next(f.head for f in plan.files if f.name == "config.json")).get(
        "quantization_config", {}
    )
    for key in _DECIDED:
        if key in stated and key in ours and str(stated[key]).lower() != str(ours[key]).lower():
            yield f"{key} is {stated[key]!r}, the tensors say {ours[key]!r}"
    if name.startswith("gptq") and stated.get("sym") is False and _all_middle(proof.artifact):
        yield "sym is False although every zero point is the middle of its range; vLLM serves no GPTQ that says so"
    if (stated.get("format"), ours.get("format")) == ("int-quantized", "pack-quantized"):
        yield "format is int-quantized although inputs are not quantized; vLLM serves such weights packed only"
    if found := {
        n for f in proof.files if f.suffix == ".safetensors" for n in safetensors.read_header(f).tensors
    }:
        wanted = [i.name for i in plan.items() if i.held and not i.name.endswith(_OPTIONAL)]
        yield from (f"{n} is missing under the name that loaders look for" for n in wanted if n not in found)


def _all_middle(model: Model) -> bool:
    """Whether there are zero points and all say what symmetric codes would."""
    found = [e.data for e in model.entries.values() if isinstance(e.data, QTensor)]
    return bool(found) and all(
        q.zero is not None and bool((q.zero.load() == 1 << (q.grid.bits - 1)).all()) for q in found
    )


def untied(model: Model) -> Iterator[str]:
    """Fused modules whose parts are quantized differently, or whose scales of one number differ."""
    for group in fused.groups(model.decoder):
        members = {
            r: Held(e.data if isinstance(e.data, QTensor) else None, e.activation, e.transform)
            for r in group
            if (e := model.entries.get(r)) is not None
        }
        if len(members) < 2:
            continue
        same = fusion.unify(members)
        names = f"{next(iter(members)).rpartition('.')[0]}.{'/'.join(r.rpartition('.')[2] for r in members)}"
        if isinstance(same, str):
            yield f"{names}: {same}"
        elif any(same[r] is not held and same[r] != held for r, held in members.items()):
            yield f"{names}: one scale per tensor, and they differ; vLLM would take the largest"


def cast_away(proof: Proof) -> Iterator[str]:
    """Scales that a runtime casts to the model's dtype, which does not hold them."""
    assert proof.artifact is not None
    name = _FORMAT_OF.get(method(proof), method(proof))
    stated = read_object(proof.path / "config.json")
    dtype = hf.stated_dtype(stated)
    if name not in FORMATS or dtype is None:
        return
    for role, entry in proof.artifact.entries.items():
        q = entry.data
        if not isinstance(q, QTensor) or not isinstance(q.scale, Tensor):
            continue
        if casts(Held(q, entry.activation), name) and not holds(q.scale, dtype):
            yield f"{role}: scales in {q.scale.dtype} that {dtype}, the model's dtype, would round"


# --- a second reading --------------------------------------------------------------------------------------


def independent(proof: Proof) -> None:
    """The codes of the artifact, and of a quantized source, decoded by others: what was read must be the same numbers."""
    assert proof.artifact is not None
    _folder(proof, proof.path, proof.artifact, "independent dequantization")
    source = Path(proof.source.source)
    if proof.carries and source.is_dir() and source.resolve() != proof.path.resolve():
        _folder(proof, source, proof.source, "second decoding of the source")


def _folder(proof: Proof, folder: Path, model: Model, name: str) -> None:
    about = quantization_config(folder)
    if not any(isinstance(e.data, QTensor) for e in model.entries.values()):
        return
    matrices = {b.hf.removesuffix(".weight"): b for b in binds(find(model.arch.family).names, model.decoder)}
    if about.get("quant_method") == "compressed-tensors" and folder == proof.path:
        if (python := package_python(proof)) is None:
            proof.not_proven.append(
                "tensors: decompression by the package compressed-tensors, which is neither installed here nor in the "
                "interpreter of vLLM (lconvert.toml, --python vllm=PATH)"
            )
        else:
            _package(proof, folder, model, matrices, python)
    worst, count, left = 0.0, 0, []
    for module, theirs in second_reading.modules(folder, about):
        bind = matrices.get(module)
        if theirs is None or bind is None or bind.experts:
            left.append(module)
            continue
        worst = max(worst, _difference(model, bind, theirs))
        count += 1
    if about.get("quant_method") == "mxfp4":
        for role, theirs in second_experts.matrices(folder):
            worst, count = max(worst, _distance(_expert(model, role), theirs)), count + 1
    if count:
        value = f"max |difference| {worst:g} over {count} modules, by lconvert's second decoder"
        proof.at_most("tensors", f"{name}, bit by bit", value, worst, 0, "0")
    held = sum(isinstance(e.data, QTensor) for e in model.entries.values())
    if left or not count:
        method = about.get("quant_method", "this format")
        proof.not_proven.append(
            f"tensors: {name} of {len(left) or held} modules: no second decoder knows {method} as it is here"
        )


def _expert(model: Model, role: str) -> NDArray[np.float32]:
    """The values of one expert, none where the model has no such matrix."""
    entry = model.entries.get(role)
    return np.empty((0, 0), np.float32) if entry is None else values(entry.data)


def _difference(model: Model, bind: Bind, theirs: NDArray[np.float32]) -> float:
    ours = hf_tensor(model, bind)
    # codes lie as the product takes them, also where the plain weight is stored the other way (GPT-2's Conv1D)
    return _distance(ours.T if bind.transpose else ours, theirs)


def _distance(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    with np.errstate(invalid="ignore"):
        wrong = np.abs(ours.astype(np.float64) - theirs)
    return float(np.nan_to_num(wrong, nan=np.inf).max(initial=0.0))


def package_python(proof: Proof) -> str | None:
    """An interpreter that may have the package: this one, else vLLM's."""
    if find_spec("compressed_tensors"):
        return sys.executable
    found = proof.options.python.get("vllm") or settings("vllm").python
    return None if found is None else interpreter(found)


def _package(proof: Proof, folder: Path, model: Model, matrices: Mapping[str, Bind], python: str) -> None:
    """compressed-tensors' own decompression and config class."""
    worst, count, version = 0.0, 0, ""
    skipped: list[str] = []
    failed: list[str] = []
    refused: list[str] = []
    try:
        for head, theirs in _answers(python, folder):
            if "version" in head:
                version, refused = head["version"], head["refused"]
            elif theirs is None:
                (failed if "failed" in head else skipped).append(
                    f"{head['module']}: {head.get('failed') or head.get('skipped')}"
                )
            elif (bind := matrices.get(head["module"])) is not None:
                worst, count = max(worst, _difference(model, bind, theirs)), count + 1
    except InputError as e:
        proof.not_proven.append(f"tensors: decompression by the package compressed-tensors: {e}")
        return
    proof.count("structure", "config class of compressed-tensors", refused, f"accepts it ({version})")
    if refused:
        return
    if failed:
        proof.count("tensors", "compressed-tensors decompresses it", failed, "")
    if skipped:
        proof.not_proven.append(
            f"tensors: decompression of {len(skipped)} modules by compressed-tensors: {skipped[0]}"
        )
    if count:
        value = f"max |difference| {worst:g} over {count} modules, by compressed-tensors {version}"
        proof.at_most("tensors", "independent dequantization", value, worst, 0, "0")


def _answers(python: str, folder: Path) -> Iterator[tuple[dict[str, Any], NDArray[np.float32] | None]]:
    """What ct_worker writes: a line of JSON, and the matrix where there is one. InputError where it fails."""
    how = foreign.started(python, ct_worker.__file__, folder)
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(**how, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        assert process.stdout is not None
        yield from _lines(process.stdout)
        if process.wait(foreign.TIMEOUT):
            errors.seek(0)
            raise InputError(foreign.failure(python, errors.read()))


def _lines(stream: IO[bytes]) -> Iterator[tuple[dict[str, Any], NDArray[np.float32] | None]]:
    for line in iter(stream.readline, b""):
        head = json.loads(line)
        shape = head.get("shape")
        if shape is None:
            yield head, None
            continue
        yield head, np.frombuffer(stream.read(4 * int(np.prod(shape))), np.float32).reshape(shape)
