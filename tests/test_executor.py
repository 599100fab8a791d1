"""The executor: same bytes on any thread count, nothing under the final name unless complete, kill and resume."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert import executor, interrupt, written
from lconvert.errors import InputError, OutputError
from tests.checkpoints import write_llama


@pytest.fixture(autouse=True, params=[written.LEAST, 0], ids=["", "direct"])
def through(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it twice: through the page cache, and past it."""
    monkeypatch.setattr(written, "LEAST", request.param)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama") / "model", vocab_size=2048, num_hidden_layers=3)


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("ftype", ["Q8_0", "Q4_K_M"])
def test_bytes_do_not_depend_on_threads_or_slabs(
    checkpoint: Path, tmp_path: Path, ftype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = set()
    for threads, slab in ((1, executor.SLAB_BYTES), (2, 64 << 10), (7, 3000)):
        monkeypatch.setattr(executor, "SLAB_BYTES", slab)
        out = tmp_path / f"{threads}.gguf"
        result = lconvert.convert(checkpoint, out, ftype=ftype, threads=threads, name="x")
        assert result.manifest["files"][out.name]["sha256"] == _sha(out)
        assert result.plan.size == out.stat().st_size
        hashes.add(_sha(out))
    assert len(hashes) == 1


def test_manifest_hashes_the_source_and_records_verdicts(checkpoint: Path, tmp_path: Path) -> None:
    lconvert.convert(checkpoint, tmp_path / "m.gguf", ftype="Q4_K_M")
    manifest = json.loads((tmp_path / "m.gguf.manifest.json").read_text())
    source = checkpoint / "model.safetensors"
    assert manifest["sources"][str(source)]["sha256"] == _sha(source)
    assert manifest["lconvert"] == lconvert.__version__
    assert manifest["plan"]["options"]["ftype"] == "Q4_K_M"
    tensors = {t["name"]: t for t in manifest["plan"]["files"][0]["tensors"]}
    assert tensors["blk.0.attn_q.weight"]["verdict"]["kind"] == "quantized"
    assert 0.01 < tensors["blk.0.attn_q.weight"]["verdict"]["error"] < 0.2
    assert tensors["output_norm.weight"]["verdict"] == {"kind": "widened"}


def test_existing_output_needs_force(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    out.write_text("precious")
    with pytest.raises(OutputError, match=r"m\.gguf: exists; --force replaces it"):
        lconvert.convert(checkpoint, out, ftype="Q8_0")
    assert out.read_text() == "precious" and _left(tmp_path) == ["m.gguf"]
    lconvert.convert(checkpoint, out, ftype="Q8_0", force=True)
    assert out.read_bytes()[:4] == b"GGUF"


def test_output_may_not_be_the_source(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    lconvert.convert(checkpoint, out, ftype="Q8_0")
    before = _sha(out)
    with pytest.raises(OutputError, match="is also the source"):
        lconvert.convert(out, out, force=True)
    assert _sha(out) == before


class _FullDisk:
    """os.pwrite that fails with ENOSPC after so many bytes."""

    def __init__(self, budget: int) -> None:
        self.budget, self.real = budget, os.pwrite

    def __call__(self, fd: int, data: Any, at: int) -> int:
        if self.budget <= 0:
            raise OSError(28, "No space left on device")
        n = self.real(fd, data[: self.budget], at)  # a short write first, as real disks do
        self.budget -= n
        return n


def test_full_disk_leaves_nothing_and_says_so(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor.os, "pwrite", _FullDisk(1_000_000))
    with pytest.raises(OutputError, match="the disk is full"):
        lconvert.convert(checkpoint, tmp_path / "m.gguf", ftype="Q8_0")
    assert _left(tmp_path) == []


def test_too_small_a_disk_is_noticed_before_writing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Small:
        f_bavail, f_frsize = 10, 4096

    monkeypatch.setattr(executor.os, "statvfs", lambda path: Small())
    with pytest.raises(OutputError, match=r"MB are needed, 0 MB are free"):
        lconvert.convert(checkpoint, tmp_path / "m.gguf", ftype="Q8_0")
    assert _left(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX file size limits")
def test_file_size_limit_is_a_clear_error(checkpoint: Path, tmp_path: Path) -> None:
    """A real failing write, through the kernel."""
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
sys.argv = ["lconvert", "hf-to-gguf", {str(checkpoint)!r}, "--q8_0", "--no-validate", "--no-card", "-o", {str(tmp_path / "m.gguf")!r}]
from lconvert.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "cannot be written (File too large)" in done.stderr
    assert _left(tmp_path) == []


def test_read_only_folder_is_a_clear_error(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **kw: Any) -> int:
        if str(path).endswith(".partial"):
            raise OSError(30, "Read-only file system")
        return real(path, flags, *rest, **kw)

    monkeypatch.setattr(executor.os, "open", refuse)
    with pytest.raises(OutputError, match="no permission to write there"):
        lconvert.convert(checkpoint, tmp_path / "m.gguf", ftype="Q8_0")
    assert _left(tmp_path) == []


def test_nan_in_a_weight_names_tensor_and_place(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "bad", dtype="F32")
    from lconvert.formats import safetensors

    file = safetensors.read_header(folder / "model.safetensors")
    info = file.tensors["model.layers.1.mlp.up_proj.weight"]
    with open(folder / "model.safetensors", "r+b") as f:
        f.seek(info.start + 4 * (256 * 300 + 17))
        f.write(np.float32(np.nan).tobytes())
    with pytest.raises(
        InputError, match=r"layers\.1\.mlp\.up_proj\.weight.*row \d+, column 17 is not finite"
    ):
        lconvert.convert(folder, tmp_path / "m.gguf", ftype="Q4_K_M")
    assert not list(tmp_path.glob("m.gguf*"))


def test_f16_overflow_is_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "big", dtype="F32")
    from lconvert.formats import safetensors

    info = safetensors.read_header(folder / "model.safetensors").tensors["lm_head.weight"]
    with open(folder / "model.safetensors", "r+b") as f:
        f.seek(info.start)
        f.write(np.float32(70000).tobytes())
    with pytest.raises(InputError, match=r"lm_head\.weight.*too large for F16"):
        lconvert.convert(folder, tmp_path / "m.gguf", ftype="F16")
    lconvert.convert(folder, tmp_path / "ok.gguf", ftype="BF16")


@pytest.mark.parametrize(
    ("dtype", "value", "ftype"), [("BF16", 2.0**23, "Q8_0"), ("F32", 1e6, "Q4_0"), ("F32", -7e4, "Q4_1")]
)
def test_values_whose_scale_overflows_are_refused(
    tmp_path: Path, dtype: str, value: float, ftype: str
) -> None:
    """llama.cpp would refuse the file; ggml's encoder writes an infinite scale without a word."""
    folder = write_llama(tmp_path / "huge", dtype=dtype)
    from lconvert.formats import safetensors

    info = safetensors.read_header(folder / "model.safetensors").tensors["model.layers.0.mlp.up_proj.weight"]
    bits = np.float32(value).tobytes()
    with open(folder / "model.safetensors", "r+b") as f:
        f.seek(info.start)
        f.write(bits[2:] if dtype == "BF16" else bits)
    with pytest.raises(
        InputError, match=r"up_proj\.weight: values in row 0 are too large for \w+: a scale would be infinite"
    ):
        lconvert.convert(folder, tmp_path / "m.gguf", ftype=ftype)
    lconvert.convert(folder, tmp_path / "ok.gguf", ftype=ftype, tensor_types=[("ffn_up", "BF16")])


def test_source_that_changes_during_the_run(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    model = lconvert.read(folder)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    with pytest.raises(
        InputError, match=r"changed during the conversion|changed while it was being converted"
    ):
        lconvert.convert(model, tmp_path / "m.gguf", ftype="Q8_0")
    assert not list(tmp_path.glob("m.gguf*"))


_RUNNER = """
import sys, time
from lconvert import executor
executor.SLAB_BYTES, executor.CHECKPOINT_SECONDS = 20000, 0.0
real = executor.os.pwrite
executor.os.pwrite = lambda *args: (time.sleep(0.001), real(*args))[1]
sys.argv = ["lconvert", "hf-to-gguf", SOURCE, "--q4_k_m", "--no-validate", "--no-card", "-o", OUT, *EXTRA]
from lconvert.cli import main
main()
"""


def _run(source: Path, out: Path, *extra: str) -> subprocess.Popen[bytes]:
    code = (
        _RUNNER.replace("SOURCE", repr(str(source)))
        .replace("OUT", repr(str(out)))
        .replace("EXTRA", repr(extra))
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


_INTERRUPTED_INSIDE_SUBMIT = """
import os, signal, sys, threading
from lconvert import executor
executor.SLAB_BYTES = 20000
enter, calls = threading.Condition.__enter__, []
def interrupted(self):
    got = enter(self)
    if threading.get_ident() == threading.main_thread().ident and self._lock is idle._cond._lock:
        calls.append(os.kill(os.getpid(), signal.SIGINT) if len(calls) == 7 else None)
    return got
class Pool(executor.ThreadPoolExecutor):
    def __init__(self, *args, **more):
        global idle
        super().__init__(*args, **more)
        if more["thread_name_prefix"] == "slab":
            idle = self._idle_semaphore
            threading.Condition.__enter__ = interrupted
executor.ThreadPoolExecutor = Pool
sys.argv = ["lconvert", "hf-to-gguf", SOURCE, "--q4_k_m", "--no-validate", "--no-card", "-o", OUT]
from lconvert.cli import main
main()
"""


def test_ctrl_c_while_the_pool_holds_a_lock(checkpoint: Path, tmp_path: Path) -> None:
    """KeyboardInterrupt inside `submit` would leave the pool's lock taken, and the workers would wait for it for ever."""
    out = tmp_path / "out" / "m.gguf"
    code = _INTERRUPTED_INSIDE_SUBMIT.replace("SOURCE", repr(str(checkpoint))).replace("OUT", repr(str(out)))
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode == 130, process.stderr
    assert process.stderr == "lconvert: interrupted; nothing was written\n"
    assert not out.parent.exists()


def test_the_second_ctrl_c_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), interrupt.deferred() as check:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check()
        check()  # once
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        raise AssertionError("the second was held back")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_late_ctrl_c_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt), interrupt.deferred():
        os.kill(os.getpid(), signal.SIGINT)


def test_a_program_that_handles_ctrl_c_itself_keeps_its_handler() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with interrupt.deferred() as check:
            os.kill(os.getpid(), signal.SIGINT)
            check()
        assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_killed_at_random_moments_and_resumed(checkpoint: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    process = _run(checkpoint, whole, "--name", "x")
    assert process.wait() == 0, process.stderr.read().decode() if process.stderr else ""
    wanted, size = _sha(whole), whole.stat().st_size
    out, partial = tmp_path / "m.gguf", tmp_path / "m.gguf.partial"
    rng = random.Random(7)
    killed_with_journal = 0
    for at in sorted(rng.uniform(0.02, 0.9) * size for _ in range(6)):
        process = _run(checkpoint, out, "--name", "x", "--resume")
        while process.poll() is None and not (partial.exists() and partial.stat().st_size >= at):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        code = process.wait()
        if code == 0:  # it was faster than the kill
            assert _sha(out) == wanted
            out.unlink()
            (tmp_path / "m.gguf.manifest.json").unlink()
            continue
        assert not out.exists(), "a killed run left something under the final name"
        killed_with_journal += (tmp_path / "m.gguf.partial.json").exists()
    process = _run(checkpoint, out, "--name", "x", "--resume")
    assert process.wait() == 0, process.stderr.read().decode() if process.stderr else ""
    assert _sha(out) == wanted
    assert killed_with_journal, "no kill hit the run between the first and the last checkpoint"
    assert _left(tmp_path) == ["m.gguf", "m.gguf.manifest.json", "whole.gguf", "whole.gguf.manifest.json"]


def test_resume_really_continues(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure in the middle, the second run does not produce the first rows again."""
    monkeypatch.setattr(executor, "SLAB_BYTES", 20000)
    monkeypatch.setattr(executor, "CHECKPOINT_SECONDS", 0.0)
    full = _FullDisk(1_500_000)
    with monkeypatch.context() as m:
        m.setattr(executor.os, "pwrite", full)
        # Every record is waited for: on a busy disk a sync takes longer than all that is written here.
        m.setattr(executor._Journal, "ready", lambda journal: journal.wait() is None)
        with pytest.raises(OutputError, match="--resume"):
            # One thread: slabs are written in order, so the first of them is done.
            lconvert.convert(checkpoint, tmp_path / "m.gguf", ftype="Q8_0", name="x", threads=1)
    assert _left(tmp_path) == ["m.gguf.partial", "m.gguf.partial.json"]
    first: list[int] = []
    result = lconvert.convert(
        checkpoint,
        tmp_path / "m.gguf",
        ftype="Q8_0",
        name="x",
        resume=True,
        progress=lambda n, f: first.append(n),
    )
    assert first[0] > 1_000_000, "the first report is what was there already"
    lconvert.convert(checkpoint, tmp_path / "w.gguf", ftype="Q8_0", name="x")
    assert _sha(tmp_path / "m.gguf") == _sha(tmp_path / "w.gguf")
    assert result.manifest["files"]["m.gguf"]["sha256"] == _sha(tmp_path / "w.gguf")
    whole = json.loads((tmp_path / "w.gguf.manifest.json").read_text())["plan"]["files"][0]["tensors"]
    assert json.loads(json.dumps(result.manifest["plan"]["files"][0]["tensors"])) == whole  # same errors, too


def _break_off(checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves what a conversion to Q8_0 leaves that a full disk ends in the middle: a partial file and its journal."""
    monkeypatch.setattr(executor, "SLAB_BYTES", 20000)
    monkeypatch.setattr(executor, "CHECKPOINT_SECONDS", 0.0)
    with monkeypatch.context() as m:
        m.setattr(executor.os, "pwrite", _FullDisk(1_500_000))
        with pytest.raises(OutputError):
            lconvert.convert(checkpoint, out, ftype="Q8_0", name="x")


@pytest.mark.parametrize("left", [None, 0, 1000])
def test_a_partial_file_that_lost_its_bytes_is_started_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int | None
) -> None:
    """The journal survives, the file beside it does not: zeros must not pass for finished rows."""
    _break_off(checkpoint, tmp_path / "m.gguf", monkeypatch)
    if left is None:
        (tmp_path / "m.gguf.partial").unlink()
    else:
        os.truncate(tmp_path / "m.gguf.partial", left)
    lconvert.convert(checkpoint, tmp_path / "m.gguf", ftype="Q8_0", name="x", resume=True)
    lconvert.convert(checkpoint, tmp_path / "w.gguf", ftype="Q8_0", name="x")
    assert _sha(tmp_path / "m.gguf") == _sha(tmp_path / "w.gguf")


def test_a_journal_of_other_options_is_not_continued(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _break_off(checkpoint, tmp_path / "m.gguf", monkeypatch)
    lconvert.convert(checkpoint, tmp_path / "m.gguf", ftype="Q4_0", name="x", resume=True)
    lconvert.convert(checkpoint, tmp_path / "w.gguf", ftype="Q4_0", name="x")
    assert _sha(tmp_path / "m.gguf") == _sha(tmp_path / "w.gguf")


def test_shards_of_a_quantized_model(checkpoint: Path, tmp_path: Path) -> None:
    result = lconvert.convert(checkpoint, tmp_path / "m.gguf", ftype="Q8_0", split_max_size=1_000_000)
    names = [p.name for p in result.paths]
    assert len(names) > 2 and names[0] == f"m-00001-of-{len(names):05}.gguf"
    whole = lconvert.convert(checkpoint, tmp_path / "w.gguf", ftype="Q8_0")
    a, b = lconvert.read(result.paths[0]), lconvert.read(whole.paths[0])
    from lconvert.kernels.qtensor import values

    for name, entry in a.entries.items():
        assert np.array_equal(values(entry.data), values(b.entries[name].data)), name


def test_a_journal_of_other_importances_is_not_continued(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "SLAB_BYTES", 20000)
    monkeypatch.setattr(executor, "CHECKPOINT_SECONDS", 0.0)
    rng = np.random.default_rng(0)
    one, two = ({"blk.2.ffn_up.weight": rng.gamma(1, size=(1, 256)).astype(np.float32)} for _ in range(2))
    with monkeypatch.context() as m:
        m.setattr(executor.os, "pwrite", _FullDisk(1_500_000))
        with pytest.raises(OutputError):
            lconvert.convert(checkpoint, tmp_path / "m.gguf", ftype="Q6_K", name="x", imatrix=one)
    seen: list[int] = []
    options = {"ftype": "Q6_K", "name": "x", "imatrix": two}
    lconvert.convert(
        checkpoint, tmp_path / "m.gguf", resume=True, progress=lambda n, f: seen.append(n), **options
    )
    assert seen[0] < 1_000_000, "it started afresh"
    result = lconvert.convert(checkpoint, tmp_path / "w.gguf", **options)
    assert _sha(tmp_path / "m.gguf") == _sha(tmp_path / "w.gguf")
    assert result.manifest["plan"]["options"]["imatrix"]["tensors"] == 1
