"""Runs the transformers model with weights out of a Model, one decoder layer at a time.

The model is built with empty (meta) parameters; each layer's weights are dequantized when the layer runs and
dropped after it, so memory is one layer plus activations. Calibration, layer-by-layer comparison and the
dequantized reference use it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .archs import find
from .archs.common import Bind, binds
from .errors import InputError, LconvertError, MissingPackageError, UnsupportedError
from .ir import Conv, Convnet, Decoder, Linear, Model, Plain, Pool, Tensor
from .kernels.qtensor import effective
from .spec import shapes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@cache
def packages() -> tuple[Any, Any]:
    """torch and transformers, imported; MissingPackageError says what to install."""
    # transformers asks whether the package `kernels` exists and would find this project's folder of that name when
    # Python runs in the checkout (python -m ...), so that entry of the path goes.
    sys.path[:] = [p for p in sys.path if not Path(p or ".", "kernels", "blocks.py").is_file()]
    try:
        import torch
        import transformers
    except ImportError as e:
        raise MissingPackageError(f"{e.name} is not installed: pip install 'lconvert[hf]'") from None
    return torch, transformers


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Inside, torch computes on `count` threads; None: on as many as it did."""
    torch, _ = packages()
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def explained(source: str) -> Iterator[None]:
    """What transformers has against a configuration as an InputError; it raises whatever comes along."""
    try:
        yield
    except LconvertError:
        raise
    except Exception as e:
        reason = " ".join(str(e).split())
        raise InputError(f"{source}: transformers does not run it ({type(e).__name__}: {reason})") from e


@contextmanager
def _parameters_on_meta(torch: Any) -> Iterator[None]:
    """Modules built inside have meta parameters but real buffers (rotary tables and the like)."""
    original: Callable[..., None] = torch.nn.Module.register_parameter

    def register(module: Any, name: str, parameter: Any) -> None:
        original(module, name, parameter)
        if parameter is not None:
            empty = torch.empty_like(parameter, device="meta")
            module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)

    torch.nn.Module.register_parameter = register
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = original


def norm_shift(model: Model, role: str) -> tuple[float, float]:
    """What is added to a canonical entry and then taken off for transformers' parameter: norms that hold the effective weight
    (offset 0) where the Hugging Face class adds one lose it."""
    target = find(model.arch.family).traits_offset
    shifted = "norm" in role and isinstance(model.arch, Decoder) and model.arch.norm_offset != target
    return (model.arch.norm_offset, target) if shifted and isinstance(model.arch, Decoder) else (0.0, 0.0)


def hf_tensor(model: Model, bind: Bind) -> NDArray[np.float32]:
    """One Hugging Face tensor in fp32, put together from the canonical entries of `model`."""
    import numpy as np

    out = np.empty(bind.stored, np.float32)
    for role, ranges in bind.parts:
        part = effective(model.entries[role])
        more, less = norm_shift(model, role)
        if more != less:
            part = part + np.float32(more) - np.float32(less)
        if bind.row is not None:
            part = part[bind.row]
        at = 0
        for a, b in ranges:
            out[a:b] = part[at : at + b - a]
            at += b - a
    if bind.alternating:
        split = out.reshape(bind.experts, bind.alternating, -1, *out.shape[1:])
        out = split.swapaxes(1, 2)
    shape = bind.shape[:-2] + bind.shape[:-3:-1] if bind.transpose else bind.shape
    out = out.reshape(shape)
    return np.ascontiguousarray(out.swapaxes(-1, -2)) if bind.transpose else out


def _no_numbers(model: Model, bind: Bind) -> InputError:
    """Which of the entries of a tensor that holds NaN or infinite values has them, and where."""
    import numpy as np

    for role, _ in bind.parts:
        data = model.entries[role].data
        bad = ~np.isfinite(effective(model.entries[role]).reshape(data.shape[0], -1)).all(axis=1)
        if bad.any():
            where = f"{data.origin}: " if isinstance(data, Tensor) and data.origin else ""
            return InputError(
                f"{where}{role} holds NaN or infinite values, first in row {int(bad.argmax())}; the weights are damaged, or what "
                "they were multiplied by is"
            )
    raise AssertionError("a tensor is made of its entries")


