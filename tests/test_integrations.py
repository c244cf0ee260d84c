"""`patch`: stand-ins of other trainers before and after.

Tolerances: ours rounds S, A and B of a step once from fp64, eager code rounds them several times in
fp32: a few 1e-7 of a value of size 5, and 1/S^2 times that in a log-prob.
"""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import editr2_kernels as ek
from editr2.errors import IntegrationError
from editr2.integrations import patch, steps, unpatch

X_TOL = dict(rtol=1e-5, atol=5e-6)
LOG_PROB_TOL = dict(rtol=1e-5, atol=2e-5)
SHAPE = (4, 12, 8)
LEVEL = 0.6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def close(ours, theirs, **tolerance):
    torch.testing.assert_close(ours, theirs, **(tolerance or X_TOL))


# Before and after: a stand-in training loop of each project


class Policy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(SHAPE[-1] + 1, SHAPE[-1])
        torch.nn.init.normal_(self.layer.weight, std=0.3, generator=generator(5))
        torch.nn.init.zeros_(self.layer.bias)

    def forward(self, x, t):
        return self.layer(torch.cat([x, (t / 1000).view(-1, 1, 1).expand(*x.shape[:2], 1)], dim=-1))


def stock_schedule(scheduler, count=5):
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / count, count), device="cpu")
    return scheduler


def flow_grpo_loop(peers, kind):
    from diffusers import FlowMatchEulerDiscreteScheduler

    module = sys.modules["flow_grpo.diffusers_patch.sd3_sde_with_logprob"]
    scheduler = stock_schedule(FlowMatchEulerDiscreteScheduler(shift=3.0))

    def step(v, i, x, x_next, gen):
        at = scheduler.timesteps[i].expand(len(x))
        return module.sde_step_with_logprob(
            scheduler, v, at, x, noise_level=LEVEL, prev_sample=x_next, generator=gen, sde_type=kind
        )

    return step, scheduler.timesteps


def flow_factory_loop(peers, kind):
    module = sys.modules["flow_factory.scheduler.flow_match_euler_discrete"]
    scheduler = stock_schedule(
        module.FlowMatchEulerDiscreteSDEScheduler(
            noise_level=LEVEL, dynamics_type=kind, sde_steps=[0, 1, 3]
        )
    )

    def step(v, i, x, x_next, gen):
        at = scheduler.timesteps[i].expand(len(x))
        out = scheduler.step(
            v, at, x, next_latents=x_next, generator=gen, compute_log_prob=i in (0, 1, 3)
        )
        log_prob = torch.zeros(len(x)) if out.log_prob is None else out.log_prob
        return out.next_latents, log_prob, out.next_latents_mean, out.std_dev_t + 0.1

    return step, scheduler.timesteps


def verl_omni_loop(peers, kind):
    module = sys.modules["verl_omni.pipelines.schedulers.flow_match_sde"]
    scheduler = stock_schedule(module.FlowMatchSDEDiscreteScheduler(shift=3.0))

    def step(v, i, x, x_next, gen):
        if x_next is None:
            return scheduler.step(
                v,
                scheduler.timesteps[i],
                x,
                generator=gen,
                noise_level=LEVEL,
                sde_type=kind,
                return_dict=False,
            )
        at = scheduler.timesteps[i].expand(len(x))
        return scheduler.sample_previous_step(
            sample=x,
            model_output=v,
            timestep=at,
            noise_level=LEVEL,
            prev_sample=x_next,
            sde_type=kind,
        )

    return step, scheduler.timesteps


def dance_grpo_loop(peers, kind):
    module = sys.modules["fastvideo.train_grpo_flux"]
    sigmas = torch.tensor(ek.flow_sigmas(5, 3.0))

    def step(v, i, x, x_next, gen):
        x_next, x0, log_prob = module.flux_step(v, x, 0.3, sigmas, i, x_next, True, kind == "sde")
        return x_next, log_prob, x0, torch.ones(1)

    return step, sigmas[:-1] * 1000


LOOPS = {
    "flow_grpo": (flow_grpo_loop, ("sde", "cps")),
    "flow_factory": (flow_factory_loop, ("Flow-SDE", "Dance-SDE", "CPS")),
    "verl_omni": (verl_omni_loop, ("sde", "cps", "dance_sde")),
    "dance_grpo": (dance_grpo_loop, ("sde", "ode")),
}
CASES = [(name, kind) for name, (_, kinds) in LOOPS.items() for kind in kinds]


