"""On a GPU: CUDA C++ and Triton against the reference, bitwise repeats and batch slices, graph
capture, no host sync.

Under NVIDIA's checker, `compute-sanitizer --tool memcheck|racecheck|initcheck|synccheck python -m
pytest` of this file with `-k cuda` runs every kernel of the CUDA module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import editr2_kernels as ek

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device is visible to PyTorch"
    ),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1,),
    (41, 25),
    (1024, 64),
]  # one element; rows of no multiple of 8; a 512 x 512 image's latents
RENORMS = ["none", "token", "text_channel", "channel", "global"]
BATCH = 4


@pytest.fixture(params=["triton", "cuda"])
def on_gpu(request: pytest.FixtureRequest) -> str:
    status = ek.backends()[request.param]
    if not status.available:
        pytest.skip(f"backend {request.param}: {status.reason}")
    return request.param


@pytest.fixture(autouse=True)
def uninitialised_memory_as_it_comes() -> Iterator[None]:
    """Filling every torch.empty with NaN would be kernels of its own in the graphs that are
    captured here."""
    torch.use_deterministic_algorithms(False)
    yield


Inputs = dict[str, Any]


def inputs(shape: tuple[int, ...] = (1024, 64), dtype: torch.dtype = torch.float32) -> Inputs:
    """Everything an operator may take, a sample a row; three noisy rows of the table and a
    deterministic one."""
    generator = torch.Generator(DEVICE).manual_seed(3)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=DEVICE)

    return {
        "x": normal(BATCH, *shape).to(dtype),
        "v": normal(BATCH, *shape).to(dtype),
        "v_ref": normal(BATCH, *shape).to(dtype),
        "v_old": normal(BATCH, *shape).to(dtype),
        "v_uncond": normal(BATCH, *shape).to(dtype),
        "v_uncond_image": normal(BATCH, *shape).to(dtype),
        "guidance": torch.tensor([4.0, 1.0, 2.5, 7.0], device=DEVICE),
        "guidance_image": torch.tensor([1.5, 1.0, 1.0, 2.0], device=DEVICE),
        "index": torch.tensor([1, 5, 0, 7], device=DEVICE),
        "seed": torch.tensor([3, -4, 2**50, 0], device=DEVICE),
        "advantage": torch.tensor([1.0, -1.0, 0.5, 2.0], device=DEVICE),
        "mask": torch.tensor([True, True, True, False], device=DEVICE),
        "logits": normal(BATCH, 4099).to(dtype),
        "ids": torch.tensor([0, 4098, -100, 77], device=DEVICE),
        "scores": torch.rand(BATCH, 3, 2, generator=generator, device=DEVICE),
        "group": torch.tensor([7, 7, 7, 7], device=DEVICE),
        "table": ek.transition_table(
            ek.flow_sigmas(8, 3.0), noise_level=0.9, window=(1, 8), device=DEVICE
        ),
    }


def guidance(i: Inputs, renorm: str | None) -> dict[str, Any]:
    if renorm is None:
        return {}
    names = ("v_uncond", "guidance", "v_uncond_image", "guidance_image")
    return {**{name: i[name] for name in names}, "guidance_interval": (0.1, 0.95), "renorm": renorm}


def philox_normal(i: Inputs, backend: str, renorm: str | None) -> list[Tensor]:
    return [ek.philox_normal(i["seed"], i["index"], i["x"].shape[1:], backend=backend)]


def sde_step(i: Inputs, backend: str, renorm: str | None) -> list[Tensor]:
    step = ek.sde_step(
        i["x"],
        i["v"],
        i["table"],
        i["index"],
        i["seed"],
        **guidance(i, renorm),
        return_x0=True,
        backend=backend,
    )
    assert step.x0 is not None
    return [step.x_next, step.log_prob, step.x0]


def differentiable(i: Inputs, renorm: str | None) -> tuple[Inputs, list[Tensor]]:
    """The inputs with leaves in place of what a loss is differentiated to."""
    names = ["v"] if renorm is None else ["v", "v_uncond", "v_uncond_image"]
    leaves = {name: i[name].detach().clone().requires_grad_() for name in names}
    return {**i, **leaves}, list(leaves.values())


def sde_log_prob(i: Inputs, backend: str, renorm: str | None) -> list[Tensor]:
    i, leaves = differentiable(i, renorm)
    out = ek.sde_log_prob(
        i["x"],
        i["v_old"],
        i["v"],
        i["table"],
        i["index"],
        v_ref=i["v_ref"],
        **guidance(i, renorm),
        backend=backend,
    )
    assert out.mean_diff is not None
    return [*out, *torch.autograd.grad(out.log_prob.sum() + out.mean_diff.sum(), leaves)]


def grpo_loss(i: Inputs, backend: str, renorm: str | None) -> list[Tensor]:
    i, leaves = differentiable(i, renorm)
    x_next = i["x"] * 0.9  # near enough for a log-probability of moderate size
    with torch.no_grad():
        old = ek.sde_log_prob(
            i["x"], x_next, i["v"], i["table"], i["index"], **guidance(i, renorm), backend=backend
        ).log_prob
    out = ek.grpo_loss(
        i["x"],
        x_next,
        i["v"],
        i["table"],
        i["index"],
        old - 1e-3,
        i["advantage"],
        clip=0.2,
        v_ref=i["v_ref"],
        kl_weight=0.1,
        kl_scale="mean",
        guard=True,
        v_old=i["v_old"],
        mask=i["mask"],
        normalizer=3.0,
        **guidance(i, renorm),
        backend=backend,
    )
    return [
        out.log_prob,
        out.ratio,
        out.kl,
        out.loss,
        *out.metrics,
        *torch.autograd.grad(out.loss, leaves),
    ]


def nft_loss(i: Inputs, backend: str, renorm: str | None) -> list[Tensor]:
    i, leaves = differentiable(i, None)
    out = ek.nft_loss(
        i["x"],
        i["v_uncond"],
        i["table"][i["index"], 6],
        i["v"],
        i["v_old"],
        i["advantage"].sigmoid(),
        beta=0.5,
        v_ref=i["v_ref"],
        mask=i["mask"],
        normalizer=3.0,
        backend=backend,
    )
    return [out.loss, *out.metrics, *torch.autograd.grad(out.loss, leaves)]


def token_log_prob(i: Inputs, backend: str, renorm: str | None) -> list[Tensor]:
    logits = i["logits"].detach().clone().requires_grad_()
    out = ek.token_log_prob(logits, i["ids"], temperature=0.7, backend=backend)
    return [*out, *torch.autograd.grad(out.log_prob.sum() + out.entropy.sum(), logits)]


def group_advantage(i: Inputs, backend: str, renorm: str | None) -> list[Tensor]:
    """Of every preset: between them they run every stage of the kernel."""
    some = torch.rand(i["scores"].shape, generator=torch.Generator().manual_seed(2)) < 0.7
    presets = [
        ek.group_advantage(i["scores"], i["group"], o, applies=applies, backend=backend)
        for o in ek.CREDIT_PRESETS.values()
        for applies in (None, some.to(i["scores"].device))
    ]
    return [value for out in presets for value in out]


Operator = Callable[[Inputs, str, "str | None"], list[Tensor]]
OPERATORS: list[Operator] = [
    philox_normal, sde_step, sde_log_prob, grpo_loss, nft_loss, token_log_prob, group_advantage,
]  # fmt: skip
CASES = [
    pytest.param(run, renorm, id=f"{run.__name__}-{renorm}")
    for run in OPERATORS
    for renorm in ([None, *RENORMS] if run in (sde_step, sde_log_prob, grpo_loss) else [None])
]


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for place, (one, other) in enumerate(zip(a, b)):
        assert one.dtype == other.dtype and torch.equal(
            one.float().nan_to_num(7), other.float().nan_to_num(7)
        ), place


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("run, renorm", CASES)
def test_matches_the_reference(
    run: Operator, renorm: str | None, shape: tuple[int, ...], dtype: torch.dtype, on_gpu: str
) -> None:
    i = inputs(shape, dtype)
    ours, reference = run(i, on_gpu, renorm), run(i, "ref", renorm)
    for place, (a, b) in enumerate(zip(ours, reference, strict=True)):
        assert a.dtype == b.dtype
        if (
            run is group_advantage
            or run is philox_normal
            or (run is sde_step and renorm in (None, "none"))
        ):
            if (
                place != 1 or run is group_advantage
            ):  # log_prob is a sum, whose order is the backend's own
                assert torch.equal(a, b), place
                continue
        # An fp32 sum over N terms in another order, and one rounding to the storage dtype at
        # another value.
        unit = torch.finfo(a.dtype).eps
        largest = float(b.detach().float().abs().nan_to_num().max())
        # Near zero a step of the dtype is no part of the value: an H200 gave a float16 gradient one
        # such step off.
        atol = max(2 * unit, 2e-5) * largest * 0.1 + torch.finfo(a.dtype).smallest_normal * unit
        torch.testing.assert_close(
            a.float(), b.float(), rtol=max(2 * unit, 2e-5), atol=atol, equal_nan=True
        )


# The last is 2,048 blocks of 256 threads, more than any device holds at one time.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(41, 25), (1024, 64), (16384, 64)])
@pytest.mark.parametrize("run, renorm", CASES)
def test_repeats_and_batch_slices(
    run: Operator, renorm: str | None, shape: tuple[int, ...], dtype: torch.dtype, on_gpu: str
) -> None:
    i = inputs(shape, dtype)
    whole = run(i, on_gpu, renorm)
    assert_same_bits(run(i, on_gpu, renorm), whole)
    if run is group_advantage:
        return  # a sample depends on its group by definition
    part = {k: t if k == "table" or not isinstance(t, Tensor) else t[1:3] for k, t in i.items()}
    for place, (a, b) in enumerate(zip(run(part, on_gpu, renorm), whole, strict=True)):
        if b.dim() > 0:  # losses and metrics are over the batch
            assert torch.equal(a.nan_to_num(7), b[1:3].nan_to_num(7)), place


def off_16_bytes(t: Tensor) -> Tensor:
    """The same values, contiguous, an element behind a multiple of 16 bytes."""
    moved = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:]
    assert moved.data_ptr() % 16 == t.element_size()
    return moved.copy_(t.flatten()).view(t.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("run, renorm", CASES)
def test_latents_off_16_bytes(
    run: Operator, renorm: str | None, dtype: torch.dtype, on_gpu: str
) -> None:
    i = inputs(dtype=dtype)
    expected = run(i, on_gpu, renorm)
    latents = [
        name
        for name, value in i.items()
        if isinstance(value, Tensor) and value.shape == i["x"].shape
    ]
    for names in [[name] for name in latents] + [latents]:  # one pointer, and all
        assert_same_bits(
            run({**i, **{name: off_16_bytes(i[name]) for name in names}}, on_gpu, renorm), expected
        )


@pytest.mark.parametrize(
    "shape", [(33, 1 << 16, 1 << 10), (1, (1 << 15) + 1, 1 << 16)], ids=["samples", "a_sample"]
)
def test_a_step_past_two_to_the_31_elements(shape: tuple[int, ...], on_gpu: str) -> None:
    """Its last elements are those of a step on them alone; without noise, which depends on an
    element's place."""
    needed = 7 * torch.Size(shape).numel()  # x, v, x_next, of two bytes an element; and a margin
    if (free := torch.cuda.mem_get_info()[0]) < needed:
        pytest.skip(f"needs {needed >> 30} GiB of device memory, {free >> 30} are free")
    table = ek.transition_table(
        ek.flow_sigmas(8, 3.0), noise_level=0.9, window=(1, 8), device=DEVICE
    )
    index, seed = (torch.zeros(shape[0], dtype=torch.int64, device=DEVICE) for _ in range(2))
    x = torch.randn(shape[-1], device=DEVICE, dtype=torch.bfloat16).expand(shape).contiguous()
    v = torch.randn(shape[-2], 1, device=DEVICE, dtype=torch.bfloat16).expand(shape).contiguous()
    x[-1, -1], v[-1, -1] = torch.randn(2, shape[-1], device=DEVICE)  # as nowhere else
    assert x.numel() > 2**31
    out = ek.sde_step(x, v, table, index, seed, backend=on_gpu).x_next
    last = slice(-1, None), slice(-1, None), slice(-9, None)
    expected = ek.sde_step(x[last], v[last], table, index[-1:], seed[-1:], backend="ref").x_next
    assert torch.equal(out[last], expected) and not torch.equal(out[last], x[last])


