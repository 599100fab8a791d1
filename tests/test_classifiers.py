"""The command line around encoders and networks of images: flags that quantize, proofs, the benchmark, and what each says when it cannot."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("torch", "transformers", "onnx", "onnxruntime", "tokenizers"):
    pytest.importorskip(package, reason=f"{package} is not installed")
import torch
from torch import nn

import lconvert
from lconvert.converters import convnet, hf, onnx_source
from lconvert.errors import InputError, OptionError
from lconvert.executor import execute
from lconvert.forward import Forward, sequential
from lconvert.ir import Convnet, QTensor
from lconvert.passes import examples
from lconvert.passes.examples import arrays
from lconvert.passes.observers import OBSERVERS
from lconvert.validators.classifier_forward import ACTIVATIONS, Network, erf
from lconvert.validators.report import Report
from tests.conftest import DEMO, ROOT
from tests.small_classifiers import bert, sentences
from tests.test_cli import inside

_IMAGE = (1, 8, 8)


def _tokenizer() -> Any:
    """WordPiece of a few words of the README, framed as BERT's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")[:4000]
    made.train_from_iterator(
        text.splitlines(), trainers.WordPieceTrainer(vocab_size=300, special_tokens=special)
    )
    frame = {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B:1 [SEP]:1"}
    made.post_processor = processors.TemplateProcessing(**frame, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return made


class Sources:
    """tok: a BERT with a tokenizer; bert, distilbert: without; cnn: a network of images. NAME.npz beside each: examples with labels."""

    def __init__(self, root: Path):
        self.root = root
        made = _tokenizer()
        import transformers

        bert("bert", root / "tok", vocab_size=made.get_vocab_size())
        transformers.BertTokenizerFast(tokenizer_object=made).save_pretrained(root / "tok")
        (root / "text.txt").write_text(
            (ROOT / "README.md").read_text(encoding="utf-8")[:3000], encoding="utf-8"
        )
        for kind in ("bert", "distilbert"):
            bert(kind, root / kind)
            np.savez(root / f"{kind}.npz", **sentences(kind, tuple(range(2, 40))))
        torch.manual_seed(1)
        steps = (nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 6))
        execute(hf.plan(convnet.from_torch(nn.Sequential(*steps).eval(), _IMAGE)), root / "cnn")
        x = np.random.default_rng(0).random((40, *_IMAGE), dtype=np.float32)
        model = lconvert.read(root / "cnn")
        labels = sequential(model)(torch.from_numpy(x)).argmax(1).numpy()
        np.savez(root / "cnn.npz", images=x, labels=labels)
        np.save(root / "cnn.npy", x)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("classifiers"))


def export(*args: object) -> tuple[int, str, str]:
    return inside(["hf-to-onnx", *map(str, args)])


def failed(report: Report) -> list[str]:
    return [f"{c.name}: {c.value}" for c in report.checks if c.passed is False]


def value(report: Report, name: str) -> str:
    return next(c.value for c in report.checks if c.name == name)


# --- the reference ---------------------------------------------------------------------------------------------


def test_erf_is_that_of_the_c_library() -> None:
    x = np.linspace(-8, 8, 20011)
    assert np.abs(erf(x) - [math.erf(v) for v in x]).max() < 8e-9


def test_activations_are_those_of_torch() -> None:
    x = torch.linspace(-6, 6, 1001)
    theirs = {
        "relu": nn.functional.relu, "tanh": torch.tanh, "silu": nn.functional.silu, "gelu": nn.functional.gelu,
        "gelu_tanh": lambda v: nn.functional.gelu(v, approximate="tanh"), "relu2": lambda v: nn.functional.relu(v) ** 2,
    }  # fmt: skip
    assert theirs.keys() == ACTIVATIONS.keys()
    for name, function in theirs.items():
        got = ACTIVATIONS[name](x.numpy())
        assert got.dtype == np.float32 and np.abs(got - function(x).numpy()).max() < 2e-6, name


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_numpy_computes_what_transformers_does(kind: str, act: str, tmp_path: Path) -> None:
    bert(kind, tmp_path / "m", **{"activation" if kind == "distilbert" else "hidden_act": act})
    model, feed = lconvert.read(tmp_path / "m"), sentences(kind)
    want = Forward(model).classify(feed)
    assert np.abs(Network(model).logits(feed) - want).max() < 2e-5 * np.abs(want).max()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pool", [nn.MaxPool2d, nn.AvgPool2d])
