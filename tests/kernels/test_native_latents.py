"""The native operators on latents, called directly: instruction sets, threads and tails bitwise,
values by float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from editr2_kernels import flow_sigmas, transition_table
from editr2_kernels.backends import pointer, strided

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [
    1,
    15,
    64,
    4096,
    4097,
    3 * 4096 + 37,
]  # vectors, blocks of 64 and tiles of 4096, whole and cut
RENORMS = ["none", "token", "text_channel", "channel", "global"]
BATCH = 7
HALF_ULP = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}


@pytest.fixture
def native() -> Iterator[Any]:
    module = pytest.importorskip("editr2_kernels._native")
    best = module.isa()
    yield module
    module.set_isa(best)


def table(second_order: bool = False) -> Tensor:
    rows = transition_table(
        flow_sigmas(6, 3.0), noise_level=0.7, window=(0, 5)
    )  # the last row is deterministic
    if second_order:
        rows[1:, 2] = torch.linspace(-0.3, 0.4, 5)
    return rows


def steps(batch: int) -> Tensor:
    return torch.arange(batch) % 6


def seeds(batch: int) -> Tensor:
    return torch.arange(batch) * 0x1234567890ABCD - 3


def weights(batch: int) -> Tensor:
    """Text and image weight, low and high sigma: both, one, none, outside the interval."""
    kinds = [
        (4.0, 2.0, -1.0, 2.0),
        (3.0, 1.0, 0.0, 1.0),
        (1.0, 1.5, 0.0, 1.0),
        (1.0, 1.0, 0.0, 1.0),
        (4.0, 2.0, 2, 3),
    ]
    return torch.tensor([kinds[b % len(kinds)] for b in range(batch)])


def normal(batch: int, n: int, *dtypes: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(batch, n, generator=generator).to(dtype) for dtype in dtypes]


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int32 if t.element_size() == 4 else torch.int16)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


class Calls:
    """The functions of the module on one set of latents."""

    def __init__(self, native: Any, x: Tensor, v: Tensor, threads: int = 2, renorm: str = "none",
    width: int = 1,
                 second_order: bool = False, **tensors: Tensor | None) -> None:  # fmt: skip
        self.native, self.x, self.v, self.tensors = native, x, v, tensors
        self.batch, self.n = x.shape
        self.table, self.index, self.seed = (
            table(second_order),
            steps(self.batch),
            seeds(self.batch),
        )
        self.sizes = {"workspace": 0, "B": self.batch, "N": self.n, "threads": threads}
        self.latents = {
            "x": strided(x),
            "v": strided(v),
            "m_prev": self.rows("m_prev"),
            "v_uncond": self.rows("v_uncond"),
            "v_uncond_image": self.rows("v_uncond_image"),
            "guidance": pointer(tensors.get("guidance")),
            "renorm": RENORMS.index(renorm),
            "width": width,
            "table": pointer(self.table),
            "rows": len(self.table),
            "step_index": pointer(self.index),
        } | self.sizes

    def rows(self, name: str) -> tuple[int, int, int]:
        return strided(self.tensors.get(name))

    def step(self, dtype: torch.dtype = torch.float32, score_stored: bool = True) -> list[Tensor]:
        """x_next, log_prob, x0."""
        x_next, x0 = (poisoned(self.batch, self.n, dtype=dtype) for _ in range(2))
        log_prob = poisoned(self.batch)
        self.native.sde_step(
            **self.latents,
            noise=self.rows("noise"),
            seed=pointer(self.seed),
            x_next=strided(x_next),
            x0=strided(x0),
            log_prob=pointer(log_prob),
            score_stored=score_stored,
        )
        return [x_next, log_prob, x0]

    def replay(self, x_next: Tensor) -> list[Tensor]:
        """log_prob and the mean difference."""
        log_prob, mean_diff = poisoned(self.batch), poisoned(self.batch)
        self.native.sde_log_prob(
            **self.latents,
            x_next=strided(x_next),
            v_ref=self.rows("v_ref"),
            log_prob=pointer(log_prob),
            mean_diff=pointer(mean_diff),
        )
        return [log_prob, mean_diff]

    def grpo(self, x_next: Tensor, old: Tensor, advantage: Tensor, mask: Tensor | None = None,
             **options: Any) -> list[Tensor]:  # fmt: skip
        """loss, log_prob, ratio, kl, metrics, factors."""
        out = [
            poisoned(1),
            *(poisoned(self.batch) for _ in range(3)),
            poisoned(8),
            poisoned(self.batch, 3),
        ]
        defaults = dict(
            clip_low=0.1,
            clip_high=0.2,
            advantage_clip=1.5,
            kl_weight=0.3,
            kl_scale=0,
            guard=False,
            normalizer=0.0,
        )
        self.native.grpo_loss(
            **self.latents,
            x_next=strided(x_next),
            v_ref=self.rows("v_ref"),
            v_old=self.rows("v_old"),
            old_log_prob=pointer(old),
            advantage=pointer(advantage),
            mask=pointer(mask),
            **(defaults | options),
            **dict(
                zip(("loss", "log_prob", "ratio", "kl", "metrics", "factors"), map(pointer, out))
            ),
        )
        return out

    def backward(self, x_next: Tensor, factors: Tensor | None = None, scale: Tensor | None = None,
                 grad_log_prob: Tensor | None = None,
                 grad_mean_diff: Tensor | None = None) -> list[Tensor]:  # fmt: skip
        """The gradients to v and to the unguided branches there are."""
        names = [
            "v",
            *(
                name
                for name in ("v_uncond", "v_uncond_image")
                if self.tensors.get(name) is not None
            ),
        ]
        grads = {name: poisoned(self.batch, self.n, dtype=self.v.dtype) for name in names}
        self.native.replay_backward(
            **self.latents,
            x_next=strided(x_next),
            v_ref=self.rows("v_ref"),
            v_old=self.rows("v_old"),
            factors=pointer(factors),
            scale=pointer(scale),
            grad_log_prob=pointer(grad_log_prob),
            grad_mean_diff=pointer(grad_mean_diff),
            **{
                f"grad_{name}": strided(grads.get(name))
                for name in ("v", "v_uncond", "v_uncond_image")
            },
        )
        return list(grads.values())


def nft(
    native: Any,
    x0: Tensor,
    noise: Tensor,
    v: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    sigma: Tensor,
    r: Tensor,
    mask: Tensor | None = None,
    threads: int = 2,
    scale: Tensor | None = None,
    **options: float,
) -> list[Tensor]:
    """loss, metrics, factors and the gradient to v."""
    batch, n = x0.shape
    loss, metrics, factors, grad = (
        poisoned(1),
        poisoned(5),
        poisoned(batch, 3),
        poisoned(batch, n, dtype=v.dtype),
    )
    latents = dict(
        x0=strided(x0),
        noise=strided(noise),
        v=strided(v),
        v_old=strided(v_old),
        v_ref=strided(v_ref),
        beta=0.7,
        workspace=0,
        B=batch,
        N=n,
        threads=threads,
    )
    defaults = dict(advantage_max=5.0, ref_weight=0.2, min_weight=1e-5, normalizer=0.0)
    native.nft_loss(
        **latents,
        sigma=pointer(sigma),
        r=pointer(r),
        mask=pointer(mask),
        loss=pointer(loss),
        metrics=pointer(metrics),
        factors=pointer(factors),
        **(defaults | options),
    )
    native.nft_loss_backward(
        **latents, factors=pointer(factors), scale=pointer(scale), grad_v=strided(grad)
    )
    return [loss, metrics, factors, grad]


def on_every_isa(native: Any, run: Any) -> list[Tensor]:
    results: list[list[Tensor]] = []
    for isa in native.supported_isas():
        native.set_isa(isa)
        results.append(run())
        assert same(results[0], results[-1]), f"{isa} differs from {native.supported_isas()[0]}"
    return results[0]


def close(got: Tensor, expected: Tensor, scale: float) -> None:
    """`scale` relative to the largest value, as sums cancel, plus the rounding of each to its
    storage dtype."""
    floor = scale * max(expected.abs().max().item(), 1e-30) + (
        2**-24 if got.dtype == torch.float16 else 0
    )
    rounding = HALF_ULP[got.dtype] if got.dtype != torch.float32 else 0
    torch.testing.assert_close(got.double(), expected.detach(), rtol=2 * rounding, atol=floor)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("v_dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_step_and_replay(
    native: Any, x_dtype: torch.dtype, v_dtype: torch.dtype, out_dtype: torch.dtype, n: int
) -> None:
    x, v, v_ref, noise = normal(BATCH, n, x_dtype, v_dtype, x_dtype, v_dtype)
    row = table()[steps(BATCH)][:, :, None]
    mu = row[:, 0] * x.float() + row[:, 1] * v.float()
    expected = (mu + row[:, 3] * noise.float()).to(out_dtype)
    row, mu = row.double(), mu.double()
    g_lp, g_md = torch.linspace(-1, 1, BATCH), torch.linspace(2, 3, BATCH)

    def run() -> list[Tensor]:
        calls = Calls(native, x, v, noise=noise, v_ref=v_ref)
        x_next, log_prob, x0 = calls.step(out_dtype)
        assert torch.equal(x_next, expected)
        assert torch.equal(x0, (x.float() - row[:, 6].float() * v.float()).to(out_dtype))
        replayed, mean_diff = calls.replay(x_next)
        assert torch.equal(bits(replayed), bits(log_prob)), "replay differs from the step"
        grad = calls.backward(x_next, grad_log_prob=g_lp, grad_mean_diff=g_md)
        calls = Calls(native, x, v)
        sampled = calls.step(out_dtype)
        assert torch.equal(bits(calls.replay(sampled[0])[0]), bits(sampled[1])), (
            "replay differs from the sampled step"
        )
        return [
            x_next,
            log_prob,
            x0,
            mean_diff,
            *grad,
            *sampled,
            *calls.step(out_dtype, score_stored=False),
        ]

    x_next, log_prob, _, mean_diff, grad, *_, unrounded, _ = on_every_isa(native, run)
    z = x_next.double() - mu
    expected = row[:, 4, 0] * (z**2).mean(1) + row[:, 5, 0]
    # fp32 sums of at most 128 squares a lane, then fp64: relative to the larger term, as the two
    # may cancel.
    scale = torch.maximum((expected - row[:, 5, 0]).abs(), row[:, 5, 0].abs()).clamp(min=1e-30)
    assert ((log_prob.double() - expected).abs() / scale).max() <= 1e-6
    difference = row[:, 1] * (v.double() - v_ref.double())
    torch.testing.assert_close(mean_diff.double(), difference.square().mean(1), rtol=1e-6, atol=0)
    expected = (
        -2 * g_lp.double()[:, None] * row[:, 4] * row[:, 1] * z
        + 2 * g_md.double()[:, None] * row[:, 1] * difference
    )
    subnormal = 2**-24 if v_dtype == torch.float16 else 0
    torch.testing.assert_close(
        grad.double(),
        expected / n,
        rtol=2.02 * HALF_ULP[v_dtype],
        atol=expected.abs().max().item() / n * 1e-6 + subnormal,
    )
    if (
        n > 64
    ):  # the unrounded sample's log-prob is that of its own noise; the deterministic row's is c
        noise_squares = (mu + row[:, 3] * sampled_noise(native, n).double() - mu).square().mean(1)
        torch.testing.assert_close(
            unrounded.double(), row[:, 4, 0] * noise_squares + row[:, 5, 0], rtol=1e-5, atol=1e-6
        )


def sampled_noise(native: Any, n: int) -> Tensor:
    noise, seed, step = poisoned(BATCH, n), seeds(BATCH), steps(BATCH)
    native.philox_normal(
        seed=pointer(seed), step=pointer(step), out=strided(noise), B=BATCH, N=n, threads=1
    )
    return noise


def guided(branches: list[Tensor], entry: Tensor, sigma: Tensor, renorm: str, width: int) -> Tensor:
    """The formula of guidance.h in float64, sample by sample; branches: v, v_uncond,
    v_uncond_image."""
    v, out = branches[0], []
    for b in range(len(v)):
        text, image, low, high = entry[b].tolist()
        rows = [
            t[b].reshape(
                1 if renorm == "global" else -1, v.shape[1] if renorm == "global" else width
            )
            for t in branches
        ]
        if not low < sigma[b] <= high or (text == 1 and image == 1):
            out.append(v[b])
            continue

        def scaled(w: Tensor, v_rows: Tensor = rows[0]) -> Tensor:
            v_norm, w_norm = v_rows.norm(dim=1, keepdim=True), w.norm(dim=1, keepdim=True)
            return w * (
                v_norm / w_norm if renorm == "token" else (v_norm / (w_norm + 1e-8)).clamp(max=1)
            )

        u = rows[1] + text * (rows[0] - rows[1])
        if renorm == "text_channel":
            u = scaled(u)
        u = rows[2] + image * (u - rows[2])
        if renorm in ("token", "channel", "global"):
            u = scaled(u)
        out.append(u.reshape(-1))
    return torch.stack(out)


@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize(
    "width, n", [(64, 9600), (37, 300 * 37), (1, 130), (4096, 8192), (5001, 15003), (8192, 8192)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_guidance(native: Any, renorm: str, width: int, n: int, dtype: torch.dtype) -> None:
    batch = 10
    x, v, uncond, uncond_image, v_ref, v_old, m_prev = normal(
        batch, n, torch.float32, *[dtype] * 5, torch.float32
    )
    guidance = weights(batch)
    factors = (
        torch.tensor([[0.3, 0.2, -0.4]]).repeat(batch, 1) + torch.arange(batch)[:, None] * 0.01
    )
    factors[5] = torch.tensor([0.0, 0.5, 0.0])
    factors[6] = 0.0

    def run(threads: int = 2, take: slice = slice(None)) -> list[Tensor]:
        tensors = dict(
            v_uncond=uncond,
            v_uncond_image=uncond_image,
            v_ref=v_ref,
            v_old=v_old,
            m_prev=m_prev,
            guidance=guidance,
        )
        calls = Calls(
            native,
            x[take],
            v[take],
            threads,
            renorm,
            width,
            True,
            **{k: t[take] for k, t in tensors.items()},
        )
        sampled = calls.step()
        replayed = calls.replay(sampled[0])
        assert torch.equal(bits(replayed[0]), bits(sampled[1])), "replay differs from the step"
        return [
            *sampled,
            replayed[1],
            *calls.backward(sampled[0], factors=factors[take], scale=torch.tensor([0.5])),
        ]

    results = on_every_isa(native, run)
    assert same(results, run(threads=1)) and same([t[:3] for t in results], run(take=slice(3)))
    x_next, log_prob, x0, mean_diff, *grads = results
    branches = [t.double().requires_grad_() for t in (v, uncond, uncond_image)]
    row = table(True)[steps(batch)].double()[:, :, None]
    u = guided(branches, guidance, row[:, 6, 0], renorm, width)
    mu = row[:, 0] * x.double() + row[:, 1] * u + row[:, 2] * m_prev.double()
    if renorm == "none":  # the same bits as eager
        text, image = guidance[:, :1], guidance[:, 1:2]
        eager = torch.where(
            text == 1, v.float(), uncond.float() + (v.float() - uncond.float()) * text
        )
        eager = torch.where(
            image == 1, eager, uncond_image.float() + (eager - uncond_image.float()) * image
        )
        inside = (row[:, 6] > guidance[:, 2:3]) & (row[:, 6] <= guidance[:, 3:])
        eager = torch.where(inside, eager, v.float())
        single = row.float()
        eager_mu = single[:, 0] * x + single[:, 1] * eager + single[:, 2] * m_prev
        noise, seed, step = poisoned(batch, n), seeds(batch), steps(batch)
        native.philox_normal(
            seed=pointer(seed), step=pointer(step), out=strided(noise), B=batch, N=n, threads=1
        )
        assert torch.equal(x_next, eager_mu + single[:, 3] * noise)
        assert torch.equal(x0, x - single[:, 6] * eager)
    z = x_next.double() - mu
    close(x0, x.double() - row[:, 6] * u, 1e-6)
    close(log_prob, row[:, 4, 0] * (z**2).mean(1) + row[:, 5, 0], 1e-5)
    close(mean_diff, (row[:, 1] * (u - v_ref.double())).square().mean(1), 1e-5)
    f = 0.5 * factors.double()[:, :, None]
    g = f[:, 0] * z + f[:, 1] * (u - v_ref.double()) + f[:, 2] * (u - v_old.double())
    expected = torch.autograd.grad(u, branches, g.detach())
    for name, got, want in zip(("v", "v_uncond", "v_uncond_image"), grads, expected, strict=True):
        for b in range(
            batch
        ):  # against the gradient to u times the weights, as its parts may cancel
            torch.testing.assert_close(
                got[b].double(),
                want[b],
                rtol=2 * HALF_ULP[dtype],
                atol=1e-5 * g[b].abs().max().item(),
                msg=f"gradient to {name}, sample {b}",
            )
    assert all((grad[6] == 0).all() for grad in grads)


@pytest.mark.parametrize("renorm", ["none", "token", "channel"])
def test_factors_of_zero_read_nothing_and_write_zeros(native: Any, renorm: str) -> None:
    n = 5000
    x, v, uncond, v_ref = (torch.full((2, n), torch.nan) for _ in range(4))
    guidance = weights(2)
    guidance[:, 1] = 1.0
    calls = Calls(
        native,
        x,
        v,
        renorm=renorm,
        width=50 if renorm == "token" else n,
        v_uncond=uncond,
        v_ref=v_ref,
        guidance=guidance,
    )
    for scale in (None, torch.tensor([torch.inf])):
        for grad in calls.backward(x, factors=torch.zeros(2, 3), scale=scale):
            assert torch.equal(bits(grad), torch.zeros(2, n, dtype=torch.int32))
    for grad in calls.backward(x):  # no gradient arrives at either result
        assert torch.equal(grad, torch.zeros(2, n))


@pytest.mark.parametrize("n", [37, 5 * 4096 + 11])
@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("kl_scale", range(4))
def test_grpo_loss(native: Any, n: int, guard: bool, kl_scale: int) -> None:
    x, v, v_ref, v_old = normal(
        BATCH, n, torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16
    )
    calls = Calls(native, x, v, v_ref=v_ref, v_old=v_old)
    x_next, log_prob, _ = calls.step()
    offset = torch.tensor([0.0, -0.05, 0.3, -0.3, 0.15, 0.0, -0.15])
    old, advantage = log_prob + offset, torch.tensor([1.0, -2.0, 0.5, 0.7, -0.4, 1.0, 3.0])
    mask = torch.tensor([1, 1, 1, 1, 1, 0, 1], dtype=torch.uint8)
    old[5] = torch.nan  # masked: must reach neither loss nor metrics

    def run(threads: int = 2, normalizer: float = 0.0) -> list[Tensor]:
        calls = Calls(native, x, v, threads, v_ref=v_ref, v_old=v_old)
        out = calls.grpo(
            x_next, old, advantage, mask, guard=guard, kl_scale=kl_scale, normalizer=normalizer
        )
        return out + calls.backward(x_next, factors=out[-1], scale=torch.tensor([2.0]))

    results = on_every_isa(native, run)
    assert same(results, run(threads=1))
    loss, got_log_prob, ratio, kl, metrics, factors, grad = results
    assert torch.equal(bits(got_log_prob), bits(log_prob))

    row = table()[steps(BATCH)].double()
    u = v.double().requires_grad_()
    mean = lambda t: t.square().mean(1)  # noqa: E731
    z2 = mean(x_next.double() - row[:, :1] * x.double() - row[:, 1:2] * u)
    delta, variance, noisy = row[:, 6] - row[:, 7], 2 * row[:, 3] ** 2, row[:, 3] != 0
    exponent = row[:, 4] * z2 + row[:, 5] - old.double()
    log_ratio = exponent.detach()
    if guard:
        shift = mean(row[:, 1:2] * (u - v_old.double())) / variance
        exponent = torch.where(noisy, (exponent + torch.where(noisy, shift, 0)) * row[:, 3], 0)
    rho, a = exponent.exp(), advantage.double().clamp(-1.5, 1.5)
    policy = torch.maximum(-a * rho, -a * rho.clamp(1 - 0.1, 1 + 0.2)) / (delta if guard else 1)
    ref2 = mean((1 if kl_scale == 3 else row[:, 1:2]) * (u - v_ref.double()))
    factor = {0: 1 / variance, 1: delta / variance, 2: torch.ones(BATCH), 3: torch.ones(BATCH)}[
        kl_scale
    ]
    divergence = torch.where(noisy, factor, factor if kl_scale > 1 else 0) * ref2
    counted = mask.bool()
    total = (policy + 0.3 * divergence)[counted].mean()
    expected = torch.autograd.grad(total, u)[0].nan_to_num() * 2
    rho, policy, divergence = rho.detach(), policy.detach(), divergence.detach()
    close(loss[0], total, 2e-5)
    close(ratio[counted], rho[counted], 2e-6)
    close(kl, divergence, 2e-6)
    rho, log_ratio = rho[counted], log_ratio[counted]
    statistics = [
        rho.mean(),
        (rho - 1).abs().max(),
        (rho < 0.9).double().mean(),
        (rho > 1.2).double().mean(),
        (log_ratio**2 / 2).mean(),
        divergence[counted].mean(),
        policy[counted].mean(),
        0.0,
    ]
    torch.testing.assert_close(
        metrics.double(), torch.tensor(statistics, dtype=torch.double), rtol=2e-5, atol=1e-6
    )
    assert (factors[5] == 0).all() and (grad[5] == 0).all()
    for b in range(BATCH):
        torch.testing.assert_close(
            grad[b].double(), expected[b], rtol=2 * HALF_ULP[torch.bfloat16],
            atol=2e-5 * max(expected[b].abs().max().item(), 1e-30),
        )  # fmt: skip
    weighted = run(normalizer=12.0)
    torch.testing.assert_close(weighted[0], loss * 6 / 12, rtol=1e-6, atol=0)
    torch.testing.assert_close(weighted[5], factors * 6 / 12, rtol=1e-6, atol=0)


def test_grpo_non_finite_and_nothing_counted(native: Any) -> None:
    x, v, v_ref = normal(3, 70, *[torch.float32] * 3)
    calls = Calls(native, x, v, v_ref=v_ref)
    x_next, log_prob, _ = calls.step()
    advantage, mask = torch.ones(3), torch.ones(3, dtype=torch.uint8)
    old = log_prob.clone()
    old[1] = torch.nan
    loss, *_, metrics, _ = calls.grpo(x_next, old, advantage, mask)
    assert loss.isnan() and metrics[7] == 1
    mask[1] = 0
    loss, *_, metrics, _ = calls.grpo(x_next, old, advantage, mask)
    assert loss.isfinite() and metrics[7] == 0
    loss, *_, metrics, factors = calls.grpo(x_next, old, advantage, torch.zeros_like(mask))
    assert loss == 0 and (metrics == 0).all() and (factors == 0).all()


@pytest.mark.parametrize("n", [37, 5 * 4096 + 11])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nft_loss(native: Any, n: int, dtype: torch.dtype) -> None:
    x0, noise, v, v_old, v_ref = normal(5, n, torch.float32, torch.float32, dtype, dtype, dtype)
    sigma, r = torch.linspace(0.2, 1, 5), torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0])
    mask = torch.tensor([1, 1, 0, 1, 1], dtype=torch.uint8)
    x0[2] = torch.nan

    def run(threads: int = 2) -> list[Tensor]:
        return nft(native, x0, noise, v, v_old, v_ref, sigma, r, mask, threads, torch.tensor([0.5]))

    results = on_every_isa(native, run)
    assert same(results, run(threads=1))
    loss, metrics, factors, grad = results
    u, old, t = v.double().requires_grad_(), v_old.double(), sigma.double()[:, None]
    clean = x0.double()
    x_t = (1 - t) * clean + t * noise.double()
    sides = []
    for side in (0.7 * u + 0.3 * old, 1.7 * old - 0.7 * u):
        error = x_t - t * side - clean
        weight = error.detach().abs().mean(1).clamp(min=1e-5)
        sides.append(error.square().mean(1) / weight)
    policy = 5 * (r.double() * sides[0] + (1 - r.double()) * sides[1]) / 0.7
    ref2 = (u - v_ref.double()).square().mean(1)
    counted = mask.bool()
    total = (policy + 0.2 * ref2)[counted].mean()
    expected = torch.autograd.grad(total, u)[0] * 0.5
    close(loss[0], total, 1e-6)
    statistics = torch.stack([t[counted].mean() for t in (policy, *sides, ref2)]).detach()
    close(metrics, torch.cat([statistics, torch.zeros(1)]), 1e-6)
    assert (factors[2] == 0).all() and (grad[2] == 0).all()
    close(grad[counted], expected[counted], 1e-6)
    without = nft(native, x0, noise, v, v_old, None, sigma, r, mask)
    assert without[1][3] == 0 and (without[2][:, 2] == 0).all()
    torch.testing.assert_close(
        without[0].double()[0], policy[counted].mean().detach(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("n", [37, 5 * 4096 + 11])
def test_threads_batch_and_position_change_no_bit(native: Any, n: int) -> None:
    x, v, v_ref = normal(9, n, torch.float32, torch.bfloat16, torch.float32)

    def run(threads: int, size: int = 9) -> list[Tensor]:
        calls = Calls(native, x[:size], v[:size], threads, v_ref=v_ref[:size])
        sampled = calls.step()
        gradient = torch.linspace(-1, 1, 9)[:size]
        return (
            sampled
            + calls.replay(sampled[0])
            + calls.backward(sampled[0], None, None, gradient, gradient + 2)
        )

    for isa in native.supported_isas():
        native.set_isa(isa)
        alone = run(1)
        assert all(same(alone, run(threads)) for threads in (2, 3, 8))
        # Sample b meets the same step and seed as the first b + 1 samples: a shorter batch must not
        # differ.
        assert same([t[:4] for t in alone], run(2, 4))


def test_batch_strides_in_and_out(native: Any) -> None:
    (wide,) = normal(5, 3000, torch.float32)
    x, v = wide[:, 100:1101], wide[:1, 7:1008].expand(5, 1001)
    apart, together = Calls(native, x, v), Calls(native, x.contiguous(), v.contiguous())
    expected = together.step()
    assert same(apart.step(), expected)
    room, log_prob = torch.full((5, 1100), 7.0), poisoned(5)
    apart.native.sde_step(
        **apart.latents,
        noise=strided(None),
        seed=pointer(apart.seed),
        x_next=strided(room[:, 50:1051]),
        x0=strided(None),
        log_prob=pointer(log_prob),
        score_stored=True,
    )
    assert same([room[:, 50:1051], log_prob], expected[:2])
    assert (room[:, :50] == 7).all() and (room[:, 1051:] == 7).all()


BUFFER = torch.zeros(200)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"step": 6}, "step_index: got 6 for sample 1, accepted: 0 <= step_index < 6"),
        ({"step": -1}, "step_index: got -1 for sample 1"),
        ({"x": (BUFFER.data_ptr(), 3, 100)}, "x: got dtype code 3, accepted: 0"),
        ({"v": (BUFFER.data_ptr(), -1, 100)}, "v: got dtype code -1"),
        ({"v": (BUFFER.data_ptr(), 0, -4)}, "v: got batch stride -4"),
        ({"noise": (BUFFER.data_ptr(), 9, 100)}, "noise: got dtype code 9"),
        (
            {"x_next": (BUFFER.data_ptr(), 0, 99)},
            "x_next: got batch stride 99, accepted: a stride >= N",
        ),
        ({"x_next": (0, 0, 0)}, "x_next: got pointer 0"),
        ({"x0": (BUFFER.data_ptr(), 4, 100)}, "x0: got dtype code 4"),
        ({"x": (0, 0, 0)}, "x: got pointer 0"),
        ({"B": -1}, "B: got -1"),
        ({"N": -2}, "N: got -2"),
        ({"rows": -3}, "rows: got -3"),
        ({"threads": 0}, "threads: got 0"),
        ({"seed": 0}, "seed: got pointer 0"),
        ({"table": 0}, "table: got pointer 0"),
        ({"renorm": 5}, "renorm: got 5, accepted: 0 .. 4"),
        ({"renorm": 1, "width": 33}, "width: got 33"),
        ({"renorm": 3, "width": 0}, "width: got 0"),
        ({"v_uncond": (0, 0, 0)}, "v_uncond: got pointer 0"),
        ({"v_uncond_image": (0, 0, 0)}, "v_uncond_image: got pointer 0"),
        ({"m_prev": (0, 0, 0)}, "m_prev: got none"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(
    native: Any, change: dict[str, Any], message: str
) -> None:
    x, v = normal(2, 100, torch.float32, torch.float32)
    calls = Calls(
        native, x, v, second_order=True, m_prev=x, v_uncond=v, v_uncond_image=v, guidance=weights(2)
    )
    calls.index[1] = change.get("step", 1)
    out, log_prob = torch.full((2, 100), 7.0), torch.full((2,), 7.0)
    arguments = calls.latents | dict(
        noise=strided(None), seed=pointer(calls.seed), x_next=strided(out), x0=strided(None),
        log_prob=pointer(log_prob), score_stored=True,
    )  # fmt: skip
    arguments |= {name: value for name, value in change.items() if name != "step"}
    with pytest.raises(ValueError) as error:
        native.sde_step(**arguments)
    assert str(error.value).startswith(message)
    assert (out == 7).all() and (log_prob == 7).all()


def test_missing_velocities_are_named(native: Any) -> None:
    x, v = normal(2, 100, torch.float32, torch.float32)
    calls = Calls(native, x, v)
    scores, factors = torch.zeros(2), torch.tensor([[1.0, 0, 0], [1, 0.5, 0]])
    with pytest.raises(ValueError, match="v_old: got pointer 0"):
        calls.grpo(x, scores, scores, guard=True)
    with pytest.raises(ValueError, match="kl_scale: got 4"):
        calls.grpo(x, scores, scores, kl_scale=4)
    with pytest.raises(ValueError, match="v_ref: got pointer 0"):
        calls.backward(x, factors=factors)
    with pytest.raises(ValueError, match="v_old: got pointer 0"):
        calls.backward(x, factors=factors[:, [0, 2, 1]].contiguous())
    with pytest.raises(ValueError, match="v_ref: got pointer 0"):
        calls.backward(x, grad_mean_diff=torch.ones(2))


def test_empty_batch(native: Any) -> None:
    calls = Calls(native, torch.empty(0, 5), torch.empty(0, 5))
    assert [len(t) for t in calls.step()] == [0, 0, 0]
    loss, *_, metrics, _ = calls.grpo(torch.empty(0, 5), torch.empty(0), torch.empty(0))
    assert loss == 0 and (metrics == 0).all()
