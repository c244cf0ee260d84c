"""`patch` at the edges of what other projects accept: the same answer, or the original's own; and
what it says when a project is only partly there.

Each table has one row a case: a new one joins as a row.
"""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

import editr2.integrations as e
from editr2.errors import IntegrationError

SHAPE = (4, 12, 8)
FLOW_GRPO = "flow_grpo.diffusers_patch.sd3_sde_with_logprob"
TRACKER = "flow_grpo.stat_tracking"
FACTORY = "flow_factory.scheduler.flow_match_euler_discrete"
VERL_OMNI = "verl_omni.pipelines.schedulers.flow_match_sde"
VERL_OMNI_LOSS = "verl_omni.trainer.diffusion.diffusion_algos"
DANCE = "fastvideo.train_grpo_flux"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def latents(shape=SHAPE):
    x, v, x_next = torch.randn(3, *shape, generator=generator(1))
    return x, v.requires_grad_(), x_next


def scheduled(scheduler, count=5):
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / count, count), device="cpu")
    return scheduler


def flow_grpo(at=(1,), shape=SHAPE, given=False, **more):
    def call():
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = scheduled(FlowMatchEulerDiscreteScheduler(shift=3.0))
        x, v, x_next = latents(shape)
        more.update({"prev_sample": x_next} if given else {"generator": generator(2)})
        function = sys.modules[FLOW_GRPO].sde_step_with_logprob
        return v, function(scheduler, v, scheduler.timesteps[list(at)], x, **more)

    return "flow_grpo", call


def flow_factory(dynamics, given=False, **more):
    def call():
        cls = sys.modules[FACTORY].FlowMatchEulerDiscreteSDEScheduler
        scheduler = scheduled(cls(noise_level=0.5, dynamics_type=dynamics))
        x, v, x_next = latents()
        draw = {"next_latents": x_next} if given else {"generator": generator(2)}
        return v, scheduler.step(v, scheduler.timesteps[[0, 1, 2, 3]], x, **draw, **more)

    return "flow_factory", call


def verl_omni(at, given=False, **more):
    def call():
        scheduler = scheduled(sys.modules[VERL_OMNI].FlowMatchSDEDiscreteScheduler(shift=3.0))
        scheduler._init_step_index(scheduler.timesteps[2])
        x, v, x_next = latents()
        draw = {"prev_sample": x_next} if given else {"generator": generator(2)}
        timestep = None if at is None else scheduler.timesteps[list(at)]
        return v, scheduler.sample_previous_step(
            sample=x, model_output=v, timestep=timestep, return_sqrt_dt=True, **draw, **more
        )

    return "verl_omni", call


def dance_grpo(sigmas, eta=0.3, given=False):
    def call():
        x, v, x_next = latents()
        torch.manual_seed(3)
        function = sys.modules[DANCE].flux_step
        return v, function(
            v, x, eta, torch.tensor(sigmas), 0, x_next if given else None, True, True
        )

    return "dance_grpo", call


