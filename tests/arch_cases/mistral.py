"""Mistral: llama.cpp knows no window for it, so a context beyond the window is wrong there."""

from . import Case
from .llama import SMALL

CASES = [
    Case("full", "mistral", SMALL | {"sliding_window": None}, returns="llama"),
    Case(
        "window", "mistral", SMALL | {"sliding_window": 96}, losses=("sliding_window",), exact=96, wrong=1e-3
    ),
]
