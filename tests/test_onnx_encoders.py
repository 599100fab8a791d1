"""Encoders (BERT, DistilBERT) and small convolutional networks: read, rounded to static int8, drawn as ONNX, run in ONNX Runtime.

Floats are compared with transformers and torch, int8 with the same model in torch whose inputs torch rounds (fake_quantize).
"""

from __future__ import annotations

import collections
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert import recipe
from lconvert.converters import checkpoint, convnet, hf, lcir, onnx
from lconvert.errors import InputError, OptionError, UnsupportedError
from lconvert.executor import execute
from lconvert.forward import Forward, sequential
from lconvert.ir import Convnet, Encoder, Model, QTensor, Tensor
from lconvert.kernels.qtensor import values
from lconvert.passes import examples, histograms, kv, static
from lconvert.passes.observers import OBSERVERS
from tests.conftest import DEMO, ROOT
from tests.small_classifiers import SIZES, bert, sentences

for package in ("onnx", "onnxruntime", "sklearn", "torch", "transformers"):
    pytest.importorskip(package, reason=f"{package} is not installed")
import onnx as onnx_package
import onnxruntime
import torch
import transformers
from torch import nn

#: Logits of the random models are of the order of 1.
CLOSE = 1e-4
KINDS = ["bert", "distilbert"]


def exported(model: Model, folder: Path, **options: Any) -> Path:
    execute(onnx.plan(model, onnx.Options(**options)), folder, force=True)
    path = folder / "model.onnx"
    onnx_package.checker.check_model(str(path))
    return path


def run(path: Path, feed: dict[str, Any], optimized: Path | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(["logits"], feed)[0]


def operators(path: Path) -> collections.Counter[str]:
    return collections.Counter(
        n.op_type for n in onnx_package.load(path, load_external_data=False).graph.node
    )


def rounding(model: Model, role: str) -> Any:
    """What torch makes of an input that the model rounds: codes and back."""
    a = model.entries[role].activation
    assert a is not None and a.scale is not None
    zero = 0 if a.zero is None else int(a.zero.load().reshape(-1)[0])
    low, high = (-128, 127) if a.grid.signed else (0, 255)
    scale = float(a.scale.load().reshape(-1)[0])
    return lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero, low, high)


# --- floats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("kind", KINDS)
def test_floats_are_those_of_transformers(kind: str, act: str, tmp_path: Path) -> None:
    """With padding, with token types, and every row of the batch alone."""
    module = bert(kind, tmp_path / "m", **{"activation" if kind == "distilbert" else "hidden_act": act})
    model = lconvert.read(tmp_path / "m")
    assert isinstance(model.arch, Encoder)
    feed = sentences(kind)
    with torch.no_grad():
        want = module(**{k: torch.as_tensor(v) for k, v in feed.items()}).logits.numpy()
    assert np.abs(want).max() > 0.1
    path = exported(model, tmp_path / "o")
    assert np.abs(run(path, feed) - want).max() < CLOSE
    assert np.abs(Forward(model).classify(feed) - want).max() < CLOSE
    for i, length in enumerate(feed["attention_mask"].sum(1)):
        alone = {k: v[i : i + 1, :length] for k, v in feed.items()}
        assert np.abs(run(path, alone)[0] - want[i]).max() < CLOSE


def test_a_token_type_and_the_mask_matter(tmp_path: Path) -> None:
    """What the test above compares is not indifferent to them."""
    bert("bert", tmp_path / "m")
    path, feed = exported(lconvert.read(tmp_path / "m"), tmp_path / "o"), sentences("bert")
    want = run(path, feed)
    for name in ("token_type_ids", "attention_mask"):
        assert np.abs(run(path, feed | {name: 1 - feed[name]}) - want).max() > 100 * CLOSE


NETS: dict[str, tuple[Any, ...]] = {
    "lenet": (nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(4, 6, (3, 2), stride=2)),
    "gelu": (nn.Conv2d(2, 4, 5, bias=False), nn.GELU(), nn.Dropout(0.5), nn.MaxPool2d(3)),
}