ANSWERS = {
    "one timestep of all samples: one sqrt(-dt)": verl_omni([1]),
    "a timestep a sample: a sqrt(-dt) each": verl_omni([0, 1, 2, 3]),
    "no timestep: a sqrt(-dt) a sample": verl_omni(None),
    "no timestep, replayed": verl_omni(None, given=True, sde_type="dance_sde"),
    "CPS above 1": verl_omni([1], noise_level=1.3, sde_type="cps"),
    "CPS above 1, replayed": verl_omni([1], given=True, noise_level=1.3, sde_type="cps"),
    "a level below 0": verl_omni([1], noise_level=-0.4, sde_type="dance_sde"),
    "CPS above 1 of flow_grpo": flow_grpo(noise_level=1.3, sde_type="cps"),
    "CPS above 1 of flow_grpo, replayed": flow_grpo(given=True, noise_level=1.3, sde_type="cps"),
    "a level below 0 of flow_grpo": flow_grpo(noise_level=-0.5),
    "a level that is infinite": flow_grpo(noise_level=float("inf")),
    "CPS above 1 of Flow-Factory": flow_factory("CPS", noise_level=1.2),
    "CPS above 1 of one sample": flow_factory(
        "CPS", noise_level=torch.tensor([0.5, 1.2, 0.3, 0.7])
    ),
    "a sigma_max above 1": flow_factory("Flow-SDE", noise_level=0.4, sigma_max=1.5),
    "a step that rises": flow_factory(
        "Flow-SDE", given=True, noise_level=0.4, timestep_next=torch.full((4,), 990.0)
    ),
    "ODE: a log-prob without gradient": flow_factory("ODE"),
    "ODE, replayed": flow_factory("ODE", given=True),
    "ODE without log-prob": flow_factory("ODE", compute_log_prob=False),
    "a schedule that rises": dance_grpo([0.4, 0.6, 0.2]),
    "a level below 0 of DanceGRPO": dance_grpo([0.9, 0.6, 0.2], eta=-0.3, given=True),
}


def leaves(value):
    if isinstance(value, Tensor):
        return [value]
    if value is None:
        return [None]
    parts = value.values() if hasattr(value, "values") else value
    return [leaf for part in parts for leaf in leaves(part)]


def answer(call):
    """Type of the result, its tensors, the gradient of what carries one; or the type of what was
    raised."""
    try:
        v, result = call()
    except Exception as error:
        return type(error), [], None
    tensors = leaves(result)
    carrying = [t for t in tensors if t is not None and t.requires_grad]
    grad = torch.autograd.grad(sum(t.square().sum() for t in carrying), v)[0] if carrying else None
    return type(result), tensors, grad


@pytest.mark.parametrize("name, call", ANSWERS.values(), ids=ANSWERS)
def test_a_call_has_the_answer_of_the_original(peers, name, call):
    kind, theirs, their_grad = answer(call)
    with e.patch(name):
        our_kind, ours, our_grad = answer(call)
    assert our_kind is kind and len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert (our is None) == (their is None)
        if their is not None:
            assert our.requires_grad == their.requires_grad
            torch.testing.assert_close(
                our, their, rtol=1e-5, atol=2e-5, equal_nan=True
            )  # as in test_integrations
    assert (our_grad is None) == (their_grad is None)
    if their_grad is not None:
        torch.testing.assert_close(our_grad, their_grad, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_the_flow_grpo_of_july_2025(peers, monkeypatch):
    """No `sde_type`, no `return_sqrt_dt`, and latents of four dimensions; three run the original,
    whatever it makes."""
    module = sys.modules[FLOW_GRPO]
    newer = module.sde_step_with_logprob

    def sde_step_with_logprob(
        scheduler, model_output, timestep, sample, noise_level=0.7, prev_sample=None, generator=None
    ):
        if sample.dim() != 4:
            raise RuntimeError("coefficients of four dimensions")
        return newer(scheduler, model_output, timestep, sample, noise_level, prev_sample, generator)

    monkeypatch.setattr(module, "sde_step_with_logprob", sde_step_with_logprob)
    for shape in ((4, 3, 6, 6), SHAPE):
        for at, given in (([1], False), ([0, 1, 2, 3], True)):
            _, call = flow_grpo(at, shape, given, noise_level=0.6)
            kind, theirs, _ = answer(call)
            with e.patch("flow_grpo") as patched:
                assert len(patched.replaced) == 2
                our_kind, ours, _ = answer(call)
            assert kind is our_kind and (kind is RuntimeError) == (len(shape) == 3)
            for our, their in zip(ours, theirs, strict=True):
                torch.testing.assert_close(our, their, rtol=1e-5, atol=2e-5)


# Advantages: scores far from 0 that hardly differ, where fp32 holds them and where it does not.

SCORES = {
    "about 25": 25 + 1e-3 * np.arange(4),
    "about 1e4": 1e4 + 1e-2 * np.arange(4),
    "about 1e7": 1e7 + 0.25 * np.arange(4),
    "fp32": (25 + 1e-3 * np.arange(4)).astype(np.float32),
    "not held by fp32": 1e9 + 0.25 * np.arange(4),
    "columns of their own size": np.stack([25 + 1e-3 * np.arange(4), 1e-3 * np.arange(4)], axis=1),
    "ordinary": np.array([0.1, 0.7, 0.3, 0.9]),
    "negative": -25 - 1e-3 * np.arange(4),
    "equal": np.full(4, 25.1),
    "beyond fp32": 1e300 * np.arange(4),
    "infinite": np.array([1.0, np.inf, 0.0, 2.0]),
}


@pytest.mark.parametrize("global_std", [False, True])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_advantages_are_those_of_float64(peers, scores, global_std):
    """Of two groups, the second as far away again: within fp32 rounding of values of size 1."""
    cls = sys.modules[TRACKER].PerPromptStatTracker
    rewards = np.concatenate([scores, 2 * scores])
    theirs = cls(global_std).update(list("aaaabbbb"), rewards)
    with e.patch("flow_grpo"):
        ours = cls(global_std).update(list("aaaabbbb"), rewards)
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6)


