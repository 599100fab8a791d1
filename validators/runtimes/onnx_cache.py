"""A cache of fixed length in ONNX Runtime: one block of memory for what goes in and what comes out.

Keys and values stay where they are between steps: each buffer is bound as `past_key_values.N.*` and as `present.N.*`, so that
TensorScatter writes a step's rows into it and copies nothing (onnxruntime/core/providers/cpu/llm/tensorscatter.cc copies the cache
where the two differ). What was before a step is gone after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lconvert.errors import InputError

#: Slots taken before a run, (batch,); a graph with this input has a cache of fixed length (converters/onnx_static.py).
POSITION = "cache_position"


class Fixed:
    """Keys and values of a batch in a session, and how many positions of them are taken.

    names: of inputs to those of outputs. buffers: by input, (batch, heads, capacity, width).
    """

    def __init__(
        self, package: Any, session: Any, names: Mapping[str, str], buffers: dict[str, NDArray[Any]]
    ):
        self.buffers, self.taken = buffers, 0
        self.capacity = next(iter(buffers.values())).shape[2]
        self._binding, self._session = session.io_binding(), session
        self._binding.bind_output("logits", "cpu")  # the first, whose value is taken
        for name, array in buffers.items():
            value = package.OrtValue.ortvalue_from_numpy(array)
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(names[name], value)

    def fits(self, tokens: int) -> None:
        """InputError where there is no room for so many tokens more."""
        if self.taken + tokens > self.capacity:
            raise InputError(
                f"{tokens} tokens after {self.taken} do not fit the cache of {self.capacity} positions; open the model with "
                "a larger context"
            )

    def run(self, feed: Mapping[str, NDArray[Any]], tokens: int) -> NDArray[Any]:
        """Logits of so many tokens behind those that are in. feed: every other input; the mask of all tokens so far is
        continued by ones to the capacity, for a slot that is not taken is nobody's past."""
        given = dict(feed)
        if (mask := given.get("attention_mask")) is not None:
            given["attention_mask"] = np.pad(
                mask, ((0, 0), (0, self.capacity - mask.shape[1])), constant_values=1
            )
        for name, array in given.items():
            self._binding.bind_cpu_input(name, np.ascontiguousarray(array))
        self._binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(self._binding)
        self.taken += tokens
        return np.asarray(self._binding.get_outputs()[0].numpy())
