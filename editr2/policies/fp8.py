"""Frozen linear layers whose weights are float8 numbers (e4m3), each row with a scale of its own.

The same layers run in the rollout and in training, so the policy that is trained is the one that
sampled. Which: the transformer blocks' attention and MLP (`lora_targets`), which are nearly all of
the arithmetic and most of the weights. Embedders, norms with the modulation that they apply, and
the final layer stay as they are, as in diffusers' own storage in float8: they see a handful of
vectors a sample, so nothing is gained, and what they get wrong reaches every token.

On a CUDA device of compute capability 8.9 or above, computing in bfloat16, the activations are
brought to float8 too, token by token, and the product is torch's `_scaled_mm` (the one name that
torch 2.9 to 2.13 share). A token's row does not depend on what else is in the batch. Elsewhere the
product is that of the dequantised weights. The backward pass hands on the gradient of the input by
the dequantised weights, in the computing dtype; the weights have none.

Scales are powers of two: bringing numbers to float8 rounds once and dequantising is exact, also in
bfloat16, so every path uses the same weights to the last bit, and the error is not larger (float8
rounds relative to the number).

Why not torchao (0.18): its product of float8 by float8 has no derivative and refuses a CPU; its
weight-only layers multiply in bfloat16; its float8 training keeps bfloat16 weights.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from editr2.policies.base import autocast_dtype

FLOAT8 = torch.float8_e4m3fn
"""Numbers up to 448."""
SMALLEST = 2.0**-90
"""Of a row's largest number, so that a row of zeros has a scale, too."""
MULTIPLE = 16
"""Of both widths of a layer that `_scaled_mm` takes on a GPU."""
CAPABILITY = (8, 9)
"""The first with float8 products."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> float8 [M, K] and the scales that bring it back, float32 [M, 1]: of each row the
    smallest power of two that fits its largest number. Exact but for the one rounding to float8, so
    of the same bits on every device. A row with NaN or infinity has the scale NaN."""
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    largest = torch.maximum(high, -low).float()
    bits = largest.clamp_min(SMALLEST).view(torch.int32)
    # Adding this carries into the exponent exactly where the number is above 1.75 times a power of
    # two; 448 is 1.75 times 2^8.
    scale = (((bits + 0x1FFFFF) >> 23 << 23) - (8 << 23)).view(torch.float32)
    scale = scale + 0 * largest  # which the cast to float8 may hide
    return (x / scale.to(x.dtype)).to(FLOAT8), scale


def dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Exact in float32 and bfloat16."""
    return weight.to(dtype) * scale.to(dtype)


class _Product(torch.autograd.Function):
    """x W^T + bias, differentiable in x alone. It keeps nothing but the float8 weights for the
    backward pass, where a product of dequantised ones would keep those."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, in_float8: bool
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        bias = None if bias is None else bias.to(x.dtype)
        if not in_float8:
            return nn.functional.linear(x, dequantized(weight, scale, x.dtype), bias)
        tokens, scales = quantize_rows(x.reshape(-1, x.shape[-1]))
        product = torch._scaled_mm(
            tokens,
            weight.t(),
            scale_a=scales,
            scale_b=scale.t(),
            bias=bias,
            out_dtype=x.dtype,
            use_fast_accum=True,  # of less weight than the rounding to float8
        )
        return product.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        weight, scale = ctx.saved_tensors
        return grad @ dequantized(weight, scale, grad.dtype), None, None, None, None


class Float8Linear(nn.Linear):
    """A frozen linear layer. weight: float8 [N, K]. weight_scale: float32 [N, 1]. bias: as it was.
    in_float8: whether products in bfloat16 are computed in float8; None: where the device has
    them."""

    weight_scale: nn.Parameter
    in_float8: bool | None = None

    def __init__(self, layer: nn.Linear) -> None:
        """Of the weights of `layer`, which it does not keep."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        home = layer.weight.device
        # The same bits on any device, and a thousand times faster on a GPU.
        fast = torch.accelerator.current_accelerator(check_available=True) or home
        values = layer.weight.detach().to(home if home.type == "meta" else fast)
        self.weight, self.weight_scale = (
            nn.Parameter(t.to(home), requires_grad=False) for t in quantize_rows(values)
        )
        self.bias = layer.bias
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], in autocast's dtype where it is on."""
        if (dtype := autocast_dtype(x.device)) is not None:
            x = x.to(dtype)
        in_float8 = (
            x.dtype == torch.bfloat16
            and self.in_features % MULTIPLE == self.out_features % MULTIPLE == 0
            and (has_float8(x.device) if self.in_float8 is None else self.in_float8)
        )
        return _Product.apply(x, self.weight, self.weight_scale, self.bias, in_float8)


@torch.compiler.assume_constant_result
def has_float8(device: torch.device) -> bool:
    """Whether it multiplies float8 numbers in the format stored here."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= CAPABILITY


def quantize_linears(module: nn.Module, targets: str) -> list[Float8Linear]:
    """Puts a `Float8Linear` in the place of every linear layer whose name, without adapters, the
    expression matches: one by one, so that no second copy of the weights is alive. Adapters stay
    where they are. Returns the new layers.

    It comes after adapters are put on: peft gives fresh ones the dtype of the layer below."""
    found = []
    for name, layer in list(module.named_modules()):
        if type(layer) is nn.Linear and re.fullmatch(targets, name.removesuffix(".base_layer")):
            module.set_submodule(name, made := Float8Linear(layer))
            found.append(made)
            layer.weight = None  # type: ignore[assignment]  # whoever still has the old layer
    return found
