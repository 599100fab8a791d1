"""Text out of a folder that `lconvert hf-to-onnx` wrote, with onnxruntime, tokenizers and NumPy alone.

python examples/onnx_generate.py FOLDER "Once upon a time" [TOKENS]
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def generate(folder: Path, prompt: str, tokens: int = 32) -> str:
    """The prompt and its greedy continuation."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    caches = [i for i in session.get_inputs() if i.name.startswith("past_key_values")]
    past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in caches}
    ids = tokenizer.encode(prompt).ids
    new = ids
    for _ in range(tokens):
        positions = np.arange(len(ids) - len(new), len(ids))[None]
        feed = {
            "input_ids": np.array([new]),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": positions,
        }
        logits, *present = session.run(None, feed | past)
        past = dict(zip(past, present, strict=True))
        new = [int(logits[0, -1].argmax())]
        ids = ids + new
    return tokenizer.decode(ids)


if __name__ == "__main__":
    print(generate(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])))