def iteration(peers, name, kind):
    """A rollout, its advantages, and one update with a clipped surrogate and a KL to a reference;
    what it computed."""
    step, timesteps = LOOPS[name][0](peers, kind)
    policy, reference = Policy(), Policy()
    with torch.no_grad():
        reference.layer.weight.mul_(1.1)
    gen = generator(7)
    torch.manual_seed(8)  # flux_step draws from the global generator
    x = torch.randn(SHAPE, generator=generator(9))
    trajectory = []
    with torch.no_grad():
        for i, t in enumerate(timesteps):
            x_next, log_prob, mean, std = step(policy(x, t.expand(len(x))), i, x, None, gen)
            trajectory.append((x, x_next, log_prob))
            x = x_next
    tracker = sys.modules["flow_grpo.stat_tracking"].PerPromptStatTracker()
    rewards = x.flatten(1).mean(1).numpy()
    advantage = torch.from_numpy(tracker.update(["a", "b", "a", "b"], rewards, type="grpo")).float()
    losses, ratios = [], []
    for i, (x, x_next, old) in enumerate(trajectory[:-1]):
        t = timesteps[i].expand(len(x))
        _, log_prob, mean, std = step(policy(x, t), i, x, x_next, None)
        with torch.no_grad():
            mean_ref = step(reference(x, t), i, x, x_next, None)[2]
        ratio = torch.exp(log_prob - old)
        policy_loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - 1e-4, 1 + 1e-4) * advantage)
        kl = ((mean - mean_ref) ** 2).mean(dim=(1, 2), keepdim=True) / (2 * std**2)
        losses.append(policy_loss.mean() + 0.04 * kl.mean())
        ratios.append(ratio.detach())
    torch.stack(losses).sum().backward()
    grads = [parameter.grad.clone() for parameter in policy.parameters()]
    return trajectory, torch.stack(losses).detach(), grads, torch.stack(ratios)


@pytest.mark.parametrize("name, kind", CASES)
def test_a_training_loop_computes_the_same_with_the_operators(peers, name, kind):
    before, losses, grads, _ = iteration(peers, name, kind)
    with patch(name):
        after, our_losses, our_grads, ratios = iteration(peers, name, kind)
    for (x, x_next, log_prob), (our_x, our_next, our_log_prob) in zip(before, after):
        close(our_x, x)
        close(our_next, x_next)
        close(our_log_prob, log_prob, **LOG_PROB_TOL)
    close(our_losses, losses, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(our_grads, grads):
        close(ours, theirs, rtol=1e-3, atol=2e-4 * theirs.abs().max().item())
    assert torch.equal(ratios, torch.ones_like(ratios)), "a replay must have the rollout's bits"
    again, again_losses, again_grads, _ = iteration(peers, name, kind)
    assert torch.equal(again_losses, losses) and all(map(torch.equal, again_grads, grads)), (
        "unpatch must restore"
    )


@pytest.mark.parametrize("name", LOOPS)
def test_the_operators_are_what_runs(peers, name, monkeypatch):
    """The comparison above would hold with nothing replaced."""
    calls = []
    monkeypatch.setattr(
        steps, "sde_step", lambda *a, **k: calls.append("sde_step") or ek.sde_step(*a, **k)
    )
    monkeypatch.setattr(
        steps, "sde_log_prob", lambda *a, **k: calls.append("log_prob") or ek.sde_log_prob(*a, **k)
    )
    iteration(peers, name, LOOPS[name][1][0])
    assert not calls
    with patch(name):
        calls.clear()
        iteration(peers, name, LOOPS[name][1][0])
        assert {"sde_step", "log_prob"} <= set(calls)


@pytest.mark.parametrize("name, kind", [case for case in CASES if case != ("dance_grpo", "ode")])
def test_a_drawn_sample_carries_the_gradient_of_the_original(peers, name, kind):
    """Where the velocity has a gradient and no sample is given: through the sample, its log-prob
    and the mean."""
    x, v = torch.randn(2, *SHAPE, generator=generator(1))

    def gradient():
        step, _ = LOOPS[name][0](peers, kind)
        torch.manual_seed(8)
        velocity = v.clone().requires_grad_()
        x_next, log_prob, mean, _ = step(velocity, 1, x, None, generator(2))
        return torch.autograd.grad(
            (x_next**2).sum() + (log_prob.exp()).sum() + (mean**2).sum(), velocity
        )[0]

    if name == "verl_omni":  # its rollout step keeps the books; index 0 is where a fresh one stands
        pytest.importorskip("diffusers")
    theirs = gradient()
    with patch(name):
        close(gradient(), theirs, rtol=1e-4, atol=1e-4)


def test_shapes_and_extras_of_flow_grpo(peers):
    module = sys.modules["flow_grpo.diffusers_patch.sd3_sde_with_logprob"]
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = stock_schedule(FlowMatchEulerDiscreteScheduler())
    x, v = torch.randn(2, 4, 16, 6, 6, generator=generator(1))

    def call(at, **more):
        return module.sde_step_with_logprob(
            scheduler, v, scheduler.timesteps[at], x, 0.5, None, generator(2), **more
        )

    for at, more in itertools.product(
        ([0, 4, 2, 3], [1]), ({}, {"return_sqrt_dt": True}, {"sde_type": "cps"})
    ):
        theirs = call(at, **more)
        with patch("flow_grpo"):
            ours = call(at, **more)
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs):
            close(our, their, **LOG_PROB_TOL)


