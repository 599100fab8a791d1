"""The command line as its users meet it: transcripts in tests/cli/*.md, Ctrl-C, pipes, terminals.

A transcript is a Markdown file whose ```console blocks are run in order, each file in a folder of its own that
holds `demo_model`. `$ ` begins a command, `2> ` a line of stderr, `[exit N]` a code other than 0; every other line is
stdout. Hashes and the folder are placeholders. After a wanted change: python -m tests.test_cli --accept
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lconvert.cli import VERBS, main, one_line
from tests.checkpoints import write_llama
from tests.conftest import DEMO, ROOT

FOLDER = Path(__file__).with_name("cli")
TRANSCRIPTS = sorted(FOLDER.glob("*.md"))

#: What differs from run to run, and what stands for it.
PLACEHOLDERS = ((re.compile(r"\b[0-9a-f]{64}\b"), "<sha256>"),)


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    """A folder with the demo model and `lconvert` for shells; the current one inside the block."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        shutil.copytree(DEMO, folder / "demo_model", ignore=shutil.ignore_patterns("README.md"))
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)


def environment(shims: Path) -> dict[str, str]:
    """A shell's environment in which `lconvert` and `python` are the ones under test."""
    for name, module in (("lconvert", "-m lconvert "), ("python", "")):
        shim = shims / name
        shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module}"$@"\n')
        shim.chmod(0o755)
    path = os.pathsep.join(p for p in (str(ROOT / "src"), os.environ.get("PYTHONPATH")) if p)
    return {
        **os.environ,
        "PATH": f"{shims}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": path,
        "LC_ALL": "C.UTF-8",
    }


def inside(argv: list[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line in this process, which saves the imports."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["lconvert", *argv]
    code: object = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as e:
        code = e.code
    finally:
        sys.argv = before
    assert isinstance(code, int)
    return code, out.getvalue(), err.getvalue()


def shell(command: str, env: dict[str, str]) -> tuple[int, str, str]:
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], check=False, capture_output=True, text=True, env=env
    )
    return done.returncode, done.stdout, done.stderr


def rewritten(text: str) -> str:
    """The transcript with what the commands say now."""
    with working_folder() as folder, tempfile.TemporaryDirectory() as shims:
        env = environment(Path(shims))
        lines: list[str] = []
        console = skipping = False
        for line in text.splitlines():
            if line.startswith("```"):
                console = line == "```console"
                skipping = False
            if console and line.startswith("$ "):
                lines.append(line)
                lines += _said(line[2:], env, folder)
                skipping = True
            elif not skipping:
                lines.append(line)
    return "\n".join(lines) + "\n"


def _said(command: str, env: dict[str, str], folder: Path) -> list[str]:
    own, _, last = command.partition(" | tail -1")
    if own.startswith("lconvert ") and not set(own + last) & set("|<>;&$`*"):
        code, out, err = inside(shlex.split(own)[1:])
    else:
        code, out, err = shell(command, env)
    lines = out.splitlines()
    said = (lines[-1:] if own != command else lines) + [f"2> {line}" for line in err.splitlines()]
    said += [f"[exit {code}]"] if code else []
    for pattern, stands in PLACEHOLDERS:
        said = [pattern.sub(stands, line.replace(str(folder), "<folder>")) for line in said]
    return said


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda p: p.stem)
def test_transcript(path: Path) -> None:
    text = path.read_text()
    assert rewritten(text) == text, f"differs; look, then: python -m tests.test_cli --accept {path.name}"


def test_transcripts_exist_and_notice_a_difference() -> None:
    assert len(TRANSCRIPTS) >= 4
    assert (
        rewritten("```console\n$ echo a; false\nb\n```\n")
        == "```console\n$ echo a; false\na\n[exit 1]\n```\n"
    )
    assert rewritten("```console\n$ lconvert nope\n```\n").splitlines()[2].startswith("2> lconvert: error: ")


# --- every verb ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_has_examples_that_parse(verb: str) -> None:
    code, out, err = inside([verb, "--help"])
    assert (code, err) == (0, "") and "Examples:" in out
    examples = [line.strip() for line in out.splitlines() if line.strip().startswith("lconvert ")]
    assert examples
    for example in examples:
        argv = shlex.split(re.split(r" [|>] ", example)[0])[1:]
        code, out, err = inside([*argv, "--no-such-flag"])
        assert code == 2 and "No such option '--no-such-flag'" in err, (example, err)


def test_one_line() -> None:
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line("bell \a esc \x1b[31m half \ud800") == r"bell \x07 esc \x1b[31m half \ud800"
    assert len(one_line("x" * 10_000_000)) == 2000


