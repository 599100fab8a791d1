"""Peak memory of what runs a model on a text: four times the layers, and no more memory, in a process that measures nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import random_models
from tests.arch_cases import Case

_CONFIG = {
    "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 256,
    "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
_SHALLOW, _DEEP = 2, 8
#: Bytes of one layer in fp32.
_LAYER = 4 * (512 * (512 + 128 + 128 + 512) + 3 * 512 * 1536)
#: glibc gives back at once what is freed above this many bytes: without it, peaks of one run differ by six layers.
_GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}

_MEASURED = """
import json, sys
import numpy as np
import lconvert
from lconvert.passes import allocate, awq, gptq
from lconvert.primitives import importance, sensitivity, text
from lconvert.primitives.job import Calibration, Job
from lconvert.primitives.probe import Probe

ids = tuple(tuple(w) for w in np.random.default_rng(0).integers(0, 256, (1, 64)).tolist())
text.windows = lambda model, calibration: text.Windows(ids)
job = Job(Calibration("random"), threads=1)


def peak(run):
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    run()
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith("VmHWM"))


def allocated(model):
    options = allocate.Options("gguf", bpw=10.0, types=("Q8_0", "none"))
    allocate.run(model, options, job)


def estimated(method):
    return lambda model: sensitivity.costs(method, Probe(model, ids), {}, probes=1)


def changed(model):
    rounding = allocate.Rounding(model, {})
    Probe(model, ids).kld({r: rounding.lazily(r, "Q8_0") for r, e in model.entries.items() if len(e.shape) == 2})


def rounded(method):
    return lambda model: method.run(model, method.Options(grid="int4", group=128, ignore="head"), job)


runs = {
    "importance": lambda model: importance.measure(model, job),
    "fisher": estimated("fisher"),
    "hessian": estimated("hessian"),
    "kld": changed,
    "allocation": allocated,
    "gptq": rounded(gptq),
    "awq": rounded(awq),
    "held": lambda model: [e.data.load().astype(np.float32) for e in model.entries.values()],
}
models = [lconvert.read(folder) for folder in sys.argv[1:]]
print(json.dumps({name: [peak(lambda: run(model)) for model in (models[0], *models)] for name, run in runs.items()}))
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from Linux's /proc"
)
def test_peaks_do_not_grow_with_layers(tmp_path: Path) -> None:
    """6 layers more take less than one in fp32, so not even their int4 codes are kept; "held" shows that it would be seen."""
    folders = []
    for layers in (_SHALLOW, _DEEP):
        case = Case("deep", "llama", _CONFIG | {"num_hidden_layers": layers}, dtype="bfloat16")
        folders.append(str(random_models.build(case, tmp_path / f"{layers}")))
    out = subprocess.run(
        [sys.executable, "-P", "-c", _MEASURED, *folders],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | _GIVEN_BACK,
    )
    assert out.returncode == 0, out.stderr
    peaks = json.loads(out.stdout.splitlines()[-1])
    grown = {name: (deep - shallow) / _LAYER for name, (_, shallow, deep) in peaks.items()}
    assert grown.pop("held") > 0.9 * (_DEEP - _SHALLOW), peaks
    assert all(layers < 1 for layers in grown.values()), (grown, peaks)