@pytest.mark.parametrize("at", [[0, 4, 2, 3], [1]])
def test_a_timestep_for_all_samples_of_verl_omni(peers, at):
    module = sys.modules["verl_omni.pipelines.schedulers.flow_match_sde"]
    x, v, x_next = torch.randn(3, *SHAPE, generator=generator(1))

    def call():
        scheduler = stock_schedule(module.FlowMatchSDEDiscreteScheduler())
        return scheduler.sample_previous_step(
            sample=x,
            model_output=v,
            timestep=scheduler.timesteps[at],
            prev_sample=x_next,
            return_sqrt_dt=True,
        )

    theirs = call()
    with patch("verl_omni"):
        ours = call()
    assert [a.shape for a in ours] == [b.shape for b in theirs] and ours[-1].shape == (len(at),)
    for our, their in zip(ours, theirs, strict=True):
        close(our, their, **LOG_PROB_TOL)


def test_cps_without_noise_is_scored(peers):
    """Its last step has S = 0, and -mean(z^2) there is not 0 for another velocity."""
    step, timesteps = flow_grpo_loop(peers, "cps")
    last = len(timesteps) - 1
    x, v, x_next = torch.randn(3, *SHAPE, generator=generator(1))
    theirs = step(v, last, x, x_next, None)[1]
    with patch("flow_grpo"):
        ours = flow_grpo_loop(peers, "cps")[0](v, last, x, x_next, None)[1]
    assert (theirs < -0.1).all()
    close(ours, theirs)


@pytest.mark.parametrize("kind", ["Flow-SDE", "Dance-SDE", "CPS", "ODE"])
def test_calls_of_flow_factory(peers, kind):
    """Steps by both ends, levels as tensors, scalars, evaluation, fields as asked, bf16 latents."""
    module = sys.modules["flow_factory.scheduler.flow_match_euler_discrete"]
    x, v, x_next = torch.randn(3, *SHAPE, generator=generator(1))

    def calls():
        scheduler = stock_schedule(
            module.FlowMatchEulerDiscreteSDEScheduler(noise_level=0.5, dynamics_type=kind)
        )
        times = scheduler.timesteps
        batch = times[[0, 1, 2, 3]]
        yield scheduler.step(v, times[2], x, generator=generator(3))
        yield scheduler.step(
            v, times[2].item(), x, generator=generator(3), return_kwargs=["next_latents", "dt"]
        )
        yield scheduler.step(
            v, batch, x, timestep_next=batch - 90.0, noise_level=0.4, generator=generator(3)
        )
        yield scheduler.step(v, 640.0, x, timestep_next=480.0, noise_level=0.4, next_latents=x_next)
        levels = torch.tensor([0.2, 0.3, 0.4, 0.5])
        yield scheduler.step(
            v, batch, x, noise_level=levels, generator=generator(3), return_dict=False
        )
        yield scheduler.step(
            v,
            batch,
            x,
            sigma_max=0.95,
            noise_level=0.3,
            next_latents=x_next,
            compute_log_prob=False,
        )
        yield scheduler.step(
            v.bfloat16(), batch, x.bfloat16(), generator=generator(3), dynamics_type="CPS"
        )
        scheduler.is_eval = True
        yield scheduler.step(v, batch, x, generator=generator(3), compute_log_prob=False)

    theirs = list(calls())
    with patch("flow_factory"):
        ours = list(calls())
    for our, their in zip(ours, theirs):
        assert type(our) is type(their)
        our, their = ((v if isinstance(v, tuple) else list(v.items())) for v in (our, their))
        for a, b in zip(our, their, strict=True):
            if isinstance(a, tuple):
                assert a[0] == b[0]
                a, b = a[1], b[1]
            assert (a is None) == (b is None)
            if a is not None:
                close(a, b, **LOG_PROB_TOL)


