"""What gradients are not: of second order, or in forward mode. Both raise, of every operator that
has a gradient.

Of the registration, which all backends share. A row is an operator and the argument that is
differentiated.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import editr2_kernels as ek

TABLE = ek.transition_table([0.9, 0.6, 0.2], dynamics="flow-sde", noise_level=0.7)
INDEX = torch.tensor([0, 1])
X, NEXT, V, OTHER = torch.randn(4, 2, 3, 6, generator=torch.Generator().manual_seed(0))
NUMBERS = torch.tensor([0.3, 0.6])
IDS = torch.tensor([[0, 1, 2], [3, 4, 5]])
WEIGHT = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))


def log_prob(v, **more):
    out = ek.sde_log_prob(X, NEXT, v, TABLE, INDEX, v_ref=OTHER, **more)
    return out.log_prob + out.mean_diff


def guided(name, leaf):
    branches = {"v_uncond": OTHER, "v_uncond_image": NEXT, name: leaf}
    return log_prob(V, guidance=4.0, guidance_image=2.0, renorm="token", **branches)


def tokens(rows, **more):
    out = ek.token_log_prob(rows, IDS, **more)
    return out.log_prob + out.entropy


CALLS = {
    "sde_log_prob": ("sde_log_prob", log_prob, V),
    "sde_log_prob, v_uncond": ("sde_log_prob", lambda leaf: guided("v_uncond", leaf), V),
    "sde_log_prob, v_uncond_image": (
        "sde_log_prob",
        lambda leaf: guided("v_uncond_image", leaf),
        V,
    ),
    "grpo_loss": (
        "grpo_loss",
        lambda v: (
            ek.grpo_loss(
                X, NEXT, v, TABLE, INDEX, NUMBERS, NUMBERS, v_ref=OTHER, kl_weight=0.1
            ).loss
        ),
        V,
    ),
    "awm_loss": (
        "grpo_loss",
        lambda v: ek.awm_loss(X, NEXT, v, NUMBERS, NUMBERS, clip=1.0).loss,
        V,
    ),
    "awm_log_prob": ("sde_log_prob", lambda v: ek.awm_log_prob(X, NEXT, v), V),
    "nft_loss": (
        "nft_loss",
        lambda v: ek.nft_loss(X, NEXT, NUMBERS, v, OTHER, NUMBERS, beta=0.5).loss,
        V,
    ),
    "token_log_prob": ("token_log_prob", tokens, V),
    "token_log_prob, hidden": ("hidden_token_log_prob", lambda leaf: tokens((leaf, WEIGHT)), V),
    "token_log_prob, weight": ("hidden_token_log_prob", lambda leaf: tokens((V, leaf)), WEIGHT),
}
ROWS = pytest.mark.parametrize("op, function, at", CALLS.values(), ids=CALLS)


def test_the_table_has_every_differentiable_operator():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("editr2::")}
    names -= {
        "editr2::sde_step_out"
    }  # a custom_op, which always has a kernel there; it refuses outputs with gradient
    differentiable = {
        n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(n, "Autograd")
    }
    assert differentiable == {f"editr2::{op}" for op, _, _ in CALLS.values()}


def refused(op):
    return pytest.raises(
        RuntimeError, match=rf"^editr2::{op} has no forward-mode derivative.*reverse mode"
    )


@ROWS
def test_forward_mode_raises(op, function, at):
    """It used to give 0, without a word."""
    with refused(op):
        torch.func.jvp(function, (at,), (torch.ones_like(at),))
    with refused(op):
        torch.func.jacfwd(function)(at)
    with forward_ad.dual_level(), refused(op):
        function(forward_ad.make_dual(at, torch.ones_like(at)))
    with forward_ad.dual_level(), refused(op):  # Hessian-vector products
        function(forward_ad.make_dual(at.clone().requires_grad_(), torch.ones_like(at)))
    with forward_ad.dual_level():
        leaf = at.clone().requires_grad_()
        plain = function(leaf)
        assert forward_ad.unpack_dual(plain).tangent is None, "a level alone is nobody's tangent"
        with refused(op):
            torch.autograd.grad(
                plain, leaf, forward_ad.make_dual(torch.ones_like(plain), torch.ones_like(plain))
            )


@ROWS
def test_a_second_derivative_raises(op, function, at):
    leaf = at.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
    assert grad.abs().max() > 0
    with pytest.raises(RuntimeError, match=f"editr2::{op} can be differentiated once only"):
        (grad.square().sum() + leaf.square().sum()).backward()


def test_the_reference_has_a_forward_mode():
    """Which the message of the operators names."""
    _, tangent = torch.func.jvp(
        lambda v: ek.sde_log_prob_ref(X, NEXT, v, TABLE, INDEX).log_prob,
        (V,),
        (torch.ones_like(V),),
    )
    leaf = V.clone().requires_grad_()
    grad = torch.autograd.grad(ek.sde_log_prob(X, NEXT, leaf, TABLE, INDEX).log_prob.sum(), leaf)[0]
    torch.testing.assert_close(tangent, grad.flatten(1).sum(1))