def test_numpy_computes_what_torch_does(pool: Any, stride: int) -> None:
    torch.manual_seed(2)
    body = (
        nn.Conv2d(2, 4, (3, 2), padding=1),
        nn.GELU(),
        pool(2),
        nn.Conv2d(4, 6, 2, stride=stride, bias=False),
        nn.Tanh(),
    )
    x = torch.randn(3, 2, 11, 9)
    width = nn.Sequential(*body, nn.Flatten())(x).shape[1]
    module = nn.Sequential(*body, nn.Flatten(), nn.Linear(width, 5)).eval()
    model = convnet.from_torch(module, (2, 11, 9))
    want = module(x).detach().numpy()
    assert np.abs(Network(model).logits({"images": x.numpy()}) - want).max() < 1e-5


# --- flags -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_text_calibrates_an_encoder(observer: str, sources: Sources, tmp_path: Path) -> None:
    args = [sources.root / "tok", "-o", tmp_path / "o", "--w8a8", "--calibration", sources.root / "text.txt"]
    code, text, err = export(*args, "--observer", observer, "--no-validate", "--no-card", "--json")
    assert code == 0, err
    assert f"static: inputs of 14 matrices, {observer}" in json.dumps(json.loads(text)["manifest"])
    back = onnx_source.load(tmp_path / "o" / "model.onnx")
    rounded = [e for e in back.entries.values() if isinstance(e.data, QTensor)]
    assert len(rounded) == 14 and all(
        e.activation is not None and not e.activation.grid.signed for e in rounded
    )


@pytest.mark.parametrize("name", ["cnn.npz", "cnn.npy"])
def test_arrays_calibrate_a_network_of_images(name: str, sources: Sources, tmp_path: Path) -> None:
    """And are what the proof shows where no other file is named; the trt dialect gets symmetric inputs."""
    for dialect, signed in (("ort", False), ("trt", True)):
        out = tmp_path / dialect
        args = [
            sources.root / "cnn",
            "-o",
            out,
            "--w8a8",
            "--calibration",
            sources.root / name,
            "--dialect",
            dialect,
        ]
        code, text, err = export(*args)
        assert code == 0 and f"compared on 40 examples of {name}" in text, text + err
        assert ("cost: accuracy" in text) == name.endswith("npz")
        back = onnx_source.load(out / "model.onnx")
        specs = [e.activation for e in back.entries.values() if e.activation is not None]
        assert len(specs) == 2 and all(s.grid.signed is signed for s in specs)