@pytest.mark.parametrize(
    "rounds, std", list(itertools.product((True, False), ("diffusion", "std")))
)
def test_conventions_of_versions_are_found(peers, rounds, std, monkeypatch):
    """The same signature, another rounding, another `std_dev_t`."""
    cls = sys.modules[
        "flow_factory.scheduler.flow_match_euler_discrete"
    ].FlowMatchEulerDiscreteSDEScheduler
    monkeypatch.setattr(cls, "rounds", rounds)
    monkeypatch.setattr(cls, "dance_std", std)
    x, v = torch.randn(2, *SHAPE, generator=generator(1))

    def call():
        scheduler = stock_schedule(cls(noise_level=0.5, dynamics_type="Dance-SDE"))
        return scheduler.step(v, scheduler.timesteps[1], x.bfloat16(), generator=generator(3))

    theirs = call()
    with patch("flow_factory"):
        ours = call()
    close(ours.next_latents, theirs.next_latents)
    close(ours.std_dev_t, theirs.std_dev_t)
    assert torch.equal(ours.next_latents.bfloat16().float(), ours.next_latents) == rounds


@pytest.mark.parametrize(
    "constants, always_noisy", list(itertools.product((True, False), repeat=2))
)
def test_forks_of_dance_grpo(peers, constants, always_noisy):
    """MixGRPO's function has another name and stands in another module."""
    module = ModuleType("fastvideo.utils.sampling_utils")
    module.dance_grpo_step = original = peers.flux_step_of(constants, always_noisy)
    x, v, x_next = torch.randn(3, *SHAPE, generator=generator(1))
    sigmas = torch.tensor(ek.flow_sigmas(4))

    def calls():
        torch.manual_seed(0)
        for index, given, sde in itertools.product(
            (0, torch.tensor(2), 3), (None, x_next), (True, False)
        ):
            yield from module.dance_grpo_step(v, x, 0.4, sigmas, index, given, True, sde)
            yield from module.dance_grpo_step(v, x, 0.4, sigmas, index, given, False, sde)

    theirs = list(calls())
    with patch("dance_grpo", module=module) as patched:
        assert module.dance_grpo_step is not original and "sampling_utils.dance_grpo_step" in repr(
            patched
        )
        for our, their in zip(calls(), theirs, strict=True):
            close(our, their, **LOG_PROB_TOL)
    assert module.dance_grpo_step is original


@pytest.mark.parametrize("global_std", [False, True])
@pytest.mark.parametrize("columns", [None, 3])
def test_advantages_of_flow_grpo(peers, global_std, columns):
    rewards = (
        torch.randn(64, *([] if columns is None else [columns]), generator=generator(1)).numpy()
        * 0.1
        + 3.0
    )
    prompts = [f"prompt {i % 7}" for i in range(64)]
    trackers = [
        sys.modules["flow_grpo.stat_tracking"].PerPromptStatTracker(global_std) for _ in range(2)
    ]
    theirs = trackers[0].update(prompts, rewards)
    with patch("flow_grpo"):
        ours = trackers[1].update(prompts, rewards)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        assert trackers[1].stats.keys() == trackers[0].stats.keys()
        assert all(
            (trackers[1].stats[key] == trackers[0].stats[key]).all() for key in trackers[0].stats
        )
        assert trackers[1].history_prompts == trackers[0].history_prompts
        # Statistics of an earlier call join in, which is the original's own work; so are other
        # kinds.
        again = trackers[1].update(prompts, rewards * 2)
        np.testing.assert_array_equal(again, _unpatched_update(trackers[0], prompts, rewards * 2))
        trackers[1].clear()
        np.testing.assert_array_equal(trackers[1].update(prompts, rewards, type="rwr"), rewards)
        trackers[1].clear()
        infinite = np.where(np.arange(len(rewards)) == 0, np.inf, rewards.T).T
        trackers[0].clear()
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(
                trackers[1].update(prompts, infinite),
                _unpatched_update(trackers[0], prompts, infinite),
            )


