"""Is `lconvert bench` right? Its decode speed against what llama.cpp counts itself, same settings, in pairs.

python -P benchmarks/decode.py [--type Q8_0] [--pairs 9] [MODEL]
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from pathlib import Path

import numpy as np

import lconvert
from lconvert.validators.bench import Entry, bench
from lconvert.validators.runtimes import llamacpp

PROMPT, TOKENS = 64, 96


def llama_perf(path: Path, prompt_tokens: int, n: int) -> float:
    """Decode tokens per second as llama.cpp counts them itself (llama_perf_context: t_eval_ms / n_eval)."""
    import llama_cpp as c

    llamacpp.capture_log(c)
    model_params = c.llama_model_default_params()
    model_params.use_extra_bufts = False
    model = c.llama_model_load_from_file(str(path).encode(), model_params)
    params = c.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch, params.no_perf = prompt_tokens + n, 1, 1, False
    params.type_k = params.type_v = c.GGML_TYPE_F32  # what purpose="parity" uses
    params.flash_attn_type = 0
    context = c.llama_init_from_model(model, params)
    vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))

    def decode(ids: list[int]) -> int:
        array = (ctypes.c_int32 * len(ids))(*ids)
        assert c.llama_decode(context, c.llama_batch_get_one(array, len(ids))) == 0
        logits = np.ctypeslib.as_array(c.llama_get_logits_ith(context, -1), shape=(vocabulary,))
        return int(logits.argmax())

    token = decode([5] * prompt_tokens)
    c.llama_perf_context_reset(context)
    for _ in range(n - 1):
        token = decode([token])
    perf = c.llama_perf_context(context)
    c.llama_free(context)
    c.llama_model_free(model)
    assert perf.n_eval == n - 1
    return float(1000 * perf.n_eval / perf.t_eval_ms)


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    demo = Path(__file__).resolve().parents[1] / "examples" / "demo_model"
    arguments.add_argument("model", nargs="?", type=Path, default=demo)
    arguments.add_argument("--type", default="Q8_0")
    arguments.add_argument("--pairs", type=int, default=9)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = lconvert.convert(options.model, Path(folder) / "m.gguf", ftype=options.type).paths[0]
        load = {"prompt_tokens": PROMPT, "output_tokens": TOKENS, "repetitions": 1, "warmup": 0, "threads": 1}
        ratios = []
        for _ in range(options.pairs):
            theirs = llama_perf(path, PROMPT, TOKENS)
            [ours] = bench([Entry(path)], purpose="parity", **load)["results"]  # type: ignore[arg-type]
            ratios.append(ours["decode_tokens_per_s"]["median"] / theirs)
    low, median, high = np.quantile(ratios, [0, 0.5, 1])
    print(f"lconvert bench / llama_perf_context, decode: median {median:.3f} ({low:.3f} .. {high:.3f})")


if __name__ == "__main__":
    main()
