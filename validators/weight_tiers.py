"""The tiers structure and tensors: does the artifact hold what it should, and does it say so truly?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lconvert.converters import replaced
from lconvert.errors import few
from lconvert.plan import manifest_path
from lconvert.validators import (
    carried,
    compressed,
    documents,
    onnx_engine,
    onnx_layers,
    onnx_tier,
    quantized_tier,
    structure,
    tensors,
    traits,
    vllm_config,
)
from lconvert.validators.proof import Proof

#: structure.manifest_hashes
Hashes = Mapping[str, tuple[str, str]]


def run(proof: Proof) -> tensors.TensorCheck | None:
    """Both tiers; the table of tensors, None where they were left out or the format has none yet."""
    wanted = {"structure", "tensors"} & set(proof.options.tiers)
    if not wanted:
        return None
    if proof.artifact is None:
        proof.not_proven.append("structure and tensors: only graphs that lconvert wrote are read into the IR")
        return None
    proof.progress("tensors")
    if proof.kind == "gguf":
        found = tensors.check_gguf(proof.path, proof.artifact, proof.expected)
    elif proof.graph is not None:
        found = onnx_tier.check(proof, proof.graph)
    else:
        found = tensors.check_folder(proof.path, proof.artifact, proof.expected)
    files, hashes = _files(proof), {}
    if "structure" in wanted or proof.carries:
        hashes = structure.manifest_hashes(files, proof.sha256)
    manifest = _manifest(proof, hashes)
    plan: Mapping[str, Any] = manifest.get("plan", {})
    if proof.carries:
        promises = carried.promised({"plan": plan})
        table = carried.judged(found.table, proof.artifact, proof.source, proof.expected, promises)
        if proof.graph is not None:  # no graph holds integers on another grid than the source's
            table = tuple(replace(r, carried="differs") if r.carried == "requantized" else r for r in table)
        found = replace(found, table=table)
    made = compressed.compare(proof, manifest) if "tensors" in wanted else None
    if made is not None:
        found = replace(found, table=tuple(replace(r, compressed=made.same.get(r.name)) for r in found.table))
    proof.details["tensors"] = found.to_json()
    proof.details["artifact"]["bits_per_weight"] = found.bits_per_weight
    if "structure" in wanted:
        _structure(proof, found, hashes, plan.get("options", {}))
        if proof.kind == "hf":
            quantized_tier.structure(proof)
            vllm_config.check(proof, str(plan.get("target", "")))
        elif proof.graph is not None:
            onnx_tier.structure(proof, proof.graph)
            onnx_engine.run(proof, proof.graph)
    if "tensors" in wanted:
        _values(proof, found, plan, made)
        if proof.kind == "hf":
            quantized_tier.independent(proof)
        elif proof.graph is not None:
            onnx_layers.check(proof, proof.graph)
        if proof.carries:
            _carried(proof, found)
    return found


def _files(proof: Proof) -> list[Path]:
    if proof.graph is not None and manifest_path(proof.path).is_file():
        return sorted(p for p in proof.path.parent.rglob("*") if p.is_file())
    return sorted(p for p in proof.path.rglob("*") if p.is_file()) if proof.path.is_dir() else proof.files


def _structure(proof: Proof, found: tensors.TensorCheck, hashes: Hashes, options: Mapping[str, Any]) -> None:
    assert proof.artifact is not None
    types = ", ".join(f"{n} {t}" for t, n in sorted(found.types.items()))
    proof.count("structure", "independent reader", found.structure, f"{found.tensors} tensors: {types}")
    if proof.kind == "gguf":
        differs = structure.gguf_traits(proof.source.decoder, proof.artifact.decoder)
    else:
        differs = traits.differences(proof.source.arch, proof.artifact.arch)
    proof.count("structure", "traits", differs, "as the source says")
    _hashes(proof, hashes)
    if proof.kind == "gguf":
        _claims(proof, options)


def _hashes(proof: Proof, found: Hashes) -> None:
    """All files of the artifact against the manifest beside the first of them."""
    name = "sha256 of the manifest"
    if len(found) == 1:
        ((seen, wanted),) = found.values()
        proof.add("structure", name, seen[:16], wanted[:16], seen == wanted)
    elif found:
        wrong = [f"{f} is {a[:16]}, expected {b[:16]}" for f, (a, b) in found.items() if a != b]
        proof.count("structure", name, wrong, f"{len(found)} files")


def _claims(proof: Proof, options: Mapping[str, Any]) -> None:
    """What the file's metadata says of its own tensors. options: those of its conversion, as far as they are known."""
    assert proof.artifact is not None and proof.header is not None
    wrong, fewer = structure.gguf_claims(proof.header, proof.artifact)
    proof.count("structure", "metadata", wrong, "agrees with the tensors")
    chosen = [name for name in _CHOSEN if options.get(name)]
    if chosen:
        value = f"by choice ({', '.join(chosen)}): {len(fewer)} have fewer bits"
        proof.add("structure", "tensor types", value, measured=len(fewer))
        proof.notes += [f"by choice: {text}" for text in fewer[:5]]
        return
    limit = float(proof.gates["mixture"]["fewer_bits"])
    value = f"{len(fewer)} have fewer bits" if fewer else "as llama.cpp's mixture of this name"
    proof.at_most("structure", "tensor types", value, len(fewer), limit, f"{limit:g} with fewer bits")
    proof.notes += [f"tensor types: {text}" for text in fewer[:5]]