def _unpatched_update(tracker, prompts, rewards):
    return type(tracker).update.__wrapped__(tracker, prompts, rewards)


def test_calls_that_are_not_covered_run_the_original(peers):
    """A gradient to the latents, float64, latents that are not fp32 where that is an error."""
    step, _ = flow_grpo_loop(peers, "sde")
    x, v = torch.randn(2, *SHAPE, generator=generator(1))

    def gradient():
        latents = x.clone().requires_grad_()
        return torch.autograd.grad(step(v, 1, latents, None, generator(2))[0].sum(), latents)[0]

    theirs = gradient(), step(v.double(), 1, x.double(), None, generator(2))[0]
    with patch("flow_grpo"):
        ours = gradient(), step(v.double(), 1, x.double(), None, generator(2))[0]
    assert all(map(torch.equal, ours, theirs))
    with patch("verl_omni"), pytest.raises(AssertionError):
        verl_omni_loop(peers, "sde")[0](v.bfloat16(), 1, x, x, None)


def test_bf16_velocities_of_flow_grpo(peers):
    step, _ = flow_grpo_loop(peers, "sde")
    x, v = torch.randn(2, *SHAPE, generator=generator(1)).bfloat16()
    theirs = step(v, 1, x, None, generator(2))
    with patch("flow_grpo"):
        ours = step(v, 1, x, None, generator(2))
        replay = step(v, 1, x, ours[0], None)
    for our, their in zip(ours, theirs):
        close(our, their, **LOG_PROB_TOL)
    assert torch.equal(replay[1], ours[1])


@pytest.mark.parametrize("name, kind", [(name, kinds[0]) for name, (_, kinds) in LOOPS.items()])
def test_philox_noise_is_a_function_of_seeds_drawn_from_the_generator(peers, name, kind):
    x, v = torch.randn(2, *SHAPE, generator=generator(1))

    def drawn(seed):
        torch.manual_seed(seed)
        return LOOPS[name][0](peers, kind)[0](v, 0, x, None, generator(seed))

    with patch(name):
        plain = drawn(3)
    with patch(name, noise="philox"):
        first, again, other = drawn(3), drawn(3), drawn(4)
        replay = LOOPS[name][0](peers, kind)[0](v, 0, x, first[0], None)
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], plain[0])
    if name != "dance_grpo":  # which returns x0 in the place of the mean
        seeds = torch.randint(2**63 - 1, (len(x),), generator=generator(3))
        noise = ek.philox_normal(seeds, 0, x.shape[1:])
        close(
            (first[0] - first[2]) / (plain[0] - plain[2]),
            noise / torch.randn(SHAPE, generator=generator(3)),
            rtol=1e-2,
            atol=1e-2,
        )
    assert torch.equal(replay[1], first[1])


def test_generators_a_sample(peers):
    """diffusers takes a list of generators; each keeps its meaning."""
    x, v = torch.randn(2, *SHAPE, generator=generator(1))
    step, _ = flow_grpo_loop(peers, "sde")

    def drawn():
        return step(v, 0, x, None, [generator(i) for i in range(len(x))])[0]

    theirs = drawn()
    with patch("flow_grpo"):
        close(drawn(), theirs)
    with patch("flow_grpo", noise="philox"):
        alone = step(v[2:3], 0, x[2:3], None, [generator(2)])[0]
        assert torch.equal(drawn()[2:3], alone)


# Patching