@pytest.mark.parametrize(("flag", "kind"), [("int8", "tok"), ("int4", "tok"), ("int8", "cnn")])
def test_weights_alone(flag: str, kind: str, sources: Sources, tmp_path: Path) -> None:
    code, text, err = export(sources.root / kind, "-o", tmp_path / "o", f"--{flag}")
    assert code == 0 and "PASS" in text, text + err
    back = onnx_source.load(tmp_path / "o" / "model.onnx")
    coded = {n for n, e in back.entries.items() if isinstance(e.data, QTensor)}
    assert len(coded) == (2 if kind == "cnn" else 14) and not any("embed" in n for n in coded)


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        ("tok", ["--w8a8"], "add --calibrate FILE: a text with an example per line"),
        ("cnn", ["--w8a8"], "an array `images` of shape (count, 1, 8, 8)"),
        ("cnn", ["--w8a8", "--calibration", "text.txt"], "is a network of images, which no text shows"),
        ("bert", ["--w8a8", "--calibration", "text.txt"], "has no tokenizer, so no text can be used for it"),
        ("bert", ["--w8a8", "--calibration", "cnn.npz"], "holds images, labels"),
        ("cnn", ["--w8a8", "--calibration", "bert.npz"], "expected .npz with an array `images`"),
        ("cnn", ["--int4"], "convolutions are held in int8"),
        ("tok", ["--fp8", "--calibration", "text.txt"], "is a bert; --int8 has int8 weights"),
        ("tok", ["--nvfp4", "--dialect", "trt"], "is a bert; --int8 has int8 weights"),
        ("tok", ["--int8", "--dialect", "genai"], "this works on decoders"),
        ("tok", ["--int8", "--observer", "mse"], "which --int8 leaves in floats"),
        ("tok", ["--observer", "mse"], "add --w8a8"),
        ("cnn", ["--int8", "--block-size", "16"], "a scale per output channel"),
        ("tok", ["--int8", "--recipe", "int8"], "choose one"),
        ("tok", ["--last-logit"], "is an encoder"),
        ("tok", ["--text", "cnn.npz"], "holds images, labels"),
        ("cnn", ["--text", "text.txt"], "is a network of images"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(
    kind: str, args: list[str], words: str, sources: Sources, tmp_path: Path
) -> None:
    given = [sources.root / a if a.endswith((".txt", ".npz")) else a for a in args]
    code, _, err = export(sources.root / kind, "-o", tmp_path / "o", *given)
    assert code == 2 and words in " ".join(err.split()), err
    assert (tmp_path / "o").exists() == ("--text" in args)


def test_a_decoder_has_no_observers(sources: Sources, tmp_path: Path) -> None:
    text = sources.root / "text.txt"
    code, _, err = export(DEMO, "-o", tmp_path / "o", "--w8a8", "--calibration", text, "--observer", "mse")
    assert code == 2 and "is a language model" in err
    code, _, err = export(DEMO, "-o", tmp_path / "o", "--w8a8", "--calibration", sources.root / "bert.npz")
    assert code == 2 and not (tmp_path / "o").exists()


def test_a_recipe_says_the_rest(sources: Sources, tmp_path: Path) -> None:
    """The same options, and those that have no flag."""
    step = f"  - static: {{text: {sources.root / 'cnn.npz'}, observer: percentile, weights: tensor, examples: 8}}\n"
    (tmp_path / "r.yaml").write_text("schema: lconvert.recipe/1\npasses:\n" + step)
    code, text, err = export(
        sources.root / "cnn", "-o", tmp_path / "o", "--recipe", tmp_path / "r.yaml", "--no-validate"
    )
    assert code == 0 and "static: inputs of 2 matrices, percentile" in text and "INT8, per tensor" in text, (
        err
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_ids": np.full((2, 4), 60)}, "takes 0 to 59"),
        ({"input_ids": np.ones((2, 41), int)}, "has 40 positions"),
        ({"input_ids": np.ones((2, 4))}, "expected whole numbers"),
        ({"input_ids": np.ones((0, 4), int)}, "is empty"),
        ({"attention_mask": np.array([[0, 1, 1, 1]] * 2)}, "padded on the right"),
        ({"attention_mask": np.ones((2, 3), int)}, "expected whole numbers (count, length)"),
        ({"attention_mask": np.ones((3, 4), int)}, "there are 2 examples"),
        ({"token_type_ids": np.full((2, 4), 2)}, "takes 0 to 1"),
        ({"position_ids": np.ones((2, 4), int)}, "no input 'position_ids'"),
        ({"labels": np.ones(2)}, "labels must be"),
        ({"input_ids": np.array([{}], object)}, "cannot be read"),
    ],
)
def test_arrays_that_are_no_examples(
    change: dict[str, Any], words: str, sources: Sources, tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", **{"input_ids": np.ones((2, 4), int), **change})
    with pytest.raises(InputError) as e:
        arrays(lconvert.read(sources.root / "bert"), tmp_path / "x.npz")
    assert words in str(e.value)


def test_images_that_are_no_examples(sources: Sources, tmp_path: Path) -> None:
    model = lconvert.read(sources.root / "cnn")
    bad = np.full((2, *_IMAGE), np.nan, np.float32)
    for x, words in (
        (bad, "NaN or infinite"),
        (bad[..., :3], "of shape (2, 1, 8, 3)"),
        (bad > 0, "images are bool"),
    ):
        np.save(tmp_path / "x.npy", x)
        with pytest.raises(InputError) as e:
            arrays(model, tmp_path / "x.npy")
        assert words in str(e.value)
    (tmp_path / "y.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(InputError, match="cannot be read as arrays"):
        arrays(model, tmp_path / "y.npz")
    with pytest.raises(OptionError, match="language model"):
        arrays(lconvert.read(DEMO), tmp_path / "x.npy")


def test_what_is_left_out_of_arrays_is_what_it_is_without(sources: Sources, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((5, 4), np.int32))
    model = lconvert.read(sources.root / "bert")
    found = arrays(model, tmp_path / "x.npy")
    assert found.count == 5 and found.labels is None
    assert found.arrays["attention_mask"].all() and not found.arrays["token_type_ids"].any()
    assert [len(b["input_ids"]) for b in examples.load(model, tmp_path / "x.npy", count=3, length=9)] == [3]


# --- proofs ----------------------------------------------------------------------------------------------------


def test_a_proof_of_an_encoder(sources: Sources, tmp_path: Path) -> None:
    """All tiers, on passages of the text; its report is one that others read."""
    folder, out = sources.root / "tok", tmp_path / "o"
    code, text, err = export(
        folder,
        "-o",
        out,
        "--w8a8",
        "--calibration",
        sources.root / "text.txt",
        "--report",
        tmp_path / "r.json",
    )
    assert code == 0, text + err
    assert "onnx_classify.py" in text and "lconvert bench" in text and "onnx_generate" not in text
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-classification" in card and "# ids, mask, types" in card
    report = lconvert.validate(folder, out, threads=1)
    assert report.passed and not failed(report)
    assert {c.tier for c in report.checks} == {"structure", "tensors", "tokens", "logits"}
    assert value(report, "products in integers").startswith("14 of 14")
    measured = {c.name: c.measured for c in report.checks}
    graph, cost = measured["graph: largest difference"], measured["cost: error of the logits"]
    fidelity = measured["fidelity: error of the logits"]
    assert (
        graph is not None
        and cost is not None
        and fidelity is not None
        and graph < 1e-5 < cost < 0.1
        and fidelity < cost / 2
    )
    assert "transformers" in value(report, "reference: largest difference")
    for arguments in (
        ["report", str(tmp_path / "r.json"), "-o", str(tmp_path / "r.html")],
        ["validate", str(folder), str(out), "--baseline", str(tmp_path / "r.json")],
    ):
        code, text, err = inside(arguments)
        assert code == 0, text + err


def test_noise_judges_no_cost(sources: Sources, tmp_path: Path) -> None:
    """Without tokenizer or images the graph is proven, and what rounding costs is a figure."""
    for kind in ("bert", "cnn"):
        out, shown = tmp_path / kind, sources.root / f"{kind}.npz"
        assert (
            export(sources.root / kind, "-o", out, "--w8a8", "--calibration", shown, "--no-validate")[0] == 0
        )
        report = lconvert.validate(sources.root / kind, out, threads=1)
        assert report.passed and any("what rounding costs on real data" in line for line in report.not_proven)
        assert next(c for c in report.checks if c.name == "cost: error of the logits").passed is None
        with_data = lconvert.validate(sources.root / kind, out, text=shown, threads=1, max_windows=None)
        assert next(c for c in with_data.checks if c.name == "cost: error of the logits").passed
        assert not with_data.not_proven


def test_labels_count_hits(sources: Sources, tmp_path: Path) -> None:
    out, shown = tmp_path / "o", sources.root / "cnn.npz"
    assert export(sources.root / "cnn", "-o", out, "--w8a8", "--calibration", shown, "--no-validate")[0] == 0
    report = lconvert.validate(sources.root / "cnn", out, text=shown, threads=1)
    assert "the original 100.00%" in value(report, "cost: accuracy")
    found = dict(np.load(shown))
    np.savez(tmp_path / "wrong.npz", images=found["images"], labels=found["labels"] + 6)
    with pytest.raises(InputError, match="the model has 6 classes"):
        lconvert.validate(sources.root / "cnn", out, text=tmp_path / "wrong.npz", threads=1)


def test_other_sources_and_artifacts(sources: Sources, tmp_path: Path) -> None:
    """An .lcir folder of a quantized encoder: proven against the folder, and its integers carried into the graph."""
    step = f"  - static: {{text: {sources.root / 'text.txt'}, examples: 16}}\n"
    (tmp_path / "r.yaml").write_text("schema: lconvert.recipe/1\npasses:\n" + step)
    folder, lcir = sources.root / "tok", tmp_path / "q.lcir"
    assert inside(["compress", str(folder), "-o", str(lcir), "--recipe", str(tmp_path / "r.yaml")])[0] == 0
    for reference, candidate in ((folder, lcir), (lcir, lcir), (folder, folder)):
        report = lconvert.validate(reference, candidate, threads=1, cache=False)
        assert report.passed and not failed(report), failed(report)
    code, text, err = export(lcir, "-o", tmp_path / "o")
    assert code == 0, text + err
    report = lconvert.validate(lcir, tmp_path / "o", threads=1)
    assert value(report, "carried") == "14 exact of 14 quantized"
    assert value(report, "activations and KV cache") == "as the source says"
    report = lconvert.validate(folder, tmp_path / "o", threads=1, tiers=["structure", "layers"])
    assert report.passed and any("layers" in line for line in report.not_proven)


def test_another_model_is_refused(sources: Sources, tmp_path: Path) -> None:
    assert export(sources.root / "bert", "-o", tmp_path / "o", "--no-validate")[0] == 0
    with pytest.raises(InputError, match="is not made from"):
        lconvert.validate(sources.root / "distilbert", tmp_path / "o")
    with pytest.raises(InputError, match="is not made from"):
        lconvert.validate(sources.root / "cnn", tmp_path / "o")


# --- the benchmark ---------------------------------------------------------------------------------------------


def test_bench(sources: Sources, tmp_path: Path) -> None:
    for kind, unit, runtime in (("bert", "sequences", "transformers"), ("cnn", "images", "torch")):
        folder, out = sources.root / kind, tmp_path / kind
        assert export(folder, "-o", out, "--no-validate")[0] == 0
        options = ["--batch", "1,2", "--repetitions", "2", "--threads", "1"]
        code, text, err = inside(
            ["bench", str(folder), str(out), *options, "--report", str(tmp_path / "b.json")]
        )
        assert code == 0 and f"{unit}/s" in text, err
        found = json.loads((tmp_path / "b.json").read_text())
        assert [(r["runtime"], r["batch"]) for r in found["results"]] == [
            (x, n) for x in (runtime, "onnxruntime") for n in (1, 2)
        ]
        assert found["settings"]["length"] == (40 if kind == "bert" else None)
        for r in found["results"]:
            assert r["examples_per_s"]["median"] > 10 and r["latency_s"]["p50"] <= r["latency_s"]["p99"]
            assert (r["ratio"]["median"] == 1) == (r["runtime"] == runtime)


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (["bert", "DEMO"], [], "no language model; measure encoders and networks of images apart"),
        (["bert", "cnn"], [], "take different inputs"),
        (["bert"], ["--slo", "ttft=1"], "--slo is for language models"),
        (["bert@transformers"], [], "a runtime is for language models"),
        (["bert"], ["--batch", "1;2"], "give whole numbers"),
        (["bert"], ["--batch", "0"], "of 1 at least"),
        (["bert"], ["--prompt", "41"], "has 40 positions"),
        (["bert", "missing"], [], "missing"),
    ],
)
def test_bench_says_what_is_wrong(names: list[str], options: list[str], words: str, sources: Sources) -> None:
    paths = [str(DEMO) if n == "DEMO" else str(sources.root / n) for n in names]
    code, _, err = inside(["bench", *paths, *options, "--threads", "1"])
    assert code == 2 and words in " ".join(err.split()), err


