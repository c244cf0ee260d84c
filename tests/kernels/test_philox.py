import math

import numpy as np
import pytest
import torch

import editr2_kernels as ek
from editr2_kernels.philox import philox_ref

# Known-answer vectors of Random123, philox4x32-10: counter, key, output.
KNOWN = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
SEEDS = [0, 1, -1, 2**40 + 3, -(2**63), 2**63 - 1]


def words(text):
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_known_answers(counter, key, expected):
    assert philox_ref(words(counter), words(key)) == words(expected)


def oracle(seed, step, n):
    """Philox in Python integers, Box-Muller in float64 from the fp32 angle and uniform."""
    out = []
    for j in range((n + 3) // 4):
        c = [j & 0xFFFFFFFF, j >> 32, step & 0xFFFFFFFF, 0]
        k = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [
                (p1 >> 32) ^ c[1] ^ k[0],
                p1 & 0xFFFFFFFF,
                (p0 >> 32) ^ c[3] ^ k[1],
                p0 & 0xFFFFFFFF,
            ]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        for a, b in ((c[0], c[1]), (c[2], c[3])):
            u = float(np.float32(a) * np.float32(2.0**-32) + np.float32(2.0**-33))
            signed = (b - 2**32 if b >= 2**31 else b) >> 8
            theta = float((np.float32(signed) + np.float32(0.5)) * np.float32(math.pi * 2.0**-23))
            radius = math.sqrt(-2.0 * math.log(u))
            out += [radius * math.cos(theta), radius * math.sin(theta)]
    return torch.tensor(out[:n], dtype=torch.float64)


@pytest.mark.parametrize("step", [0, 13, -1, 2**31 - 1])
def test_against_oracle(backend, step):
    z = ek.philox_normal(torch.tensor(SEEDS), step, (203,), backend=backend)
    expected = torch.stack([oracle(seed, step, 203) for seed in SEEDS])
    assert (
        z.double() - expected
    ).abs().max() <= 1e-6  # a few units in the last place of values up to 6.8


def test_same_bits_on_every_backend(backend):
    seed, step = torch.tensor(SEEDS), torch.arange(len(SEEDS)) - 2
    z = ek.philox_normal(seed, step, (2053,), backend=backend)
    assert torch.equal(z, ek.philox_normal_ref(seed, step, 2053))


def test_moments():
    n = 1 << 18
    z = ek.philox_normal(torch.arange(8), 0, (n,)).double()
    error = 1 / math.sqrt(
        z.numel()
    )  # of the mean; the others follow from the variances 2, 15, 96 of z^2, z^3, z^4
    assert abs(z.mean()) < 5 * error
    assert abs((z**2).mean() - 1) < 5 * math.sqrt(2) * error
    assert abs((z**3).mean()) < 5 * math.sqrt(15) * error
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96) * error
    lag = (z[:, :-1] * z[:, 1:]).mean()
    assert abs(lag) < 5 * error
    assert abs(torch.corrcoef(z) - torch.eye(8)).max() < 5 / math.sqrt(n)
    steps = torch.stack(
        [ek.philox_normal(torch.tensor([7]), s, (n,))[0] for s in range(4)]
    ).double()
    assert abs(torch.corrcoef(steps) - torch.eye(4)).max() < 5 / math.sqrt(n)


def test_sample_depends_on_its_own_seed_and_elements_only(backend, one_thread, two_threads):
    seed, step = torch.tensor(SEEDS), torch.arange(len(SEEDS))
    shape = (
        (3, 41, 60) if backend in ("ref", "cpu") else (3, 41, 9)
    )  # the first has the elements of two threads
    z = two_threads(lambda: ek.philox_normal(seed, step, shape, backend=backend))
    assert z.shape == (len(SEEDS), *shape)
    assert torch.equal(z, ek.philox_normal(seed, step, shape, backend=backend))
    assert torch.equal(z[2:3], ek.philox_normal(seed[2:3], step[2:3], shape, backend=backend))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(z[order], ek.philox_normal(seed[order], step[order], shape, backend=backend))
    assert torch.equal(z.flatten(1)[:, :100], ek.philox_normal(seed, step, (100,), backend=backend))
    assert torch.equal(z, one_thread(lambda: ek.philox_normal(seed, step, shape, backend=backend)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_empty(backend, dtype, skip_interpreted_bf16):
    skip_interpreted_bf16(dtype)
    seed = torch.tensor([5, 6])
    z = ek.philox_normal(seed, 1, (37,), backend=backend)
    assert torch.equal(ek.philox_normal(seed, 1, (37,), dtype=dtype, backend=backend), z.to(dtype))
    assert ek.philox_normal(seed[:0], 1, (37,), dtype=dtype, backend=backend).shape == (0, 37)
    assert ek.philox_normal(seed, 1, (0,), dtype=dtype, backend=backend).shape == (2, 0)


def test_errors_name_the_argument():
    seed = torch.tensor([1, 2])
    for error, name, call in [
        (TypeError, "seed", lambda: ek.philox_normal(seed.float(), 0, (4,))),
        (ValueError, "seed", lambda: ek.philox_normal(seed[None], 0, (4,))),
        (ValueError, "step", lambda: ek.philox_normal(seed, seed[:1], (4,))),
        (TypeError, "step", lambda: ek.philox_normal(seed, 0.5, (4,))),
        (TypeError, "dtype", lambda: ek.philox_normal(seed, 0, (4,), dtype=torch.float64)),
        (TypeError, "^shape must be a sequence", lambda: ek.philox_normal(seed, 0, 4)),
        (ValueError, "shape", lambda: ek.philox_normal(seed, 0, (-4,))),
        (ValueError, "backend", lambda: ek.philox_normal(seed, 0, (4,), backend="gpu")),
    ]:
        with pytest.raises(error, match=name):
            call()
