"""The source model of the fixtures: a tiny Llama with random weights, in bf16.

    python base_model.py DIR

Sizes are chosen to find readers that guess: no weight is square, query, key, hidden and feed forward sizes all differ,
160 is no multiple of 64 or 128 (ragged 128 x 128 blocks), every width is a multiple of 32 (the group size).
The tokenizer, one word per id, is there because some peers load one; the fixtures leave it out.
"""

from __future__ import annotations

import sys

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def build() -> LlamaForCausalLM:
    """Normal weights of deviation 0.05 with three strong input channels, norms near 1."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(20)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.05 * noise)
            if parameter.ndim == 2 and "embed" not in name:
                parameter[:, [5, 23, 40]] *= 4
    return model.to(torch.bfloat16)


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, 32))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


if __name__ == "__main__":
    tokenizer().save_pretrained(sys.argv[1])
    build().save_pretrained(sys.argv[1])
