"""One run of the model over a calibration text, watching the largest magnitudes: inputs of matrices, keys and values.

The model runs one decoder layer at a time (forward.py), in fp32. Keys are watched as the cache holds them, after the
rotary embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lconvert.errors import InputError, MissingPackageError, OptionError
from lconvert.ir import Entry, Model, as_f32


@dataclass
class Peaks:
    """Largest magnitudes seen: of each matrix's input by role, of keys and values by layer."""

    inputs: dict[str, float] = field(default_factory=dict)
    keys: dict[int, float] = field(default_factory=dict)
    values: dict[int, float] = field(default_factory=dict)
    tokens: int = 0


def windows(model: Model, text: str | Path, context: int, count: int) -> list[list[int]]:
    """The first `count` windows of `context` tokens of a text file."""
    if model.tokenizer is None:
        raise InputError(f"{model.source}: has no tokenizer, so no text can be used for calibration")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingPackageError("tokenizers is not installed: pip install 'lconvert[hf]'") from None
    import json

    path = Path(text)
    try:
        words = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({e})") from None
    ids = Tokenizer.from_str(json.dumps(model.tokenizer.json)).encode(words, add_special_tokens=False).ids
    size = min(context, model.decoder.context)
    found = [ids[i : i + size] for i in range(0, len(ids), size)][:count]
    if not found:
        raise OptionError(f"{path}: holds no token; a calibration text needs some paragraphs")
    return found


def run(model: Model, batches: list[list[int]]) -> Peaks:
    """Every window through the model; the largest magnitudes of what enters each linear module and of the KV cache."""
    from lconvert.forward import Forward, packages

    torch, transformers = packages()
    forward = Forward(model)
    found = Peaks(tokens=sum(map(len, batches)))

    def watch(roles: tuple[str, ...]) -> Any:
        factors = {role: _factor(model.entries[role], torch) for role in roles}

        def hook(module: Any, args: tuple[Any, ...]) -> None:
            x = args[0].detach().abs()
            for role, factor in factors.items():
                top = float((x if factor is None else x * factor).max())
                found.inputs[role] = max(found.inputs.get(role, 0.0), top)

        return hook

    hooks = [module.register_forward_pre_hook(watch(roles)) for module, roles in forward.linears()]
    try:
        for ids in batches:
            cache = transformers.DynamicCache()  # made with the config it would drop what leaves a window
            with torch.no_grad():
                out = forward.module(torch.tensor([ids]), past_key_values=cache, use_cache=True)
            for i, (key, value) in enumerate(_cache(out.past_key_values)):
                found.keys[i] = max(found.keys.get(i, 0.0), float(key.abs().max()))
                found.values[i] = max(found.values.get(i, 0.0), float(value.abs().max()))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _factor(entry: Entry, torch: Any) -> Any:
    """What an unfolded scale multiplies the input's magnitudes by: the weights that run hold it themselves."""
    t = entry.transform
    if t is None or t.folded or t.param is None:
        return None
    return torch.from_numpy(as_f32(t.param.load(), t.param.dtype).reshape(-1).copy()).abs()


def _cache(cache: Any) -> list[tuple[Any, Any]]:
    """(keys, values) of every layer that has some."""
    layers = getattr(cache, "layers", [])
    return [(layer.keys, layer.values) for layer in layers if getattr(layer, "keys", None) is not None]