def test_the_advantages_of_25(peers):
    with e.patch("flow_grpo"):
        ours = sys.modules[TRACKER].PerPromptStatTracker().update(["a"] * 4, SCORES["about 25"])
    np.testing.assert_allclose(ours, [-1.231493, -0.410498, 0.410498, 1.231493], atol=2e-6)


# What is not there


def written(tmp_path, monkeypatch, text, name="train_grpo_own"):
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


ABSENT = {
    "no such project": (
        "no_such_project.train",
        None,
        "no_such_project.train: cannot be imported, it is not inst",
    ),
    "another version": (
        "json.no_such_module",
        None,
        "json is installed, but has no module json.no_such_module (acc",
    ),
    "a dependency": (
        "own",
        "import no_such_dependency",
        "installed, but raises ModuleNotFoundError: No module named",
    ),
    "a name": (
        "own",
        "from math import no_such_name",
        "it is installed, but raises ImportError: cannot import name",
    ),
    "a shared library": (
        "own",
        "raise OSError('libcuda.so.1: cannot open')",
        "raises OSError: libcuda.so.1: cannot",
    ),
    "any exception": (
        "own",
        "raise RuntimeError('no GPU\\nmore')",
        "raises RuntimeError: no GPU (accepted: a project",
    ),
    "no message": (
        "own",
        "assert False",
        "it is installed, but raises AssertionError (accepted: a project",
    ),
    "a script that ends": (
        "own",
        "raise SystemExit(2)",
        "it is installed, but raises SystemExit: 2 (accepted",
    ),
    "not Python": ("own", "def step(:", "it is installed, but raises SyntaxError: "),
}


@pytest.mark.parametrize("module, text, reason", ABSENT.values(), ids=ABSENT)
def test_why_a_project_cannot_be_imported(tmp_path, monkeypatch, module, text, reason):
    if text is not None:
        module = written(tmp_path, monkeypatch, text)
    with pytest.raises(IntegrationError) as raised:
        e.patch("dance_grpo", module=module)
    message = str(raised.value)
    assert (
        reason in message
        and "\n" not in message
        and message.startswith(module)
        and "(accepted: " in message
    )


def spoil_signature(monkeypatch):
    tracker = sys.modules[TRACKER].PerPromptStatTracker
    monkeypatch.setattr(tracker, "update", lambda self, prompts, rewards, weights=None: None)


def spoil_result(monkeypatch):
    monkeypatch.setattr(sys.modules[VERL_OMNI_LOSS].DiffusionNFTLoss, "negative_share", 2.0)


def spoil_import(monkeypatch):
    monkeypatch.setitem(sys.modules, VERL_OMNI_LOSS, None)  # which makes its import fail


