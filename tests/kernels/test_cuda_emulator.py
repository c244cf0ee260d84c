"""The emulator that runs the CUDA sources on the CPU: it finds the faults that a GPU would run
past, and our kernels have none of them: their bits depend on no order of blocks or threads.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import editr2_kernels as ek
from editr2_kernels import _checks


@pytest.fixture
def library(emulated_module: Any) -> Iterator[ctypes.CDLL]:
    loaded = ctypes.CDLL(emulated_module.__file__)
    loaded.editr2_emulator_fault.restype = ctypes.c_char_p
    yield loaded
    loaded.editr2_emulator_order(1)


def run(library: ctypes.CDLL, fault: int, order: int = 1) -> tuple[str, Tensor]:
    library.editr2_emulator_order(order)
    out = torch.zeros(8 * 64)
    message = library.editr2_emulator_fault(fault, ctypes.c_void_p(out.data_ptr())).decode()
    return message, out


@pytest.mark.parametrize(
    "fault, expected",
    [
        (0, r"diverging_barriers: threads of a block wait for each other.*faults\.cu"),
        (1, r"absent_thread: threads of a block wait for each other.*thread 0 returned"),
        (2, r"partial_shuffle: threads of a block wait for each other.*warp exchange.*returned"),
        (7, r"rotate: invalid launch configuration"),
    ],
)
def test_faults_are_errors(library: ctypes.CDLL, fault: int, expected: str) -> None:
    message, _ = run(library, fault)
    assert re.search(expected, message), message


def test_races_show_in_the_bits(library: ctypes.CDLL) -> None:
    expected = (torch.arange(64.0) + 1) % 64
    for order in range(5):
        message, out = run(library, 4, order)
        assert message == "" and torch.equal(out[:64], expected)
    assert not torch.equal(run(library, 3)[1], run(library, 4)[1])
    assert not torch.equal(run(library, 6, 0)[1], run(library, 6, 1)[1])


def test_shared_memory_starts_as_nan(library: ctypes.CDLL) -> None:
    _, out = run(library, 5)
    assert out.view(8, 64).isnan().all(dim=1).tolist() == [False] + 7 * [True]


def results() -> list[Tensor]:
    """Outputs and gradients of every operator, on sizes that make several blocks, warps and
    segments."""
    torch.manual_seed(0)
    backend = "cuda"
    table = ek.transition_table(ek.flow_sigmas(6, 3.0), noise_level=0.7, window=(0, 6))
    batch, shape = 3, (3, 26, 83)
    x, v, uncond, v_ref = (torch.randn(shape) for _ in range(4))
    index, seed = torch.tensor([0, 2, 4]), torch.arange(batch) + 5
    out = [ek.philox_normal(seed, index, (4100,), backend=backend)]
    for renorm in ("none", "token", "text_channel", "channel", "global"):
        guidance: dict[str, Any] = {
            "v_uncond": uncond.requires_grad_(),
            "guidance": 3.0,
            "renorm": renorm,
        }
        step = ek.sde_step(x, v, table, index, seed, **guidance, return_x0=True, backend=backend)
        assert step.x0 is not None
        leaf = v.clone().requires_grad_()
        loss = ek.grpo_loss(
            x,
            step.x_next,
            leaf,
            table,
            index,
            step.log_prob - 1e-6,
            torch.tensor([1.0, -1.0, 0.5]),
            v_ref=v_ref,
            kl_weight=0.1,
            **guidance,
            backend=backend,
        )
        grads = torch.autograd.grad(loss.loss, (leaf, uncond))
        replay = ek.sde_log_prob(
            x, step.x_next, leaf, table, index, v_ref=v_ref, **guidance, backend=backend
        )
        assert replay.mean_diff is not None and torch.equal(replay.log_prob, step.log_prob)
        more = torch.autograd.grad(replay.log_prob.sum() + replay.mean_diff.sum(), (leaf, uncond))
        out += [
            step.x_next,
            step.log_prob,
            step.x0,
            loss.loss,
            loss.ratio,
            loss.kl,
            *loss.metrics,
            *grads,
            *more,
        ]
    leaf = v.clone().requires_grad_()
    nft = ek.nft_loss(
        x,
        v_ref,
        table[index, 6],
        leaf,
        v,
        torch.rand(batch),
        beta=0.5,
        v_ref=v_ref,
        backend=backend,
    )
    out += [nft.loss, *nft.metrics, *torch.autograd.grad(nft.loss, leaf)]
    logits = torch.randn(5, 3001, requires_grad=True)
    tokens = ek.token_log_prob(logits, torch.arange(5), backend=backend)
    out += [*tokens, *torch.autograd.grad(tokens.log_prob.sum() + tokens.entropy.sum(), logits)]
    group = torch.arange(24) // 6
    for options in ek.CREDIT_PRESETS.values():
        for applies in (None, torch.rand(24, 3, 2) < 0.7):
            scores = torch.rand(24, 3, 2)
            out += list(
                ek.group_advantage(scores, group, options, applies=applies, backend=backend)
            )
    return [value.detach() for value in out]


def test_no_operator_depends_on_the_order_of_blocks_or_threads(
    library: ctypes.CDLL, emulated_cuda: Any
) -> None:
    first: list[Tensor] = []
    for order in (0, 1, 7):
        library.editr2_emulator_order(order)
        values = results()
        first = first or values
        assert len(values) > 60
        for a, b in zip(first, values):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("renorm", ["none", "text_channel", "channel", "global"])
@pytest.mark.parametrize("fault", [6, -1, 2**62, "m_prev"])
def test_a_sample_without_its_row_is_nan(
    fault: int | str, renorm: str, emulated_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU nobody looks; on CPU tensors the operators would raise before the kernels run."""
    monkeypatch.setattr(_checks, "table_rows", lambda *given: None)
    table = ek.transition_table(ek.flow_sigmas(6, 3.0), noise_level=0.7, window=(0, 6))
    x, v, uncond, v_ref = (torch.randn(3, 17, 40) for _ in range(4))
    good, bad = torch.tensor([0, 2, 4]), torch.tensor([0, 2, 4])
    broken = table.clone()
    if fault == "m_prev":
        broken[2, 2] = 0.5  # a row that asks for the previous x0
    else:
        bad[1] = fault
    outputs = []
    for index, rows_ in ((good, table), (bad, broken)):
        leaf = v.clone().requires_grad_()
        guided: dict[str, Any] = {
            "v_uncond": uncond,
            "guidance": 2.0,
            "renorm": renorm,
            "backend": "cuda",
        }
        step = ek.sde_step(x, v, rows_, index, index, **guided, return_x0=True)
        replay = ek.sde_log_prob(x, uncond, leaf, rows_, index, v_ref=v_ref, **guided)
        assert step.x0 is not None and replay.mean_diff is not None
        (grad,) = torch.autograd.grad(replay.log_prob.sum() + replay.mean_diff.sum(), leaf)
        outputs.append([*step, replay.log_prob.detach(), replay.mean_diff.detach(), grad])
    for whole, damaged in zip(*outputs):
        assert damaged[1].isnan().all() and not whole.isnan().any()
        assert torch.equal(damaged[[0, 2]], whole[[0, 2]])