@pytest.mark.parametrize("preset", ["edit-r2", "gdpo"])
@pytest.mark.parametrize("rows", [1152, 20_000])
def test_statistics_of_the_whole_batch_by_the_last_block(
    rows: int, preset: str, on_gpu: str
) -> None:
    """It reads what all the others wrote. Launches queue up, more blocks each than a device holds
    at one time."""
    generator = torch.Generator(DEVICE).manual_seed(3)
    scores = torch.rand(rows, 3, 2, generator=generator, device=DEVICE)
    group = torch.arange(rows, device=DEVICE) // 16
    options = ek.CREDIT_PRESETS[preset]
    expected = list(ek.group_advantage(scores, group, options, backend="ref"))
    for out in [ek.group_advantage(scores, group, options, backend=on_gpu) for _ in range(200)]:
        assert_same_bits(list(out), expected)


def test_a_row_of_logits_whose_largest_comes_last(on_gpu: str) -> None:
    """More rows than a device holds blocks, as long as a real vocabulary; all that was added is
    scaled to a larger logit again and again."""
    v = 151_936
    generator = torch.Generator(DEVICE).manual_seed(3)
    logits = torch.randn(2560, v, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    logits[::2] += torch.arange(v, device=DEVICE) // 4096  # rises from tile to tile
    ids = torch.randint(v, (len(logits),), generator=generator, device=DEVICE)
    out = ek.token_log_prob(logits, ids, backend=on_gpu)
    assert_same_bits(list(ek.token_log_prob(logits, ids, backend=on_gpu)), list(out))
    some = slice(0, len(logits), 151)
    expected = ek.token_log_prob(logits[some], ids[some], backend="ref")
    for a, b in zip(out, expected):
        torch.testing.assert_close(a[some], b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("run", [sde_step, sde_log_prob, grpo_loss])
def test_guidance_by_numbers_in_a_graph(run: Operator, on_gpu: str) -> None:
    """They are written on the device by the graph itself, so that it needs no memory but its
    own."""
    i = inputs(dtype=torch.bfloat16)
    numbers = {"guidance": 4.0, "guidance_image": 1.5}
    expected = run(
        {**i, **{k: torch.full((BATCH,), n, device=DEVICE) for k, n in numbers.items()}},
        on_gpu,
        "token",
    )
    i |= numbers
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(i, on_gpu, "token")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(i, on_gpu, "token")
    for _ in range(3):
        torch.randn(1 << 20, device=DEVICE)  # what was free when the graph was captured is used
        graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(captured, expected)
    with no_sync():
        run(i, on_gpu, "token")


@pytest.mark.parametrize("run, renorm", CASES)
def test_captured_in_a_graph(run: Operator, renorm: str | None, on_gpu: str) -> None:
    i = inputs(dtype=torch.bfloat16)
    eager = run(i, on_gpu, renorm)
    side = torch.cuda.Stream()  # autograd wants one run on the capturing side first
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(i, on_gpu, renorm)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(i, on_gpu, renorm)
    with torch.no_grad():
        for value in captured:
            value.zero_()
    graph.replay()
    graph.replay()  # what a launch leaves behind, such as a counter, must not reach the next
    torch.cuda.synchronize()
    assert_same_bits(captured, eager)


@pytest.mark.parametrize("run, renorm", CASES)
def test_never_waits_for_the_device(run: Operator, renorm: str | None, on_gpu: str) -> None:
    i = inputs()
    run(i, on_gpu, renorm)  # Triton compiles and loads here
    with no_sync():
        run(i, on_gpu, renorm)


@pytest.mark.parametrize("wrong", [8, -1, 2**62])
@pytest.mark.parametrize("run", [sde_step, sde_log_prob, grpo_loss])
def test_step_index_out_of_range_is_nan(run: Operator, wrong: int, on_gpu: str) -> None:
    i = inputs()
    expected = run(i, on_gpu, "token")
    i["index"][1] = wrong
    for place, (a, b) in enumerate(zip(run(i, on_gpu, "token"), expected, strict=True)):
        if a.dim() == 0:
            continue
        if not (
            run is grpo_loss and place == 1
        ):  # the guard's ratio of NaN is free to be NaN or, without noise, 1
            assert a[1].isnan().all(), place
        keep = [0, 2, 3]
        assert torch.equal(a[keep], b[keep]), place


def test_other_stream_and_other_device(on_gpu: str) -> None:
    i = inputs()
    expected = sde_step(i, on_gpu, "token")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = sde_step(i, on_gpu, "token")
    stream.synchronize()
    assert_same_bits(out, expected)
    if torch.cuda.device_count() > 1:
        elsewhere = {k: t.to("cuda:1") if isinstance(t, Tensor) else t for k, t in i.items()}
        out = sde_step(elsewhere, on_gpu, "token")
        assert torch.cuda.current_device() == 0 and out[0].device.index == 1
        assert_same_bits([t.to("cuda:0") for t in out], expected)


def test_the_two_gpu_backends_step_to_the_same_bits() -> None:
    for name in ("triton", "cuda"):
        if not ek.backends()[name].available:
            pytest.skip(f"backend {name}: {ek.backends()[name].reason}")
    for dtype in DTYPES:
        i = inputs(dtype=dtype)
        a, b = sde_step(i, "triton", "none"), sde_step(i, "cuda", "none")
        assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])
