"""The type of every tensor: llama_model_quantize's own dry run, its snapshot files, and what we refuse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lconvert.converters.gguf_mixture import (
    Hyper,
    Options,
    TensorInfo,
    choose_types,
    find_ftype,
    hyper_from_metadata,
    parse_tensor_type,
    tensor_order,
)
from lconvert.converters.gguf_mixture_rules import FLAGS, FTYPES, NOT_OFFERED, WEIGHT_TYPES
from lconvert.errors import InputError, OptionError, UnsupportedError
from lconvert.formats import gguf as container
from lconvert.kernels.blocks import BLOCKS

from . import upstream

needs_llama_cpp = pytest.mark.skipif(
    upstream.quantizer_available() is not None, reason=str(upstream.quantizer_available())
)
LOW_BITS = [
    f.name for f in FTYPES.values() if f.name.startswith(("IQ1", "IQ2")) or f.name in ("IQ3_XXS", "IQ3_XS")
]


class Case(NamedTuple):
    hyper: Hyper
    tensors: list[TensorInfo]


def named(shapes: Mapping[str, tuple[int, ...]], kind: str = "F32") -> list[TensorInfo]:
    return [TensorInfo(name, shape, kind) for name, shape in shapes.items()]


def decoder(
    hyper: Hyper,
    width: int = 256,
    ff: int = 512,
    tied: bool = False,
    fused_qkv: bool = False,
    kind: str = "F32",
) -> Case:
    """A decoder's tensors under llama.cpp's names, experts as 3-D tensors beside a router."""
    head = width // hyper.n_head
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (300, width), "output_norm.weight": (width,)}
    if not tied:
        shapes["output.weight"] = (300, width)
    experts = (hyper.n_expert,) if hyper.n_expert else ()
    suffix = "_exps" if experts else ""
    for i in range(hyper.n_layer):
        rows = {"q": width, "k": head * hyper.n_head_kv, "v": head * hyper.n_head_kv}
        if fused_qkv:
            rows = {"qkv": sum(rows.values())}
        shapes |= {f"blk.{i}.attn_{name}.weight": (n, width) for name, n in rows.items()}
        shapes[f"blk.{i}.attn_output.weight"] = (width, width)
        shapes[f"blk.{i}.attn_norm.weight"] = (width,)
        if experts:
            shapes[f"blk.{i}.ffn_gate_inp.weight"] = (hyper.n_expert, width)
        shapes |= {f"blk.{i}.ffn_{n}{suffix}.weight": (*experts, ff, width) for n in ("gate", "up")}
        shapes[f"blk.{i}.ffn_down{suffix}.weight"] = (*experts, width, ff)
    return Case(hyper, named(shapes, kind))


def values(hyper: Hyper) -> Case:
    """Only what the size of a model changes: its value projections."""
    return Case(hyper, named({f"blk.{i}.attn_v.weight": (64, 256) for i in range(hyper.n_layer)}))


CASES: dict[str, Case] = {
    "llama": decoder(Hyper("llama", 20, 8, 8)),
    "llama f16": decoder(Hyper("llama", 9, 8, 2), kind="F16"),
    "llama bf16": decoder(Hyper("llama", 9, 8, 2), tied=True, kind="BF16"),
    "llama 70B": decoder(Hyper("llama", 80, 8, 1)),
    "llama 65B": decoder(Hyper("llama", 80, 8, 8)),
    "llama 80 layers, 1 of them nextn": decoder(Hyper("llama", 81, 8, 1, n_layer_nextn=1)),
    "llama-embed 70B": values(Hyper("llama-embed", 80, 8, 2)),
    "qwen2 70B": values(Hyper("qwen2", 80, 8, 8)),
    "jais2 70B": values(Hyper("jais2", 68, 8, 8)),
    "olmo 70B": values(Hyper("olmo", 80, 8, 8)),
    "deci 70B": values(Hyper("deci", 80, 8, 8)),
    "qwen3": decoder(Hyper("qwen3", 11, 4, 1), tied=True),
    "gemma3": decoder(Hyper("gemma3", 17, 4, 2), tied=True),
    "falcon": decoder(Hyper("falcon", 32, 8, 1), fused_qkv=True),
    "falcon, 8 experts": decoder(Hyper("falcon", 4, 8, 1, 8)),
    "mixtral": decoder(Hyper("llama", 16, 8, 2, 8)),
    "mixtral, 80 layers": decoder(Hyper("llama", 80, 8, 2, 8)),
    "4 experts": decoder(Hyper("llama", 9, 8, 8, 4)),
    "qwen3moe": decoder(Hyper("qwen3moe", 18, 8, 2, 128), ff=96),
    "fused qkv": decoder(Hyper("phi3", 16, 8, 2), fused_qkv=True),
    "columns of 288": decoder(Hyper("llama", 8, 8, 8), width=288, ff=480, kind="BF16"),
    "columns of 240": decoder(Hyper("llama", 8, 8, 8), width=240, ff=200),
    "columns of 96, tied": decoder(Hyper("llama", 8, 4, 2), width=96, ff=256, tied=True),
}


# Keys without which llama.cpp does not load these architectures; no rule reads them.
_LINEAR_AND_MLA: dict[str, int | float] = {
    "attention.key_length_mla": 64,
    "attention.value_length_mla": 64,
    "attention.kv_lora_rank": 64,
    "attention.q_lora_rank": 64,
    "ssm.conv_kernel": 4,
    "kda.head_dim": 64,
    "kda.gate_lower_bound": -5.0,
    "expert_shared_count": 1,
    "expert_gating_func": 2,
    "leading_dense_block_count": 1,
}
EXTRA_KEYS: dict[str, dict[str, int | float]] = {
    "bailingmoe3": _LINEAR_AND_MLA,
    "glm5-next": _LINEAR_AND_MLA
    | {
        "attention.indexer.head_count": 4,
        "attention.indexer.key_length": 64,
        "attention.indexer.top_k": 16,
        "attention.indexer.kpool": 4,
        "hyper_connection.count": 4,
        "hyper_connection.sinkhorn_iterations": 2,
        "hyper_connection.epsilon": 1e-5,
    },
}


def write(path: Path, case: Case, data: bool = False) -> Path:
    """A GGUF file of the case: random weights with `data`, else a header and a hole (dry runs read no weights)."""
    h = case.hyper
    writer = gguf.GGUFWriter(path, h.arch)
    width = next((t.shape[-1] for t in case.tensors if t.name == "token_embd.weight"), 256)
    numbers: dict[str, int | float] = {
        "context_length": 64,
        "embedding_length": width,
        "block_count": h.n_layer,
        "feed_forward_length": 512,
        "attention.head_count": h.n_head,
        "attention.head_count_kv": h.n_head_kv,
        "attention.sliding_window": 32,
        "nextn_predict_layers": h.n_layer_nextn,
        "expert_feed_forward_length": 96,
        "expert_count": h.n_expert,
        "expert_used_count": min(h.n_expert, 2),
    }
    numbers |= {"attention.layer_norm_rms_epsilon": 1e-5, "attention.layer_norm_epsilon": 1e-5}
    for key, number in (numbers | EXTRA_KEYS.get(h.arch, {})).items():
        add = writer.add_uint32 if isinstance(number, int) else writer.add_float32
        add(f"{h.arch}.{key}", number)
    size = 0
    rng = np.random.default_rng(0)
    for t in case.tensors:
        block = BLOCKS[t.type]
        nbytes = int(np.prod(t.shape)) * block.nbytes
        kind = gguf.GGMLQuantizationType[t.type]
        if data:
            values = gguf.quants.quantize(rng.standard_normal(t.shape, dtype=np.float32) * 0.02, kind)
            writer.add_tensor(t.name, values, raw_dtype=kind)
        else:
            writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
            size += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if data:
        writer.write_tensors_to_file()
    else:
        writer.write_ti_data_to_file()
    writer.close()
    if not data:
        header = -(-path.stat().st_size // 32) * 32
        with path.open("r+b") as file:
            file.truncate(header + size)
    return path


def ones(names: Iterator[str] | list[str]) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    return {name: np.ones(1, np.float32) for name in names}


def ours(case: Case, options: Options) -> dict[str, str]:
    return {name: choice.type for name, choice in choose_types(case.tensors, case.hyper, options).items()}


def same(case: Case, path: Path, ftype: str, imatrix: bool = True, **options: Any) -> None:
    """Equal types in equal order, by a dry run over the file at `path`."""
    names = [t.name for t in case.tensors]
    theirs = upstream.plan(path, ftype, imatrix=ones(names) if imatrix else None, **options)
    got = ours(case, Options(ftype, imatrix=frozenset(names) if imatrix else None, **options))
    assert list(got.items()) == list(theirs.items())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write(folder / f"{i}.gguf", case) for i, (name, case) in enumerate(CASES.items())}


@needs_llama_cpp
@pytest.mark.parametrize("name", CASES)
def test_every_ftype_equals_dry_run(name: str, files: dict[str, Path]) -> None:
    for ftype in FTYPES:
        same(CASES[name], files[name], ftype)
        if ftype not in LOW_BITS and ftype != "Q2_K_S":
            same(CASES[name], files[name], ftype, imatrix=False)


OPTIONS: dict[str, dict[str, Any]] = {
    "pure": {"pure": True},
    "leave output": {"leave_output_tensor": True},
    "output type": {"output_tensor_type": "F16"},
    "pure, output type": {"pure": True, "output_tensor_type": "Q8_0"},
    "embedding type": {"token_embedding_type": "BF16"},
    "both": {"output_tensor_type": "F32", "token_embedding_type": "F16"},
    "override shifts the counters": {"tensor_types": ((r"blk\.(0|3|5)\.(attn_v|ffn_down)", "Q8_0"),)},
    "first pattern wins": {"tensor_types": (("ffn_up", "Q5_1"), ("ffn", "IQ4_NL"), (r"\.weight$", "Q6_K"))},
    "float by override": {"tensor_types": (("attn_[kv]", "F32"), ("attn", "BF16"), ("token_embd", "F16"))},
    "override beats pure": {"pure": True, "tensor_types": (("output", "Q8_0"),)},
    "override falls back": {"tensor_types": (("ffn_down", "Q6_K"), ("ffn_up", "MXFP4"))},
}


@needs_llama_cpp
@pytest.mark.parametrize("label", OPTIONS)
def test_options_equal_dry_run(label: str, files: dict[str, Path]) -> None:
    ftypes = ("Q4_K_M", "Q2_K", "IQ2_M", "IQ3_XXS", "Q8_0", "Q4_0", "MXFP4_MOE", "TQ1_0", "F16", "COPY")
    models = ("llama", "qwen3", "falcon", "mixtral", "columns of 288", "llama bf16", "llama 70B")
    for name in models:
        for ftype in ftypes:
            same(CASES[name], files[name], ftype, **OPTIONS[label])


_NAMES = """
blk.0.attn_q_norm.weight blk.0.ffn_gate_inp.weight blk.0.ffn_gate_inp_shexp.weight blk.0.ffn_gate_tid2eid.weight
altup_proj.weight blk.1.laurel_l.weight per_layer_model_proj.weight position_embd.weight token_types.weight
v.position_embd.weight v.blk.0.position_embd.weight blk.2.ssm_conv1d.weight blk.2.shortconv.conv.weight
blk.3.indexer.k_proj.weight blk.3.indexer.q_proj.weight blk.3.indexer.proj.weight blk.1.time_mix_first.weight
blk.1.time_mix_w0.weight blk.1.time_mix_w1.weight blk.1.time_mix_w2.weight blk.1.time_mix_v0.weight
blk.1.time_mix_v1.weight blk.1.time_mix_v2.weight blk.1.time_mix_a0.weight blk.1.time_mix_a1.weight
blk.1.time_mix_a2.weight blk.1.time_mix_g1.weight blk.1.time_mix_g2.weight blk.1.time_mix_decay_w1.weight
blk.1.time_mix_decay_w2.weight blk.1.time_mix_lerp_fused.weight blk.1.time_mix_key.weight blk.1.attn_rel_b.weight
v.sam.pos_embd.weight v.sam.neck.0.weight v.sam.net_2.weight v.blk.0.rel_pos.weight v.patch_embd.weight
mm.patch_merger.weight a.rvq.codebook.weight mm.a.code_embd.weight blk.0.attn_v.bias blk.0.ffn_down.scale
weights weight xweight abcde abcdef per_layer_token_embd.weight blk.10.attn_v.weight blk.9.attn_v.weight
blk.7x.ffn_up.weight blk.1.attn_kv_b.weight blk.2.attn_qkv.weight output.weight.weight blkx.3.attn_k.weight
blk.1.ffn_gate_up_exps.weight blk.3.ffn_up_shexp.weight blk.0.hc_fn.weight blk.0.ssm_beta.weight
blk.0.attn_q_a.weight blk.0.attn_q_b.weight blk.1.nextn.eh_proj.weight blk.1.indexer.attn_q_b.weight
blk.1.indexer.attn_k.weight blk.1.indexer_compressor_gate.weight blk.1.indexer_compressor_ape.weight
blk.1.ssm_f_a.weight blk.1.ssm_f_b.weight blk.1.ssm_g_a.weight blk.1.ssm_g_b.weight blk.1.attn_kv_a_mqa.weight
blk.1.attn_k_b.weight blk.1.attn_v_b.weight cls.output.weight Output.weight
"""


@needs_llama_cpp
@pytest.mark.parametrize("arch", ["llama", "glm5-next", "bailingmoe3"])
@pytest.mark.parametrize("ftype", ["Q4_K_M", "Q3_K_M", "IQ1_M", "F16", "MXFP4_MOE"])
def test_names(ftype: str, arch: str, tmp_path: Path) -> None:
    """Which names are kept, how they are ordered and which rule they fall under."""
    mixed = [(256, 256), (1, 256), (256, 1), (2, 3, 256), (1, 1, 512), (256,)]
    for shapes in ([(64, 512)], [(2, 64, 512)], mixed):
        tensors = [TensorInfo(n, shapes[i % len(shapes)], "F32") for i, n in enumerate(_NAMES.split())]
        case = Case(Hyper(arch, 4, 4, 4), tensors)
        same(case, write(tmp_path / "m.gguf", case), ftype)


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("ftype", ["Q4_K_M", "Q8_0", "F16", "COPY"])
def test_written_file(kind: str, ftype: str, tmp_path: Path) -> None:
    """The dry run is what a real run writes: types, order and general.file_type."""
    case = decoder(Hyper("llama", 3, 4, 2), kind=kind)
    out = upstream.quantize(write(tmp_path / "in.gguf", case, data=True), tmp_path / "out.gguf", ftype)
    reader = gguf.GGUFReader(out)
    assert [(t.name, t.tensor_type.name) for t in reader.tensors] == list(ours(case, Options(ftype)).items())
    field = reader.get_field("general.file_type")
    assert field is not None
    number = FTYPES[ftype].number
    if number is not None:
        assert field.contents() == number


_PARTS = [
    "attn_v",
    "attn_k",
    "attn_q",
    "attn_qkv",
    "attn_kv_b",
    "attn_output",
    "ffn_up",
    "ffn_down",
    "ffn_gate",
]
_PARTS += ["ffn_down_exps", "ffn_up_shexp", "attn_norm", "ssm_in", "ffn_gate_inp"]
_TOP = [
    "token_embd.weight",
    "output.weight",
    "per_layer_token_embd.weight",
    "output_norm.weight",
    "rope_freqs.weight",
]
_COLUMNS = st.sampled_from([256, 512, 768, 64, 96, 128, 40, 320])
_PATTERNS = st.sampled_from(
    ["attn", "ffn_down", r"blk\.[0-3]\.", "token_embd", "v.weight", "^output", r"\d\d", "up|gate"]
)
_TYPES = st.sampled_from(sorted(WEIGHT_TYPES - {"NVFP4"}))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n_layer = draw(st.sampled_from([1, 2, 7, 8, 16, 33]))
    kv = draw(st.sampled_from([0, 1, 2, 4, 8]))
    hyper = Hyper(
        draw(st.sampled_from(["llama", "falcon", "qwen3", "gemma3", "phi3"])),
        n_layer,
        8,
        kv,
        draw(st.sampled_from([0, 0, 2, 4, 8, 16])),
    )
    names = draw(st.lists(st.sampled_from(_TOP), unique=True))
    for i in range(n_layer):
        names += [f"blk.{i}.{part}.weight" for part in draw(st.lists(st.sampled_from(_PARTS), unique=True))]
    tensors = []
    for name in names:
        shape = (draw(st.sampled_from([1, 8, 64])), draw(_COLUMNS))
        if draw(st.integers(0, 3)) == 0:
            shape = (draw(st.sampled_from([1, 4, 8])), *shape)  # type: ignore[assignment]
        tensors.append(TensorInfo(name, shape, draw(st.sampled_from(["F32", "F16", "BF16"]))))
    tensors.append(TensorInfo("rope_factors.weight", (256,), "F32"))
    return Case(hyper, draw(st.permutations(tensors)))


@needs_llama_cpp
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    case=cases(),
    ftype=st.sampled_from(list(FTYPES)),
    pure=st.sampled_from([False, False, True]),
    leave=st.booleans(),
    output=st.none() | _TYPES,
    embedding=st.none() | _TYPES,
    overrides=st.lists(st.tuples(_PATTERNS, _TYPES), max_size=2),
    imatrix=st.booleans(),
)
def test_random_models_equal_dry_run(
    case: Case,
    ftype: str,
    pure: bool,
    leave: bool,
    output: str | None,
    embedding: str | None,
    overrides: list[tuple[str, str]],
    imatrix: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    names = frozenset(t.name for t in case.tensors)
    shared: dict[str, Any] = {
        "pure": pure,
        "leave_output_tensor": leave,
        "output_tensor_type": output,
        "token_embedding_type": embedding,
        "tensor_types": tuple(overrides),
    }
    path = write(tmp_path_factory.mktemp("random") / "m.gguf", case)
    try:
        got = ours(case, Options(ftype, imatrix=names if imatrix else None, **shared))
    except OptionError as error:
        if "needs an importance matrix" not in str(error):
            return  # llama.cpp aborts the process here
        with pytest.raises(upstream.UpstreamError, match="requires an imatrix") as theirs:
            upstream.quantize(path, path.with_suffix(".out"), ftype, **shared)
        assert f"offending tensor: {str(error).split()[1]}\n" in str(theirs.value)
        return
    theirs_types = upstream.plan(path, ftype, imatrix=ones(list(names)) if imatrix else None, **shared)
    assert list(got.items()) == list(theirs_types.items())


def _layers(n: int, shapes: Mapping[str, tuple[int, ...]], start: int = 0) -> dict[str, tuple[int, ...]]:
    return {f"blk.{i}.{name}.weight": shape for i in range(start, n) for name, shape in shapes.items()}


def _attention(width: int, q: int, kv: int) -> dict[str, tuple[int, ...]]:
    return {"attn_q": (q, width), "attn_k": (kv, width), "attn_v": (kv, width), "attn_output": (width, q)}


def _ffn(width: int, ff: int, suffix: str = "", *lead: int) -> dict[str, tuple[int, ...]]:
    shapes = {"gate": (*lead, ff, width), "up": (*lead, ff, width), "down": (*lead, width, ff)}
    return {f"ffn_{name}{suffix}": shape for name, shape in shapes.items()}


def _ends(vocab: int, width: int, tied: bool = False) -> dict[str, tuple[int, ...]]:
    names = ("token_embd.weight",) if tied else ("token_embd.weight", "output.weight")
    return dict.fromkeys(names, (vocab, width))


# The tensors of the models behind upstream's snapshot files, from the models' configurations.
SNAPSHOTS: dict[str, tuple[Hyper, dict[str, tuple[int, ...]]]] = {
    "meta-llama-3.1-70b-instruct": (
        Hyper("llama", 80, 64, 8),
        _ends(128256, 8192) | _layers(80, _attention(8192, 8192, 1024) | _ffn(8192, 28672)),
    ),
    "qwen3-0.6b": (
        Hyper("qwen3", 28, 16, 8),
        _ends(151936, 1024) | _layers(28, _attention(1024, 2048, 1024) | _ffn(1024, 3072)),
    ),
    "qwen3-14b": (
        Hyper("qwen3", 40, 40, 8),
        _ends(151936, 5120) | _layers(40, _attention(5120, 5120, 1024) | _ffn(5120, 17408)),
    ),
    "gemma-3-4b-it": (
        Hyper("gemma3", 34, 8, 4),
        _ends(262144, 2560, tied=True) | _layers(34, _attention(2560, 2048, 1024) | _ffn(2560, 10240)),
    ),
    "gpt-oss-120b": (
        Hyper("gpt-oss", 36, 64, 8, 128),
        _ends(201088, 2880) | _layers(36, _attention(2880, 4096, 512) | _ffn(2880, 2880, "_exps", 128)),
    ),
    "step-3.5-flash": (
        Hyper("step35", 45, 64, 8, 288),
        _ends(128896, 4096)
        | _layers(45, _attention(4096, 8192, 1024) | {"attn_gate": (64, 4096)})
        | _layers(3, _ffn(4096, 11264))
        | _layers(45, _ffn(4096, 1280, "_exps", 288) | _ffn(4096, 1280, "_shexp"), start=3),
    ),
    "glm-4.6v": (
        Hyper("glm4moe", 46, 96, 8, 128),
        _ends(151552, 4096)
        | _layers(46, _attention(4096, 12288, 1024))
        | _layers(1, _ffn(4096, 10944))
        | _layers(46, _ffn(4096, 1408, "_exps", 128) | _ffn(4096, 1408, "_shexp"), start=1),
    ),
    "deepseek-v3.1": (
        Hyper("deepseek2", 61, 128, 1, 256),
        _ends(129280, 7168)
        | _layers(
            61,
            {
                "attn_q_a": (1536, 7168),
                "attn_q_b": (24576, 1536),
                "attn_kv_a_mqa": (576, 7168),
                "attn_k_b": (128, 512, 128),
                "attn_v_b": (128, 128, 512),
                "attn_output": (7168, 16384),
            },
        )
        | _layers(3, _ffn(7168, 18432))
        | _layers(61, _ffn(7168, 2048, "_exps", 256) | _ffn(7168, 2048, "_shexp"), start=3),
    ),
}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_snapshot(name: str) -> None:
    """Upstream's regression files list, per file type, every tensor that deviates from the base type."""
    path = upstream.source_folder() / "tests" / "snapshots" / f"{name}.schema"
    if not path.is_file():
        pytest.skip(f"{path.name} of llama.cpp's tests not found (set LCONVERT_LLAMACPP_SRC)")
    hyper, shapes = SNAPSHOTS[name]
    tensors = [t._replace(type="F64") for t in named(shapes)]  # a type that no rule gives: "kept" would show
    seen = 0
    for section in path.read_text().split("\n[")[1:]:
        head, *lines = section.splitlines()
        ftype, base = head.split("] ")
        assert FTYPES[ftype].base == base.upper()
        expected = dict(line.upper().rsplit(" ", 1) for line in lines if line)
        # The snapshots are taken without importance data and without asking for them.
        got = _types_without_imatrix(tensors, hyper, ftype)
        deviating = {n.upper(): t for n, t in got.items() if t != FTYPES[ftype].base}
        assert deviating == expected, ftype
        seen += 1
    assert seen == 33


