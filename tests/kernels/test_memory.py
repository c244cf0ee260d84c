"""The losses' peak memory beyond their inputs: the gradient and at most 1 MiB, seen by the
operating system.

A process of its own, so that only the loss moves its high-water mark; there every larger allocation
is mapped on its own (MALLOC_MMAP_THRESHOLD_) and so is seen when it is made and gone when it is
freed. An fp32 temporary of the latents' size would add 4 MiB, a bf16 one 2 MiB.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, torch
import editr2_kernels as ek

def status(key):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

shape = (8, 2048, 64)
x, x_next = torch.randn(shape), torch.randn(shape)
v, v_old, v_ref = (torch.randn(shape).to(torch.bfloat16) for _ in range(3))
v.requires_grad_()
table = ek.transition_table(ek.flow_sigmas(8, 3.0), noise_level=0.9)
index, ones, half = torch.arange(8), torch.ones(8), torch.full((8,), 0.5)

def grpo():
    old = ek.sde_log_prob(x, x_next, v.detach(), table, index).log_prob
    return ek.grpo_loss(x, x_next, v, table, index, old, ones, v_ref=v_ref, kl_weight=0.01).loss

def nft():
    return ek.nft_loss(x, x_next, half, v, v_old, half, beta=1.0, v_ref=v_ref).loss

loss = {"grpo": grpo, "nft": nft}[sys.argv[1]]
for _ in range(3):
    torch.autograd.grad(loss(), v)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
gradient, = torch.autograd.grad(loss(), v)
print(status("VmHWM") - before - gradient.numel() * gradient.element_size())
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs"
)
@pytest.mark.parametrize("loss", ["grpo", "nft"])
def test_peak_memory_is_the_gradient(loss):
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, loss], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= 2**20
