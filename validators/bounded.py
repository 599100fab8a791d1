"""Chat templates rendered in a process of their own that the system ends when one takes too long or too much.

A sandbox keeps a template from the machine, not from looping for hours or from `10**10**9`, and a template comes with
the artifact. The process is forked, so that renderers may be any functions; where a system cannot fork (Windows),
templates are rendered here without these limits.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import NoReturn, Self

from lconvert.validators.chat_sides import Render, Rendered
from lconvert.validators.conversations import Conversation

#: seconds for one conversation (real templates take milliseconds), bytes beyond what the process has already, characters
SECONDS, MEMORY, LARGEST = 10, 1 << 30, 1 << 22


class Bounded:
    """Renders conversations by number with renderers by number; a context manager that leaves no process behind."""

    def __init__(self, renderers: Sequence[Render], conversations: Sequence[Conversation]) -> None:
        self._renderers, self._conversations = renderers, conversations
        self._pipe: Connection | None = None
        self._pid = 0
        #: (renderer, template) that broke a limit once and is not tried again
        self._refused: dict[tuple[int, str], str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def __call__(
        self, renderer: int, template: str, tokens: Mapping[str, str], conversation: int
    ) -> Rendered:
        """The conversation's text, or why there is none; a broken limit counts as a template's refusal."""
        if not hasattr(os, "fork"):
            return self._renderers[renderer](template, tokens, self._conversations[conversation])
        if len(template) > LARGEST:
            return Rendered(None, f"a template of {len(template)} characters")
        if (renderer, template) in self._refused:
            return Rendered(None, self._refused[renderer, template])
        if self._pipe is None:
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send_bytes(json.dumps([renderer, template, dict(tokens), conversation]).encode())
            return Rendered(**json.loads(self._pipe.recv_bytes()))
        except (EOFError, OSError):
            number = self._end()
            reason = f"takes longer than {SECONDS} s" if number == signal.SIGALRM else "ends the renderer"
            self._refused[renderer, template] = reason
            return Rendered(None, reason)

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        self._pid = os.fork()
        if not self._pid:
            self._pipe.close()
            self._serve(theirs)
        theirs.close()

    def _serve(self, pipe: Connection) -> NoReturn:
        """In the new process: answer until the other side is gone. The alarm ends it even in the middle of one operation."""
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            _limit_memory()
            while True:
                renderer, template, tokens, conversation = json.loads(pipe.recv_bytes())
                signal.alarm(SECONDS)
                try:
                    answer = self._renderers[renderer](template, tokens, self._conversations[conversation])
                    if answer.text is not None and len(answer.text) > LARGEST:
                        answer = Rendered(None, f"makes a text of {len(answer.text)} characters")
                except MemoryError:
                    answer = Rendered(None, "needs too much memory")
                signal.alarm(0)
                pipe.send_bytes(json.dumps(asdict(answer)).encode())
        finally:  # none of what this process inherited is to be flushed or cleaned up twice
            os._exit(0)

    def _end(self) -> int:
        """End the process; the signal that ended it, 0 for none."""
        if self._pipe is None:
            return 0
        self._pipe.close()
        self._pipe = None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def _limit_memory() -> None:
    """Allow this process MEMORY more than it has; only Linux says how much that is."""
    import resource

    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MEMORY, hard))
    except (OSError, ValueError):
        pass
