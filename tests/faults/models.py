"""The good artifacts: small models of every architecture, their folders and what lconvert makes of them.

The gates in gates.yaml were set on the demo model and on trained models outside the repository. The random ones here are
drawn from seeds that no other test uses, with a tokenizer of their own, so the gates never saw them (`unseen`). Their
weights have the gains of a trained model rather than those of tests/random_models.py (whose sharp attention amplifies
every rounding), because here the default gates must hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import lconvert
from lconvert.formats import gguf
from tests import arch_cases
from tests.conftest import DEMO, ROOT, SHARED
from tests.faults import quantized

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

#: Tokens of the tokenizer trained here, and rows of the embedding: a few are padding.
TOKENS, ROWS = 512, 520
_SPECIAL = ("<|begin|>", "<|end|>", "<|turn|>", "<|pad|>", "<|unknown|>")
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] | trim }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Random:
    """A random model: `case` names one of arch_cases, `changes` go over its config."""

    case: str
    seed: int
    changes: Mapping[str, Any] = field(default_factory=dict)


#: A base of the local layers that is not what llama.cpp takes when the file does not say.
_LOCAL = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}

RANDOM: Mapping[str, Random] = {
    "cohere": Random("cohere-gqa", 8101, {"logit_scale": 0.5}),
    "deepseek_v2": Random("deepseek_v2-lite", 8123),
    "deepseek_v3": Random("deepseek_v3-groups", 8124),
    "falcon": Random("falcon-7b", 8102),
    "gemma2": Random(
        "gemma2-alternating", 8103, {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    ),
    "gemma3": Random("gemma3_text-pattern", 8104, {"rope_parameters": _LOCAL}),
    "gpt2": Random("gpt2-tied", 8105),
    "gpt_neox": Random("gpt_neox-parallel", 8106),
    "gpt_oss": Random("gpt_oss-experts", 8125),
    "granite": Random("granite-multipliers", 8107),
    "llama": Random("llama-gqa", 8108),
    "llama-other-seed": Random("llama-gqa", 9108),
    "llama3-rope": Random("llama-llama3", 8109, {"num_hidden_layers": 4}),
    "llama-linear": Random("llama-linear", 8110),
    "llama-yarn": Random("llama-yarn", 8111),
    "mistral": Random("mistral-full", 8112),
    "mixtral": Random("mixtral-experts", 8113),
    "olmo2": Random("olmo2-gqa", 8114),
    "phi3": Random("phi3-plain", 8115),
    "phi3-partial": Random("phi3-partial", 8116),
    "qwen2": Random("qwen2-gqa", 8117),
    "qwen3": Random("qwen3-gqa", 8118),
    "qwen3_moe": Random("qwen3_moe-experts", 8119),
    "smollm3": Random("smollm3-step", 8120),
    "stablelm": Random("stablelm-gqa", 8121),
    "starcoder2": Random("starcoder2-plain", 8122),
}

#: One random model for every architecture: what must raise no alarm.
ARCHITECTURES = tuple(sorted(n for n, r in RANDOM.items() if "-" not in n))


#: Good artifacts: every architecture in the types that llama.cpp is used with most; all other types on three models.
GOOD = [(m, t) for m in ARCHITECTURES for t in ("F32", "Q8_0", "Q4_K_M")]
GOOD += [
    ("demo", t)
    for t in ("HF", "F32", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K", "IQ4_NL")
]
GOOD += [
    ("llama", t) for t in ("HF", "F16", "Q4_K_M imatrix", "Q3_K_M imatrix", "IQ3_S imatrix", "IQ2_XS imatrix")
]
GOOD += [(m, t) for m in ("gemma2", "gpt2", "qwen3_moe") for t in ("HF", "F16", "Q6_K")]
GOOD += [(m, "Q8_0") for m in ("llama3-rope", "llama-linear", "llama-yarn", "phi3-partial")]

#: Good quantized artifacts: every preset on the demo model and on a random one, every source as it is and carried, and
#: presets on architectures with biases, fused matrices and experts.
QUANTIZED = [(m, kind) for m in ("demo", "llama") for kind in quantized.PRESETS]
QUANTIZED += [
    (m, kind)
    for m in ("qwen2", "phi3", "qwen3_moe", "gemma2")
    for kind in ("w4a16", "awq", "fp8", "nvfp4a16")
]
QUANTIZED += [("gpt_oss", "mxfp4")]
QUANTIZED += [(name, "HF") for name in quantized.SOURCES]
QUANTIZED += [(name, f"to {target}") for name, s in quantized.SOURCES.items() for target in s.carried]


def unseen(name: str) -> bool:
    """Whether the gates never saw the model."""
    source = quantized.SOURCES.get(name)
    return (source.base if source else name) in RANDOM


class Models:
    """Folders and artifacts below `root`, made when first asked for. `redraw`: added to every random model's seed."""

    def __init__(self, root: Path, redraw: int = 0) -> None:
        self.root, self.redraw = root, redraw

    def folder(self, name: str) -> Path:
        if name == "demo":
            return DEMO
        made = self.root / name
        if name in quantized.SOURCES:
            source = quantized.SOURCES[name]
            if not made.is_dir():
                plain = lconvert.read(self.folder(source.base))
                quantized.write(source.change(plain), source.target, made)
            return made
        if name not in RANDOM:
            return SHARED / "models" / name
        if not made.is_dir():
            model = RANDOM[name]
            draw(replace(model, seed=model.seed + self.redraw), made)
        return made

    def artifact(self, name: str, kind: str) -> Path:
        """The folder for kind HF, what a preset makes of it, what "to TARGET" carries it into, else the GGUF file of this type.

        All without their manifests. A type that ends in " imatrix" is quantized with an importance matrix.
        """
        if kind == "HF":
            return self.folder(name)
        if kind in quantized.PRESETS:
            folder = self.root / f"{name}.{kind.replace(' ', '-')}"
            if not folder.is_dir():
                quantized.made(lconvert.read(self.folder(name)), kind, folder, self.root)
            return folder
        if kind.startswith("to "):
            target = kind.removeprefix("to ")
            carried = self.root / f"{name}.to-{target}{'.gguf' if target == 'gguf' else ''}"
            if not carried.exists():
                quantized.write(lconvert.read(self.folder(name)), target, carried)
            return carried
        path = self.root / f"{name}.{kind.replace(' ', '-')}.gguf"
        if not path.exists():
            source = self.folder(name)
            ftype, weighted, _ = kind.partition(" imatrix")
            importances = _importances(self.artifact(name, "F32")) if weighted else None
            lconvert.convert(source, path, ftype=ftype, imatrix=importances)
            path.with_name(path.name + ".manifest.json").rename(self.manifest(path))
        return path

    def manifest(self, artifact: Path) -> Path:
        """Where the manifest of an artifact is kept away from it."""
        return artifact.with_name(artifact.name + ".manifest")