def net(name: str) -> tuple[nn.Sequential, Any]:
    torch.manual_seed(1)
    body = nn.Sequential(*NETS[name], nn.Flatten()).eval()
    x = torch.randn(3, 2, 12, 11)
    width = body(x).shape[1]
    return nn.Sequential(*body, nn.Linear(width, 7), nn.ReLU(), nn.Linear(7, 5, bias=False)).eval(), x


@pytest.mark.parametrize("name", sorted(NETS))
def test_convolutions_are_those_of_torch(name: str, tmp_path: Path) -> None:
    """Out of a module, through a folder, in torch again and in ONNX Runtime."""
    module, x = net(name)
    made = convnet.from_torch(module, (2, 12, 11))
    execute(hf.plan(made), tmp_path / "m")
    model = lconvert.read(tmp_path / "m")
    assert isinstance(model.arch, Convnet) and model.arch == made.arch
    want = module(x).detach().numpy()
    assert np.array_equal(sequential(model)(x).detach().numpy(), want)
    assert np.abs(run(exported(model, tmp_path / "o"), {"images": x.numpy()}) - want).max() < CLOSE


# --- int8 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["channel", "tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_what_torch_makes_of_the_same_codes(kind: str, scale: Any, tmp_path: Path) -> None:
    """And every product is one of integers in ONNX Runtime's optimized graph."""
    bert(kind, tmp_path / "m")
    model, feed = lconvert.read(tmp_path / "m"), sentences(kind)
    q = static.run(model, static.Options(scale), examples=[sentences(kind, seed=s) for s in range(4)])
    forward = Forward(q)
    for module, roles in forward.linears():
        f = rounding(q, roles[0])
        module.register_forward_pre_hook(lambda m, args, f=f: (f(args[0]),))
    want = forward.classify(feed)
    got = run(exported(q, tmp_path / "o"), feed, tmp_path / "optimized.onnx")
    floats = Forward(model).classify(feed)
    lost = np.abs(want - floats).max()
    assert 1e-3 < lost < 0.2
    assert np.abs(got - want).max() < lost / 4, "a code may fall to the other side of a tie, no more"
    found = operators(tmp_path / "optimized.onnx")
    assert found["MatMulIntegerToFloat"] == 14 and not found["MatMul"] + found["Gemm"] + found["FusedGemm"]


def test_the_graph_holds_the_codes_of_the_model(tmp_path: Path) -> None:
    bert("bert", tmp_path / "m")
    model = lconvert.read(tmp_path / "m")
    for scale in ("channel", "tensor"):
        q = static.run(model, static.Options(scale), examples=[sentences("bert")])  # type: ignore[arg-type]
        made = onnx_package.load(exported(q, tmp_path / scale))
        stored = {t.name: onnx_package.numpy_helper.to_array(t) for t in made.graph.initializer}
        quantized = {n: e.data for n, e in q.entries.items() if isinstance(e.data, QTensor)}
        assert len(quantized) == 14
        for name, data in quantized.items():
            assert np.array_equal(stored[name], data.codes.load().T) and stored[name].dtype == np.int8
            assert isinstance(data.scale, Tensor)
            if scale == "channel":
                assert np.array_equal(stored[name + ".scale"], data.scale.load().reshape(-1))
        dense = {n for n, e in q.entries.items() if isinstance(e.data, Tensor)}
        assert all(np.array_equal(stored[n], values(q.entries[n].data)) for n in dense)


def test_trt_takes_the_symmetric_graph(tmp_path: Path) -> None:
    """Half precision, int8 codes, no zero point but zero, and F32 in scales alone: what explicit quantization allows."""
    bert("bert", tmp_path / "m")
    module, x = net("lenet")
    made = (
        (lconvert.read(tmp_path / "m"), sentences("bert")),
        (
            convnet.from_torch(module, (2, 12, 11)),
            {"images": x.numpy()},
        ),
    )
    for model, feed in made:
        q = static.run(model, static.Options(symmetric=True), examples=[feed])
        graph = onnx_package.load(exported(q, tmp_path / "o", dialect="trt")).graph
        types = {t.data_type for t in graph.initializer}
        proto = onnx_package.TensorProto
        assert proto.INT8 in types and proto.FLOAT16 in types
        assert not types & {proto.UINT8, proto.INT32}
        held = {t.name: t for t in graph.initializer}
        quantizers = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
        wide = {name for name, t in held.items() if t.data_type == proto.FLOAT}
        assert wide and wide <= {n.input[1] for n in quantizers}
        assert not wide & {name for n in graph.node if n not in quantizers for name in n.input}
        rounded = [n for n in graph.node if n.op_type == "QuantizeLinear"]
        assert rounded
        for node in rounded:
            zero = held[node.input[2]]
            assert zero.data_type == proto.INT8 and not onnx_package.numpy_helper.to_array(zero).any()


