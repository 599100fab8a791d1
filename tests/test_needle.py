"""The needle search: the prompts are what they say, and a model that can look back finds what a broken copy of it misses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import lconvert
from lconvert.cli.eval import command
from lconvert.errors import InputError, OptionError
from lconvert.validators import needle
from lconvert.validators.needle import Prompt, Reading, found, prompts, read
from lconvert.validators.runtimes import DEFAULT, kind, open_runtime
from lconvert.validators.scoring import Scorer, Vocabulary
from tests.conftest import DEMO, ROOT

TEXT = (ROOT / "validators" / "text" / "excerpt.txt").read_text()
#: Running text without a word that a needle's question ends with, which a model that looks back one word needs.
QUIET = " ".join(w for w in TEXT.split() if w.strip(".,;:!?\"'—") not in ("was", "called"))[:30000]


def words(text: str) -> int:
    return len(text.split())


def test_prompts_hold_the_needle_where_they_say() -> None:
    made = prompts(TEXT, words, 512, lengths=[64, 300, 400], depths=(0.0, 0.3, 1.0), trials=3, distractors=5)
    assert len(made) == 27
    for p in made:
        template = next(n for n in needle.NEEDLES if n.format(key=p.keys[0]) in p.text)
        sentence, question = template.format(key=p.keys[0]), template.split(" {key}")[0]
        assert p.text.endswith(question)
        assert p.text.count(sentence) == 1
        before, after = p.text.removesuffix(question).split(sentence)
        assert words(before) == pytest.approx(p.depth * (words(before) + words(after)), abs=1)
        assert words(p.text) == p.tokens == p.size  # a word is a token here, so lengths come out exactly
        assert len(set(p.keys)) == 6
        assert not any(key in p.text.replace(sentence, "").split() for key in p.keys[:1])


def test_prompts_are_the_same_for_the_same_seed() -> None:
    assert prompts(TEXT, words, 256) == prompts(TEXT, words, 256)
    assert prompts(TEXT, words, 256) != prompts(TEXT, words, 256, seed=1)


def test_default_grid_fills_the_context() -> None:
    made = prompts(TEXT, words, 512)
    assert [p.size for p in made[:: len(needle.DEPTHS) * 2]] == [124, 248, 496]
    assert {p.depth for p in made} == set(needle.DEPTHS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [500]}, "lengths 500 are not within 64 and 496 tokens, the context of 512 without room"),
        ({"lengths": [10]}, "lengths 10 are not within 64"),
        ({"depths": (50,)}, "depths are shares of the text, from 0 to 1"),
        ({"distractors": 99}, "1 to 31 distractors are possible, not 99"),
    ],
)
def test_impossible_grids(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        prompts(TEXT, words, 512, **options)


def test_context_too_small_and_text_too_short() -> None:
    with pytest.raises(OptionError, match="not within 64 and 48 tokens"):
        prompts(TEXT, words, 64)
    with pytest.raises(InputError, match="the text has 3 words; at least 64 are needed for a haystack"):
        prompts("a b c", words, 512)


def test_shares_by_hand() -> None:
    grid = [Prompt("", 9, 9, 0.0, t, ("k", "x", "y", "z")) for t in range(4)]
    ours = [Reading(1, True, "k"), Reading(1, False, "a"), Reading(2, False, "b"), Reading(4, False, "c")]
    theirs = [Reading(1, True, "k"), Reading(3, False, "a"), Reading(4, False, "b"), Reading(1, False, "d")]
    got = found(grid, ours, theirs)
    assert (got.reference, got.candidate, got.agreement, got.same_text) == (0.5, 0.5, 0.5, 0.75)
    assert (got.reference_exact, got.candidate_exact, got.chance) == (0.25, 0.25, 0.25)
    row = got.to_json()["grid"][1]
    assert (row["found_reference"], row["found_candidate"], row["reference"]["rank"]) == (True, False, 1)
    alone = found(grid, ours).to_json()
    assert (alone["agreement"], "found_candidate" in alone["grid"][0]) == (None, False)


def induction_model(folder: Path) -> Path:
    """A Llama made by hand that goes on as the text went on after the same token before: two layers of one head.

    The residual stream has four parts of 128: the token's code (random signs), the code of the token before, the
    answer, and a constant. Head 0 looks at the position before (its query and key are constants whose rotations by
    RoPE's fast frequencies agree at distance 1) and copies the code from there. Head 1 looks for positions whose
    previous token is the present one (codes sit on RoPE's slow frequencies, which hardly turn) and copies their token
    into the answer, which the output matrix reads. The MLPs are zero.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    part, head, fast, theta = 128, 256, 8, 1e12
    slow = 32  # from this pair on 512 positions turn less than half a radian
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=4 * part,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=head,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=False,
        bos_token_id=2042,
        eos_token_id=2043,
        dtype="float32",
    )
    model = LlamaForCausalLM(config).eval()
    token, before, answer, constant = (slice(i * part, (i + 1) * part) for i in range(4))
    code = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], (2048, part)).astype(np.float32))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, token] = code
        model.model.embed_tokens.weight[:, constant] = 1.0
        first, second = (layer.self_attn for layer in model.model.layers)
        frequency = theta ** (-torch.arange(fast) / (head / 2))
        # Every code and the constant have 128 entries of size 1, so that the norm multiplies them by sqrt(2).
        first.q_proj.weight[:fast, constant] = 0.5
        first.k_proj.weight[:fast, constant] = 0.5 * torch.cos(frequency)[:, None]
        first.k_proj.weight[head // 2 : head // 2 + fast, constant] = 0.5 * torch.sin(frequency)[:, None]
        pairs = range(slow, slow + part // 2)
        lanes = [*pairs, *(i + head // 2 for i in pairs)]
        gain = 2.0
        for row, column in zip(lanes, range(part), strict=True):
            second.q_proj.weight[row, column] = gain
            second.k_proj.weight[row, part + column] = gain
        eye = torch.eye(part)
        for attention, target in ((first, before), (second, answer)):
            attention.v_proj.weight[:part, token] = eye
            attention.o_proj.weight[target, :part] = eye
        model.lm_head.weight[:, answer] = code * 0.3
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def able(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return induction_model(tmp_path_factory.mktemp("able"))


def scorer(path: Path) -> Scorer:
    return Scorer(open_runtime(DEFAULT[kind(path)], path, threads=1), Vocabulary.of(path))


def readings(path: Path, made: list[Prompt]) -> list[Reading]:
    one = scorer(path)
    try:
        return read(one, made)
    finally:
        one.runtime.close()


def grid(path: Path, text: str, **options: Any) -> list[Prompt]:
    one = scorer(path)
    try:
        return prompts(text, one.count, one.context, **options)
    finally:
        one.runtime.close()


def test_a_model_that_looks_back_finds_every_needle(able: Path, tmp_path: Path) -> None:
    made = grid(able, QUIET, trials=1)
    assert max(p.tokens for p in made) > 480
    ours = readings(able, made)
    assert [r.rank for r in ours] == [1] * len(made)
    assert (
        sum(r.exact for r in ours) > len(made) / 2
    )  # a piece of a key that the text holds elsewhere misleads it
    for ftype in ("F32", "Q8_0"):
        lconvert.convert(able, tmp_path / f"{ftype}.gguf", ftype=ftype)
        got = found(made, ours, readings(tmp_path / f"{ftype}.gguf", made))
        assert (got.candidate, got.agreement) == (1.0, 1.0)
        assert got.candidate_exact == pytest.approx(got.reference_exact, abs=0.0 if ftype == "F32" else 0.1)
        assert (
            got.same_text is not None and got.same_text > 0.8
        )  # what it writes after the key is a matter of luck


def test_a_lost_rope_base_loses_the_needles(able: Path, tmp_path: Path) -> None:
    """The commonest long-context fault: the base of the rotary embedding falls back to 10000."""
    broken = tmp_path / "broken"
    shutil.copytree(able, broken)
    config = json.loads((broken / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 10000.0
    (broken / "config.json").write_text(json.dumps(config))
    made = grid(able, QUIET, lengths=[480], depths=(0.0, 0.5), trials=4)
    got = found(made, readings(able, made), readings(broken, made))
    assert got.reference == 1.0
    assert got.candidate is not None and got.candidate <= 0.75
    assert got.candidate_exact is not None and got.candidate_exact <= got.reference_exact / 2
    assert got.agreement == got.candidate


@pytest.fixture(scope="module")
def demo_grid() -> tuple[list[Prompt], list[Reading]]:
    made = grid(DEMO, TEXT, lengths=[100, 300], depths=(0.0, 0.5, 1.0), trials=1)
    return made, readings(DEMO, made)


@pytest.mark.parametrize(("ftype", "agreement"), [("F32", 1.0), ("Q4_K_M", 0.75)])
def test_agreement_of_conversions(
    ftype: str, agreement: float, demo_grid: tuple[list[Prompt], list[Reading]], tmp_path: Path
) -> None:
    """The demo model is too small to find anything but by luck; its conversions must do as it does."""
    made, ours = demo_grid
    lconvert.convert(DEMO, tmp_path / "m.gguf", ftype=ftype)
    theirs = readings(tmp_path / "m.gguf", made)
    got = found(made, ours, theirs)
    assert got.agreement is not None and got.agreement >= agreement
    if ftype == "F32":
        assert theirs == ours


def test_command(able: Path) -> None:
    """As the command line asks for it, reference and candidate being the same model."""
    arguments = [str(able), "--reference", str(able), "--needle", "--context", "128", "--threads", "1"]
    done = CliRunner().invoke(command, arguments, standalone_mode=False)
    assert done.return_value == 0, done.output
    assert "needle  agreement               100.0%" in done.output
    assert "needle found, by tokens and depth" in done.output