def _plain_attention(model: Model) -> bool:
    """Whether attention is a softmax of scaled products and nothing more."""
    if not isinstance(model.arch, Decoder):
        return False
    return not any(layer.attention.softcap or layer.attention.sinks for _, layer in model.arch.each())


class Forward:
    """A transformers model whose weights come out of `model` while it runs.

    lazily: nothing is loaded before somebody calls `fill`, and what was filled stays until `drop`; otherwise everything outside
    of the layers is there at once, and layers come and go by themselves. fused: attention in one go (torch's
    scaled_dot_product_attention), several times faster and rounded a little differently, where it is a plain softmax and the class has it.
    finite: weights that are no numbers are an InputError, for whoever computes with what comes out; a proof reports them.

    >>> import lconvert
    >>> Forward(lconvert.read("examples/demo_model")).logits([1, 2, 3]).shape
    (3, 2048)
    """

    def __init__(
        self, model: Model, *, lazily: bool = False, fused: bool = False, finite: bool = False
    ) -> None:
        self._torch, transformers = packages()
        arch = find(model.arch.family)
        config = dict(model.config) or arch.config(model.arch)
        with explained(model.source or "the model"):
            hf_config = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)
            module = getattr(transformers, arch.hf_class)
            one = fused and getattr(module, "_supports_sdpa", False) and _plain_attention(model)
            hf_config._attn_implementation = "sdpa" if one else "eager"
            with _parameters_on_meta(self._torch), self._torch.no_grad():
                self.module = module(hf_config).eval()
        self._model, self._finite = model, finite
        self._binds = {n: b for b in binds(arch.names, model.arch) for n in (b.hf, b.other)}
        if isinstance(model.arch, Convnet):
            raise UnsupportedError(f"{model.source}: transformers has no convolutional networks of this kind")
        self.layers = self._find_layers(model.arch.layers)
        self._names = {id(m): n for n, m in self.module.named_modules()}
        for name, buffer in self.module.named_buffers():
            if name in self._binds:
                buffer.copy_(self.load(name, tuple(buffer.shape)))
        if not lazily:
            self._attach()

    def _find_layers(self, count: int) -> list[Any]:
        for part in self.module.modules():
            if isinstance(part, self._torch.nn.ModuleList) and len(part) == count:
                return list(part)
        raise UnsupportedError(f"{type(self.module).__name__}: its list of {count} layers was not found")

    def fill(self, part: Any, model: Model | None = None) -> None:
        """Real weights for the meta parameters under `part`, out of `model` where another one is given."""
        for full, name, parameter in self.parameters(part):
            if parameter.is_meta:
                self.put(part, name, self.load(full, tuple(parameter.shape), model))

    def parameters(self, part: Any) -> list[tuple[str, str, Any]]:
        """(name in the model, name under `part`, parameter) of everything that `part` computes with."""
        prefix = self._names[id(part)]
        return [(f"{prefix}.{n}" if prefix else n, n, p) for n, p in part.named_parameters(recurse=True)]

    def put(self, root: Any, name: str, data: Any) -> None:
        """Make `data` the parameter `name` below `root`."""
        owner, _, leaf = name.rpartition(".")
        root.get_submodule(owner)._parameters[leaf] = self._torch.nn.Parameter(data, requires_grad=False)

    def load(self, full: str, shape: tuple[int, ...], model: Model | None = None) -> Any:
        """The parameter (or buffer) of this name and shape, fp32, out of `model` where another one is given."""
        import numpy as np

        bind, source = self.bind(full, shape), model or self._model
        made = hf_tensor(source, bind)
        if self._finite and not np.isfinite(made).all():
            raise _no_numbers(source, bind)
        return self._torch.from_numpy(made)

    def bind(self, full: str, shape: tuple[int, ...]) -> Bind:
        """Which canonical rows the parameter (or buffer) of this name and shape holds."""
        return self._binds[full] if full in self._binds else self._stacked(full, shape)

    def _stacked(self, full: str, shape: tuple[int, ...]) -> Bind:
        """Experts that transformers holds as one tensor (expert, out, in) and stores one by one."""
        layer = full.split(".layers.", 1)[-1].split(".", 1)[0]
        roles = {"experts.gate_up_proj": ("gate", "up"), "experts.down_proj": ("down",)}
        for ending, kinds in roles.items():
            if full.endswith(ending):
                rows = shape[1] // len(kinds)
                every = [f"layers.{layer}.moe.experts.{e}.{k}" for e in range(shape[0]) for k in kinds]
                parts = tuple((role, ((i * rows, (i + 1) * rows),)) for i, role in enumerate(every))
                return Bind(full, parts, shape, experts=shape[0])
        if full.endswith((".mlp.gate.weight", ".moe.gate.weight", ".router.weight")):
            return Bind(full, ((f"layers.{layer}.moe.router", ((0, shape[0]),)),), shape)
        raise UnsupportedError(f"{full}: no canonical entry for this parameter")

    def _attach(self) -> None:
        inside = {id(p) for layer in self.layers for p in layer.parameters()}
        tied = isinstance(self._model.arch, Decoder) and self._model.arch.tied
        for name, parameter in list(self.module.named_parameters()):
            if id(parameter) in inside or (tied and name == "lm_head.weight"):
                continue
            self.put(self.module, name, self.load(name, tuple(parameter.shape)))
        if tied:
            head, embed = self.module.get_output_embeddings(), self.module.get_input_embeddings()
            head.weight = embed.weight
        for layer in self.layers:
            layer.register_forward_pre_hook(lambda m, args: self.fill(m))
            layer.register_forward_hook(lambda m, args, out: self.drop(m))

    def drop(self, part: Any) -> None:
        """Meta parameters again in the place of the real ones under `part`."""
        for owner in part.modules():
            for name, parameter in list(owner._parameters.items()):
                if parameter is not None:
                    empty = self._torch.empty_like(parameter, device="meta")
                    owner._parameters[name] = self._torch.nn.Parameter(empty, requires_grad=False)

    def linears(self) -> list[tuple[Any, tuple[str, ...]]]:
        """Every module whose weight is one matrix of the model, with the canonical roles that it holds."""
        out = []
        for name, module in self.module.named_modules():
            bind = self._binds.get(name + ".weight")
            if bind is not None and len(bind.shape) == 2 and "embed" not in bind.parts[0][0]:
                out.append((module, tuple(role for role, _ in bind.parts)))
        return out

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """fp32 logits (len(ids), vocab)."""
        import numpy as np

        with self._torch.no_grad():
            out = self.module(self._torch.tensor([ids]), use_cache=False).logits[0].float().numpy()
        return np.ascontiguousarray(out)

    def classify(self, example: Mapping[str, Any]) -> NDArray[np.float32]:
        """fp32 logits (batch, labels) of an encoder. example: input_ids and what else its forward takes, as integers."""
        import numpy as np

        with self._torch.no_grad():
            feed = {k: self._torch.as_tensor(np.asarray(v, np.int64)) for k, v in example.items()}
            return np.ascontiguousarray(self.module(**feed).logits.float().numpy())


def sequential(model: Model) -> Any:
    """A convolutional network as a torch.nn.Sequential with the model's weights."""
    torch, _ = packages()
    from torch import nn

    assert isinstance(model.arch, Convnet)
    plain = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "flatten": nn.Flatten}
    pools = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}
    entering, steps = shapes(model.arch), []
    for i, step in enumerate(model.arch.steps):
        match step:
            case Conv():
                options = {"stride": step.stride, "padding": step.padding, "bias": step.bias}
                steps.append(nn.Conv2d(entering[i][0], step.out, step.kernel, **options))
            case Linear():
                steps.append(nn.Linear(entering[i][0], step.out, bias=step.bias))
            case Pool():
                steps.append(pools[step.kind](step.size))
            case Plain():
                steps.append(plain[step.kind]())
    made = nn.Sequential(*steps).eval()
    made.load_state_dict(
        {b.hf: torch.from_numpy(hf_tensor(model, b).copy()) for b in binds((), model.arch)}, strict=True
    )
    return made