def _manifest(proof: Proof, hashes: Hashes) -> Mapping[str, Any]:
    """The conversion's manifest: the one given, else the one beside the files if it is theirs."""
    given: Mapping[str, Any] | None = proof.details.get("manifest")
    if given is None:
        if not hashes or any(seen != wanted for seen, wanted in hashes.values()):
            return {}
        given = documents.beside(_files(proof)) or {}
    return given


#: options of a conversion that choose types other than the mixture's
_CHOSEN = ("tensor_types", "output_tensor_type", "token_embedding_type", "pure")


def _values(
    proof: Proof, found: tensors.TensorCheck, plan: Mapping[str, Any], made: compressed.Found | None
) -> None:
    """The tensors tier: exact where promised, close everywhere else. made: the comparison with the compressed model, if one was noted."""
    _independent(proof, found.max_difference)
    bad = [f"{r.name} holds {r.non_finite}" for r in found.table if r.non_finite]
    if bad:
        proof.count("tensors", "NaN or infinite values", bad, "")
    moved, compensated = methods(plan, proof.source.report)
    if made is not None:
        _compressed(proof, made, [*moved, *compensated])
    if moved and made is None:
        proof.not_proven.append(
            f"tensors: distances to the source's weights, which {' and '.join(moved)} replaced by others; what the model predicts is compared"
        )
        return
    if made is not None and (moved or compensated):
        # what equals the compressed model is no nearer to the source than the method wanted; the source says something of the rest
        left = [r for r in found.table if not made.same.get(r.name)]
        found = replace(found, table=tuple(r for r in left if r.name in made.unchanged or not moved))
        if all(r.name in made.unchanged for r in found.table):
            compensated = []
        if not found.table:
            return
    broken = found.broken_promises
    value = f"{found.exact} of {len(found.table)}"
    if any(r.promised for r in found.table):
        proof.at_most("tensors", "equal to the source", value, len(broken), 0, "all floats")
    proof.notes += [f"not equal to the source: {name}" for name in broken[:5]]
    _stock_blocks(proof, found)
    if not compensated:
        _nearest(proof, found)
    limit = float(proof.gates["relative_error"])
    wrong = found.by_type(lambda r: None if r.promised else r.relative_error)
    if wrong:
        error, role = max(wrong.values())
        name = "RMS error of the worst tensor"
        value = f"{error:.3g} of its RMS in {role}"
        proof.at_most("tensors", name, value, error, limit)
    limits_of_weights = proof.gates["compensated"] if compensated else proof.gates
    for title, column, limits in (
        ("worst block", lambda r: r.block_error, limits_of_weights["block_error"]),
        ("RMS of the worst block", lambda r: r.block_rms, proof.gates["block_rms"]),
        ("distance of the worst block in steps", lambda r: r.steps, proof.gates["grid_steps"]),
        ("bias of the worst block in steps", lambda r: r.bias, proof.gates["grid_bias"]),
        (
            "distance in steps, nearest codes",
            lambda r: r.steps if r.nearest == 1 else None,
            proof.gates["nearest_steps"],
        ),
        (
            "bias in steps, nearest codes",
            lambda r: r.bias if r.nearest == 1 else None,
            proof.gates["nearest_bias"],
        ),
        (
            "squared error against the stock encoder's",
            lambda r: r.stock_ratio,
            limits_of_weights["stock_ratio"],
        ),
        (
            "worst block against the stock encoder's",
            lambda r: r.error_ratio,
            limits_of_weights["error_ratio"],
        ),
    ):
        for type_, (error, role) in found.by_type(column).items():
            gate = float(limits.get(type_, limits["default"]))
            proof.at_most("tensors", f"{type_}: {title}", f"{error:.3g} in {role}", error, gate)
    for type_, (error, role) in found.by_type(lambda r: r.relative_error).items():
        if error:
            proof.notes.append(
                f"relative error of {type_} tensors against the source: up to {error:.3e} ({role})"
            )


def _compressed(proof: Proof, made: compressed.Found, passes: list[str]) -> None:
    """What the manifest notes of the compressed model: every value of every tensor that the target holds as it is."""
    value = f"{sum(made.same.values())} of {len(made.same)} tensors, every value"
    proof.count("tensors", "equal to the compressed model", made.wrong, value)
    if made.unproven:
        by = " and ".join(dict.fromkeys(passes)) or "a pass"
        proof.not_proven.append(
            f"tensors: what the target rounded of {few(made.unproven)}, which {by} had replaced; compare with the .lcir folder of lconvert compress "
            "in the source's place"
        )