def _importances(wide: Path) -> dict[str, np.ndarray]:
    """Importances for every matrix of the layers in the F32 file: another weighting, but not so wild that it does harm."""
    rng, out = np.random.default_rng(8200), {}
    for name, info in gguf.read(wide).tensors.items():
        if len(info.shape) > 1 and name.startswith("blk."):
            experts = info.shape[0] if len(info.shape) == 3 else 1
            out[name] = rng.uniform(0.5, 1.5, (experts, info.shape[-1])).astype(np.float32)
    return out


def draw(model: Random, folder: Path) -> None:
    """Save a random model with the tokenizer under `folder`."""
    case = next(c for c in arch_cases.load() if c.name == model.case)
    ids = {f"{k}_token_id": TOKENS - 5 + n for n, k in enumerate(("bos", "eos"))} | {"pad_token_id": 510}
    config = transformers.CONFIG_MAPPING[case.model_type](
        **{**case.config, **ids, "vocab_size": ROWS, **model.changes}
    )
    torch.manual_seed(model.seed)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            _randomise(name, parameter, loud=bool(config.tie_word_embeddings) and "post_" in name)
        for name, buffer in made.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn_like(buffer))
    made.to(getattr(torch, case.dtype)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer(), encoding="utf-8")
    names = dict(zip(("bos_token", "eos_token"), _SPECIAL, strict=False)) | {"pad_token": "<|pad|>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "chat_template": _TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _randomise(name: str, parameter: Any, *, loud: bool) -> None:
    """Vectors move by 0.2 from where they start; matrices keep the size of what they multiply.

    `loud` norms let a layer drown the embedding, or a tied head just repeats the token with certainty.
    """
    noise = torch.randn_like(parameter)
    if parameter.dim() == 1 or "norm" in name:
        parameter.add_(0.2 * noise + (2.0 if loud else 0.0))
    elif any(part in name for part in ("embed_tokens", "embed_in", "word_embeddings", "wte", "wpe")):
        parameter.copy_(0.1 * noise)
    else:
        fan_in = (
            parameter.shape[0] if name.startswith("transformer.h.") and "c_" in name else parameter.shape[-1]
        )
        parameter.copy_(fan_in**-0.5 * noise)


@cache
def tokenizer() -> str:
    """tokenizer.json of a byte-level BPE trained on the shipped excerpt, with Qwen 2's way to split text."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )

    made = Tokenizer(models.BPE())
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS - len(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (ROOT / "validators" / "text" / "excerpt.txt").read_text(encoding="utf-8")
    made.train_from_iterator(text.splitlines(), trainer)
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _SPECIAL])
    made.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", TOKENS - 5)]
    )
    return str(made.to_str())
