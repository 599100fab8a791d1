"""Classes of texts or arrays by a folder that `lconvert hf-to-onnx` wrote, with onnxruntime, tokenizers and NumPy alone.

python examples/onnx_classify.py FOLDER "A text" ["Another" ...]
python examples/onnx_classify.py FOLDER ARRAYS.npz       (images, or input_ids with attention_mask)
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


def tokenized(folder: Path, texts: list[str]) -> dict[str, Any]:
    """Ids of the texts, padded on the right, and the mask that says so."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    found = tokenizer.encode_batch(texts)
    return {
        "input_ids": np.array([f.ids for f in found]),
        "attention_mask": np.array([f.attention_mask for f in found]),
        "token_type_ids": np.array([f.type_ids for f in found]),
    }


def classify(folder: Path, given: list[str]) -> list[tuple[str, float]]:
    """The likeliest class of each text or example, and its probability."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    feed = dict(np.load(given[0])) if given[0].endswith(".npz") else tokenized(folder, given)
    feed = {i.name: feed[i.name] for i in session.get_inputs()}
    (logits,) = session.run(["logits"], feed)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    names = json.loads((folder / "config.json").read_text()).get("id2label", {})
    return [(names.get(str(row.argmax()), str(row.argmax())), float(row.max())) for row in shares]


if __name__ == "__main__":
    if {"-h", "--help"} & {*sys.argv} or len(sys.argv) < 3:
        sys.exit(__doc__)
    found = classify(Path(sys.argv[1]), sys.argv[2:])
    texts = sys.argv[2:] if len(found) == len(sys.argv) - 2 else [f"example {i}" for i in range(len(found))]
    for text, (name, share) in zip(texts, found, strict=True):
        print(f"{share:6.1%} {name:12} {text}")
