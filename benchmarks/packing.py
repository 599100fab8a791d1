"""Speed of the packing kernels against the Python packing of their peers, one thread each, in the same process.

    PYTHONPATH=src python -P benchmarks/packing.py [--size 4096] [--rounds 7] [--json out.json]

Peers are compressed_tensors (`pack_to_int32`, `unpack_from_int32`) and vLLM (`quant_utils`: `gptq_pack`, `awq_pack`,
`unpack_cols`, `unpack_quantized_values_into_int32`) where this interpreter has them: run it with the one that
LCONVERT_VLLM_PYTHON names. A peer's function is timed as it is, without the transpose or the narrowing to bytes that a
converter still needs after it; its result is brought into our form only to be compared. "reference" is our own NumPy
specification, which serves where no compiler was. All take turns and the best CPU time of each counts, so that other
load on the machine matters little. Speeds are MB of packed bytes per second.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert import kernels
from lconvert.kernels import packing
from lconvert.kernels.reference import family
from lconvert.kernels.reference import packing as reference

SLAB = 256  # rows that a conversion holds at a time
GGUF_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "NVFP4")

Array = NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One piece of work on `nbytes` packed bytes: whole or as slabs of rows. `same` brings the peer's result into the
    form of ours."""

    name: str
    nbytes: int
    ours: Callable[[], Array | list[Array]]
    reference: Callable[[], Array]
    peer: Callable[[], Any] | None = None
    same: Callable[[Any], Array] = np.asarray


def peers() -> dict[str, Callable[..., Any]]:
    """The peers' functions that can be imported here."""
    found: dict[str, Callable[..., Any]] = {}
    try:
        helpers = import_module("compressed_tensors.compressors.pack_quantized.helpers")
        found |= {"ct_pack": helpers.pack_to_int32, "ct_unpack": helpers.unpack_from_int32}
        quant_utils = import_module("vllm.model_executor.layers.quantization.utils.quant_utils")
        uint4 = import_module("vllm.scalar_type").scalar_types.uint4b8

        def unpack_dim0(words: Any) -> Any:
            return quant_utils.unpack_quantized_values_into_int32(words, uint4, 0)

        found |= {
            "gptq_unpack": unpack_dim0,
            "gptq_pack": quant_utils.gptq_pack,
            "awq_pack": quant_utils.awq_pack,
            "awq_unpack": quant_utils.unpack_cols,
        }
    except ImportError as missing:
        print(f"without peers: {missing}")
    return found


def slabs(run: Callable[[slice], Array], rows: int) -> list[Array]:
    """`run` on SLAB rows at a time, as a conversion does."""
    return [run(slice(row, row + SLAB)) for row in range(0, rows, SLAB)]