def test_trt_builds_it(tmp_path: Path) -> None:
    """The rules find nothing, and TensorRT-RTX makes an engine ahead of time; its attention takes heads of 32."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    from lconvert.converters import trt_rules

    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, **SIZES
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "m")
    convolutions, x = net("lenet")
    for model, feed in (
        (lconvert.read(tmp_path / "m"), sentences("bert")),
        (convnet.from_torch(convolutions, (2, 12, 11)), {"images": x.numpy()}),
    ):
        q = static.run(model, static.Options(symmetric=True), examples=[feed])
        plan = onnx.plan(q, onnx.Options(dialect="trt"))
        assert trt_rules.check(trt_rules.planned(plan), [89]) == []
        path = exported(q, tmp_path / "o", dialect="trt")
        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network(0)
        assert trt.OnnxParser(network, logger).parse_from_file(str(path))
        options, profile = builder.create_builder_config(), builder.create_optimization_profile()
        for i in range(network.num_inputs):
            port = network.get_input(i)
            least, most = ([v if n < 0 else n for n in port.shape] for v in (1, 8))
            profile.set_shape(port.name, least, most, most)
        options.add_optimization_profile(profile)
        options.num_compute_capabilities = 1
        options.set_compute_capability(trt.ComputeCapability.SM89, 0)
        assert builder.build_serialized_network(network, options) is not None


def test_trt_refuses_zero_points(tmp_path: Path) -> None:
    bert("bert", tmp_path / "m")
    q = static.run(lconvert.read(tmp_path / "m"), static.Options(), examples=[sentences("bert")])
    with pytest.raises(UnsupportedError, match=r"zero point.*symmetric"):
        onnx.plan(q, onnx.Options(dialect="trt"))
    for wrong in ({"last_logit": True}, {"prefill_only": True}, {"static_cache": True}):
        with pytest.raises(UnsupportedError, match="is an encoder"):
            onnx.plan(q, onnx.Options(**wrong))


@pytest.mark.parametrize("shape", [(6, 3, 2, 5), (4, 24)])
@pytest.mark.parametrize("scale", ["channel", "tensor"])
def test_weights_are_rounded_by_definition(shape: tuple[int, ...], scale: Any) -> None:
    from lconvert.ir import dense
    from lconvert.passes import rtn

    x = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    x[1] *= 30
    x[2] = 0
    q = rtn.quantized(dense(x), static.Options(scale).rounding())
    assert isinstance(q.scale, Tensor)
    axes = tuple(range(1, len(shape))) if scale == "channel" else None
    top = np.abs(x).max(axis=axes, keepdims=True)
    s = q.scale.load()
    assert s.shape == top.shape and q.block == tuple(-1 if n == 1 else 1 for n in s.shape)
    assert np.all(np.abs(s - top / 127) <= top / 127 * 2**-8), "8 significant bits"
    want = np.where(s > 0, np.clip(np.rint(x / np.where(s > 0, s, 1)), -128, 127), 0)
    assert np.array_equal(q.codes.load(), want)
    assert np.array_equal(q.codes.read(2, 4), want[2:4])
    assert np.array_equal(values(q, 1, 3), (want * s)[1:3].astype(np.float32))
    fp8 = rtn.Options("fp8", -1)
    if len(shape) == 4:
        with pytest.raises(OptionError, match="a convolution takes int8"):
            rtn.quantized(dense(x), fp8)


# --- trained models ----------------------------------------------------------------------------------------


def example() -> Any:
    spec = importlib.util.spec_from_file_location("encoder_int8", ROOT / "examples" / "encoder_int8.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("kind", "least"), [("cnn", 0.94), ("bert", 0.83), ("distilbert", 0.83)])
def test_accuracy_on_digits(kind: str, least: float, tmp_path: Path) -> None:
    """int8 costs less than a point of accuracy with either scale of weights and any observer; plots show how."""
    e = example()
    rows = e.compare(kind, tmp_path)
    assert len(rows) == 1 + 2 * len(OBSERVERS)
    assert rows[0]["accuracy"] > least
    for row in rows[1:]:
        assert abs(row["accuracy"] - rows[0]["accuracy"]) <= 0.01, row
        assert 1e-4 < row["error"] < 0.03, row
    for name in ("ranges", "weights"):
        assert (tmp_path / f"{kind}-{name}.png").stat().st_size > 10_000
    model = lconvert.read(tmp_path / kind)
    given = e.images(e.digits()[0][:64]) if kind == "cnn" else e.sentences(e.digits()[0][:64], kind == "bert")
    found = {s: static.run(model, static.Options(s), examples=[given]) for s in ("tensor", "channel")}
    errors = {s: static.errors(model, q) for s, q in found.items()}
    assert all(errors["channel"][n] <= errors["tensor"][n] for n in errors["tensor"])
    if kind != "cnn":
        return
    fp32 = run(exported(model, tmp_path / "f"), given)
    assert np.abs(fp32 - sequential(model)(torch.tensor(given["images"])).detach().numpy()).max() < CLOSE
    q = found["channel"]
    got = run(exported(q, tmp_path / "o"), given, tmp_path / "optimized.onnx")
    apart = np.abs(got - rounded_net(q, given["images"]))
    assert np.median(apart) < 1e-5, "the same codes"
    # Some inputs lie so near the middle of two codes that the last bits of a sum decide: then those of inputs a few 1e-5 larger or smaller.
    leans = [side * n * 10.0**k for side in (-1, 1) for k in (-7, -6, -5) for n in (1, 2, 3, 5)]
    others = [np.abs(got - rounded_net(q, given["images"], lean)) for lean in leans]
    assert np.stack([apart, *others]).max(2).min(0).max() < 1e-5, "but for ties"
    kinds = operators(tmp_path / "optimized.onnx")
    assert kinds["QLinearConv"] == 2 and kinds["MatMulIntegerToFloat"] == 2
    assert not sum(kinds[k] for k in ("Conv", "FusedConv", "MatMul", "Gemm", "DequantizeLinear"))


def rounded_net(q: Model, x: Any, lean: float = 0.0) -> Any:
    """The network in torch with inputs rounded by torch where the graph has codes: in front of pooling. lean: by what share inputs are larger."""
    assert isinstance(q.arch, Convnet)
    module = sequential(q)
    for i, _ in q.arch.weighted():
        f = rounding(q, f"steps.{i}")
        at = module[histograms.watched(q.arch, i)]
        at.register_forward_pre_hook(lambda m, args, f=f: (f(args[0] * (1 + lean)),))
    with torch.no_grad():
        return module(torch.tensor(x)).numpy()


def test_a_mean_is_rounded_again(tmp_path: Path) -> None:
    """AveragePool on codes, with the scale from before it."""
    torch.manual_seed(2)
    body = (nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3))
    model = convnet.from_torch(nn.Sequential(*body).eval(), (1, 8, 8))
    x = np.random.default_rng(0).random((20, 1, 8, 8), dtype=np.float32)
    q = static.run(model, static.Options(), examples=[{"images": x}])
    run(exported(q, tmp_path / "o"), {"images": x}, tmp_path / "optimized.onnx")
    assert operators(tmp_path / "optimized.onnx")["QLinearAveragePool"] == 1
    seen = histograms.inputs(model, [{"images": x}])
    first = sequential(model)[:2](torch.tensor(x))
    assert seen["steps.4"].high == pytest.approx(float(first.detach().max()))


# --- histograms and observers ------------------------------------------------------------------------------


def test_histograms_leave_padding_out(tmp_path: Path) -> None:
    bert("bert", tmp_path / "m")
    model = lconvert.read(tmp_path / "m")
    feeds = [sentences("bert", seed=s) for s in (0, 1)]
    seen: list[Any] = []
    forward = Forward(model)
    (module,) = [m for m, roles in forward.linears() if roles == ("layers.1.mlp.up",)]
    module.register_forward_pre_hook(lambda m, args: seen.append(args[0].numpy()))
    for feed in feeds:
        forward.classify(feed)
    real = np.concatenate([x[f["attention_mask"] == 1] for x, f in zip(seen, feeds, strict=True)])
    h = histograms.inputs(model, feeds)["layers.1.mlp.up"]
    assert (h.low, h.high) == (float(real.min()), float(real.max()))
    assert np.array_equal(h.counts, np.histogram(real, 2048, (h.low, h.high))[0])
    assert h.counts.sum() == real.size == 2 * (9 + 4 + 7) * 32


def samples() -> dict[str, Any]:
    rng = np.random.default_rng(4)
    return {
        "relu with a tail": np.maximum(rng.standard_t(3, 20_000), 0),
        "both sides": rng.standard_t(4, 20_000),
        "uneven": np.concatenate([rng.normal(0, 0.1, 20_000), [3.0, -0.2]]),
    }


def histogram(x: Any) -> Any:
    from lconvert.passes.observers import Histogram

    low, high = float(x.min()), float(x.max())
    return Histogram(np.histogram(x, 2048, (low, high))[0], low, high)


@pytest.mark.parametrize("name", sorted(samples()))
@pytest.mark.parametrize("symmetric", [False, True])
def test_observers_are_their_definitions(name: str, symmetric: bool) -> None:
    x = samples()[name]
    h = histogram(x)
    width = (h.high - h.low) / 2048
    assert OBSERVERS["minmax"](h, symmetric) == (x.min(), x.max())
    low, high = OBSERVERS["percentile"](h, symmetric)
    if symmetric:
        cut = np.quantile(np.abs(x), 0.9999)
        want = max(x.min(), -cut), min(x.max(), cut)
    else:
        want = np.quantile(x, 0.00005), np.quantile(x, 0.99995)
    far = (
        2 * width + np.diff(np.sort(x)[[-4, -1]])[0] + np.diff(np.sort(x)[[0, 3]])[0]
    )  # between the outermost values
    assert (low, high) == pytest.approx(want, abs=far)
    shares = [1 - i / 100 for i in range(81)]
    errors = [squared_error(x, (h.low * s, h.high * s), symmetric) for s in shares]
    found = squared_error(x, OBSERVERS["mse"](h, symmetric), symmetric)
    assert found <= 1.02 * min(errors)
    assert name == "both sides" or found < errors[0]
    assert OBSERVERS["entropy"](h, symmetric) == pytest.approx(least_divergence(h, symmetric))


def squared_error(x: Any, found: tuple[float, float], symmetric: bool) -> float:
    """Of 8-bit codes for this range, by torch."""
    low, high = min(found[0], 0.0), max(found[1], 0.0)
    scale = max(-low, high) / 127 if symmetric else (high - low) / 255
    zero = 0 if symmetric else round(-low / scale)
    ends = (-127, 127) if symmetric else (0, 255)
    y = torch.fake_quantize_per_tensor_affine(torch.tensor(x), scale, zero, *ends).numpy()
    return float(np.square(y - x).sum())


def least_divergence(h: Any, symmetric: bool) -> tuple[float, float]:
    """The KL search as its author's slides have it, bin by bin."""
    from scipy.stats import entropy

    top = max(abs(h.low), abs(h.high))
    bins = [0.0] * 2048
    for middle, count in zip(h.middles, h.counts, strict=True):
        bins[min(int(abs(middle) / top * 2048), 2047)] += float(count)
    bins[0] = bins[1]
    levels = 256 if h.low >= 0 and not symmetric else 128
    best: tuple[float, int] = (float("inf"), 2048)
    for i in range(levels, 2049, 16):
        reference = bins[:i]
        groups: dict[int, list[int]] = collections.defaultdict(list)
        for j in range(i):
            groups[j * levels // i].append(j)
        candidate = [0.0] * i
        for members in groups.values():
            full = [j for j in members if bins[j] > 0]
            for j in full:
                candidate[j] = sum(bins[j] for j in members) / len(full)
        reference = [*reference[:-1], reference[-1] + sum(bins[i:])]
        best = min(best, (float(entropy(reference, candidate)), i), key=lambda b: b[0])
    cut = top * best[1] / 2048
    return max(h.low, -cut), min(h.high, cut)


# --- errors ------------------------------------------------------------------------------------------------


@pytest.fixture
def others(tmp_path: Path) -> dict[str, Model]:
    bert("bert", tmp_path / "bert")
    return {
        "bert": lconvert.read(tmp_path / "bert"),
        "convnet": convnet.from_torch(net("gelu")[0], (2, 12, 11)),
    }


def test_what_needs_a_language_model_says_so(others: dict[str, Model], tmp_path: Path) -> None:
    wants = {"bert": "bert is an encoder", "convnet": "convnet is a convolutional network"}
    for name, model in others.items():
        for attempt in (
            lambda m=model: lconvert.convert(m, tmp_path / "m.gguf", ftype="Q8_0"),
            lambda m=model: kv.run(m, kv.Options()),
            lambda m=model: checkpoint.plan(m, checkpoint.Options()),
        ):
            with pytest.raises(UnsupportedError, match=f"{wants[name]}.*decoders"):
                attempt()
    assert not list(tmp_path.glob("*.gguf"))


def test_lcir_holds_them(others: dict[str, Model], tmp_path: Path) -> None:
    x = net("gelu")[1].numpy()
    for name, model in others.items():
        feed = sentences("bert") if name == "bert" else {"images": x}
        q = static.run(model, static.Options(), examples=[feed])
        execute(lcir.plan(q, {}), tmp_path / f"{name}.lcir")
        back = lconvert.read(tmp_path / f"{name}.lcir")
        assert back.arch == model.arch
        for role, entry in q.entries.items():
            assert np.array_equal(values(back.entries[role].data), values(entry.data))
            a, b = entry.activation, back.entries[role].activation
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert (
                    a.scale is not None and b.scale is not None and a.zero is not None and b.zero is not None
                )
                assert (a.grid, a.scale.load(), a.zero.load()) == (b.grid, b.scale.load(), b.zero.load())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_decoder": True}, "is_decoder = True is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"new_key": 1}, "unknown key 'new_key'"),
        ({"architectures": ["BertForMaskedLM"]}, "expected BertForSequenceClassification"),
        ({"num_labels": 7}, "num_labels is 7, but id2label names 3"),
        ({"num_attention_heads": 5}, "does not divide into 5 heads"),
        ({"hidden_act": "mish"}, "unknown activation"),
        ({"num_hidden_layers": 3}, "encoder.layer.2.* is missing"),
        ({"type_vocab_size": 5}, "the configuration implies"),
        ({"num_hidden_layers": 9000}, "9000 layers are claimed"),
    ],
)
def test_configurations_that_mean_something_else(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    bert("bert", tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((InputError, UnsupportedError), match=message):
        lconvert.read(tmp_path / "m")


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"conv": 4, "kernel": [3]}], r"kernel is \[3\], expected \[height, width\]"),
        ([{"convolution": 4}], "a step is one of conv, linear"),
        ([{"conv": 4, "kernel": [3, 3], "dilation": 2}], "unknown key 'dilation'"),
        ([{"linear": 4}], "flatten them first"),
        ([{"conv": 4, "kernel": [9, 9]}], "leaves nothing of"),
        ([{"relu": True}], "ends in features, after flatten"),
        ([{"conv": 4, "kernel": [3, 3], "padding": -1}], "sizes are impossible"),
        ([], "steps must be a list"),
        ([{"flatten": True}, {"linear": 4}], "tensor 1.weight .* is missing"),
    ],
)
def test_networks_that_cannot_be(steps: list[Any], message: str, tmp_path: Path) -> None:
    execute(hf.plan(convnet.from_torch(net("gelu")[0], (2, 12, 11))), tmp_path / "m")
    config = {"model_type": "convnet", "image": [2, 8, 8], "steps": steps}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(lconvert.errors.LconvertError, match=message):
        lconvert.read(tmp_path / "m")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Conv2d(1, 2, 3, groups=1, dilation=2), r"dilation is \(2, 2\)"),
        (nn.MaxPool2d(3, stride=2), "squares of 3 every 2"),
        (nn.Conv2d(1, 2, 3, stride=(1, 2)), r"stride is \(1, 2\)"),
        (nn.Conv2d(1, 2, 3, padding="same"), "padding is same"),
        (nn.GELU("tanh"), "approximate is 'tanh'"),
        (nn.Sigmoid(), "Sigmoid.* has no step; known are Conv2d"),
    ],
)
def test_modules_without_a_step(module: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        convnet.from_torch(nn.Sequential(module, nn.Flatten()), (1, 8, 8))


def test_calibration_wants_examples(others: dict[str, Model], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="name as text a text with an example per line"):
        static.run(others["bert"], static.Options())
    with pytest.raises(OptionError, match="there are no examples"):
        static.run(others["bert"], static.Options(), examples=[])
    with pytest.raises(InputError, match="has no tokenizer"):
        static.run(others["bert"], static.Options(text=str(ROOT / "README.md")))
    bad = np.full((1, 2, 12, 11), np.nan, np.float32)
    with pytest.raises(InputError, match="NaN or infinite"):
        static.run(others["convnet"], static.Options(), examples=[{"images": bad}])
    for wrong in ({"observer": "best"}, {"weights": "group"}, {"weights": "tensor", "search": "mse"}):
        with pytest.raises(OptionError, match=r"choose|has none per tensor"):
            static.Options(**wrong)  # type: ignore[arg-type]


def test_the_command_line(others: dict[str, Model], tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """inspect shows them; a verb for language models ends with one line and exit code 2."""
    execute(hf.plan(others["convnet"]), tmp_path / "convnet")

    def call(*arguments: str) -> tuple[int, str]:
        from lconvert.cli import main

        monkeypatch.setattr("sys.argv", ["lconvert", *arguments])
        with pytest.raises(SystemExit) as done:
            main()
        shown = capsys.readouterr()
        return int(done.value.code or 0), shown.out + shown.err

    for name, word in (("bert", "token_types"), ("convnet", "steps.0")):
        folder = str(tmp_path / name)
        code, shown = call("inspect", folder)
        assert code == 0 and word in shown
        code, shown = call("inspect", "--json", folder)
        assert json.loads(shown)["arch"]["family"] == name
        graph = tmp_path / f"{name}-onnx"
        code, shown = call("hf-to-onnx", folder, "-o", str(graph))
        assert (
            code == 0 and "PASS" in shown and "onnx_classify.py" in shown and "onnx_generate" not in shown
        ), shown
        feed = sentences("bert") if name == "bert" else {"images": net("gelu")[1].numpy()}
        got = run(graph / "model.onnx", feed)
        want = Forward(others[name]).classify(feed) if name == "bert" else None
        if want is None:
            want = sequential(others[name])(torch.tensor(feed["images"])).detach().numpy()
        assert np.abs(got - want).max() < CLOSE
        for verb, flag in (("hf-to-gguf", "--q8_0"), ("hf-to-vllm", "--fp8")):
            code, shown = call(verb, folder, flag, "-o", str(tmp_path / "out.gguf"))
            assert code == 2 and "this works on decoders" in " ".join(shown.split()), shown
            assert not (tmp_path / "out.gguf").exists()


def test_calibration_on_a_text(tmp_path: Path) -> None:
    """Lines of a file through the model's own tokenizer."""
    torch.manual_seed(0)
    vocab = len(json.loads((DEMO / "tokenizer.json").read_text())["model"]["vocab"])
    bert("bert", tmp_path / "m", vocab_size=max(vocab, 4096))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path / "m" / name)
    (tmp_path / "t.txt").write_text("One line.\n\nAnother line of text,\nand a third one.\n")
    model = lconvert.read(tmp_path / "m")
    options = static.Options(text=str(tmp_path / "t.txt"), examples=2)
    assert len(examples.load(model, options.text, count=2, length=512)) == 2
    q = static.run(model, options)
    assert sum(e.activation is not None for e in q.entries.values()) == 14
    step = f"  - static: {{text: {tmp_path / 't.txt'}, examples: 2, observer: entropy}}\n"
    (tmp_path / "r.yaml").write_text("schema: lconvert.recipe/1\nname: static\npasses:\n" + step)
    by_recipe = recipe.load(tmp_path / "r.yaml").apply(model)
    assert "static: inputs of 14 matrices, entropy" in by_recipe.report