def test_importers_are_rebound_and_restored(peers, monkeypatch):
    module = sys.modules["flow_grpo.diffusers_patch.sd3_sde_with_logprob"]
    original = module.sde_step_with_logprob
    importer = ModuleType("train_flux")
    importer.sde_step_with_logprob = importer.step = original
    late = ModuleType("train_late")
    for made in (importer, late):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    patched = patch("flow_grpo")
    ours = module.sde_step_with_logprob
    assert ours is not original and importer.sde_step_with_logprob is ours and importer.step is ours
    late.sde_step_with_logprob = ours  # `from … import` after the patch
    assert len(patched.replaced) == 2
    unpatch("flow_grpo")
    assert module.sde_step_with_logprob is original and importer.step is original
    assert importer.sde_step_with_logprob is original and late.sde_step_with_logprob is original


def test_signatures_and_names_are_the_originals(peers):
    module = sys.modules["flow_grpo.diffusers_patch.sd3_sde_with_logprob"]
    original = module.sde_step_with_logprob
    with patch("flow_grpo"):
        assert inspect.signature(module.sde_step_with_logprob) == inspect.signature(original)
        assert module.sde_step_with_logprob.__name__ == "sde_step_with_logprob"
        with pytest.raises(TypeError, match="unexpected"):
            module.sde_step_with_logprob(None, None, None, None, eta=1.0)


def test_another_signature_is_refused_and_nothing_is_replaced(peers, monkeypatch):
    cls = sys.modules[
        "flow_factory.scheduler.flow_match_euler_discrete"
    ].FlowMatchEulerDiscreteSDEScheduler
    step = cls.step
    monkeypatch.setattr(cls, "step", lambda self, noise_pred, timestep, latents, eta=1.0: None)
    held = cls.step
    with pytest.raises(
        IntegrationError,
        match=r"takes \(noise_pred, timestep, latents, eta=1.0\).*: \(noise_pred, t",
    ):
        patch("flow_factory")
    assert cls.step is held
    monkeypatch.setattr(cls, "step", step)
    patch("flow_factory")


def test_other_results_are_refused(peers, monkeypatch):
    """A version that clips its diffusion coefficient: the same signature, another result."""
    monkeypatch.setattr(peers, "flow_g", lambda sigma, top, level: torch.full_like(sigma, 0.45))
    reason = "results are not those of a version known: output . of call 0"
    with pytest.raises(IntegrationError, match=reason):
        patch("flow_factory")
    for name in ("flow_grpo", "verl_omni"):  # which have another seam
        with pytest.warns(UserWarning, match=reason), patch(name):
            pass
    monkeypatch.setattr(peers, "flow_g", lambda sigma, top, level: 1 / 0)
    with pytest.raises(IntegrationError, match="the probe raises ZeroDivisionError"):
        patch("flow_factory")


def test_what_cannot_be_patched_says_why(peers, monkeypatch):
    with pytest.raises(
        IntegrationError,
        match=r"patch: 'trl' \(accepted: flow_grpo, flow_factory, verl_omni, dance",
    ):
        patch("trl")
    with pytest.raises(IntegrationError, match=r"noise: 'own' \(accepted: generator, philox\)"):
        patch("flow_grpo", noise="own")
    with pytest.raises(IntegrationError, match="module: 'flow_grpo' has seams in several modules"):
        patch("flow_grpo", module="flow_grpo")
    with pytest.raises(IntegrationError, match="no_such_module: cannot be imported"):
        patch("dance_grpo", module="no_such_module")
    with pytest.raises(IntegrationError, match="math: has no flux_step or dance_grpo_step"):
        patch("dance_grpo", module="math")
    with pytest.raises(
        IntegrationError, match=r"unpatch: 'flow_grpo' is not patched \(accepted: nothing is\)"
    ):
        unpatch("flow_grpo")
    patch("flow_grpo")
    with pytest.raises(IntegrationError, match="'flow_grpo' is patched already"):
        patch("flow_grpo")
    monkeypatch.delattr(
        sys.modules[
            "flow_factory.scheduler.flow_match_euler_discrete"
        ].FlowMatchEulerDiscreteSDEScheduler,
        "step",
    )
    with pytest.raises(IntegrationError, match=r"has no FlowMatchEulerDiscreteSDEScheduler\.step"):
        patch("flow_factory")