def test_sums_over_the_batch_are_in_double_precision(emulated_cuda: Any) -> None:
    """Three samples of one thread whose losses are 2^24, 1 and -2^24."""
    batch = 513
    table = ek.transition_table(ek.flow_sigmas(6, 3.0), noise_level=0.7, window=(0, 6))
    x, v, x_next = torch.randn(3, batch, 8)
    index = torch.zeros(batch, dtype=torch.int64)
    replay = ek.sde_log_prob(x, x_next, v, table, index, backend="cuda")
    advantage = torch.zeros(batch)
    advantage[[0, 256, 512]] = torch.tensor([-(2.0**24), -1.0, 2.0**24])
    out = ek.grpo_loss(
        x,
        x_next,
        v,
        table,
        index,
        replay.log_prob,
        advantage,
        advantage_clip=None,
        normalizer=1.0,
        backend="cuda",
    )
    assert out.loss == 1.0


def test_an_absent_mask_of_scores_counts_them_all(emulated_cuda: Any) -> None:
    scores, group = torch.rand(24, 3, 2), torch.arange(24) // 6
    for options in ek.CREDIT_PRESETS.values():
        absent = ek.group_advantage(scores, group, options, backend="cuda")
        whole = ek.group_advantage(
            scores, group, options, mask=torch.ones(24, 3, dtype=torch.bool), backend="cuda"
        )
        assert torch.equal(absent.advantage, whole.advantage) and torch.equal(
            absent.mask, whole.mask
        )
    scores[3, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="scores must be finite"):
        ek.group_advantage(scores, group, options, backend="cuda")


