"""The arrows of the architecture: a module imports only from packages to its left. And start-up stays light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import DEMO, ROOT

#: Later may import earlier; equal ranks may import each other's siblings only within one package.
ORDER = {
    name: rank
    for rank, group in enumerate(
        (
            ("errors", "ir", "spec"),
            ("archs", "kernels"),
            ("formats",),
            ("fingerprint", "plan", "forward"),
            ("interpreters", "interrupt", "written", "executor"),
            ("primitives",),
            ("passes", "recipe", "recipe_check"),
            ("converters",),
            ("validators",),
            ("api",),
            ("cli", "__main__"),
        )
    )
    for name in group
}
HEAVY = {
    "datasets",
    "lm_eval",
    "modelopt",
    "matplotlib",
    "mlflow",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "tritonclient",
    "vllm",
    "wandb",
    "torch",
    "transformers",
    "tokenizers",
    "gguf",
    "llama_cpp",
    "safetensors",
    "huggingface_hub",
    "sentencepiece",
}
PACKAGE = ROOT / "src" / "lconvert"


def _modules() -> list[Path]:
    top = [p for p in PACKAGE.iterdir() if p.suffix == ".py" or (p.is_dir() and p.name != "__pycache__")]
    return sorted(p for d in top for p in ([d] if d.suffix == ".py" else d.rglob("*.py")))


def _imports(tree: ast.AST, here: tuple[str, ...]) -> list[tuple[int, str, bool]]:
    """(line, top-level part inside lconvert or package name, whether it is lconvert's)"""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [
                (node.lineno, a.name.split(".")[0], False)
                for a in node.names
                if a.name.split(".")[0] != "lconvert"
            ]
            found += [
                (node.lineno, a.name.split(".")[1], True)
                for a in node.names
                if a.name.startswith("lconvert.")
            ]
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if node.level:
                parts = ["lconvert", *here[: len(here) - node.level], *[p for p in parts if p]]
            if parts[0] != "lconvert":
                found.append((node.lineno, parts[0], False))
            elif len(parts) > 1:
                found.append((node.lineno, parts[1], True))
            else:
                found += [(node.lineno, a.name, True) for a in node.names]
    return found


def wrong_arrows(path: Path, source: str) -> list[str]:
    here = path.relative_to(PACKAGE).with_suffix("").parts
    if here == ("__init__",):
        return []  # the public names, loaded on demand
    rank = ORDER[here[0]]
    out = []
    for line, there, ours in _imports(ast.parse(source), here):
        if ours and there in ORDER and ORDER[there] > rank and not _typing_only(source, line):
            out.append(f"{path}:{line} {here[0]} imports {there}")
    return out


def _typing_only(source: str, line: int) -> bool:
    """Inside `if TYPE_CHECKING:`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return node.lineno < line <= max(n.lineno for n in ast.walk(node) if hasattr(n, "lineno"))
    return False


def test_arrows() -> None:
    modules = _modules()
    assert len(modules) > 40
    wrong = [w for p in modules for w in wrong_arrows(p, p.read_text())]
    assert not wrong, "\n".join(wrong)


def test_arrows_notice_a_back_import() -> None:
    path = PACKAGE / "formats" / "gguf.py"
    assert wrong_arrows(path, "from lconvert.converters import gguf\n")
    assert wrong_arrows(path, "import lconvert.cli\n")
    assert wrong_arrows(PACKAGE / "ir.py", "from .plan import Plan\n")
    assert not wrong_arrows(path, "from lconvert.kernels import quantize\n")


def test_heavy_packages_are_never_imported_at_module_level() -> None:
    wrong = []
    for path in _modules():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                level = getattr(node, "level", 0)
                wrong += [f"{path}: {n}" for n in names if not level and n.split(".")[0] in HEAVY]
    assert not wrong


def _loaded(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running `code`."""
    tail = "\nimport sys, json; print('\\n' + json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.strip().splitlines()[-1]))


@pytest.mark.parametrize(
    "args",
    [["--help"]]
    + [
        [verb, "--help"]
        for verb in ("hf-to-gguf", "hf-to-vllm", "hf-to-onnx", "hf-to-trtllm", "convert", "carry", "validate")
    ],
)
def test_help_is_light(args: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["lconvert", *{args!r}]
from lconvert.cli import main
try:
    main()
except SystemExit as e:
    assert not e.code, e.code
"""
    assert not _loaded(code) & {
        "torch",
        "transformers",
        "numpy",
        "gguf",
        "tokenizers",
        "llama_cpp",
        "yaml",
        "rich",
    }


def test_conversion_without_validation_never_imports_torch(tmp_path: Path) -> None:
    code = f"""
import sys
sys.argv = ["lconvert", "hf-to-gguf", {str(DEMO)!r}, "--q4_k_m", "-o", {str(tmp_path / "m.gguf")!r}, "--no-validate"]
from lconvert.cli import main
try:
    main()
except SystemExit as e:
    assert not e.code, e.code
"""
    loaded = _loaded(code)
    assert (tmp_path / "m.gguf").exists()
    assert not loaded & {"torch", "transformers", "gguf", "tokenizers", "llama_cpp", "safetensors"}
