"""The mutation score: every planted fault is caught by the default gates in the right tier, and no good artifact is accused.

tests/faults plants them with `gguf` and `safetensors` alone. A fault must fail the tier that it is about before any later one;
tiers are independent, so only those up to that one run here. benchmarks/mutation_score.py runs all and prints the table.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, SHARED

for package in ("torch", "transformers", "llama_cpp", "gguf", "safetensors", "tokenizers"):
    pytest.importorskip(package, reason=f"{package} is not installed")
from lconvert.validators.report import TIERS
from tests.faults.checkpoints import CARRIED, CHECKPOINTS, TWINS
from tests.faults.faults import EQUIVALENT, FAULTS, FOLDERS, HIDDEN, PENDING, SHARED_FAULTS, TRAITS, Fault
from tests.faults.judge import judge, largest_difference, plant
from tests.faults.models import GOOD, QUANTIZED, Models, unseen

VLLM = Path(os.environ.get("LCONVERT_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python")
#: One for every kind of kernel that vLLM has on a CPU, and one that was carried.
SERVED = (
    "nibbles as they come [demo awq]",
    "scales inverted [demo fp8]",
    "nibbles of a word in reverse [llama-gptq to vllm]",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("good"))


def _id(fault: Fault) -> str:
    return fault.id


def _needs(fault: Fault) -> None:
    if fault in SHARED_FAULTS and not SHARED.is_dir():
        pytest.skip("the shared models are not beside this checkout")


@pytest.mark.parametrize("fault", FAULTS + SHARED_FAULTS + HIDDEN, ids=_id)
def test_every_fault_is_caught_in_its_tier(fault: Fault, models: Models, tmp_path: Path) -> None:
    _needs(fault)
    bad = plant(models, fault, tmp_path)
    found = judge(models, fault.model, bad, TIERS[: TIERS.index(fault.tier) + 1])
    assert found.tier == fault.tier, f"{found.tiers or 'survived'}: {found.words}"
    assert found.says(fault.says), found.words


@pytest.mark.parametrize(
    "fault", [f for f in TRAITS + FOLDERS if f.tier == "structure" and not f.silent], ids=_id
)
def test_wrong_metadata_shows_in_the_logits_too(fault: Fault, models: Models, tmp_path: Path) -> None:
    """So a reader that misunderstands a key the way the writer does would not go unnoticed."""
    bad = plant(models, fault, tmp_path)
    assert judge(models, fault.model, bad, ("logits",), relative=False, greedy=(0, 0)).tiers


@pytest.mark.parametrize(("model", "type_"), GOOD, ids=lambda x: str(x))
def test_no_good_artifact_is_accused(model: str, type_: str, models: Models) -> None:
    found = judge(models, model, models.artifact(model, type_))
    assert not found.tiers, f"{found.failed} {found.refused}"


@pytest.mark.parametrize("change", EQUIVALENT, ids=_id)
def test_what_changes_nothing_is_proven_to(change: Fault, models: Models, tmp_path: Path) -> None:
    good, bad = models.artifact(change.model, change.type), plant(models, change, tmp_path)
    assert good.read_bytes() != bad.read_bytes()
    largest = largest_difference(good, bad)
    print(f"{change.id}: max |delta logit| = {largest:g}")
    assert largest == 0


@pytest.mark.skipif(
    not VLLM.exists(), reason="the vLLM environment is missing: LCONVERT_VLLM_PYTHON, .venv-vllm"
)
@pytest.mark.parametrize("fault", [f for f in CHECKPOINTS + CARRIED if f.id in SERVED], ids=_id)
def test_vllm_shows_it_too(fault: Fault, models: Models, tmp_path: Path) -> None:
    """The same folder with the fault and without it, in the runtime that it is made for."""
    asked = {"runtimes": ["vllm"], "python": {"vllm": VLLM}, "relative": False, "greedy": (0, 0)}
    bad = plant(models, fault, tmp_path)
    assert not judge(
        models, fault.model, models.artifact(fault.model, fault.type), ("logits",), **asked
    ).tiers
    assert judge(models, fault.model, bad, ("logits",), **asked).tiers == ("logits",)


@pytest.mark.parametrize("twin", TWINS, ids=_id)
def test_what_means_the_same_is_not_accused(twin: Fault, models: Models, tmp_path: Path) -> None:
    found = judge(models, twin.model, plant(models, twin, tmp_path), ("structure", "tensors"))
    assert not found.tiers, found.words


@pytest.mark.parametrize(("model", "kind"), QUANTIZED, ids=lambda x: str(x))
def test_no_good_checkpoint_is_accused(model: str, kind: str, models: Models) -> None:
    """Without logits: what runs these folders is not installed everywhere."""
    found = judge(models, model, models.artifact(model, kind), ("structure", "tensors", "tokens"))
    assert not found.tiers, f"{found.failed} {found.refused}"


def test_the_table_names_what_vllm_is_shown() -> None:
    assert {f.id for f in CHECKPOINTS + CARRIED} >= set(SERVED)


def test_there_are_enough_of_them_and_half_on_models_that_no_gate_has_seen() -> None:
    assert len({f.id for f in FAULTS + SHARED_FAULTS + EQUIVALENT}) == len(
        FAULTS + SHARED_FAULTS + EQUIVALENT
    )
    assert len(FAULTS) >= 400 and len(CHECKPOINTS) >= 200 and len(CARRIED) >= 50
    assert sum(unseen(f.model) for f in FAULTS + SHARED_FAULTS) >= len(FAULTS + SHARED_FAULTS) / 2
    assert len({f.model for f in FAULTS}) >= 18 and len({f.type for f in FAULTS}) >= 10
    assert {f.tier for f in FAULTS} == {"structure", "tensors", "tokens"}


def test_the_planter_knows_nothing_of_lconvert() -> None:
    code = (
        "import sys; import tests.faults.faults; "
        "print([m for m in sys.modules if m.split('.')[0] in ('lconvert', 'formats', 'converters', 'kernels')])"
    )
    found = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.append({str(ROOT)!r}); {code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == "[]"
    for file in ("faults", "checkpoints", "changes", "packed", "planter"):
        assert not re.search(
            r"(import|from) +lconvert", (ROOT / "tests" / "faults" / f"{file}.py").read_text()
        )


def test_faults_of_formats_that_exist_are_not_pending() -> None:
    modules = {
        part for f in ("formats", "converters") for p in (ROOT / f).glob("*.py") for part in p.stem.split("_")
    }
    assert not [fault for fault, topic in PENDING if topic in modules]
