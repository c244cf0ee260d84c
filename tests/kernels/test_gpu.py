"""On a GPU: Triton against the reference, the replay theorem, no synchronisation (CUDA graph capture)."""

import pytest
import torch

import editr2_kernels as ek

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to PyTorch"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INDEX, SEED = [1, 5, 0, 7], [3, -4, 2**50, 0]


def case(n, dtype=torch.float32):
    table = ek.transition_table(ek.flow_sigmas(8, 3.0), noise_level=0.9, window=(1, 8), device="cuda")
    x, v = (torch.randn(4, n, device="cuda").to(dtype) for _ in range(2))
    return x, v, table, torch.tensor(INDEX, device="cuda"), torch.tensor(SEED, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 1025, 65536])
def test_triton_matches_the_reference(n, dtype):
    x, v, table, index, seed = case(n, dtype)
    step = ek.sde_step(x, v, table, index, seed, backend="triton")
    expected = ek.sde_step_ref(*(t.cpu() for t in (x, v, table, index, seed)))
    assert torch.equal(step.x_next.cpu(), expected.x_next)
    torch.testing.assert_close(step.log_prob.cpu(), expected.log_prob, rtol=1e-5, atol=1e-5)
    v_ref = (v * 0.9).to(dtype)
    leaf = v.clone().requires_grad_()
    out = ek.sde_log_prob(x, step.x_next, leaf, table, index, v_ref=v_ref, backend="triton")
    assert torch.equal(out.log_prob, step.log_prob)
    (out.log_prob.sum() + out.mean_diff.sum()).backward()
    other = v.clone().requires_grad_()
    out = ek.sde_log_prob(x, step.x_next, other, table, index, v_ref=v_ref, backend="ref")
    (out.log_prob.sum() + out.mean_diff.sum()).backward()
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(leaf.grad.float(), other.grad.float(), rtol=max(unit, 1e-5), atol=1e-6 * unit)


@pytest.mark.parametrize("store", DTYPES)
def test_batch_and_repeat(store):
    x, v, table, index, seed = case(5003)
    whole = ek.sde_step(x, v, table, index, seed, store_dtype=store)
    again = ek.sde_step(x, v, table, index, seed, store_dtype=store)
    part = ek.sde_step(x[1:2], v[1:2], table, index[1:2], seed[1:2], store_dtype=store)
    for a, b, c in zip(whole, again, part):
        assert torch.equal(a, b) and torch.equal(a[1:2], c)


def test_step_is_captured_in_a_graph():
    x, v, table, index, seed = case(4096)
    eager = ek.sde_step(x, v, table, index, seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ek.sde_step(x, v, table, index, seed)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured))


def test_step_index_out_of_range_is_nan():
    x, v, table, index, seed = case(100)
    index[2] = 8
    step = ek.sde_step(x, v, table, index, seed)
    assert step.log_prob.isnan().tolist() == step.x_next.isnan().all(1).tolist() == [False, False, True, False]


def test_group_advantage_has_the_bits_of_the_cpu():
    scores, group = torch.rand(96, 3, 2), torch.arange(96) // 6
    for options in ek.CREDIT_PRESETS.values():
        for backend in ("triton", "ref"):
            gpu = ek.group_advantage(scores.cuda(), group.cuda(), options, backend=backend)
            cpu = ek.group_advantage(scores, group, options, backend="ref")
            assert torch.equal(gpu.advantage.cpu(), cpu.advantage) and torch.equal(gpu.mask.cpu(), cpu.mask)
