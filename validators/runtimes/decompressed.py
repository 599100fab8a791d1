"""Folders of compressed-tensors in transformers, decompressed in fp32 and computed in the dtype that was asked for.

What the two packages do otherwise, whatever dtype is asked for (transformers 5.23, compressed-tensors 0.17 to 0.20):
- transformers decompresses experts in the dtype of their stored scales and multiplies in that; their zero points and global scales
  do not reach compressed-tensors, and int8 with quantized inputs or FP8 in blocks does not load there at all;
- compressed-tensors decompresses FP4 and MXFP8 to bfloat16, which a model in fp32 cannot multiply;
- compressed-tensors since 0.18 makes no room for packed zero points, so that their tensors do not fit.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lconvert.formats.json_object import read_object


def concerns(folder: Path) -> bool:
    """Whether transformers would load the folder through compressed-tensors."""
    path = folder / "config.json"
    about = read_object(path).get("quantization_config") if path.is_file() else None
    return (
        isinstance(about, dict)
        and about.get("quant_method") == "compressed-tensors"
        and find_spec("compressed_tensors") is not None  # transformers says what is missing
    )


def loaded(load: Callable[[], Any]) -> Any:
    """The model that `load` gives, its weights decompressed at once; the package would do it in the first forward pass."""
    with _in_fp32():
        model = load()
        if getattr(model, "ct_decompress_hook", None) is None:  # the weights are plain
            return model
        model.hf_quantizer.compressor.decompress_model(model)
    for module in model.modules():
        weight = getattr(module, "weight", None) if hasattr(module, "quantization_scheme") else None
        if weight is not None and weight.dtype != model.dtype:
            weight.data = weight.data.to(model.dtype)
    return model


@contextmanager
def _in_fp32() -> Iterator[None]:
    """Inside, the packages decompress in fp32, and use all that a folder holds."""
    torch = importlib.import_module("torch")
    ours = importlib.import_module("transformers.integrations.compressed_tensors")
    loader: Any = getattr(ours, "CompressedTensorsDequantize", None)
    fp4 = importlib.import_module("compressed_tensors.compressors.nvfp4.base")
    packed = importlib.import_module("compressed_tensors.compressors.pack_quantized.base")
    with ExitStack() as stack:
        unpack = partial(fp4.unpack_fp4_from_uint8, dtype=torch.float32)
        stack.enter_context(_replaced(fp4, "unpack_fp4_from_uint8", unpack))
        words = packed.PackedQuantizationCompressor
        stack.enter_context(_replaced(words, "compress", staticmethod(_roomy(words.compress, packed, torch))))
        if loader is not None and hasattr(ours, "get_experts_scheme"):
            stack.enter_context(_replaced(loader, "convert", _experts(loader.convert, ours, torch)))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _roomy(compress: Callable[..., Any], packed: Any, torch: Any) -> Callable[..., Any]:
    """`compress`, whose answer for a module without numbers has zero points of the size that they are stored in."""

    def compressed(state_dict: dict[str, Any], scheme: Any) -> dict[str, Any]:
        out: dict[str, Any] = compress(state_dict, scheme)
        zero = out.get("weight_zero_point")
        if zero is None or not zero.is_meta or zero.dtype == torch.int32:
            return out
        if scheme.weights.strategy in packed.PACK_ZP_STRATS:
            with torch.device("cpu"):  # models are built on meta, where packing fails
                empty = torch.zeros(zero.shape, dtype=torch.int8)
                words = packed.pack_to_int32(empty, scheme.weights.num_bits, packed_dim=0)
            out["weight_zero_point"] = words.contiguous().to("meta")
        return out

    return compressed


def _experts(convert: Callable[..., Any], ours: Any, torch: Any) -> Callable[..., Any]:
    """`CompressedTensorsDequantize.convert`, experts by `decompress` of their format, from all that is stored of them.

    It gets a list per kind of tensor, one of each expert, as {"experts.*.w1.weight_packed": ..., "experts.*.w1.weight_scale": ...},
    and gives one tensor of all experts per matrix.
    """

    def converted(self: Any, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        if "weight" in input_dict or "weight_scale" in input_dict:  # a module that is no expert
            return dict(convert(self, input_dict, *args, **kwargs))
        config = self.hf_quantizer.compressor.quantization_config
        scheme = getattr(self, "scheme", None) or ours.get_experts_scheme(config)
        formats = importlib.import_module("compressed_tensors.compressors").BaseCompressor
        compressor = formats.get_value_from_registry(scheme.format or config.format)
        dtype = kwargs["model"].get_parameter(kwargs["full_layer_name"]).dtype
        matrices: dict[str, dict[str, list[Any]]] = {}
        for key, value in input_dict.items():
            module, _, kind = key.rpartition(".")
            matrices.setdefault(module, {})[kind] = value if isinstance(value, list) else [value]
        out: dict[str, Any] = {}
        for module, kinds in matrices.items():
            main = "weight_packed" if "weight_packed" in kinds else "weight"
            if "weight_scale" not in kinds:
                out[f"{module}.{main}"] = kinds[main]
                continue
            made: list[Any] = []
            for i in range(len(kinds[main])):
                state = {kind: _wide(values[i], torch) for kind, values in kinds.items()}
                made.append(compressor.decompress(state, scheme)["weight"].to(dtype))
            out[f"{module}.{main}"] = torch.stack(made)
        return out

    return converted


def _wide(tensor: Any, torch: Any) -> Any:
    """Scales in fp32: the package computes in their dtype."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
