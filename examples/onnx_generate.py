"""Text out of a folder that `lconvert hf-to-onnx` wrote, with onnxruntime, tokenizers and NumPy alone.

python examples/onnx_generate.py FOLDER "Once upon a time" [TOKENS]

Keys and values stay in ONNX Runtime between steps. Those of a graph with --static-cache lie in one block of memory that is bound as
input and as output, so that a step writes its own rows and copies nothing.
"""

import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession, OrtValue
from tokenizers import Tokenizer

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def generate(folder: Path, prompt: str, tokens: int = 32) -> str:
    """The prompt and its greedy continuation."""
    session = InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inputs = {i.name: i for i in session.get_inputs()}
    ids = tokenizer.encode(prompt).ids
    fixed = "cache_position" in inputs
    room = len(ids) + tokens if fixed else 0
    empty = {
        name: np.zeros((1, i.shape[1], room, i.shape[3]), _TYPES[i.type])
        for name, i in inputs.items()
        if name.startswith("past_key_values")
    }
    past = {name: OrtValue.ortvalue_from_numpy(array) for name, array in empty.items()}
    binding, new = session.io_binding(), ids
    for _ in range(tokens):
        feed = {
            "input_ids": np.array([new]),
            "attention_mask": np.ones((1, room or len(ids)), np.int64),
            "position_ids": np.arange(len(ids) - len(new), len(ids))[None],
            "cache_position": np.array([len(ids) - len(new)]),
        }
        binding.bind_output("logits", "cpu")
        for name in feed.keys() & inputs.keys():
            binding.bind_cpu_input(name, feed[name])
        for name, value in past.items():
            binding.bind_ortvalue_input(name, value)
            present = name.replace("past_key_values", "present")
            binding.bind_ortvalue_output(present, value) if fixed else binding.bind_output(present, "cpu")
        session.run_with_iobinding(binding)
        logits, *made = binding.get_outputs()
        past = past if fixed else dict(zip(past, made, strict=True))
        ids = [*ids, int(logits.numpy()[0, -1].argmax())]
        new = ids[-1:] if past else ids  # a graph with --prefill-only keeps nothing
    return tokenizer.decode(ids)


if __name__ == "__main__":
    if {"-h", "--help"} & {*sys.argv} or len(sys.argv) < 3:
        sys.exit(__doc__)
    print(generate(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])))