def _types_without_imatrix(tensors: list[TensorInfo], hyper: Hyper, ftype: str) -> dict[str, str]:
    from lconvert.converters import gguf_mixture as m

    counters = m._Counters(hyper, {t.name: t for t in tensors})
    by_name = {t.name: t for t in tensors}
    options = Options(ftype)
    return {n: m._choose(by_name[n], hyper, options, counters).type for n in tensor_order(list(by_name))}


def test_order() -> None:
    names = ["blk.10.a", "blk.2.b", "blk.2.a.x", "token_embd.weight", "output.weight", "blk.2.a", "blk.10.A"]
    expected = [
        "output.weight",
        "token_embd.weight",
        "blk.2.a",
        "blk.2.a.x",
        "blk.2.b",
        "blk.10.A",
        "blk.10.a",
    ]
    assert tensor_order(names) == expected


def test_flags_and_names() -> None:
    assert (
        FLAGS["--q4_k_m"]
        == FLAGS["--q4_k"]
        == find_ftype("q4_k").name
        == find_ftype("--q4_k_m").name
        == "Q4_K_M"
    )
    assert find_ftype("mxfp4_moe").flag == "--mxfp4_moe"
    assert {f.number for f in FTYPES.values()} == {None, *range(4), *range(7, 33), *range(36, 39)}
    for name, reason in NOT_OFFERED.items():
        with pytest.raises(OptionError, match=reason):
            find_ftype(name.lower())
    with pytest.raises(OptionError, match="unknown; use one of F32, F16"):
        find_ftype("Q7_K")
    with pytest.raises(OptionError, match="'q4_k_m'"):
        Options("q4_k_m")


