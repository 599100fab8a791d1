"""Static int8: weights rounded to nearest with a scale per tensor or per output channel, inputs with calibrated scales.

What CPUs and TensorRT run in integers from end to end: the scales of inputs are fixed beforehand, from examples of what the model will
see, by one of passes/observers.py. Meant for encoders and convolutional networks; the embeddings stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lconvert.errors import OptionError
from lconvert.ir import ActSpec, Entry, Model, QTensor, dense, int_grid
from lconvert.passes import rtn
from lconvert.passes.histograms import Examples
from lconvert.primitives.job import Job
from lconvert.spec import check


@dataclass(frozen=True)
class Options:
    """weights: channel or tensor, what shares a scale. search: minmax or mse, of the scales per channel. observer: minmax, percentile,
    entropy or mse. symmetric: inputs in int8 around 0, as TensorRT must have them; else uint8 with a zero point. text: a file of
    examples, lines of text or arrays (passes/examples.py), else the run's; examples, context: how many of `text`'s, and tokens of
    each, else as many as the run has windows. targets,
    ignore: regular expressions on canonical names."""

    weights: Literal["channel", "tensor"] = "channel"
    search: Literal["minmax", "mse"] = "minmax"
    observer: str = "minmax"
    symmetric: bool = False
    text: str = ""
    examples: int = 128
    context: int = 512
    targets: str = r".*"
    ignore: str = r".*embed"

    def __post_init__(self) -> None:
        from lconvert.passes.observers import OBSERVERS

        if self.weights not in ("channel", "tensor"):
            raise OptionError(f"static: weights {self.weights!r}; choose channel or tensor")
        if self.observer not in OBSERVERS:
            raise OptionError(f"static: observer {self.observer!r}; choose {', '.join(OBSERVERS)}")
        if self.weights == "tensor" and self.search != "minmax":
            raise OptionError("static: the mse search chooses scales per channel; it has none per tensor")
        self.rounding()

    def rounding(self) -> rtn.Options:
        group: int | str = -1 if self.weights == "channel" else "tensor"
        return rtn.Options("int8", group, self.targets, self.ignore, search=self.search)


def run(
    model: Model,
    options: Options,
    job: Job = Job(),  # noqa: B008 - immutable
    examples: Examples | None = None,
) -> Model:
    """The model with int8 weights and an ActSpec on each of them. examples: arrays as passes/histograms.py takes them."""
    import numpy as np

    from lconvert.forward import threads
    from lconvert.passes import histograms
    from lconvert.passes.examples import load, wanted
    from lconvert.passes.observers import OBSERVERS, codes

    if examples is None:
        text = options.text or job.calibration.text
        if not text:
            raise OptionError(f"static: scales of inputs need examples; name as text {wanted(model)}")
        c = job.calibration
        count, length = (options.examples, options.context) if options.text else (c.windows, c.context)
        examples = load(model, text, count=count, length=length)
    with threads(job.threads):
        seen = histograms.inputs(model, examples)  # of the model as it is, not of its rounded weights
    rounded = rtn.run(model, options.rounding())
    new: dict[str, Entry] = {}
    for name, entry in rounded.entries.items():
        if not isinstance(entry.data, QTensor) or entry.data is model.entries[name].data:
            continue
        if name not in seen:
            raise OptionError(f"static: no input of {name} was seen; leave it out with ignore")
        found = codes(OBSERVERS[options.observer](seen[name], options.symmetric), options.symmetric)
        scale = dense(np.array([found.scale], np.float32))
        zero = None if options.symmetric else dense(np.array([found.zero], np.uint8))
        spec = ActSpec(int_grid(8, options.symmetric), "tensor", False, scale=scale, zero=zero)
        note = f"inputs {'int8' if options.symmetric else 'uint8'}, static, {options.observer}"
        new[name] = replace(entry, activation=spec, provenance=(*entry.provenance, note))
    return check(rounded.with_entries(new, f"static: inputs of {len(new)} matrices, {options.observer}"))


def errors(before: Model, after: Model) -> dict[str, float]:
    """Relative RMS error of every weight that `after` holds in codes."""
    import numpy as np

    from lconvert.kernels.qtensor import values

    out = {}
    for name, entry in after.entries.items():
        if isinstance(entry.data, QTensor):
            want = values(before.entries[name].data).astype(np.float64)
            got = values(entry.data).astype(np.float64)
            out[name] = float(np.sqrt(np.square(got - want).sum() / max(np.square(want).sum(), 1e-300)))
    return out
