"""Whole conversions of input that is damaged, lies, or wants to do harm.

Whatever a file says, the answer is an artifact or one LconvertError: soon, in little memory, with nothing left behind,
and without running anything that came with the model. The containers have tests of their own (test_fuzz_headers).
"""

from __future__ import annotations

import contextlib
import json
import pickle
import random
import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert import recipe
from lconvert.archs.common import INERT
from lconvert.cli import main, one_line
from lconvert.cli.inspect import describe
from lconvert.converters import hf, lcir
from lconvert.errors import InputError, LconvertError, UnsupportedError
from lconvert.executor import execute
from lconvert.formats import gguf
from lconvert.formats.gguf_values import Value
from tests.checkpoints import LLAMA, random_tensors, write_llama, write_tensors
from tests.conftest import DEMO
from tests.hostile_inputs import configs, damaged_gguf, damaged_json, write_model

SECONDS = 3.0  # of CPU for one attempt; a sound one takes some hundredths
MEMORY = 48 << 20  # bytes at the peak; the models have half a megabyte


# --- the whole way, with anything ------------------------------------------------------------------------


def consume(source: Path, out: Path, how: str) -> None:
    """One use of a source, as the verbs of the command line do it."""
    model = lconvert.read(source)
    if how == "inspect":
        json.dumps(describe(model, str(source)))
    elif how == "hf":
        execute(hf.plan(model), out / "hf", threads=1)
    elif how == "lcir":
        execute(lcir.plan(model, {}), out / "m.lcir", threads=1)
    else:
        ftype = None if how == "copy" else how
        lconvert.convert(model, out / "m.gguf", ftype=ftype, threads=1, allow_requantize=True)


def observe(source: Path, out: Path, how: str) -> LconvertError | None:
    """The error, None if it went well. Another exception, a slow or a large attempt, a leftover fail the test."""
    out.mkdir(exist_ok=True)
    tracemalloc.reset_peak()
    before, start = tracemalloc.get_traced_memory()[0], time.process_time()
    error = None
    try:
        consume(source, out, how)
    except LconvertError as e:
        error = e
    took, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1] - before
    assert took < SECONDS and peak < MEMORY, (took, peak, error)
    if error is not None:
        assert not list(out.iterdir()), error
        assert len(str(error)) < 2000 and one_line(str(error)).isprintable(), error
    shutil.rmtree(out)
    return error


