"""The oracle: llama.cpp's own converter and quantizer, driven from the tests.

`convert` runs convert_hf_to_gguf.py from the source distribution of llama-cpp-python in a fresh process. Its lookup
of the BPE pre-tokenizer (a list of hashes of known models) is replaced by a given name, because test models are not
on that list. `quantize` and `plan` call llama_model_quantize of the installed llama_cpp, what llama-quantize calls.

The sources are found through LCONVERT_LLAMACPP_SRC or in .venv/share/llama.cpp (`pip download --no-binary :all:
--no-deps llama-cpp-python==0.3.36`, then vendor/llama.cpp of the archive).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.converters.gguf_mixture_rules import ALIASES, FTYPES
from lconvert.kernels.blocks import BLOCKS

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"
VERSION = "0.3.36"

# Runs before the converter: argv is (source folder, pre-tokenizer or "", converter arguments...).
_RUNNER = """
import sys
source, pre = sys.argv[1], sys.argv[2]
sys.argv = [source + "/convert_hf_to_gguf.py", *sys.argv[3:]]
sys.path.insert(0, source)
import convert_hf_to_gguf
from conversion.base import TextModel
if pre:
    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
convert_hf_to_gguf.main()
"""

# One tensor's line of llama_model_quantize (llama-quant.cpp, main loop); the last group is absent when it is kept.
_LINE = re.compile(
    r"^\[ *\d+/ *\d+\] (?P<name>\S+) +- \[[^\]]*\], type = +(?P<source>\S+), "
    r"size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((?P<target>\S+)\))?$",
    re.MULTILINE,
)


class UpstreamError(RuntimeError):
    """llama.cpp refused; the message is the end of what it printed."""


def source_folder() -> Path:
    """The unpacked llama.cpp sources of llama-cpp-python 0.3.36 (the folder may be missing, see `available`)."""
    given = os.environ.get("LCONVERT_LLAMACPP_SRC")
    return Path(given) if given else REPO / ".venv" / "share" / "llama.cpp"


def available() -> str | None:
    """None when both converter and quantizer can run, else what is missing (for pytest.skip)."""
    return quantizer_available() or converter_available()


def quantizer_available() -> str | None:
    """None when llama_cpp is installed in the version whose rules lconvert follows, else what is missing."""
    if importlib.util.find_spec("llama_cpp") is None:
        return f"llama-cpp-python=={VERSION} is not installed"
    import llama_cpp

    found = str(llama_cpp.__version__)
    return None if found == VERSION else f"llama-cpp-python is {found}, the oracle is {VERSION}"


def converter_available() -> str | None:
    """None when convert_hf_to_gguf.py and the packages it imports are there, else what is missing."""
    script = source_folder() / "convert_hf_to_gguf.py"
    if not script.is_file():
        return f"{script.name} of llama.cpp not found (set LCONVERT_LLAMACPP_SRC)"
    missing = [
        p for p in ("torch", "transformers", "sentencepiece", "yaml") if importlib.util.find_spec(p) is None
    ]
    return f"upstream's converter needs {', '.join(missing)}" if missing else None


def convert(
    folder: Path, out: Path, outtype: str = "f32", pre: str | None = "llama-bpe", extra: Sequence[str] = ()
) -> Path:
    """Run upstream's converter on a Hugging Face folder; `outtype` is f32, f16, bf16 or q8_0; returns `out`.

    `pre` is what tokenizer.ggml.pre gets for BPE vocabularies; None keeps upstream's lookup by hash.
    Raises UpstreamError.
    """
    # -P and no PYTHONPATH: transformers must not take our folder `kernels` for the package of that name.
    command = [sys.executable, "-P", "-c", _RUNNER, str(source_folder()), pre or ""]
    command += [str(folder), "--outfile", str(out), "--outtype", outtype, *extra]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0 or not out.is_file():
        raise UpstreamError(f"convert_hf_to_gguf.py failed on {folder}:\n{done.stderr[-4000:]}")
    return out


def quantize(gguf_in: Path, gguf_out: Path, ftype: str, **params: Any) -> Path:
    """llama_model_quantize to `ftype` ("Q4_K_M", "COPY" ...); `params` as of `plan`; returns `gguf_out`."""
    _run(gguf_in, gguf_out, ftype, dry_run=False, **params)
    return gguf_out


def plan(gguf_in: Path, ftype: str, **params: Any) -> dict[str, str]:
    """The type that llama_model_quantize gives every tensor, in output order, by its dry run (reads headers only).

    params: pure, leave_output_tensor, allow_requantize, only bool; output_tensor_type, token_embedding_type, names
    of BLOCKS; tensor_types, pairs (pattern, type); imatrix, tensor name -> f32 array; nthread.
    Raises UpstreamError. Shapes for which llama.cpp aborts instead of failing take the process with them.
    """
    log = _run(gguf_in, gguf_in.with_name("never-written"), ftype, dry_run=True, **params)
    return {m["name"]: (m["target"] or m["source"]).upper() for m in _LINE.finditer(log)}


def _run(
    gguf_in: Path,
    gguf_out: Path,
    ftype: str,
    *,
    dry_run: bool,
    pure: bool = False,
    leave_output_tensor: bool = False,
    allow_requantize: bool = False,
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    tensor_types: Sequence[tuple[str, str]] = (),
    imatrix: Mapping[str, NDArray[np.float32]] | None = None,
    nthread: int = 1,
) -> str:
    """One call of llama_model_quantize with llama-quantize's arguments; returns what it logged."""
    import llama_cpp

    p = llama_cpp.llama_model_quantize_default_params()
    p.nthread = nthread
    number = FTYPES[ALIASES.get(ftype, ftype)].number
    p.ftype = 0 if number is None else number
    p.only_copy = number is None
    p.pure = pure
    p.dry_run = dry_run
    p.allow_requantize = allow_requantize
    p.quantize_output_tensor = not leave_output_tensor
    if output_tensor_type is not None:
        p.output_tensor_type = BLOCKS[output_tensor_type].ggml_id
    if token_embedding_type is not None:
        p.token_embedding_type = BLOCKS[token_embedding_type].ggml_id
    if tensor_types:
        rows = [(pattern.encode(), BLOCKS[t].ggml_id) for pattern, t in tensor_types]
        p.tt_overrides = (llama_cpp.llama_model_tensor_override * (len(rows) + 1))(*rows, (None, 0))
    keep = []
    if imatrix is not None:
        keep = [np.ascontiguousarray(v, dtype=np.float32).reshape(-1) for v in imatrix.values()]
        pointer = ctypes.POINTER(ctypes.c_float)
        data = [(n.encode(), a.ctypes.data_as(pointer), a.size) for n, a in zip(imatrix, keep, strict=True)]
        p.imatrix = (llama_cpp.llama_model_imatrix_data * (len(data) + 1))(*data, (None, None, 0))
    with _captured_log() as log:
        failed = llama_cpp.llama_model_quantize(os.fsencode(gguf_in), os.fsencode(gguf_out), ctypes.byref(p))
    text = "".join(log)
    if failed:
        raise UpstreamError(f"llama_model_quantize to {ftype} failed on {gguf_in.name}:\n{text[-2000:]}")
    return text


@contextmanager
def _captured_log() -> Iterator[list[str]]:
    """Collect llama.cpp's log in place of the printing that llama_cpp installs, and put that back."""
    import llama_cpp
    from llama_cpp._logger import llama_log_callback as printing

    lines: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
    def collect(_level: int, text: bytes, _user: object) -> None:
        lines.append(text.decode("utf-8", "replace"))

    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(printing, ctypes.c_void_p(0))
