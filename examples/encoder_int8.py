"""Static int8 of what is no language model: a small CNN and a small BERT, trained here, exported, measured in ONNX Runtime.

python examples/encoder_int8.py [OUT]

The data are scikit-learn's digits: 1797 images of 8 x 8 pixels, written by hand, which are inside the package. The CNN sees them as they
are. For BERT a digit is a sentence: a word for every pixel with some ink (its place, and whether it is dark), so that sentences differ in
length and are padded. That is no natural language, but real data with held-out truth; accuracies are of this task alone. Both models
train for some seconds; the table says what int8 costs them, with a weight scale per tensor or per channel and by observer.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import nn

import lconvert
from lconvert.converters import convnet, hf, onnx
from lconvert.executor import execute
from lconvert.ir import Model
from lconvert.passes import histograms, static
from lconvert.passes.observers import OBSERVERS
from lconvert.validators import plots, plots_ranges

TRAIN, CALIBRATION = 1200, 128
INK, DARK = 5, 11  # of 16
CLS, FIRST = 1, 2  # words: padding is 0; then 64 faint pixels and 64 dark ones
Arrays = Mapping[str, Any]


def digits() -> tuple[Any, Any]:
    """Images (1797, 8, 8) with values 0..16 in a fixed random order, and what they are."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return x[order].reshape(-1, 8, 8), y[order]


def images(x: Any) -> dict[str, Any]:
    return {"images": (x[:, None] / 16).astype(np.float32)}


def sentences(x: Any, types: bool) -> dict[str, Any]:
    """Every pixel with enough ink as a word, after CLS; types: whether it is dark is the word's type as well."""
    rows = []
    for digit in x.reshape(-1, 64):
        places = np.flatnonzero(digit > INK)
        rows.append(np.concatenate([[CLS], FIRST + places + 64 * (digit[places] > DARK)]))
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for out, row in zip(ids, rows, strict=True):
        out[: len(row)] = row
    found = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}
    return found | ({"token_type_ids": (ids >= FIRST + 64).astype(np.int64)} if types else {})


def batches(arrays: Arrays, size: int) -> Iterator[dict[str, Any]]:
    count = len(next(iter(arrays.values())))
    return ({k: v[i : i + size] for k, v in arrays.items()} for i in range(0, count, size))


def train(module: nn.Module, arrays: Arrays, labels: Any, rate: float, epochs: int) -> None:
    """Some epochs of Adam in a fixed order, slower and slower."""
    optimizer = torch.optim.Adam(module.parameters(), rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, epochs)
    module.train()
    for _ in range(epochs):
        for batch, y in zip(batches(arrays, 50), batches({"y": labels}, 50), strict=True):
            given = {k: torch.as_tensor(v) for k, v in batch.items()}
            out = module(**given).logits if "input_ids" in given else module(given["images"])
            optimizer.zero_grad()
            nn.functional.cross_entropy(out, torch.as_tensor(y["y"])).backward()
            optimizer.step()
        schedule.step()
    module.eval()


def lenet() -> nn.Sequential:
    """LeNet's shape for images of 8 x 8."""
    torch.manual_seed(0)
    features = (nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    features += (nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    return nn.Sequential(*features, nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


def bert(kind: str) -> Any:
    """A BERT or DistilBERT of two layers for the sentences above."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": FIRST + 128,
        "max_position_embeddings": 65,
        "num_labels": 10,
        "initializer_range": 0.1,
    }
    if kind == "distilbert":
        config = transformers.DistilBertConfig(dim=64, n_layers=2, n_heads=2, hidden_dim=128, **sizes)
        return transformers.DistilBertForSequenceClassification(config)
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, **sizes
    )
    return transformers.BertForSequenceClassification(config)


def trained(kind: str, folder: Path) -> tuple[Model, Arrays]:
    """A model of ours, trained and written to `folder`, and its inputs for all digits. kind: cnn, bert or distilbert."""
    torch.set_num_threads(1)
    x, y = digits()
    arrays = images(x) if kind == "cnn" else sentences(x, types=kind == "bert")
    some = {k: v[:TRAIN] for k, v in arrays.items()}
    if kind == "cnn":
        net = lenet()
        train(net, some, y[:TRAIN], 3e-3, 20)
        execute(hf.plan(convnet.from_torch(net, (1, 8, 8))), folder, force=True)
    else:
        module = bert(kind)
        train(module, some, y[:TRAIN], 3e-3, 8)
        module.save_pretrained(folder)
    return lconvert.read(folder), arrays


def logits(model: Model, arrays: Arrays, folder: Path) -> Any:
    """What ONNX Runtime makes of the held-out digits."""
    execute(onnx.plan(model), folder, force=True)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    held_out = {k: v[TRAIN:] for k, v in arrays.items()}
    return np.concatenate([session.run(["logits"], b)[0] for b in batches(held_out, 100)])


def compare(kind: str, out: Path) -> list[dict[str, Any]]:
    """Accuracy of floats and of int8 by weight scale and observer, printed; plots of ranges and of weight errors under `out`."""
    model, arrays = trained(kind, out / kind)
    truth = digits()[1][TRAIN:]
    examples = list(batches({k: v[:CALIBRATION] for k, v in arrays.items()}, 32))
    with tempfile.TemporaryDirectory() as work:
        want = logits(model, arrays, Path(work) / "fp32")
        rows = [
            {
                "model": kind,
                "weights": "float",
                "observer": "-",
                "accuracy": accuracy(want, truth),
                "error": 0.0,
            }
        ]
        errors = {}
        for scale in ("tensor", "channel"):
            for observer in OBSERVERS:
                rounded = static.run(model, static.Options(scale, observer=observer), examples=examples)  # type: ignore[arg-type]
                got = logits(rounded, arrays, Path(work) / "int8")
                error = float(np.sqrt(np.square(got - want).mean() / np.square(want).mean()))
                rows.append({"model": kind, "weights": scale, "observer": observer})
                rows[-1] |= {"accuracy": accuracy(got, truth), "error": error}
            errors[scale] = static.errors(model, rounded)
    for row in rows:
        print("{model:11} {weights:8} {observer:11} {accuracy:7.2%} {error:9.4f}".format(**row))
    seen = histograms.inputs(model, examples)
    panels = [
        (r, h, {o: choose(h, False) for o, choose in OBSERVERS.items()})
        for r, h in seen.items()
        if distinct(r)
    ]
    plots.save(plots_ranges.ranges(panels), out / f"{kind}-ranges.png")
    names = list(seen)
    bars = [(f"a scale per {scale}", [found[n] for n in names]) for scale, found in errors.items()]
    plots.save(plots_ranges.weights(names, bars), out / f"{kind}-weights.png")
    return rows


def distinct(role: str) -> bool:
    """Queries, keys and values have one input."""
    return not role.endswith((".attn.k", ".attn.v"))


def accuracy(found: Any, truth: Any) -> float:
    return float((found.argmax(1) == truth).mean())


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("out", nargs="?", type=Path, default="encoder-int8", help="folder of the plots")
    out = Path(arguments.parse_args().out)
    out.mkdir(exist_ok=True)
    print(f"{'model':11} {'weights':8} {'observer':11} accuracy, relative error of the logits")
    for kind in ("cnn", "bert", "distilbert"):
        compare(kind, out)
    print(f"plots are in {out}/")