def checkpoint_cases(size: int) -> Iterator[Case]:
    """The layouts of checkpoints, on a square weight."""
    known = peers()
    codes = np.random.default_rng(0).integers(0, 16, (size, size), dtype=np.uint8)
    signed = (codes - np.uint8(8)).view(np.int8)
    rows, columns, awq = packing.pack_rows(codes, 4), packing.pack_columns(codes, 4), packing.pack_awq(codes)
    low = codes & np.uint8(7)
    three = (low - np.uint8(4)).view(np.int8)
    narrow = packing.pack_rows(low, 3, stream=False)
    call: dict[str, Callable[[], Any]] = {}
    if known:
        import torch

        torch.set_num_threads(1)
        t_signed, t_three = (
            torch.from_numpy(signed),
            torch.from_numpy(three),
        )
        t_rows, t_columns, t_awq, t_narrow = (
            torch.from_numpy(words.view(np.int32)) for words in (rows, columns, awq, narrow)
        )
        t_turned = torch.from_numpy(np.ascontiguousarray(codes.T).astype(np.int32))
        shape = torch.Size((size, size))
        call = {
            "unpack rows": lambda: known["ct_unpack"](t_rows, 4, shape),
            "pack rows": lambda: known["ct_pack"](t_signed, 4),
            "unpack words of 3": lambda: known["ct_unpack"](t_narrow, 3, shape),
            "pack words of 3": lambda: known["ct_pack"](t_three, 3),
        }
        if "gptq_pack" in known:
            call |= {
                "unpack columns": lambda: known["gptq_unpack"](t_columns),
                "pack columns": lambda: known["gptq_pack"](t_turned, 4, size, size),
                "unpack AWQ": lambda: known["awq_unpack"](t_awq, 4, size, size),
                "pack AWQ": lambda: known["awq_pack"](t_turned, 4, size, size),
                "GPTQ to compressed-tensors": lambda: known["ct_pack"](
                    (known["gptq_unpack"](t_columns) - 8).to(torch.int8).t(), 4
                ),
                "compressed-tensors to GPTQ": lambda: known["gptq_pack"](
                    (known["ct_unpack"](t_rows, 4, shape).to(torch.int32) + 8).t(), 4, size, size
                ),
            }

    def words(result: Any) -> Array:
        return np.asarray(result).view(np.uint32)

    def awq_columns(result: Any) -> Array:
        return (
            np.asarray(result).reshape(size, -1, 8)[:, :, np.argsort(reference.AWQ_ORDER)].reshape(size, -1).T
        )

    def filled(codes_of: Callable[[slice], Array], signed: bool = False) -> Array:
        """GPTQ's words of codes that come as slabs."""
        out = np.empty_like(columns)
        slabs(lambda s: packing.pack_columns(codes_of(s), 4, signed=signed, out=out, start=s.start), size)
        return out

    def case(
        name: str, packed: Array, ours: Any, spec: Any, same: Callable[[Any], Array] = np.asarray
    ) -> Case:
        return Case(name, packed.nbytes, ours, spec, call.get(name), same)

    yield case(
        "unpack rows",
        rows,
        lambda: packing.unpack_rows(rows, 4, size, signed=True),
        lambda: reference.unpack_rows(rows, 4, size, True),
    )
    yield case(
        "pack rows",
        rows,
        lambda: packing.pack_rows(signed, 4, signed=True),
        lambda: reference.pack_rows(codes, 4, True),
        words,
    )
    yield case(
        "unpack words of 3",
        narrow,
        lambda: packing.unpack_rows(narrow, 3, size, signed=True, stream=False),
        lambda: reference.unpack_rows(narrow, 3, size, False),
    )
    yield case(
        "pack words of 3",
        narrow,
        lambda: packing.pack_rows(three, 3, signed=True, stream=False),
        lambda: reference.pack_rows(low, 3, False),
        words,
    )
    yield case(
        "unpack columns",
        columns,
        lambda: packing.unpack_columns(columns, 4, size),
        lambda: reference.unpack_columns(columns, 4, size),
        lambda result: np.asarray(result).T,
    )
    yield case(
        "pack columns",
        columns,
        lambda: packing.pack_columns(codes, 4),
        lambda: reference.pack_columns(codes, 4),
        words,
    )
    yield case(
        "unpack AWQ", awq, lambda: packing.unpack_awq(awq), lambda: reference.unpack_awq(awq), awq_columns
    )
    yield case("pack AWQ", awq, lambda: packing.pack_awq(codes), lambda: reference.pack_awq(codes), words)
    yield case(
        "GPTQ to compressed-tensors",
        columns,
        lambda: slabs(
            lambda s: packing.pack_rows(
                packing.unpack_columns(columns, 4, size, start=s.start, stop=s.stop), 4
            ),
            size,
        ),
        lambda: reference.pack_rows(reference.unpack_columns(columns, 4, size), 4, True),
        words,
    )
    yield case(
        "compressed-tensors to GPTQ",
        columns,
        lambda: filled(lambda s: packing.unpack_rows(rows[s], 4, size)),
        lambda: reference.pack_columns(reference.unpack_rows(rows, 4, size, True), 4),
        words,
    )
    legacy = family("Q4_0")
    scale = np.ones((size, size // 32), np.float16)
    blocks = kernels.pack("Q4_0", {"codes": signed, "scale": scale})

    def to_q4(s: slice) -> Array:
        found = packing.unpack_columns(columns, 4, size, signed=True, start=s.start, stop=s.stop)
        return kernels.pack("Q4_0", {"codes": found, "scale": scale[s]})

    def spec_to_q4() -> Array:
        found = (reference.unpack_columns(columns, 4, size) - np.uint8(8)).view(np.int8)
        return legacy.PACK["Q4_0"]({"codes": found, "scale": scale})  # type: ignore[no-any-return]

    yield case("GPTQ to Q4_0", columns, lambda: slabs(to_q4, size), spec_to_q4)
    yield case(
        "Q4_0 to GPTQ",
        columns,
        lambda: filled(lambda s: kernels.unpack("Q4_0", blocks[s])["codes"], signed=True),
        lambda: reference.pack_columns(
            legacy.UNPACK["Q4_0"](blocks)["codes"].view(np.uint8) + np.uint8(8), 4
        ),
    )


def block_cases(size: int) -> Iterator[Case]:
    """GGUF blocks of arbitrary bytes, compared by their codes."""
    for type in GGUF_TYPES:
        row_bytes = kernels.BLOCKS[type].row_bytes(size)
        blocks = np.random.default_rng(1).integers(0, 256, (size, row_bytes), dtype=np.uint8)
        parts, spec = kernels.unpack(type, blocks), family(type)
        yield Case(
            f"unpack {type}",
            blocks.nbytes,
            lambda type=type, blocks=blocks: kernels.unpack(type, blocks)["codes"],  # type: ignore[misc]
            lambda type=type, blocks=blocks, spec=spec: spec.UNPACK[type](blocks)["codes"],  # type: ignore[misc]
        )
        yield Case(
            f"pack {type}",
            blocks.nbytes,
            lambda type=type, parts=parts: kernels.pack(type, parts),  # type: ignore[misc]
            lambda type=type, parts=parts, spec=spec: spec.PACK[type](parts),  # type: ignore[misc]
        )


def whole(result: Array | list[Array]) -> Array:
    return np.concatenate(result) if isinstance(result, list) else result


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Best MB/s of each contender."""
    contenders: dict[str, Callable[[], Any]] = {"lconvert": case.ours, "reference": case.reference}
    if case.peer:
        contenders["peer"] = case.peer
    best: dict[str, float] = {}
    results: dict[str, Any] = {}
    for turn in range(rounds):
        for name, run in contenders.items():
            if name == "reference" and turn > 1:
                continue  # slow and steady
            start = time.process_time()
            results[name] = run()
            best[name] = min(best.get(name, np.inf), time.process_time() - start)
    equal = not case.peer or np.array_equal(case.same(results["peer"]), whole(results["lconvert"]))
    speed = {name: case.nbytes / taken / 1e6 for name, taken in best.items()}
    return {
        "case": case.name,
        "bytes": case.nbytes,
        "equal": equal,
        "mb_per_s": {name: round(value, 1) for name, value in speed.items()},
        "ratio": {
            name: round(speed["lconvert"] / value, 1) for name, value in speed.items() if name != "lconvert"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", type=int, default=4096, help="rows and columns of the weight (default 4096)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of every contender (default 7)")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args()

    print(f"{'case':27} {'lconvert':>9}  {'peer':>15}  {'reference':>15}   MB/s (times as fast)")
    results = []
    for cases in (checkpoint_cases, block_cases):
        for case in cases(options.size):
            result = measure(case, options.rounds)
            results.append(result)
            speed, ratio = result["mb_per_s"], result["ratio"]
            columns = "  ".join(
                f"{speed[name]:7.1f} ({ratio[name]:5.1f})" if name in speed else f"{'-':>15}"
                for name in ("peer", "reference")
            )
            verdict = "" if result["equal"] else "   RESULTS DIFFER"
            print(f"{case.name:27} {speed['lconvert']:9.1f}  {columns}{verdict}", flush=True)
    if options.json:
        report = {
            "machine": platform.processor() or platform.machine(),
            "size": options.size,
            "results": results,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
