"""Random BERT and DistilBERT of transformers, and sentences for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

SIZES = {"vocab_size": 60, "max_position_embeddings": 40, "num_labels": 3}


def bert(kind: str, folder: Path, **options: Any) -> Any:
    """A random model of transformers, saved. kind: bert or distilbert."""
    import torch
    import transformers

    torch.manual_seed(3)
    sizes: dict[str, Any] = {**SIZES, **options}
    if kind == "bert":
        own = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        config = transformers.BertConfig(**{**own, **sizes})
        module = transformers.BertForSequenceClassification(config).eval()
    else:
        own = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
        config = transformers.DistilBertConfig(**{**own, **sizes})
        module = transformers.DistilBertForSequenceClassification(config).eval()
    for name, p in module.named_parameters():
        torch.nn.init.normal_(p, float("norm" in name.lower() and name.endswith("weight")), 0.2)
    module.save_pretrained(folder)
    return module


def sentences(kind: str, lengths: tuple[int, ...] = (9, 4, 7), seed: int = 0) -> dict[str, Any]:
    """Padded on the right with ids that mean something."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), max(lengths))
    mask = (np.arange(shape[1]) < np.array(lengths)[:, None]).astype(np.int64)
    out = {"input_ids": rng.integers(0, 60, shape), "attention_mask": mask}
    return out | ({"token_type_ids": rng.integers(0, 2, shape)} if kind == "bert" else {})