def test_the_example_classifies(sources: Sources, tmp_path: Path) -> None:
    """Classes of texts are those of the model; of arrays those of its torch module."""
    spec = importlib.util.spec_from_file_location("onnx_classify", ROOT / "examples" / "onnx_classify.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for kind in ("tok", "cnn"):
        assert export(sources.root / kind, "-o", tmp_path / kind, "--no-validate")[0] == 0
    texts = ["ONNX and more", "a longer text of several words"]
    found = module.classify(tmp_path / "tok", texts)
    model = lconvert.read(sources.root / "tok")
    want = [Network(model).logits({"input_ids": [r]})[0] for r in examples.tokens(model, texts, 40)]
    assert [name for name, _ in found] == [f"LABEL_{w.argmax()}" for w in want]
    shares = [float(np.exp(w - w.max()).max() / np.exp(w - w.max()).sum()) for w in want]
    assert [share for _, share in found] == pytest.approx(shares, rel=1e-3)
    cnn = lconvert.read(sources.root / "cnn")
    assert isinstance(cnn.arch, Convnet)
    labels = np.load(sources.root / "cnn.npz")["labels"]
    assert [
        int(name) for name, _ in module.classify(tmp_path / "cnn", [str(sources.root / "cnn.npz")])
    ] == labels.tolist()
