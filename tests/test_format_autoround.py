"""AutoRound: its packing formats are GPTQ's and AWQ's, and its config says which module holds what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import lconvert
from lconvert.errors import InputError, LconvertError, UnsupportedError
from lconvert.formats import autoround
from lconvert.formats.scheme import Checkpoint
from lconvert.ir import QTensor, int_grid
from tests import int_checkpoints as made

MODULE = "model.layers.0.mlp.up_proj"
BASE = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "data_type": "int",
    "autoround_version": "0.16.1",
}


def parse(**changes: Any) -> autoround.AutoRound:
    config = {k: v for k, v in (BASE | changes).items() if v is not ...}
    return autoround.parse(Checkpoint("config.json", config, Path("/nowhere")))


@pytest.mark.parametrize("folder", made.peer_folders("auto-round"), ids=lambda p: p.name)
def test_peers_checkpoints_mean_what_the_peer_dequantizes(folder: Path) -> None:
    made.compare_with_oracle(lconvert.read(folder), folder)


@pytest.mark.parametrize(
    ("peer", "case"), [c for p in ("gptq", "gemm") for c in made.layout_cases(p) if c[0] == "autoround"]
)
def test_packing_formats_of_its_packers(peer: str, case: str) -> None:
    """The name of the packing format in the config leads to the layout that AutoRound's own layer packs."""
    arrays = made.layout(peer, case)
    codes, zeros = arrays.pop("codes"), arrays.pop("zeros")
    layout, bits, kind, _ = case.split("-")
    name = {"gptq": "auto_round:auto_gptq", "gptq_v2": "auto_round", "gemm": "auto_round:auto_awq"}[layout]
    scheme = parse(packing_format=name, bits=int(bits), sym=kind == "sym")
    weight = scheme.weight(MODULE, made.parts(arrays), codes.shape)
    assert weight is not None and weight.used == arrays.keys()
    assert np.array_equal(made.values_of(weight.data), made.meaning(codes, zeros, arrays["scales"].T))


@pytest.mark.parametrize(
    ("changes", "layout"),
    [
        ({"packing_format": ...}, "gptq"),
        ({"packing_format": ..., "backend": "auto"}, "gptq"),
        (
            {
                "packing_format": ...,
                "backend": "auto_round:gptq:exllamav2",
                "quant_method": "intel/auto-round",
            },
            "gptq",
        ),
        ({"packing_format": ..., "backend": "auto_round:exllamav2"}, "gptq_v2"),
        ({"packing_format": "auto_round:gptqmodel"}, "gptq_v2"),
        ({"packing_format": "auto_round:awq"}, "awq"),
    ],
)
def test_names_of_packing_formats(changes: dict[str, Any], layout: str) -> None:
    assert parse(**changes).layout == layout


def test_a_folder_with_extra_config(tmp_path: Path) -> None:
    """By name, by the end of the name and by expression, as vLLM resolves them."""
    extra = {
        "model.layers.0.self_attn.q_proj": {"bits": 8},
        "mlp.down_proj": {"group_size": -1, "sym": False},
        r".*k_proj$": {"bits": 16},
        "lm_head": {"bits": 8, "group_size": 64},
    }

    def module(name: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        if name.endswith("k_proj"):
            return None
        bits = 8 if name.endswith(("q_proj", "lm_head")) else 4
        group = {"down_proj": -1, "lm_head": 64}.get(name.rpartition(".")[2], 32)
        found = made.gptq(*made.draw(rng, shape, bits, group, not name.endswith("down_proj")), bits)
        del found["g_idx"]
        return found

    config = BASE | {"extra_config": extra, "block_name_to_quantize": "model.layers"}
    # the head of 48 rows fills whole words in 8 bits
    model = lconvert.read(made.write_folder(tmp_path / "m", module, config))
    found = {k: e.data for k, e in model.entries.items() if isinstance(e.data, QTensor)}
    assert (found["layers.0.attn.q"].grid, found["layers.0.attn.v"].grid) == (
        int_grid(8, True),
        int_grid(4, True),
    )
    down = found["layers.0.mlp.down"]
    assert (down.grid, down.block) == (int_grid(4, False), (1, -1)) and down.zero is not None
    assert found["head"].block == (1, 64)
    assert "layers.0.attn.k" not in found and len(found) == 7
    assert "quantized: autoround (gptq) 4 bit, group 32" in model.report


def test_a_quantized_module_of_16_bits() -> None:
    arrays = made.parts(made.gptq(*made.draw(np.random.default_rng(0), (32, 64), 4, 32, True), 4))
    with pytest.raises(
        InputError, match=r"up_proj: is stored quantized, but quantization_config excludes it"
    ):
        parse(extra_config={MODULE: {"bits": 16}}).weight(MODULE, arrays, (32, 64))
    assert parse().weight(MODULE, {}, (32, 64)) is None


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"packing_format": "auto_round:fp8_static"}, r"'auto_round:fp8_static' cannot be read, known are auto_round:auto_gptq"),
    ({"packing_format": "gguf"}, r"packing_format 'gguf' cannot be read"),
    ({"packing_format": 3}, r"packing_format 3 cannot be read"),
    ({"data_type": "mx_fp"}, r"data_type 'mx_fp' of AutoRound cannot be read, only int"),
    ({"act_bits": 8}, r"act_bits 8: quantized activations of AutoRound cannot be read"),
    ({"rotation_config": {"type": "hadamard"}}, r"rotation_config rotates activations"),
    ({"bits": 5}, r"5 bits: GPTQ's layout is known for 2, 3, 4, 8 bits"),
    ({"bits": 16}, r"bits 16: nothing is quantized; remove quantization_config"),
    ({"bits": ...}, r"quantization_config lacks bits"),
    ({"group_size": "32"}, r"group_size of quantization_config is '32', expected a whole number"),
    ({"packing_format": "auto_round:auto_awq", "bits": 8}, r"AWQ of 8 bits cannot be read, only 4"),
    ({"extra_config": [1]}, r"extra_config is \[1\], expected an object of objects"),
    ({"extra_config": {"x": 1}}, r"extra_config is \{'x': 1\}, expected an object of objects"),
    ({"extra_config": {"(a+)+": {}}}, r"extra_config '\(a\+\)\+': this expression may take too long"),
    ({"extra_config": {"a(": {}}}, r"extra_config 'a\(': no valid regular expression"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=lambda x: str(x)[:40])
def test_configs_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LconvertError, match=message):
        parse(**changes)


@settings(max_examples=150, deadline=None)
@given(
    made.configs(
        (
            "bits",
            "group_size",
            "sym",
            "packing_format",
            "backend",
            "data_type",
            "act_bits",
            "extra_config",
            "rotation_config",
        )
    )
)
def test_any_config_is_read_or_refused(changes: dict[str, Any]) -> None:
    """No value of any key leads to another exception than the errors of lconvert."""
    made.read_or_refused(
        lambda: parse(**changes),
        made.gptq(*made.draw(np.random.default_rng(0), (32, 64), 4, 32, True), 4),
        (32, 64),
    )


def test_layers_of_another_type_are_refused() -> None:
    arrays = made.parts(made.gptq(*made.draw(np.random.default_rng(0), (32, 64), 4, 32, True), 4))
    scheme = parse(extra_config={"up_proj": {"data_type": "nv_fp"}})
    with pytest.raises(
        UnsupportedError, match=r"extra_config of model.layers.0.mlp.up_proj: data_type 'nv_fp'"
    ):
        scheme.weight(MODULE, arrays, (32, 64))