@pytest.mark.parametrize(
    ("argv", "keys"),
    [
        (["inspect", "demo_model"], {"path", "name", "arch", "tensors", "totals", "tokenizer", "report"}),
        (["formats"], {"sources", "targets", "architectures", "file_types", "tensor_types"}),
        (["recipes"], {"recipes", "passes"}),
        (["doctor"], {"lconvert", "kernels", "packages"}),
        (["hf-to-gguf", "demo_model", "--q4_k_m", "--dry-run"], {"target", "files", "options", "notes"}),
        (["hf-to-gguf", "demo_model", "--q8_0", "--no-validate", "-o", "m.gguf"], {"files", "manifest", "validation"}),
        (["compress", "demo_model", "-o", "m.lcir", "--recipe", "int8"], {"files", "manifest"}),
        (["gguf-to-hf", "demo_model", "-o", "back"], {"files", "manifest"}),
    ],
    ids=lambda x: "-".join(x[:1]) if isinstance(x, list) else "",
)  # fmt: skip
def test_json_is_all_there_is_on_stdout(argv: list[str], keys: set[str]) -> None:
    with working_folder():
        code, out, err = inside([*argv, "--json"])
    assert (code, err) == (0, "")
    assert keys <= set(json.loads(out))


# --- pipes, terminals, signals ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return environment(tmp_path_factory.mktemp("bin"))


@pytest.mark.parametrize(
    "command", ["inspect {} --json | head -1", "inspect {} | head -2", "--help | head -1"]
)
def test_a_closed_pipe_is_no_failure(command: str, env: dict[str, str]) -> None:
    """With pipefail, so a code of lconvert's own would be seen."""
    code, out, err = shell("lconvert " + command.format(DEMO), env)
    assert (code, err) == (0, "") and out


