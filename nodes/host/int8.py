"""Linear layers in int8: ComfyUI's quantised tensors, which its patcher and GPU kernels use, and oneDNN on a CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import comfy.utils
import torch
from torch import Tensor, nn

from ...wuerstchen_core.checkpoints import Part
from ...wuerstchen_core.checkpoints.lazy import lazy_state
from ...wuerstchen_core.checkpoints.quant import CONFIG, SCALE, int8_entries
from ...wuerstchen_core.common.devices import has_int8
from ...wuerstchen_core.kernels.int8 import PackedWeight
from ...wuerstchen_core.models.layers import TimestepBlock

try:
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
except ImportError:  # ComfyUI 0.3.64
    QUANT_ALGOS, QuantizedTensor = {}, ()

FORMAT = "int8_tensorwise"
# Without comfy-kitchen, ComfyUI has the format but an empty class.
SUPPORTED = FORMAT in QUANT_ALGOS and issubclass(QuantizedTensor, Tensor)
QUANTISATION = (f".{SCALE}", f".{CONFIG}")  # endings of a state dict's keys that are no parameters


def check_supported(device: torch.device) -> None:
    """Raises ValueError if this ComfyUI has no layers in int8, or the device no product for them."""
    if not SUPPORTED:
        raise ValueError("weight_dtype int8 needs a ComfyUI of 2026: update ComfyUI, or choose another weight_dtype")
    if device.type == "mps":
        raise ValueError("weight_dtype int8 does not run on Apple's GPUs: choose another weight_dtype")


def keeps_int8(part: Part, device: torch.device) -> bool:
    """True if a part is stored in int8, in which ComfyUI and this device compute fast."""
    return SUPPORTED and _is_fast(device) and any(map(_stored_in_int8, part.state_dict.values()))


def _is_fast(device: torch.device) -> bool:
    """True if a device has instructions for products of int8, and ComfyUI or this pack uses them."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (7, 5)  # Turing, or ROCm
    return device.type == "cpu" and has_int8()


def _stored_in_int8(x: Any) -> bool:
    stored = getattr(x, "quantised", None)
    return stored is not None and stored.config["format"] == FORMAT


def quantised(
    network: nn.Module, weights: dict[str, Any], dtype: torch.dtype, device: torch.device, only_stored: bool
) -> dict[str, Any]:
    """Returns a state dict in ComfyUI's form: the linear layers in int8 and the rest in `dtype`.

    With `only_stored`, the linear layers in int8 are those that the file has in int8. For GPUs, weights are rotated
    (ConvRot), as ComfyUI's kernels expect; oneDNN takes them unrotated.
    """
    names = {
        f"{path}.{name}.weight"
        for path, parent in network.named_modules()
        for name, layer in parent.named_children()
        if isinstance(layer, Int8Layer) and not isinstance(parent, TimestepBlock)
    }
    state: dict[str, Any] = {}
    for key, x in lazy_state(weights).items():
        if key in names and (_stored_in_int8(x) or not only_stored):
            state |= int8_entries(key, x, rotated=device.type != "cpu")
        else:
            state[key] = x.load().to(dtype)
    return state


def dequantised(weight: Tensor) -> Tensor:
    """Returns a weight as a plain tensor."""
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight


class Int8Layer:
    """Mixin for ComfyUI's quantised linear layers."""

    weight: Any
    bias: Any
    weight_function: list[Any]
    bias_function: list[Any]
    _cache: _Cache | None = None

    def set_weight(
        self, weight: Tensor, inplace_update: bool = False, return_weight: bool = False, **kwargs: Any
    ) -> Any:
        """Takes a patched weight [c_out, c_in], which is rounded to the nearest numbers in int8."""
        if not _is_int8(self.weight):
            return super().set_weight(weight, return_weight=return_weight, **kwargs)  # type: ignore[misc]
        out = self.weight.requantize_from_float(weight, scale="recalculate").to(self.weight.dtype)
        if return_weight:
            return out
        self.weight = nn.Parameter(out, requires_grad=False)
        return None

    def packed(self, columns: int | None = None) -> PackedWeight | None:
        """Returns the weight with its first `columns` (default: all) in oneDNN's order, packed until it is patched.

        None where ComfyUI computes: with rotated weights, or patches that apply at each call.
        """
        weight = self.weight
        if not _is_int8(weight) or self.weight_function or self.bias_function:
            return None
        values, scale = weight._qdata, weight._params.scale
        if weight._params.convrot or scale.shape != (len(values), 1):
            return None
        columns = values.shape[1] if columns is None else columns
        key = columns, values.data_ptr(), 0 if values.is_inference() else values._version
        vectors = [x for x in (scale, self.bias) if x is not None]
        cache = self._cache
        if cache is None or key != cache.key or not all(map(torch.equal, vectors, cache.vectors)):
            packed = PackedWeight(values, scale, self.bias, columns)
            cache = self._cache = _Cache(packed, key, [x.clone() for x in vectors], values)
        return cache.packed

    def __getstate__(self) -> dict[str, Any]:  # for copies
        return {**vars(self), "_cache": None}


class _Cache(NamedTuple):
    """A packed weight and the numbers that it was made from, which threads must see together.

    Tensors of inference mode do not count their changes, so the scale and the bias are compared.
    """

    packed: PackedWeight
    key: tuple[Any, ...]
    vectors: list[Tensor]
    values: Tensor  # kept, since another tensor could get its address


def _is_int8(weight: Any) -> bool:
    return isinstance(weight, QuantizedTensor) and weight._layout_cls == QUANT_ALGOS[FORMAT]["comfy_tensor_layout"]


class Int8Hooks:
    """Mixin for ComfyUI's patchers: weight hooks replace weights in int8 as a whole.

    ComfyUI writes over their numbers, which leaves the scales as they were.
    """

    model: Any
    hook_backup: dict[str, tuple[Tensor, torch.device]]
    cached_hook_patches: dict[Any, dict[str, tuple[Tensor, torch.device]]]

    def patch_hook_weight_to_device(
        self, hooks: Any, combined_patches: Any, key: str, *args: Any, **kwargs: Any
    ) -> None:
        super().patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kwargs)  # type: ignore[misc]
        cached, weight = self.cached_hook_patches.get(hooks, {}), comfy.utils.get_attr(self.model, key)
        if key in cached and _is_int8(weight):
            cached[key] = weight, cached[key][1]

    def patch_cached_hook_weights(self, cached_weights: Any, key: str, memory_counter: Any) -> None:
        weight = comfy.utils.get_attr(self.model, key)
        if not _is_int8(weight):
            return super().patch_cached_hook_weights(cached_weights, key, memory_counter)  # type: ignore[misc]
        self.hook_backup.setdefault(key, (weight, weight.device))
        return self._replace(key, *cached_weights[key])

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        for key, (weight, device) in list(self.hook_backup.items()):
            if _is_int8(weight) and (not whitelist_keys_set or key in whitelist_keys_set):
                self._replace(key, weight, device)
                del self.hook_backup[key]
        super().unpatch_hooks(whitelist_keys_set)  # type: ignore[misc]

    def _replace(self, key: str, weight: Tensor, device: torch.device) -> None:
        comfy.utils.set_attr_param(self.model, key, weight.to(device))