def test_reasons() -> None:
    case = decoder(Hyper("llama", 16, 8, 2, 8))
    choices = choose_types(case.tensors, case.hyper, Options("Q4_K_M"))
    assert choices["blk.0.attn_v.weight"] == ("Q8_0", "attn_v: 8 experts")
    assert choices["blk.3.ffn_gate_inp.weight"] == ("F32", "kept: name has 'ffn_gate_inp.weight'")
    assert choices["blk.3.attn_norm.weight"] == ("F32", "kept: a vector")
    assert choices["blk.0.ffn_down_exps.weight"] == (
        "Q6_K",
        "ffn_down: first and last eighth, every third between",
    )
    odd = choose_types(
        [TensorInfo("blk.0.ffn_up.weight", (8, 96), "F32")], Hyper("llama", 1, 1, 1), Options("Q4_K_S")
    )
    assert odd["blk.0.ffn_up.weight"] == ("Q5_0", "ffn_up; 96 columns are not whole blocks of Q4_K")


def test_missing_importance_data() -> None:
    case = decoder(Hyper("llama", 2, 8, 8))
    with pytest.raises(
        OptionError, match=r"blk\.0\.attn_k\.weight gets IQ2_XXS, which needs an importance matrix"
    ):
        choose_types(case.tensors, case.hyper, Options("IQ2_XXS"))
    some = frozenset(t.name for t in case.tensors) - {"blk.1.ffn_up.weight"}
    with pytest.raises(OptionError, match=r"no entry for tensor blk\.1\.ffn_up\.weight, which gets Q2_K"):
        choose_types(case.tensors, case.hyper, Options("Q2_K_S", imatrix=some))
    assert choose_types(case.tensors, case.hyper, Options("Q2_K", imatrix=some))


