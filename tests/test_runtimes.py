"""The runtimes that live in this process: ids, logits and greedy continuations, each against another
runtime.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert.errors import InputError, LconvertError, MissingPackageError, OptionError
from lconvert.validators.logits import log_softmax
from lconvert.validators.runtimes import Runtime, llamacpp, open_runtime
from tests.conftest import DEMO

for name in ("torch", "transformers", "llama_cpp", "onnx", "onnxruntime"):
    pytest.importorskip(name, reason=f"{name} is not installed")

from tests import onnx_decoder

TEXT = (
    "It was the best of times, it was the worst of times; we had everything before us <|eot_id|> and nothing."
)
#: past its end-of-text token a model goes on here, because exactly n tokens are asked for
N = 24


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model as every runtime loads it, all with the same numbers."""
    folder = tmp_path_factory.mktemp("artifacts")
    (folder / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    return {
        "transformers": DEMO,
        "dequantized": lconvert.convert(DEMO, folder / "F32.gguf", ftype="F32").paths[0],
        "llama.cpp": folder / "F32.gguf",
        "onnxruntime": onnx_decoder.llama(DEMO, folder / "decoder.onnx"),
    }


@pytest.fixture(scope="module")
def opened(artifacts: dict[str, Path]) -> dict[str, Runtime]:
    return {name: open_runtime(name, path, context=256, threads=1) for name, path in artifacts.items()}


@pytest.fixture(scope="module")
def ids(opened: dict[str, Runtime]) -> list[int]:
    return opened["transformers"].tokenize(TEXT * 8, special=True)[:200]


OTHERS = ("dequantized", "llama.cpp", "onnxruntime")


@pytest.mark.parametrize("name", OTHERS)
def test_logits_are_those_of_transformers(opened: dict[str, Runtime], ids: list[int], name: str) -> None:
    reference, found = opened["transformers"].logits(ids), opened[name].logits(ids)
    assert found.dtype == np.float32 and found.shape == reference.shape == (len(ids), 2048)
    assert np.abs(found - reference).max() < 1e-4
    assert np.array_equal(found, opened[name].logits(ids)), "a call must start from an empty context"


@pytest.mark.parametrize("name", OTHERS)
def test_greedy_continuations_are_those_of_transformers(
    opened: dict[str, Runtime], ids: list[int], name: str
) -> None:
    for prompt in (ids[:1], ids[:17], ids):
        expected, found = (opened[x].generate(prompt, N) for x in ("transformers", name))
        assert found.ids == expected.ids and len(found.ids) == len(found.seconds) == N
        assert found.seconds[0] > 0 and all(a <= b for a, b in pairwise(found.seconds))


def test_a_continuation_is_the_argmax_of_the_logits(opened: dict[str, Runtime], ids: list[int]) -> None:
    """With a key-value cache the same as by full passes without one."""
    made = opened["transformers"].generate(ids[:30], N).ids
    full = opened["transformers"].logits([*ids[:30], *made])
    assert tuple(full[29:-1].argmax(-1)) == made


def test_it_goes_on_past_the_end_of_the_text(opened: dict[str, Runtime]) -> None:
    eos = 2043
    for runtime in opened.values():
        assert len(runtime.generate([2042, eos, eos], 5).ids) == 5


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_ids(opened: dict[str, Runtime], name: str, special: bool) -> None:
    expected = opened["transformers"].tokenize(TEXT, special=special)
    assert opened[name].tokenize(TEXT, special=special) == expected
    # a runtime that ignored `special` would give the same ids for both
    assert expected != opened[name].tokenize(TEXT, special=not special)


@pytest.mark.parametrize("name", ["transformers", *OTHERS])
def test_a_window_longer_than_the_context(opened: dict[str, Runtime], name: str) -> None:
    with pytest.raises(InputError, match="257 tokens do not fit the context of 256"):
        opened[name].logits([1] * 257)
    with pytest.raises(InputError, match="257 tokens do not fit the context of 256"):
        opened[name].generate([1] * 250, 8)
    assert (
        len(opened[name].generate([1] * 250, 7).ids) == 7
    )  # the last token need not fit: nothing follows it
    for call in (lambda: opened[name].logits([]), lambda: opened[name].generate([], 3)):
        with pytest.raises(InputError, match="token"):
            call()


@pytest.mark.parametrize("name", ["transformers", *OTHERS])
def test_info(opened: dict[str, Runtime], name: str) -> None:
    info = opened[name].info()
    assert info["runtime"] == name and all(isinstance(v, str) for v in info.values())
    assert len([v for v in info.values() if v[:1].isdigit() and "." in v]) >= 1, "no version is named"


@pytest.mark.parametrize("name", ["transformers", *OTHERS])
def test_an_artifact_that_is_none(name: str, tmp_path: Path) -> None:
    path = tmp_path / "artifact.gguf"
    path.write_bytes(b"GGUF and nothing else")
    with pytest.raises(LconvertError, match=r"artifact\.gguf"):
        open_runtime(name, path)


def test_an_unknown_runtime() -> None:
    with pytest.raises(OptionError, match=r"unknown runtime openvino; runtimes: llama.cpp, transformers"):
        open_runtime("openvino", DEMO)


@pytest.mark.parametrize(
    ("name", "package"), [("llama.cpp", "llama_cpp"), ("onnxruntime", "onnxruntime"), ("vllm", "vllm")]
)
def test_a_missing_package(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match="is not installed"):
        open_runtime(name, DEMO)


# --- llama.cpp


def test_llama_cpp_in_several_batches(
    artifacts: dict[str, Path], opened: dict[str, Runtime], ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large vocabulary's logits are made in batches, so that llama.cpp's own copy of them stays small."""
    monkeypatch.setattr(llamacpp, "_ROWS_BYTES", 4 * 2048 * 30)
    runtime: Any = open_runtime("llama.cpp", artifacts["llama.cpp"], context=256, threads=1)
    assert runtime._batch == 30 < len(ids)
    assert np.abs(runtime.logits(ids) - opened["transformers"].logits(ids)).max() < 1e-4
    assert runtime.generate(ids, N).ids == opened["transformers"].generate(ids, N).ids
    runtime.close()


def test_llama_cpp_as_it_is_served(
    artifacts: dict[str, Path], opened: dict[str, Runtime], ids: list[int]
) -> None:
    runtime = open_runtime("llama.cpp", artifacts["llama.cpp"], context=256, threads=1, purpose="speed")
    info = runtime.info()
    assert (info["kv_cache"], info["flash_attention"], info["threads"]) == ("F16", "auto", "1")
    assert info["repacked_weights"] == ("off" if "AMX_INT8 = 1" in info["system"] else "on")
    plain = opened["llama.cpp"].info()
    assert (plain["kv_cache"], plain["flash_attention"], plain["repacked_weights"]) == ("F32", "off", "off")
    p, q = log_softmax(opened["llama.cpp"].logits(ids)), log_softmax(runtime.logits(ids))
    kld = float((np.exp(p) * (p - q)).sum(-1).mean())
    assert 0 < kld < 1e-5  # its keys and values are F16, the others' are not
    runtime.close()


# --- transformers


def test_transformers_as_it_is_served(opened: dict[str, Runtime], ids: list[int]) -> None:
    runtime = open_runtime("transformers", DEMO, purpose="speed")
    assert runtime.info()["dtype"] == "bfloat16" and runtime.info()["attention"] == "sdpa"
    half = open_runtime("transformers", DEMO, options={"dtype": "float16"})
    assert half.info()["dtype"] == "float16" and half.info()["attention"] == "eager"
    exact = opened["transformers"].logits(ids)
    errors = [np.abs(r.logits(ids) - exact).mean() for r in (half, runtime)]
    assert 0 < errors[0] < errors[1] < 0.1


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(DEMO / name)
    runtime = open_runtime("transformers", tmp_path)
    with pytest.raises(InputError, match=r"tokenizer.json: cannot be read"):
        runtime.tokenize("text", special=False)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.json: the tokenizers package refuses it"):
        runtime.tokenize("text", special=False)


# --- ONNX Runtime


@pytest.mark.parametrize("kind", ["no mask", "no cache"])
def test_onnx_graphs_with_fewer_inputs(
    kind: str, opened: dict[str, Runtime], ids: list[int], tmp_path: Path
) -> None:
    path = onnx_decoder.llama(DEMO, tmp_path / "m.onnx", cache=kind != "no cache", mask=kind != "no mask")
    runtime = open_runtime("onnxruntime", path, context=256)
    assert np.abs(runtime.logits(ids) - opened["transformers"].logits(ids)).max() < 1e-4
    assert runtime.generate(ids[:20], 8).ids == opened["transformers"].generate(ids[:20], 8).ids
    assert runtime.info()["kv_cache"].startswith("no" if kind == "no cache" else "yes")


def test_onnx_in_several_batches(
    artifacts: dict[str, Path], opened: dict[str, Runtime], ids: list[int]
) -> None:
    runtime = open_runtime("onnxruntime", artifacts["onnxruntime"], context=256, options={"batch_tokens": 30})
    assert np.abs(runtime.logits(ids) - opened["transformers"].logits(ids)).max() < 1e-4


def test_onnx_accuracy_levels(tmp_path: Path) -> None:
    """int4 weights: fp32 activations for parity, 8-bit ones for speed."""
    path, exact = onnx_decoder.quantized_head(tmp_path / "m.onnx")
    prompt = list(range(40))
    errors = {}
    for purpose in ("parity", "speed"):
        runtime = open_runtime("onnxruntime", path, purpose=purpose)  # type: ignore[arg-type]
        errors[purpose] = np.abs(runtime.logits(prompt) - exact[prompt]).max() / np.abs(exact).max()
        assert runtime.info()["accuracy_level"] == {"parity": "1", "speed": "4"}[purpose]
    assert errors["parity"] < 1e-6 and 1e-4 < errors["speed"] < 0.05
    runtime = open_runtime("onnxruntime", path, options={"accuracy_level": 4})
    assert np.abs(runtime.logits(prompt) - exact[prompt]).max() / np.abs(exact).max() == errors["speed"]


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"input_ids": "tokens"}, "not a decoder: inputs"),
        ({"logits": "scores"}, "not a decoder: inputs"),
        ({"position_ids": "cache_position"}, "unknown inputs cache_position"),
        ({"present.1.key": "new.1.key"}, "no present.1.key"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_onnx_graphs_that_are_no_decoders(
    rename: dict[str, str], message: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    import onnx

    model = onnx.load(artifacts["onnxruntime"])
    for value in (*model.graph.input, *model.graph.output):
        value.name = rename.get(value.name, value.name)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [rename.get(n, n) for n in names]
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(InputError, match=message):
        open_runtime("onnxruntime", tmp_path / "m.onnx")
