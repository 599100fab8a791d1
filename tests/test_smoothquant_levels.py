"""SmoothQuant's O1, O2 and O3: inputs rounded with a scale per token, with one found at run time, and with one from a text; in ONNX Runtime,
and what targets without such kernels say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("onnx", "onnxruntime", "torch", "transformers"):
    pytest.importorskip(package, reason=f"{package} is not installed")
import torch

import lconvert
from lconvert import recipe
from lconvert.converters import onnx, targets
from lconvert.errors import OptionError, UnsupportedError
from lconvert.executor import execute
from lconvert.forward import Forward
from lconvert.ir import Model
from lconvert.passes import activations
from lconvert.primitives.job import Calibration, Job
from tests.conftest import DEMO, ROOT
from tests.test_onnx_archs import Session, tokens

RECIPES = {"O1": "smoothquant-w8a8", "O2": "smoothquant-w8a8-o2", "O3": "smoothquant-w8a8-o3"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    text = tmp_path_factory.mktemp("text") / "calib.txt"
    text.write_text((ROOT / "README.md").read_text(encoding="utf-8")[:3000], encoding="utf-8")
    job = Job(Calibration(str(text), 2, 64))
    return {o: recipe.load(name).apply(lconvert.read(DEMO), job) for o, name in RECIPES.items()}


def rounded(model: Model, ids: list[int], level: str) -> Any:
    """Logits where what enters every linear module of a layer is rounded as the level says, in plain torch."""
    forward = Forward(model)

    def hook(role: str) -> Any:
        static = model.entries[role].activation

        def before(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x = inputs[0]
            if level == "O3":
                assert static is not None and static.scale is not None
                scale = torch.tensor(float(np.asarray(static.scale.load()).reshape(-1)[0]))
            elif level == "O2":
                scale = x.abs().max() / 127
            else:
                scale = x.abs().amax(-1, keepdim=True) / 127
            return ((x / scale.clamp(min=1e-30)).round().clamp(-128, 127) * scale, *inputs[1:])

        return before

    count = 0
    for name, module in forward.module.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers." in name:
            _, layer, part, kind = name.rsplit(".", 3)
            block = {"self_attn": "attn", "mlp": "mlp"}[part]
            module.register_forward_pre_hook(hook(f"layers.{layer}.{block}.{kind.removesuffix('_proj')}"))
            count += 1
    assert count == 21
    return forward.logits(ids)


def test_in_onnx_runtime(models: dict[str, Model], tmp_path: Path) -> None:
    ids = tokens(models["O1"], 24)
    # O2's one scale is of all tokens that run together: runs of their own, as one value that falls to the other code is felt by all
    runs = [ids[a : a + 4] for a in range(0, 24, 4)]
    got: dict[str, Any] = {}
    for level, model in models.items():
        plan = onnx.plan(model, onnx.Options(), model)
        assert not any("stay in F32" in n for n in plan.notes)
        execute(plan, tmp_path / level, threads=1)
        session = Session(tmp_path / level / "model.onnx")
        got[level] = np.concatenate([session.logits(run, [len(run)]) for run in runs])
    for level, model in models.items():
        want = np.concatenate([rounded(model, run, level) for run in runs])
        near = np.abs(got[level] - want).mean()
        far = min(np.abs(got[other] - want).mean() for other in got if other != level)
        # equal until a value between two codes falls to the other one, which everything after it then sees
        assert near < 0.2 * far and np.abs(got[level] - want).mean(-1).min() < 1e-3, (level, near, far)
        assert level != "O3" or near < 1e-5
    plain = np.concatenate([Forward(lconvert.read(DEMO)).logits(run) for run in runs])
    errors = {level: float(np.square(y - plain).mean()) for level, y in got.items()}
    assert errors["O1"] < errors["O2"], errors


def test_what_has_kernels(models: dict[str, Model]) -> None:
    """Nothing but an ONNX graph finds one scale for all tokens while it runs, and nothing else says that it does."""

    def verdicts(level: str, name: str) -> set[str]:
        items = targets.plan(models[level], name, "x", original=models[level]).items()
        return {i.verdict.kind for i in items if "q_proj" in i.name or "attn_q" in i.name}

    spec = models["O2"].entries["layers.0.attn.q"].activation
    assert spec is not None and (spec.per, spec.dynamic, spec.scale) == ("tensor", True, None)
    for name in ("vllm", "compressed-tensors"):
        assert verdicts("O1", name) == {"exact"} and verdicts("O2", name) == {"refused"}, name
    for name in ("tensorrt-llm", "modelopt"):
        assert verdicts("O2", name) == {"refused"}, name
    reasons = [
        i.verdict.reason for i in targets.plan(models["O2"], "vllm", "x", original=models["O2"]).items()
    ]
    assert any("int8 activations are static per tensor or dynamic per token" in str(r) for r in reasons)
    with pytest.raises(UnsupportedError, match="no inputs quantized per tensor while the model runs"):
        onnx.plan(models["O2"], onnx.Options(dialect="trt"), models["O2"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": "row"}, "activations: per 'row'; choose token or tensor"),
        ({"per": "tensor", "group": 32}, "per tensor with groups; leave one of them out"),
        ({"per": "tensor", "grid": "fp4"}, "per tensor with groups"),
        ({"per": "token", "dynamic": False}, "per token without dynamic; a static scale is one per tensor"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as e:
        activations.Options(**options)
    assert message in str(e.value)
