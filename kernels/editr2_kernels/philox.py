"""Counter-based normal noise: the same seed, step and element give the same number everywhere.

    key     = the sample's 64-bit seed (low word key0, high word key1)
    counter = (j mod 2^32, j div 2^32, step as uint32, 0),   j = element div 4
    r0..r3  = Philox4x32-10(counter, key)                    -> elements 4j .. 4j+3
    (r_a, r_b) = (r0, r1), (r2, r3)
    u = r_a 2^-32 + 2^-33,          theta = (int32(r_b) >> 8 + 1/2) pi 2^-23
    z_a = sqrt(-2 ln u) cos(theta),  z_b = sqrt(-2 ln u) sin(theta)

u is in (0, 1], so no value is infinite; the largest |z| is sqrt(-2 ln 2^-33) = 6.76. ln, sin and
cos are written out (the polynomials of Cephes, fp32, every product and sum rounded on its own) and
the square root is correctly rounded: library functions differ between machines, and PyTorch's even
between positions in one tensor, while this gives identical bits on every backend, in every batch.
Against exact arithmetic the error stays below 1e-6.

Sources: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); Box and Muller
(1958).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks
from ._operator import operator
from .backends import compiled, pointer, select, strided
from .numerics import sqrt_ref

_LOW32 = 0xFFFFFFFF
INITIAL_STEP = -1  # by convention the initial latents are the noise of this step


def philox_ref(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Philox4x32-10 on words held in int64 (values 0 .. 2^32-1), any broadcastable shapes."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product of two 32-bit words may wrap in int64; its bits are right all the same.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _LOW32) ^ c1 ^ k0,
            p1 & _LOW32,
            ((p0 >> 32) & _LOW32) ^ c3 ^ k1,
            p0 & _LOW32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _LOW32, (k1 + 0xBB67AE85) & _LOW32
    return c0, c1, c2, c3


def _log_unit(u: Tensor) -> Tensor:
    """ln u, 2^-33 <= u <= 1: u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); e ln 2 in two
    parts, one exact."""
    bits = u.view(torch.int32)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).view(torch.float32) - 1.0
    exponent = e.to(torch.float32)
    f2 = f * f
    p = f * 7.0376836292e-2 - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    tail = p * (f * f2)
    tail = tail + exponent * -2.12194440e-4
    tail = tail - 0.5 * f2
    return (f + tail) + exponent * 0.693359375


def _cos_sin(k: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of float32((k + 1/2) pi 2^-23); k's bits give the quadrant q, so that q pi/2 is
    taken off exactly."""
    theta = (k.to(torch.float32) + 0.5) * (math.pi * 2.0**-23)
    q = (k + (1 << 21)) >> 22
    quadrant = q.to(torch.float32)
    r = (theta - quadrant * 1.57079637) + quadrant * 4.37113883e-8
    r2 = r * r
    s = r2 * -1.9515295891e-4 + 8.3321608736e-3
    s = s * r2 - 1.6666654611e-1
    s = r + r * (r2 * s)
    c = r2 * 2.443315711809948e-5 - 1.388731625493765e-3
    c = c * r2 + 4.166664568298827e-2
    c = (1.0 - 0.5 * r2) + (r2 * r2) * c
    odd = (q & 1) != 0
    cosine, sine = torch.where(odd, s, c), torch.where(odd, c, s)
    return torch.where(((q + 1) & 2) != 0, -cosine, cosine), torch.where((q & 2) != 0, -sine, sine)


def _normal_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    u = a.to(torch.float32) * 2.0**-32 + 2.0**-33
    cosine, sine = _cos_sin(torch.where(b >= 2**31, b - 2**32, b) >> 8)
    radius = sqrt_ref(_log_unit(u) * -2.0)
    return radius * cosine, radius * sine


def philox_normal_ref(seed: Tensor, step: Tensor, n: int) -> Tensor:
    """[B] seeds and steps -> [B, n] fp32 normals."""
    j = torch.arange((n + 3) // 4, device=seed.device, dtype=torch.int64)[None, :]
    counter = (j & _LOW32, j >> 32, (step & _LOW32)[:, None], torch.zeros_like(j))
    r = philox_ref(counter, ((seed & _LOW32)[:, None], ((seed >> 32) & _LOW32)[:, None]))
    z = torch.stack((*_normal_pair(r[0], r[1]), *_normal_pair(r[2], r[3])), dim=-1)
    return z.flatten(1)[:, :n]


def _fake_philox_normal(
    seed: Tensor, step: Tensor, n: int, dtype: torch.dtype, backend: str
) -> Tensor:
    return torch.empty(seed.shape[0], n, dtype=dtype, device=seed.device)


@operator(
    "philox_normal",
    "(Tensor seed, Tensor step, SymInt n, ScalarType dtype, str backend) -> Tensor",
    fake=_fake_philox_normal,
)
def _philox_normal(seed: Tensor, step: Tensor, n: int, dtype: torch.dtype, backend: str) -> Tensor:
    chosen = select(backend, seed.device)
    if chosen == "ref":
        return philox_normal_ref(seed, step, n).to(dtype)
    seed, step = seed.contiguous(), step.contiguous()
    out = torch.empty(seed.shape[0], n, dtype=dtype, device=seed.device)
    if out.numel() == 0:
        return out
    if chosen == "triton":
        from . import triton_kernels

        triton_kernels.philox_normal(seed, step, out)
    else:
        module, where = compiled(chosen, seed)
        batch, _ = out.shape
        module.philox_normal(
            seed=pointer(seed), step=pointer(step), out=strided(out), B=batch, N=n, **where
        )
    return out


def philox_normal(
    seed: Tensor,
    step: int | Tensor,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Standard normal noise of given seeds at a given step.

    Args:
        seed: [B] int64, one key a sample.
        step: int, or [B] int64. Initial latents by convention use step -1, sampler steps their step
            index.
        shape: shape of one sample, without the batch dimension.
        dtype: float32, bfloat16 or float16; the fp32 normal is rounded once.
        backend: None picks one; a name is used or raises RuntimeError.

    Returns:
        [B, *shape] on the device of `seed`. Sample b depends on seed[b], step[b] and the element
        index only.
    """
    _checks.tensor("seed", seed)
    _checks.per_sample("seed", seed, seed.shape[0] if seed.dim() == 1 else -1, "seed", seed)
    if isinstance(step, int):
        step = torch.full_like(seed, step)
    _checks.per_sample("step", step, seed.shape[0], "seed", seed)
    _checks.float_dtype("dtype", dtype)
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"shape must be a sequence of sizes, got {type(shape).__name__}")
    n = math.prod(shape)
    if n < 0 or any(size < 0 for size in shape):
        raise ValueError(f"shape must hold sizes >= 0, got {list(shape)}")
    out = _philox_normal(seed, step, n, dtype, _checks.backend_name(backend))
    return out.view(seed.shape[0], *shape)