@needs_llama_cpp
def test_missing_entry_stops_upstream_too(tmp_path: Path) -> None:
    case = decoder(Hyper("llama", 1, 8, 8))
    path = write(tmp_path / "m.gguf", case, data=True)
    with_data = {t.name: np.ones(t.shape[-1], np.float32) for t in case.tensors if "ffn_up" not in t.name}
    with pytest.raises(
        upstream.UpstreamError, match=r"Missing importance matrix for tensor blk\.0\.ffn_up\.weight"
    ):
        upstream.quantize(path, tmp_path / "out.gguf", "Q2_K_S", imatrix=with_data)
    with pytest.raises(OptionError, match=r"blk\.0\.ffn_up\.weight"):
        choose_types(case.tensors, case.hyper, Options("Q2_K_S", imatrix=frozenset(with_data)))


@needs_llama_cpp
def test_expert_tensor_without_layer(tmp_path: Path) -> None:
    case = Case(
        Hyper("llama", 2, 8, 8, 8), named({"mtp.ffn_up.weight": (64, 256), "blk.0.attn_q.weight": (64, 256)})
    )
    with pytest.raises(UnsupportedError, match=r"mtp\.ffn_up\.weight .* names no layer below 2"):
        choose_types(case.tensors, case.hyper, Options("Q4_K_M"))
    with pytest.raises(
        upstream.UpstreamError, match=r"Failed to determine layer for tensor mtp\.ffn_up\.weight"
    ):
        upstream.plan(write(tmp_path / "m.gguf", case), "Q4_K_M")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_embedding_type": "Q4_K"}, r"token_embd\.weight has 96 columns, not a multiple of the 256"),
        ({"output_tensor_type": "Q6_K"}, r"output\.weight has 96 columns, .* Q6_K \(output option\) needs"),
        (
            {"tensor_types": (("ffn_up", "NVFP4"),)},
            r"blk\.0\.ffn_up\.weight has 96 columns, .* 64 that NVFP4",
        ),
    ],
)
def test_shape_that_an_option_cannot_have(options: dict[str, Any], message: str) -> None:
    case = decoder(Hyper("llama", 2, 4, 4), width=96)
    with pytest.raises(OptionError, match=message):
        choose_types(case.tensors, case.hyper, Options("Q4_K_M", **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_tensor_type": "I32"}, "'I32' cannot hold weights"),
        ({"tensor_types": (("x", "q8_0"),)}, "'q8_0' cannot hold weights"),
        ({"tensor_types": (("(?i)x", "Q8_0"),)}, "not a plain ECMAScript"),
        ({"tensor_types": (("(?<=a)x", "Q8_0"),)}, "not a plain ECMAScript"),
        ({"tensor_types": (("a++", "Q8_0"),)}, "not a plain ECMAScript"),
        ({"tensor_types": (("[[:digit:]]", "Q8_0"),)}, "not a plain ECMAScript"),
        ({"tensor_types": ((r"\Ax", "Q8_0"),)}, "not a plain ECMAScript"),
        ({"tensor_types": (("(", "Q8_0"),)}, "not a regular expression"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Options("Q4_K_M", **options)


def test_parse_tensor_type() -> None:
    assert parse_tensor_type("blk.[0-9]+.ATTN_V=q8_0") == ("blk.[0-9]+.attn_v", "Q8_0")
    for bad in ("attn_v", "=q8_0", "attn_v=", "attn_v=q9", "attn_v=i32"):
        with pytest.raises(OptionError, match="expected pattern=type"):
            parse_tensor_type(bad)


def test_duplicate_tensor() -> None:
    with pytest.raises(InputError, match="tensor a occurs more than once"):
        choose_types(named({"a": (1, 2)}) * 2, Hyper("llama", 1, 1, 1), Options("Q8_0"))


@needs_llama_cpp
def test_hyper_from_metadata(tmp_path: Path) -> None:
    for name in ("mixtral", "llama 80 layers, 1 of them nextn"):
        path = write(tmp_path / "m.gguf", CASES[name])
        assert hyper_from_metadata(container.read(path).metadata) == CASES[name].hyper
    metadata = {
        "general.architecture": container.string("x"),
        "x.block_count": container.u32(3),
        "x.attention.head_count": container.array("i32", [4, 8, 8]),
    }
    assert hyper_from_metadata(metadata) == Hyper("x", 3, 4, 4)
    with pytest.raises(InputError, match=r"x\.block_count is of kind str"):
        hyper_from_metadata(metadata | {"x.block_count": container.string("3")})
    with pytest.raises(InputError, match=r"general\.architecture is missing"):
        hyper_from_metadata({})
    with pytest.raises(InputError, match=r"x\.block_count is missing"):
        hyper_from_metadata({"general.architecture": container.string("x")})
    with pytest.raises(UnsupportedError, match="layer count of nanbeige"):
        hyper_from_metadata({"general.architecture": container.string("nanbeige")})