def spoil_name(monkeypatch):
    monkeypatch.delattr(sys.modules[FLOW_GRPO], "sde_step_with_logprob")


PARTS = {
    "a signature": (
        "flow_grpo",
        spoil_signature,
        f"{FLOW_GRPO}.sde_step_with_logprob",
        f"{TRACKER}.PerPromptStatTracker.update",
        r"takes \(prompts, rewards, weights=None\) after its first argument \(accepted: "
        r"\(prompts, rewards",
    ),
    "a result": (
        "verl_omni",
        spoil_result,
        f"{VERL_OMNI}.FlowMatchSDEDiscreteScheduler.sample_previous_step",
        f"{VERL_OMNI_LOSS}.DiffusionNFTLoss.compute_loss",
        "its results are not those of a version known: output 0 of call 0 of the probe differs by",
    ),
    "a module": (
        "verl_omni",
        spoil_import,
        f"{VERL_OMNI}.FlowMatchSDEDiscreteScheduler.sample_previous_step",
        f"{VERL_OMNI_LOSS}.DiffusionNFTLoss.compute_loss",
        "cannot be imported",
    ),
    "a name": (
        "flow_grpo",
        spoil_name,
        f"{TRACKER}.PerPromptStatTracker.update",
        f"{FLOW_GRPO}.sde_step_with_logprob",
        "has no sde_step_with_logprob",
    ),
}


def held(full_name):
    """What stands at module.name or module.Class.name."""
    module = next(
        name
        for name in (FLOW_GRPO, TRACKER, VERL_OMNI, VERL_OMNI_LOSS)
        if full_name.startswith(f"{name}.")
    )
    value = sys.modules[module]
    for part in full_name[len(module) + 1 :].split("."):
        value = vars(value).get(part)
    return value


@pytest.mark.parametrize("name, spoil, works, refused, reason", PARTS.values(), ids=PARTS)
def test_what_is_refused_is_told_and_the_rest_works(
    peers, monkeypatch, name, spoil, works, refused, reason
):
    spoil(monkeypatch)
    absent = sys.modules.get(refused.rsplit(".", 2)[0], 0) is None
    before = held(works), None if absent else held(refused)
    with pytest.warns(UserWarning, match=rf"patch: '{name}' in part, .*{reason}") as told:
        patched = e.patch(name)
    assert len(told) == 1
    assert (
        list(patched.refused) == [refused]
        and "refused" in repr(patched)
        and len(patched.replaced) == 1
    )
    assert held(works) is not before[0]
    assert absent or held(refused) is before[1]
    e.unpatch(name)
    assert held(works) is before[0]


def test_a_project_that_is_whole_says_nothing(peers):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("flow_grpo", "flow_factory", "verl_omni", "dance_grpo"):
            with e.patch(name) as patched:
                assert not patched.refused


def test_the_originals_are_offered(peers):
    """A name of one's own, in any module, follows the patch; what is offered does not."""
    module, cls = sys.modules[FLOW_GRPO], sys.modules[VERL_OMNI_LOSS].DiffusionNFTLoss
    theirs = module.sde_step_with_logprob
    main = sys.modules["__main__"]
    main.my_handle = theirs
    try:
        with e.patch("flow_grpo") as patched, e.patch("verl_omni"):
            assert main.my_handle is module.sde_step_with_logprob is not theirs
            assert patched.originals[f"{FLOW_GRPO}.sde_step_with_logprob"] is theirs
            assert e.original("flow_grpo") == patched.originals
            loss = e.original("verl_omni")[f"{VERL_OMNI_LOSS}.DiffusionNFTLoss.compute_loss"]
            assert loss.__self__ is cls and not hasattr(loss, "__wrapped__")
        assert main.my_handle is theirs
    finally:
        del main.my_handle
    with pytest.raises(
        IntegrationError, match=r"original: 'flow_grpo' is not patched \(accepted: nothing is\)"
    ):
        e.original("flow_grpo")