USES = ["copy", "copy", "Q8_0", "hf", "lcir", "inspect"]
Damage = Callable[[random.Random, Path], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny sound checkpoint of every architecture case."""
    root = tmp_path_factory.mktemp("sound")
    return {name: write_model(root / name, config) for name, config in configs().items()}


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def soak(
    seconds: float, seed: int, attempt: Callable[[random.Random], LconvertError | None]
) -> tuple[int, int]:
    """(attempts that went well, attempts that were refused) within the time."""
    r, well, refused = random.Random(seed), 0, 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if attempt(r) is None:
            well += 1
        else:
            refused += 1
    return well, refused


def _one_file(*names: str) -> Damage:
    def damage(r: random.Random, folder: Path) -> None:
        path = folder / r.choice(names)
        path.write_text(damaged_json(r, json.loads(path.read_text())))

    return damage


def _index(r: random.Random, folder: Path) -> None:
    tensors = lconvert.formats.safetensors.read_header(folder / "model.safetensors").tensors
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(damaged_json(r, index))


@pytest.mark.parametrize(
    ("damage", "seed"),
    [
        (_one_file("config.json"), 1),
        (_one_file("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"), 2),
        (_index, 3),
    ],
    ids=["config", "tokenizer", "index"],
)
def test_damaged_folders(
    damage: Damage, seed: int, sound: Mapping[str, Path], tmp_path: Path, traced: None
) -> None:
    def attempt(r: random.Random) -> LconvertError | None:
        work = tmp_path / "work"
        shutil.copytree(sound[r.choice([*sound])], work)
        damage(r, work)
        error = observe(work, tmp_path / "out", r.choice(USES))
        shutil.rmtree(work)
        return error

    well, refused = soak(3.5, seed, attempt)
    assert well and refused


def test_damaged_gguf_metadata(sound: Mapping[str, Path], tmp_path: Path, traced: None) -> None:
    files: list[Path] = []
    for name in [*sound][::2]:
        with contextlib.suppress(UnsupportedError):  # a trait that llama.cpp lacks
            files += lconvert.convert(sound[name], tmp_path / "sound" / f"{name}.gguf", ftype="F32").paths
    read = [gguf.read(f) for f in files]
    assert len(read) > 15

    def attempt(r: random.Random) -> LconvertError | None:
        content = damaged_gguf(r, r.choice(read))
        if content is None:
            return None
        (tmp_path / "m.gguf").write_bytes(content)
        return observe(tmp_path / "m.gguf", tmp_path / "out", r.choice(USES))

    well, refused = soak(4.0, 4, attempt)
    assert well and refused


@pytest.mark.parametrize("preset", ["int4-g32-mse", "mxfp4"])
def test_damaged_lcir(preset: str, sound: Mapping[str, Path], tmp_path: Path, traced: None) -> None:
    base = tmp_path / "sound.lcir"
    execute(lcir.plan(recipe.load(preset).apply(lconvert.read(sound["llama-llama3"])), {}), base)

    def attempt(r: random.Random) -> LconvertError | None:
        work = tmp_path / "work"
        shutil.copytree(base, work)
        _one_file("lcir.json")(r, work)
        error = observe(work, tmp_path / "out", r.choice(USES))
        shutil.rmtree(work)
        return error

    well, refused = soak(2.0, 5, attempt)
    assert well and refused


# --- particular lies -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; no model has more than 16384"),
        ({"num_hidden_layers": 16384}, "16384 layers are claimed, but there are only 21 tensors"),
        ({"num_hidden_layers": 1e308}, r"num_hidden_layers is 1e\+308, expected a number"),
        ({"num_hidden_layers": -2}, "num_hidden_layers is -2, expected a positive integer"),
        ({"num_hidden_layers": 2.5}, "expected a 32-bit integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, expected a number"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2', expected a number"),
        ({"num_hidden_layers": None}, "the required key 'num_hidden_layers' is missing"),
        ({"num_key_value_heads": 2**31}, "key-value heads in all are claimed"),
        ({"num_key_value_heads": 3}, "8 heads are not a multiple of 3|has shape"),
        ({"num_attention_heads": 7}, "a hidden size of 256 does not divide into 7 heads"),
        ({"num_attention_heads": 512}, "a hidden size of 256 does not divide into 512 heads"),
        ({"vocab_size": 321}, r"has shape \(320, 256\), the configuration implies \(321, 256\)"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a number"),
        ({"rope_theta": 0}, "rope_theta is 0.0, expected a positive number"),
        ({"rope_theta": [1]}, r"rope_theta is \[1\], expected a number"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\], expected an object"),
        ({"rope_scaling": {"rope_type": "ntk"}}, "rope_type 'ntk' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_parameters: the required key 'factor' is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "wobble": 1}}, "unknown key 'wobble'"),
        ({"hidden_act": "mish"}, "hidden_act = 'mish' is an unknown activation"),
        ({"hidden_act": {"a": 1}}, "hidden_act = {'a': 1} is an unknown activation"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
        ({"model_type": "rwkv"}, "model_type 'rwkv' is not supported; supported: "),
        ({"model_type": "../llama"}, "model_type '../llama' is not supported"),
        ({"model_type": 3}, "'model_type' is missing"),
        ({"attention_sinks": 4}, "unknown key 'attention_sinks'; it may change what the model computes"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config lacks bits"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "quant_method 'aqlm' cannot be read"),
        ({"quantization_config": {"quant_method": "zip"}}, "unknown quant_method 'zip'; known are gptq, awq"),
        ({"quantization_config": {"bits": 4}}, "quantization_config has no quant_method"),
        ({"quantization_config": "gptq"}, "quantization_config is 'gptq', expected an object"),
        (
            {"architectures": "LlamaForCausalLM"},
            "architectures is 'LlamaForCausalLM', expected a list of str",
        ),
        ({"architectures": ["LlamaModel"]}, r"architectures is \['LlamaModel'\], expected LlamaForCausalLM"),
    ],
)
def test_lying_configs(change: Mapping[str, Any], message: str, tmp_path: Path, traced: None) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(LLAMA) | change))
    write_tensors(folder / "model.safetensors", random_tensors(LLAMA))
    error = observe(folder, tmp_path / "out", "copy")
    assert error is not None
    with pytest.raises(type(error), match=message):
        raise error


def _renamed(t: dict[str, Any]) -> None:
    t["model.layers.1.mlp.up_proj.wait"] = t.pop("model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"tensor model.norm.weight \(256,\) is missing"),
        (lambda t: t.update({"model.extra": t["model.norm.weight"]}), "unknown tensor model.extra; lconvert does not"),
        (_renamed, r"tensor model.layers.1.mlp.up_proj.weight \(512, 256\) is missing"),
        (lambda t: t.update({"model.norm.weight": ("I32", np.zeros(256, np.int32))}), "is stored as I32"),
        (lambda t: t.update({"model.norm.weight": ("F64", np.zeros(256))}), "is stored as F64; only F32, F16, BF16"),
        (lambda t: t.update({"model.norm.weight": ("F32", np.zeros((256, 1), np.float32))}), r"has shape \(256, 1\)"),
        (lambda t: t.update({"\x1b[31m\n": ("F32", np.zeros(1, np.float32))}), r"unknown tensor \\x1b\[31m\\n;"),
    ],
)  # fmt: skip
def test_wrong_tensors(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path, traced: None
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    tensors = random_tensors(LLAMA)
    change(tensors)
    write_tensors(folder / "model.safetensors", tensors)
    error = observe(folder, tmp_path / "out", "Q8_0")
    assert error is not None
    with pytest.raises(type(error), match=message):
        raise error


_BITS = {
    "F32": (np.float32, {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}),
    "F16": (np.float16, {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}),
    "BF16": (np.uint16, {"nan": 0x7FC1, "inf": 0x7F80, "-inf": 0xFF80}),
}


@pytest.mark.parametrize("ftype", ["Q4_K_M", "Q8_0", "F16", None])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", _BITS)
def test_weights_that_are_no_numbers(dtype: str, value: str, ftype: str | None, tmp_path: Path) -> None:
    """Every type refuses them; a copy too, since no runtime can compute with them."""
    kind, bits = _BITS[dtype]
    tensors = random_tensors(LLAMA, dtype)
    name = "model.layers.1.self_attn.v_proj.weight"
    weights = tensors[name][1].astype(kind)
    weights[77, 31] = bits[value]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    write_tensors(folder / "model.safetensors", tensors | {name: (dtype, weights)})
    with pytest.raises(InputError, match=rf"{name}.*column 31 is not finite"):
        lconvert.convert(folder, tmp_path / "out" / "m.gguf", ftype=ftype)
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_larger_than_the_embedding(sound: Mapping[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(sound["llama-gqa"], tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"][1]["id"] = 300  # the embedding has rows 0 to 299
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(LconvertError, match="300"):
        lconvert.convert(folder, tmp_path / "out" / "m.gguf")
    assert not (tmp_path / "out").exists()


def _set(**changes: Any) -> Callable[[dict[str, Value]], None]:
    return lambda keys: keys.update({k.replace("__", "."): v for k, v in changes.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(llama__attention__head_count=gguf.u32(0)), "key llama.attention.head_count is 0, expected a positive"),
        (_set(llama__attention__head_count=gguf.u32(2**31 - 1)), "expected at most the width of the model, 64"),
        (_set(llama__attention__head_count=gguf.array("u32", [4, 4])), "is an array of 2, expected a number"),
        (_set(llama__attention__head_count=gguf.string("4")), "is '4', expected a number"),
        (_set(llama__block_count=gguf.u32(2**31 - 1)), "is 2147483647, expected at most the number of tensors"),
        (_set(llama__block_count=gguf.u32(1)), "unknown tensor blk.1.attn_k.weight"),
        (_set(llama__block_count=gguf.u32(3)), "tensor blk.2.attn_norm.weight is missing"),
        (_set(llama__block_count=gguf.f32(float("nan"))), "block_count is nan, expected a number"),
        (_set(llama__expert_count=gguf.u32(10**9)), "experts in all are claimed, but the tensors hold 0|is missing"),
        (_set(llama__rope__dimension_count=gguf.u32(2**31 - 1)), "expected at most the head's"),
        (_set(llama__rope__freq_base=gguf.f32(0)), "key llama.rope.freq_base is 0.0, expected a positive number"),
        (_set(llama__rope__scaling__type=gguf.string("su")), "rope scaling 'su' is not supported"),
        (_set(llama__rope__scaling__type=gguf.u32(1)), "rope.scaling.type is 1, expected a string"),
        (_set(llama__attention__value_length=gguf.u32(8)), "key llama.attention.value_length is 8, the tensors and"),
        (_set(llama__attention__causal=gguf.boolean(False)), "key llama.attention.causal is False; it may change"),
        (_set(llama__expert_shared_count=gguf.u32(1)), "key llama.expert_shared_count is 1; it may change"),
        (_set(general__architecture=gguf.string("mamba")), "architecture 'mamba' is not supported; supported: "),
        (_set(general__architecture=gguf.u32(3)), "'general.architecture' is missing or not a string"),
        (lambda keys: keys.pop("llama.context_length"), "the required key 'llama.context_length' is missing"),
        (lambda keys: keys.pop("tokenizer.ggml.tokens"), "tokenizer.ggml.tokens: the vocabulary is missing"),
        (_set(tokenizer__ggml__tokens=gguf.array("str", ["a", "b"])), "holds 2 tokens, but the embedding has 300 rows"),
        (_set(tokenizer__ggml__tokens=gguf.array("str", ["a"] * 300)), "two tokens have the text 'a'"),
        (_set(tokenizer__ggml__model=gguf.string("rwkv")), "tokenizer.ggml.model is 'rwkv'"),
    ],
)  # fmt: skip
def test_lying_gguf_metadata(
    change: Callable[[dict[str, Value]], Any],
    message: str,
    sound: Mapping[str, Path],
    tmp_path: Path,
    traced: None,
) -> None:
    source = tmp_path / "sound.gguf"
    lconvert.convert(sound["llama-gqa"], source, ftype="F32")
    file = gguf.read(source)
    keys = dict(file.metadata)
    change(keys)
    tensors = [(t.name, t.type, t.shape) for t in file.tensors.values()]
    head, offsets, total = gguf.header(keys, tensors)
    content = bytearray(total)
    content[: len(head)] = head
    for at, (name, _, _) in zip(offsets, tensors, strict=True):
        data = gguf.raw(file, name).load().tobytes()
        content[at : at + len(data)] = data
    (tmp_path / "m.gguf").write_bytes(content)
    error = observe(tmp_path / "m.gguf", tmp_path / "out", "copy")
    assert error is not None and str(error).startswith(str(tmp_path / "m.gguf")), error
    with pytest.raises(type(error), match=message):
        raise error


# --- coverage: nothing is dropped in silence -------------------------------------------------------------


@pytest.mark.parametrize("name", configs())
def test_every_key_is_consumed_or_listed_as_inert(
    name: str, sound: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(sound[name], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    given = {"unsloth_version": "2026.1", "attention_dropout": 0.1}
    (folder / "config.json").write_text(json.dumps(given | config))
    report = "\n".join(lconvert.read(folder).report)
    listed = report.partition("inert config keys: ")[2].partition("\n")[0].split(", ")
    assert set(given) <= set(listed) and set(listed) <= INERT | set(given)
    (folder / "config.json").write_text(json.dumps(config | {"zzz_scale": 2.0}))
    with pytest.raises(UnsupportedError, match="unknown key 'zzz_scale'"):
        lconvert.read(folder)


# --- nothing that comes with a model is run --------------------------------------------------------------


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def test_code_beside_a_model_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python files, pickles and templates lie in the folder; converting, proving and inspecting touch none."""
    marker = tmp_path / "ran"
    folder = shutil.copytree(DEMO, tmp_path / "model")
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
    for name in (
        "modeling_demo.py",
        "tokenization_demo.py",
        "configuration_demo.py",
        "__init__.py",
        "setup.py",
    ):
        (folder / name).write_text(code)
    for name in ("training_args.bin", "pytorch_model.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(_Bomb(marker)))
    pickle.loads((folder / "optimizer.pt").read_bytes())
    assert marker.exists(), "the bomb works"
    marker.unlink()
    for name, entry in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        data = json.loads((folder / name).read_text())
        module = "modeling_demo.Model" if name == "config.json" else ["tokenization_demo.T", None]
        data["auto_map"] = {entry: module, "AutoConfig": "configuration_demo.C"}
        (folder / name).write_text(json.dumps(data))
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in range(10**9) %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    for argv in (
        ["inspect", str(folder)],
        ["hf-to-gguf", str(folder), "--q8_0", "-o", str(tmp_path / "m.gguf")],
        ["gguf-to-hf", str(tmp_path / "m.gguf"), "-o", str(tmp_path / "back")],
    ):
        monkeypatch.setattr("sys.argv", ["lconvert", *argv])
        with pytest.raises(SystemExit) as done:
            main()
        assert done.value.code == 0, argv
    assert not marker.exists()
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == template


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickles_are_refused_with_advice(suffix: str, tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / f"model{suffix}").write_bytes(pickle.dumps(_Bomb(tmp_path / "ran")))
    for source in (folder, folder / f"model{suffix}"):
        with pytest.raises(UnsupportedError, match=r"can run code when .* safetensors"):
            lconvert.read(source)
    assert not (tmp_path / "ran").exists()