def methods(plan: Mapping[str, Any], before: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Passes that a manifest names which changed what the weights are (transforms, masks), and those that rounded so that errors make up
    for each other, which no weight by itself can tell from a fault. before: the source's report, whose passes are in its weights already."""
    recipe = plan.get("options", {}).get("recipe") or {}
    said = [f"{name}: " for step in recipe.get("passes", ()) for name in step]
    said += [str(note) for note in plan.get("notes", ()) if note not in before]
    names = replaced.named(said)
    return replaced.moved(names), replaced.compensated(names)


def _carried(proof: Proof, found: tensors.TensorCheck) -> None:
    """A quantized source: every entry to the bit, or held in the way that its grid explains; activations and caches as stated."""
    assert proof.artifact is not None
    rows = [r for r in found.table if r.carried is not None]
    wrong = [
        f"{r.name}: {r.type}, relative error {r.relative_error:.2e}" for r in rows if r.carried == "differs"
    ]
    counts = {k: sum(r.carried == k for r in rows) for k in ("exact", "rounded", "requantized")}
    said = [f"{n} {k}" for k, n in counts.items() if n]
    proof.count("tensors", "carried", wrong, f"{', '.join(said) or 'no tensor'} of {len(rows)} quantized")
    for kind in ("rounded", "requantized"):
        some = [r for r in rows if r.carried == kind]
        if some:
            worst = max(some, key=lambda r: r.relative_error or 0)
            proof.notes.append(
                f"{kind}: {', '.join(r.name for r in some[:3])}{' ...' if some[3:] else ''}; relative error up to "
                f"{worst.relative_error:.2e} ({worst.name})"
            )
    left = carried.unstated(proof.expected, proof.artifact)
    if proof.kind == "gguf" or (proof.kind == "hf" and quantized_tier.weights_alone(proof)):
        proof.notes += left
    else:
        again = {r.name for r in rows if r.carried == "requantized"}
        wanted, unrounded = proof.expected, list[str]()
        if proof.graph is not None:
            wanted, unrounded = onnx_tier.unrounded(wanted, proof.graph)
        differs = list(carried.settings(wanted, proof.artifact, again))
        what = "as the source says, but for what is not proven" if unrounded else "as the source says"
        proof.count("tensors", "activations and KV cache", differs, what)
        proof.not_proven += [f"tensors: {text}" for text in unrounded]


def _independent(proof: Proof, worst: float | None) -> None:
    """Another program's reading of the values; of a folder that is what is stored, not what codes stand for."""
    if worst is None:
        proof.not_proven.append(
            "tensors: values that only torch reads, read independently (it is not installed)"
        )
    else:
        name = "independent dequantization" if proof.kind == "gguf" else "independent reading of values"
        proof.at_most("tensors", name, f"max |difference| {worst:g}", worst, 0, "0")
    if proof.kind == "lcir" and proof.quantized:
        proof.not_proven.append(
            "tensors and logits: another program's dequantization; only lconvert reads the codes of .lcir"
        )


def _stock_blocks(proof: Proof, found: tensors.TensorCheck) -> None:
    """Where most blocks are those of llama.cpp's encoder, all of them must be, or no further from the source."""
    compared = [r for r in found.table if r.stock_blocks is not None]
    if not compared:
        return
    same = sum(r.stock_blocks == 1 for r in compared)
    damaged = [f"{r.name} has {r.damaged} damaged blocks" for r in compared if r.damaged]
    proof.count(
        "tensors",
        "blocks of the stock encoder",
        damaged,
        f"{same} of {len(compared)} tensors block for block"
        + ("" if same == len(compared) else ", the others by another method"),
    )


def _nearest(proof: Proof, found: tensors.TensorCheck) -> None:
    """Codes that are not the nearest to the source's values."""
    judged = [r for r in found.table if r.nearest is not None]
    if judged:
        stray = [f"{r.name} has {r.stray} codes that are not the nearest" for r in judged if r.stray]
        grids = [r for r in judged if r.steps is not None]
        if 2 * sum(r.nearest == 1 for r in grids) > len(
            grids
        ):  # rounded to nearest: no tensor is an exception
            stray += [
                f"{r.name}: {1 - (r.nearest or 0):.1%} of its codes are not the nearest, where most tensors have none"
                for r in grids
                if r.nearest != 1 and not r.stray
            ]
        lowest = min(r.nearest for r in judged if r.nearest is not None)
        proof.count(
            "tensors", "nearest codes", stray, f"{100 * lowest:.2f}% or more in {len(judged)} tensors"
        )
