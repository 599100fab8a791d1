"""Every architecture, proved: llama.cpp computes what transformers computes, and nothing is lost on any way round.

Each case of `arch_cases` is one random model, made once. The F32 GGUF isolates the graph: names, row orders, norms,
scales, rope and metadata must all be right for the KLD to stay at rounding noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch

import lconvert
from lconvert.archs import find
from lconvert.archs.common import Keys
from lconvert.converters import hf
from lconvert.errors import InputError, UnsupportedError
from lconvert.forward import Forward
from lconvert.ir import Model, Tensor, as_f32
from lconvert.kernels.qtensor import values
from lconvert.spec import roles
from lconvert.validators.tensors import check_gguf
from tests import arch_cases
from tests.arch_cases import Case

for package in ("llama_cpp", "torch", "transformers"):
    pytest.importorskip(package, reason=f"{package} is not installed")
from tests import random_models
from tests.built_models import Built, kld

CASES = arch_cases.load()
every = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)

#: Mean KLD that an F32 GGUF of a correct graph stays under: fp32 sums in another order give 1e-13 to 1e-11.
ROUNDING = 1e-10
#: The same with ggml's GELU in the reference: a value at the edge of two fp16 numbers may be looked up on either side.
TABLE = 5e-8
#: Median KLD that quantized weights stay under on random (hard to quantize) models; gross errors are above 1.
QUANTIZED = {"Q8_0": 0.02, "Q4_K_M": 1.0}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Case -> Built, made when first asked for; pytest runs the tests of a case in any order."""
    root, made = tmp_path_factory.mktemp("archs"), dict[str, Built]()

    def get(case: Case) -> Built:
        if case.name not in made:
            made[case.name] = Built(case, root)
        return made[case.name]

    yield get


@every
def test_parity(case: Case, built: Any) -> None:
    b = built(case)
    assert sorted(loss.name for loss in b.losses) == sorted(case.losses)
    assert all(loss.reason and loss.link.startswith("https://") for loss in b.losses)
    if not case.loads:
        with pytest.raises(InputError, match=r"llama\.cpp cannot load"):
            b.in_llama_cpp(case, b.gguf)
        return
    got = b.full(case)
    each = kld(b.reference, got)
    exact = each[: case.exact]
    assert not len(exact) or exact.mean() <= case.floor, f"{exact.mean():.2e}"
    if case.wrong:
        rest = each[case.exact :]
        assert rest.mean() >= case.wrong, f"{rest.mean():.2e}: the loss {case.losses} makes no difference"
    if random_models.with_ggml_gelu(b.hf):
        table = kld(random_models.logits(b.hf, b.ids), got)[: case.exact]
        assert table.mean() <= TABLE, f"{table.mean():.2e} with ggml's GELU in the reference"
        b.hf = random_models.reference(b.folder)
    else:
        assert case.floor <= ROUNDING


@every
def test_refusal(case: Case, built: Any, tmp_path: Path) -> None:
    """A loss without a context limit needs --allow-trait-loss; one with a limit does not."""
    b = built(case)
    if case.refused:
        with pytest.raises(UnsupportedError, match="--allow-trait-loss"):
            lconvert.convert(b.model, tmp_path / "x.gguf", ftype="F32")
    else:
        plan = lconvert.plan_gguf(b.model, "x.gguf", ftype="F32")
        assert not [v for v in plan.losses if v.kind == "refused"]
        assert len(plan.losses) == len(case.losses)


@every
def test_tensors_both_ways(case: Case, built: Any) -> None:
    """HF -> IR -> HF: every tensor of the checkpoint comes back under its name with its bits."""
    b = built(case)
    stored = safetensors_bits(b.folder)
    made = {t.name: t.produce(0, t.rows).data for t in hf.to_hf(b.model)}
    assert made.keys() == stored.keys()
    for name, bits in stored.items():
        assert np.array_equal(made[name].view(bits.dtype), bits), name


def safetensors_bits(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint as unsigned integers, read by the safetensors package."""
    out = {}
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                t = file.get_tensor(name)
                out[name] = t.view({2: torch.int16, 4: torch.int32}[t.element_size()]).numpy()
    return out


@every
def test_config_both_ways(case: Case, built: Any) -> None:
    """The reconstructed config means the same to lconvert and to transformers."""
    b = built(case)
    arch = find(case.model_type)
    config = arch.config(b.model.arch)
    keys = Keys(config)
    assert arch.traits(keys) == b.model.arch
    keys.finish()
    rebuilt = Forward(dataclasses.replace(b.model, config={}))
    assert np.array_equal(rebuilt.logits(b.ids), b.reference)


@every
def test_forward(case: Case, built: Any) -> None:
    """The layer-by-layer forward pass is transformers', bit for bit."""
    b = built(case)
    assert np.array_equal(Forward(b.model).logits(b.ids), b.reference)


def effective(model: Model, name: str) -> np.ndarray:
    """Values of an entry with the norm offset applied, in fp32."""
    data = model.entries[name].data
    x = as_f32(data.load(), data.dtype) if isinstance(data, Tensor) else values(data)
    shifted = "norm" in name and not name.endswith(".bias")
    return x + np.float32(model.arch.norm_offset) if shifted else x


@every
def test_gguf_both_ways(case: Case, built: Any) -> None:
    """GGUF -> IR: the traits but for what the file cannot say, and every value exactly."""
    b = built(case)
    back = lconvert.read(b.gguf)
    want, got = b.model.arch, back.arch
    if not case.losses:
        family = case.returns or want.family
        assert dataclasses.replace(got, norm_offset=want.norm_offset) == dataclasses.replace(
            want, family=family
        )
        found = Forward(back).logits(b.ids)
        # Norms that hold the effective weight lose a rounding when the class adds its offset again.
        assert kld(b.reference, found).max() <= (0.0 if want.norm_offset == 0 else ROUNDING)
    assert roles(got) == roles(want)
    for name in roles(want):
        assert np.array_equal(effective(back, name), effective(b.model, name)), name


FIRST = [c for i, c in enumerate(CASES) if c.model_type not in {x.model_type for x in CASES[:i]}]


@pytest.mark.parametrize("ftype", QUANTIZED)
@pytest.mark.parametrize("case", FIRST, ids=lambda c: c.name)
def test_quantized(case: Case, ftype: str, built: Any, tmp_path: Path) -> None:
    """Quantized files load and keep the function; the median, since a rounding may send a token to other experts."""
    b = built(case)
    path = tmp_path / "model.gguf"
    lconvert.convert(b.model, path, ftype=ftype, allow_loss=case.losses)
    tensors = check_gguf(path, lconvert.read(path), b.model)
    assert not tensors.structure and not tensors.broken_promises and tensors.max_difference == 0
    assert not any(row.damaged for row in tensors.table)
    each = kld(b.full(case), b.in_llama_cpp(case, path))
    assert 1e-7 < np.median(each) < QUANTIZED[ftype], f"{np.median(each):.2e}"