def test_a_pipe_closed_before_anything_is_read(env: dict[str, str]) -> None:
    code, out, err = shell(f"lconvert inspect {DEMO} --json | sleep 0", env)
    assert (code, out, err) == (0, "", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_stdout_that_cannot_be_written(env: dict[str, str]) -> None:
    code, _, err = shell(f"lconvert inspect {DEMO} > /dev/full", env)
    assert code == 2 and err == "lconvert: error: No space left on device\n"


def test_no_ansi_codes_in_a_pipe_and_no_progress(env: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        ["lconvert", "hf-to-gguf", str(DEMO), "--q4_k_m", "--no-validate", "-o", str(tmp_path / "m.gguf")],
        check=False, capture_output=True, env=env | {"TERM": "xterm-256color", "COLORTERM": "truecolor"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == b""
    assert b"\x1b" not in done.stdout and b"\r" not in done.stdout


def test_a_terminal_gets_progress_and_a_drawn_table(env: dict[str, str], tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        ["lconvert", "hf-to-gguf", str(DEMO), "--q4_k_m", "--no-validate", "-o", str(tmp_path / "m.gguf")],
        stdin=theirs, stdout=theirs, stderr=theirs, env=env | {"TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # Linux ends a pty with EIO
        while chunk := os.read(ours, 65536):
            seen += chunk
    os.close(ours)
    assert process.wait() == 0, seen
    assert b"converting" in seen and b"\x1b[" in seen, "a progress bar"
    assert "━".encode() in seen and b"Q4_K" in seen, "a drawn table"


_SLOW = """
import sys, time
from lconvert import executor
executor.SLAB_BYTES, executor.CHECKPOINT_SECONDS = 20000, CHECKPOINT
real = executor.os.pwrite
def slow(*args):
    time.sleep(0.005)
    return real(*args)
executor.os.pwrite = slow
sys.argv = ["lconvert", "hf-to-gguf", SOURCE, "--q8_0", "--no-validate", "--no-card", "--name", "x", "-o", OUT]
from lconvert.cli import main
main()
"""


def interrupted(source: Path, out: Path, checkpoint: float, env: dict[str, str]) -> tuple[int, str]:
    """A conversion that gets SIGINT once it has written for a while; its exit code and stderr."""
    code = _SLOW.replace("CHECKPOINT\n", f"{checkpoint}\n").replace("SOURCE", repr(str(source)))
    process = subprocess.Popen(
        [sys.executable, "-c", code.replace("OUT", repr(str(out)))],
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    partial = out.with_name(out.name + ".partial")
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size > 300_000):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_ctrl_c_keeps_what_resume_can_use(env: dict[str, str], tmp_path: Path) -> None:
    source = write_llama(tmp_path / "model")
    out = tmp_path / "out" / "m.gguf"
    code, err = interrupted(source, out, 0.0, env)
    assert (code, err) == (130, "lconvert: interrupted; what was finished is kept for --resume\n")
    assert sorted(p.name for p in out.parent.iterdir()) == ["m.gguf.partial", "m.gguf.partial.json"]
    argv = ["hf-to-gguf", str(source), "--q8_0", "--no-validate", "--no-card", "--name", "x", "-o"]
    assert inside([*argv, str(out), "--resume"])[0] == 0
    assert inside([*argv, str(tmp_path / "whole.gguf")])[0] == 0
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert sorted(p.name for p in out.parent.iterdir()) == ["m.gguf", "m.gguf.manifest.json"]


def test_ctrl_c_before_anything_is_worth_keeping_leaves_nothing(env: dict[str, str], tmp_path: Path) -> None:
    source = write_llama(tmp_path / "model")
    code, err = interrupted(source, tmp_path / "out" / "m.gguf", 1e9, env)
    assert (code, err) == (130, "lconvert: interrupted; nothing was written\n")
    assert not (tmp_path / "out").exists(), "not even the folder that the run made"


def test_a_second_run_into_the_same_file(env: dict[str, str], tmp_path: Path) -> None:
    """Two jobs of one CI must not write into each other's output."""
    source, out = write_llama(tmp_path / "model"), tmp_path / "m.gguf"
    code = _SLOW.replace("CHECKPOINT\n", "1e9\n").replace("SOURCE", repr(str(source)))
    first = subprocess.Popen([sys.executable, "-c", code.replace("OUT", repr(str(out)))], env=env)
    while not (tmp_path / "m.gguf.partial").exists():
        assert first.poll() is None
        time.sleep(0.002)
    argv = ["hf-to-gguf", str(source), "--no-validate", "--no-card", "--name", "x", "-o"]
    code_, _, err = inside([*argv, str(out), "--q4_0", "--force"])
    assert code_ == 2 and "m.gguf.partial: another run is writing this file; wait for it" in err
    assert first.wait(timeout=60) == 0
    assert inside([*argv, str(tmp_path / "w.gguf"), "--q8_0"])[0] == 0
    assert out.read_bytes() == (tmp_path / "w.gguf").read_bytes()


def test_ctrl_c_outside_a_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lconvert.api.read", interrupt)
    monkeypatch.setattr("lconvert.read", interrupt, raising=False)
    assert inside(["inspect", str(DEMO)]) == (130, "", "lconvert: interrupted\n")


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only intended errors are made short: anything else must be findable."""

    def bug(path: str) -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr("lconvert.read", bug, raising=False)
    with pytest.raises(RuntimeError, match="bug"):
        inside(["inspect", str(DEMO)])


# --- names that come out of files ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/passwd", "a\0b", "\x1b[31m", "x" * 5000, "..", "", "\ud800"]
)
def test_a_models_name_cannot_choose_the_folder(name: str) -> None:
    """The default output name is made from the model's, which a GGUF file chooses."""
    from lconvert.formats import gguf

    with working_folder() as folder:
        assert inside(["hf-to-gguf", "demo_model", "--q8_0", "--no-validate", "-o", "s.gguf"])[0] == 0
        file = gguf.read("s.gguf")
        tensors = [(t.name, t.type, t.shape) for t in file.tensors.values()]
        data = (folder / "s.gguf").read_bytes()
        stored = name.encode(errors="replace").decode()
        head, _, _ = gguf.header({**file.metadata, "general.name": gguf.string(stored)}, tensors)
        start = min(len(data) - sum(-(-t.nbytes // 32) * 32 for t in file.tensors.values()), len(data))
        (folder / "s.gguf").write_bytes(head + data[start:])
        before = set(folder.iterdir())
        code, _, err = inside(["hf-to-gguf", "s.gguf", "--no-validate", "--no-card"])
        new = {p.name for p in set(folder.iterdir()) - before}
    assert code == 0, err
    assert len(new) == 2 and all(re.fullmatch(r"[\w.+-]{1,120}", n) and n[0] != "." for n in new), new


def accept(names: list[str]) -> None:
    """Write what the commands say now into the transcripts (all of them, or those named)."""
    for path in TRANSCRIPTS:
        if not names or path.name in names:
            path.write_text(rewritten(path.read_text()))
            print(f"accepted {path.relative_to(ROOT)}")


if __name__ == "__main__":
    if sys.argv[1:2] != ["--accept"]:
        sys.exit("python -m tests.test_cli --accept [FILE.md ...]")
    accept(sys.argv[2:])