def test_a_context_that_was_unpatched_within_leaves_a_later_patch_alone(peers):
    with patch("flow_grpo"):
        unpatch("flow_grpo")
        patch("flow_grpo", noise="philox")
    unpatch("flow_grpo")


def test_a_timestep_outside_the_schedule_is_an_error(peers):
    module = sys.modules["flow_grpo.diffusers_patch.sd3_sde_with_logprob"]
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = stock_schedule(FlowMatchEulerDiscreteScheduler())
    x = torch.zeros(SHAPE)
    with (
        patch("flow_grpo"),
        pytest.raises(ValueError, match=r"timestep must be one of the scheduler's .* \[123.0\]"),
    ):
        module.sde_step_with_logprob(scheduler, x, torch.tensor([123.0]), x)


def test_a_schedule_changed_in_place_is_read_again():
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    assert steps.on_host(sigmas) == (1.0, 0.5, 0.0)
    sigmas[1] = 0.25
    assert steps.on_host(sigmas) == (1.0, 0.25, 0.0)


def test_a_rollout_under_inference_mode_leaves_nothing_that_training_cannot_save(peers):
    module = sys.modules["flow_grpo.diffusers_patch.sd3_sde_with_logprob"]
    from diffusers import FlowMatchEulerDiscreteScheduler

    x, v = torch.randn(2, *SHAPE, generator=generator(1))
    with patch("flow_grpo"):
        with torch.inference_mode():
            scheduler = stock_schedule(
                FlowMatchEulerDiscreteScheduler(shift=1.7)
            )  # a schedule not seen before
            x_next = module.sde_step_with_logprob(scheduler, v, scheduler.timesteps[[1]], x, LEVEL)[
                0
            ]
        v = v.clone().requires_grad_()
        at = scheduler.timesteps[[1]].clone()
        module.sde_step_with_logprob(scheduler, v, at, x, LEVEL, prev_sample=x_next.clone())[
            1
        ].sum().backward()
    assert v.grad.abs().max() > 0


class Syncs(TorchDispatchMode):
    """Counts what waits for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
        )
        return func(*args, **(kwargs or {}))


def test_looks_at_the_host_do_not_grow_with_the_batch(peers):
    """The original looks twice a sample. The one look left is the check of a CPU timestep; on a GPU
    there is none,
    as the test below shows."""

    def looks(batch):
        from diffusers import FlowMatchEulerDiscreteScheduler

        module = sys.modules["flow_grpo.diffusers_patch.sd3_sde_with_logprob"]
        scheduler = stock_schedule(FlowMatchEulerDiscreteScheduler(shift=3.0))
        x = torch.zeros(batch, 4, 4)
        at = scheduler.timesteps[1].expand(batch)
        module.sde_step_with_logprob(scheduler, x, at, x, LEVEL)  # reads the schedule
        with Syncs() as syncs:
            module.sde_step_with_logprob(scheduler, x, at, x, LEVEL)
        return syncs.count

    assert looks(8) >= 2 * 8
    with patch("flow_grpo"):
        assert looks(8) == looks(2) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("noise", ["generator", "philox"])
def test_a_patched_step_never_waits_for_the_gpu(peers, noise):
    from diffusers import FlowMatchEulerDiscreteScheduler

    module = sys.modules["flow_grpo.diffusers_patch.sd3_sde_with_logprob"]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5, device="cuda")
    x, v = torch.randn(2, *SHAPE, device="cuda")
    at = scheduler.timesteps[1].expand(len(x))
    with patch("flow_grpo", noise=noise):
        first = module.sde_step_with_logprob(scheduler, v, at, x, LEVEL)  # reads the schedule
        torch.cuda.set_sync_debug_mode("error")
        try:
            module.sde_step_with_logprob(scheduler, v, at, x, LEVEL)
            replay = module.sde_step_with_logprob(scheduler, v, at, x, LEVEL, prev_sample=first[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(replay[1], first[1])
    missing = module.sde_step_with_logprob
    with patch("flow_grpo"):
        out = module.sde_step_with_logprob(scheduler, v, at + 1, x, LEVEL)
        assert out[0].isnan().all() and missing is not module.sde_step_with_logprob


def test_importing_the_patcher_is_light():
    code = (
        "import sys, editr2.integrations; print(*{'diffusers', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
