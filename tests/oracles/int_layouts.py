"""Small matrices packed by the layers of GPTQModel and AutoRound themselves: fixtures of GPTQ's and AWQ's layouts.

    python int_layouts.py gptqmodel|autoround OUT.safetensors

Runs in the environment of one of the two. Known codes, zero points and scales are made into the weights that they mean, and
the peer's layer packs those. A case NAME holds NAME.qweight, .qzeros, .scales (and .g_idx) as the peer stores them, the codes
(N, K) and zero points (N, G) that went in, and where the peer has a dequantization its weight (N, K) in fp32. Names are
LAYOUT-BITS-sym|asym-GROUP.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

os.cpu_count = lambda: 8  # GPTQModel refuses to start its thread pools on smaller machines

import torch
from safetensors.torch import save_file

OUT, IN = 32, 64


def source(bits: int, sym: bool, group: int, lowest: int, rows: int = OUT, cols: int = IN) -> tuple[Any, ...]:
    """A linear layer that lies exactly on a grid, with its codes, zero points and scales."""
    size = cols if group == -1 else group
    shape = (rows, cols // size)
    generator = torch.Generator().manual_seed(bits * 10 + sym)
    scales = (torch.rand(shape, generator=generator) * 0.01 + 0.001).half().float()
    drawn = torch.randint(lowest, 2**bits, shape, generator=generator)
    zeros = torch.full(shape, 2 ** (bits - 1)) if sym else drawn
    codes = torch.randint(0, 2**bits, (rows, cols), generator=generator)
    layer = torch.nn.Linear(cols, rows, bias=False)
    layer.weight.data = (codes - zeros.repeat_interleave(size, 1)).float() * scales.repeat_interleave(size, 1)
    return layer, codes, zeros, scales


def case(layer: Any, codes: Any, zeros: Any, **more: Any) -> dict[str, torch.Tensor]:
    stored = {name: getattr(layer, name, None) for name in ("qweight", "qzeros", "scales", "g_idx")}
    known = {"codes": codes.to(torch.uint8), "zeros": zeros.to(torch.uint8), **more}
    return {name: t.contiguous().clone() for name, t in (stored | known).items() if t is not None}


def gptqmodel() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    from gptqmodel.nn_modules.qlinear.gemv_awq import AwqGEMVLinear
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    def build(kind: Any, bits: int, group: int, sym: bool, rows: int = OUT, cols: int = IN) -> Any:
        shape = {"in_features": cols, "out_features": rows, "bias": False}
        return kind(bits=bits, group_size=group, sym=sym, desc_act=False, register_buffers=True, **shape)

    for bits, group in ((2, 32), (3, 32), (4, 32), (8, 32), (4, -1)):
        for sym in (True, False):
            linear, codes, zeros, scales = source(bits, sym, group, lowest=1)
            layer = build(TorchLinear, bits, group, sym)
            index = torch.arange(IN, dtype=torch.int32) // (IN if group == -1 else group)
            layer.pack_original(linear, scales.clone(), zeros.float(), index)
            name = f"{bits}-{'sym' if sym else 'asym'}-{group}"
            fine = build(TorchLinear, bits, group, sym)
            for suffix in ("qweight", "qzeros", "g_idx"):
                setattr(fine, suffix, getattr(layer, suffix).clone())
            fine.scales = layer.scales.float()
            yield f"gptq_v2-{name}", case(layer, codes, zeros, weight=fine.eval().dequantize_weight().T)
            convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, group_size=group))
            yield f"gptq-{name}", case(layer, codes, zeros)
    for sym in (True, False):
        linear, codes, zeros, scales = source(4, sym, 32, lowest=0)
        layer = build(AwqTorchLinear, 4, 32, sym)
        layer.pack(linear, scales, zeros.float())
        weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, 32).T
        yield f"gemm-4-{'sym' if sym else 'asym'}-32", case(layer, codes, zeros, weight=weight)
    for group, cols in ((64, 128), (128, 256)):
        linear, codes, zeros, scales = source(4, False, group, 0, 64, cols)
        layer = build(AwqGEMVLinear, 4, group, False, 64, cols)
        layer.pack(linear, scales, zeros.float())
        yield f"gemv-4-asym-{group}", case(layer, codes, zeros)


def autoround() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    from auto_round.export.export_to_awq.utils import WQLinear_GEMM
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    for name, module in (("gptq_v2", qlinear_torch), ("gptq", qlinear_torch_zp)):
        for bits in (2, 3, 4, 8):
            for sym in (True, False):
                linear, codes, zeros, scales = source(bits, sym, 32, lowest=int(name == "gptq"))
                layer = module.QuantLinear(bits, 32, IN, OUT, False)
                layer.device = torch.device("cpu")
                layer.pack(linear, scales, 2 ** (bits - 1) if sym else zeros, None, device="cpu")
                yield f"{name}-{bits}-{'sym' if sym else 'asym'}-32", case(layer, codes, zeros)
    linear, codes, zeros, scales = source(4, False, 32, lowest=0)
    turned = {"scales": scales.T.contiguous(), "zeros": zeros.float().T.contiguous()}
    layer = WQLinear_GEMM.from_linear(linear, 4, 32, device="cpu", **turned)
    yield "gemm-4-asym-32", case(layer, codes, zeros)


def main(peer: str, out: str) -> None:
    cases = {"gptqmodel": gptqmodel, "autoround": autoround}[peer]
    tensors = {f"{name}.{suffix}": t for name, parts in cases() for suffix, t in parts.items()}
    package = {"gptqmodel": "gptqmodel", "autoround": "auto-round"}[peer]
    save_file(tensors, out, {"written by": f"{package} {version(package)}"})


if __name__ == "__main__":
    main(*sys.argv[1:])
