"""Shared by all tests: where optional material is, and that CI does not skip an oracle.

With LCONVERT_REQUIRE_ORACLES set (as `make test` does) a test that skips for want of a package or of llama.cpp's
source fails instead. Only what is no oracle of a conversion may be missing: larger trained models outside the
repository, a browser, nvidia-modelopt (the fixtures hold checkpoints of its making), a processor's AMX, and vLLM's environment where LCONVERT_WITHOUT_VLLM says so (`make test VLLM=no`).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo_model"
#: Larger trained models and text beside the checkout; tests that use them skip without.
SHARED = ROOT.parent / "shared"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Generator[None, Any, Any]:
    report = yield
    if report.skipped and os.environ.get("LCONVERT_REQUIRE_ORACLES") and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[-1]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
        allowed = [
            "shared",
            "wandb",
            "chromium",
            "nvidia-modelopt",
            "no amx",
            *(["vllm"] if os.environ.get("LCONVERT_WITHOUT_VLLM") else []),
        ]
        if not any(word in reason.lower() for word in allowed):
            report.outcome = "failed"
            report.longrepr = f"skipped although every oracle must be here: {reason}"
    return report


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Reference logits are kept for the session, not in the user's cache folder."""
    os.environ["LCONVERT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _interrupts() -> None:
    """A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of larger trained models."""
    if not SHARED.is_dir():
        pytest.skip("the shared models are not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def demo() -> Path:
    """The trained model that the repository ships."""
    return DEMO


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with F32.gguf, Q8_0.gguf and Q4_K_M.gguf of the demo model; copy what a test changes."""
    import lconvert

    folder = tmp_path_factory.mktemp("artifacts")
    for ftype in ("F32", "Q8_0", "Q4_K_M"):
        lconvert.convert(DEMO, folder / f"{ftype}.gguf", ftype=ftype)
    return folder
