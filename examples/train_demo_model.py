"""Trains examples/demo_model: a Llama of 2.3 million parameters, tokenizer included: 15 minutes of one core's time.

    python examples/train_demo_model.py --text novels.txt --eval validators/text/excerpt.txt --out DIR

The model in this repository was trained on five novels by Jane Austen and is measured on the opening of a sixth;
examples/data/README.md says how to get the text. Any UTF-8 prose of a few megabytes will do: one paragraph per line,
a blank line between paragraphs, two between chapters.

Every training row is <|begin_of_text|> and 511 tokens, which is what a runtime feeds the model. One row in eight holds
paragraphs as the turns of a conversation, so that the chat template and its special tokens mean something too: the
"assistant" goes on with the story. On one processor, the same seed, text, thread count and library versions give the
same file.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

VOCABULARY = 2048
CONTEXT = 512
CHAT_SHARE = 1 / 8

BOS, EOS, HEADER, HEADER_END, TURN_END, PAD = SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)

# The pre-tokenizer pattern of Llama 3 (its tokenizer.json), which llama.cpp knows as "llama-bpe".
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{{- bos_token }}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\n"
    "    {{- message['content'] | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
    "{%- endif %}\n"
)


def train_tokenizer(text: str) -> Tokenizer:
    """Byte-level BPE of VOCABULARY tokens, the special ones last, that puts <|begin_of_text|> first."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n\n"), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS}:1 $B:1",
                special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
            ),
        ]
    )
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(
            f"the text yields {tokenizer.get_vocab_size()} tokens, not {VOCABULARY}: it is too short"
        )
    return tokenizer


def model_config(tokenizer: Tokenizer) -> LlamaConfig:
    """The shape: every row a multiple of 256 weights, grouped-query attention, tied embeddings to stay small."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )


def chat_row(paragraphs: list[list[int]], tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    """CONTEXT tokens of consecutive paragraphs as user and assistant turns, without <|begin_of_text|>."""
    header, header_end, turn_end = (tokenizer.token_to_id(token) for token in (HEADER, HEADER_END, TURN_END))
    (blank,) = tokenizer.encode("\n\n", add_special_tokens=False).ids
    roles = [tokenizer.encode(role, add_special_tokens=False).ids for role in ("user", "assistant")]
    row: list[int] = []
    at = rng.randrange(len(paragraphs))
    turn = 0
    while len(row) < CONTEXT:
        row += [
            header,
            *roles[turn % 2],
            header_end,
            blank,
            *paragraphs[(at + turn) % len(paragraphs)],
            turn_end,
        ]
        turn += 1
    return row[:CONTEXT]


def training_rows(text: str, tokenizer: Tokenizer, rng: random.Random) -> Iterator[list[int]]:
    """Endless rows of CONTEXT + 1 token ids: <|begin_of_text|>, then prose or, one time in eight, conversation.

    An epoch cuts the chapters, joined by <|end_of_text|>, at a new offset and deals the pieces in a new order.
    """
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    chapters = text.strip().split("\n\n\n")
    stream = [
        token
        for encoding in tokenizer.encode_batch(chapters, add_special_tokens=False)
        for token in (*encoding.ids, eos)
    ]
    lines = [line for chapter in chapters for line in chapter.split("\n\n")]
    paragraphs = [encoding.ids for encoding in tokenizer.encode_batch(lines, add_special_tokens=False)]
    while True:
        starts = list(range(rng.randrange(CONTEXT), len(stream) - CONTEXT, CONTEXT))
        rng.shuffle(starts)
        for start in starts:
            yield [bos, *stream[start : start + CONTEXT]]
            if rng.random() < CHAT_SHARE / (1 - CHAT_SHARE):
                yield [bos, *chat_row(paragraphs, tokenizer, rng)]


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def train(model: LlamaForCausalLM, rows: Iterator[list[int]], steps: int, batch: int, peak: float) -> None:
    """AdamW; weight decay for the matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-9,
    )
    model.train()
    began = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, warmup=min(100, steps // 10 + 1))
        ids = torch.tensor([next(rows) for _ in range(batch)])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.monotonic() - began:6.0f} s", flush=True)


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, tokenizer: Tokenizer, text: str) -> dict[str, float]:
    """Perplexity and bits per byte: windows of CONTEXT - 1 tokens after <|begin_of_text|>, every token scored."""
    model.eval()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    bos = tokenizer.token_to_id(BOS)
    nats = 0.0
    for start in range(0, len(ids), CONTEXT - 1):
        window = torch.tensor([[bos, *ids[start : start + CONTEXT - 1]]])
        logits = model(input_ids=window, use_cache=False).logits[0, :-1]
        nats += torch.nn.functional.cross_entropy(logits.float(), window[0, 1:], reduction="sum").item()
    return {"perplexity": math.exp(nats / len(ids)), "bits_per_byte": nats / math.log(2) / len(text.encode())}


def unigram_baseline(tokenizer: Tokenizer, train_text: str, text: str) -> dict[str, float]:
    """The same two numbers for a model that knows only how often each token occurs (add-one smoothing)."""
    counts = torch.ones(VOCABULARY, dtype=torch.float64)
    counts += torch.bincount(
        torch.tensor(tokenizer.encode(train_text, add_special_tokens=False).ids), minlength=VOCABULARY
    )
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    nats = -(counts / counts.sum()).log()[torch.tensor(ids)].sum().item()
    return {"perplexity": math.exp(nats / len(ids)), "bits_per_byte": nats / math.log(2) / len(text.encode())}


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the folder a user would download: weights in bf16, configuration, tokenizer, chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=[tokenizer.token_to_id(EOS), tokenizer.token_to_id(TURN_END)],
        pad_token_id=tokenizer.token_to_id(PAD),
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
    )
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": CONTEXT,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def main() -> None:
    arguments = argparse.ArgumentParser(description="Trains the demo model.")
    arguments.add_argument("--text", type=Path, required=True, help="training text, UTF-8")
    arguments.add_argument("--eval", type=Path, required=True, help="held-out text, UTF-8, never trained on")
    arguments.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    arguments.add_argument("--steps", type=int, default=2000)
    arguments.add_argument("--batch", type=int, default=4, help="rows of 512 tokens per step")
    arguments.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    arguments.add_argument("--seed", type=int, default=1775)
    arguments.add_argument("--threads", type=int, default=1)
    options = arguments.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)
    text = options.text.read_text(encoding="utf-8")
    held_out = options.eval.read_text(encoding="utf-8")

    tokenizer = train_tokenizer(text)
    model = LlamaForCausalLM(model_config(tokenizer))
    print(f"{sum(parameter.numel() for parameter in model.parameters())} parameters")
    train(
        model,
        training_rows(text, tokenizer, random.Random(options.seed)),
        options.steps,
        options.batch,
        options.rate,
    )

    model = model.to(torch.bfloat16)
    save(model, tokenizer, options.out)
    for name, result in (
        ("unigram baseline", unigram_baseline(tokenizer, text, held_out)),
        ("the saved model", evaluate(model.float(), tokenizer, held_out)),
    ):
        print(f"{name}: perplexity {result['perplexity']:.2f}, {result['bits_per_byte']:.3f} bits per byte")


if __name__ == "__main__":
    main()