def test_versions_of_the_emulated_cuda(emulated_module: Any) -> None:
    assert emulated_module.driver_version() == emulated_module.runtime_version() == 0


def rows(t: Tensor) -> tuple[int, int, int]:
    return t.data_ptr(), 0, t.stride(0)


@pytest.fixture
def step_arguments(emulated_module: Any) -> dict[str, Any]:
    x = torch.zeros(2, 8)
    table = ek.transition_table([1.0, 0.0], dynamics="ode")
    index = torch.zeros(2, dtype=torch.int64)
    scratch = torch.zeros(emulated_module.workspace(2, 8, 8, 0), dtype=torch.uint8)
    absent = (0, 0, 0)
    return {
        "x": rows(x),
        "v": rows(x),
        "m_prev": absent,
        "v_uncond": absent,
        "v_uncond_image": absent,
        "guidance": 0,
        "renorm": 0,
        "width": 8,
        "noise": absent,
        "table": table.data_ptr(),
        "rows": 1,
        "step_index": index.data_ptr(),
        "seed": index.data_ptr(),
        "x_next": rows(torch.zeros(2, 8)),
        "x0": absent,
        "log_prob": 0,
        "score_stored": True,
        "workspace": scratch.data_ptr(),
        "B": 2,
        "N": 8,
        "device": 0,
        "stream": 0,
        "kept": (x, table, index, scratch),
    }


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("B", -1, "B: got -1"),
        ("N", -1, "N: got -1"),
        ("B", 2**62, "B: got"),
        ("x", (0, 0, 8), "x: got 0"),
        ("v", (16, 3, 8), "v dtype: got 3"),
        ("x_next", (16, 0, -8), "x_next stride: got -8"),
        ("rows", -1, "rows: got -1"),
        ("table", 0, "table: got 0"),
        ("step_index", 0, "step_index: got 0"),
        ("seed", 0, "seed: got 0"),
        ("workspace", 0, "workspace: got 0"),
        ("workspace", 8, "workspace: got 8"),
        ("renorm", 5, "renorm: got 5"),
        ("N", 2**50, "B \\* N: got"),
    ],
)
def test_arguments_are_checked_on_the_host(
    emulated_module: Any, step_arguments: dict[str, Any], name: str, value: Any, message: str
) -> None:
    step_arguments.pop("kept")
    step_arguments[name] = value
    with pytest.raises(ValueError, match=message):
        emulated_module.sde_step(**step_arguments)


def test_an_absent_device_is_an_error_of_cuda(
    emulated_module: Any, step_arguments: dict[str, Any]
) -> None:
    step_arguments.pop("kept")
    with pytest.raises(RuntimeError, match="CUDA failed choosing device 3"):
        emulated_module.sde_step(**{**step_arguments, "device": 3})


def test_workspace_of_a_width_that_does_not_divide(emulated_module: Any) -> None:
    assert emulated_module.workspace(4, 1000, 10, 1) > emulated_module.workspace(4, 1000, 10, 0) > 0
    with pytest.raises(ValueError, match="width: got 7"):
        emulated_module.workspace(4, 1000, 7, 1)
