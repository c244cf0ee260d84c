"""What a run, or an evaluation, is about to do, in a few lines for the terminal."""

from __future__ import annotations

from editr2.config import Config, PolicyConfig
from editr2.errors import counted
from editr2.policies.base import Policy, parameter_count
from editr2.policies.configured import policy_class
from editr2.rewards.base import weights_of
from editr2.rewards.panel import Panel
from editr2.rl.sampler import Sampler
from editr2.run.tracking import duration
from editr2.sessions.source import SessionSource


def opening(
    config: Config,
    source: SessionSource,
    policy: Policy,
    reward: Panel,
    sampler: Sampler,
    *,
    given: bool = False,
    done: int = 0,
    seconds: float = 0.0,
) -> list[str]:
    """Where a run's results go and what it does, at most six lines. given: whether the policy was
    given ready made. done, seconds: iterations that a resumed run has done, and the time they
    took."""
    r, t = config.rollout, config.train
    kind = f"{type(policy).__name__}, given ready made" if given else _named(config.policy)
    parts = {
        "results": f"{config.out}: report.html at the end, metrics.jsonl as it goes",
        "policy": f"{kind}; {_trained(config.policy, policy)}",
        "data": _sessions(config, source),
        "judges": f"{judges_told(config, reward)}; {_evaluated(config, source)}",
        "method": f"{t.loss}, credit {config.credit.preset}, {_steps(sampler, r.dynamics)}",
        "run": f"{_iterations(t.iterations, done, seconds)}, of "
        f"{counted(r.sessions, 'session')} x {r.siblings} siblings",
    }
    return [f"{name:<9}{text}" for name, text in parts.items()]


def sessions_told(config: Config, source: SessionSource) -> str:
    """Of an evaluation that belongs to no run."""
    count = counted(len(source.heldout), "session")
    if path := config.data.heldout or config.data.path:
        return f"{count} of {path}"
    return f"{count}, the shapes world's held-out ones"


def sampled_by(config: Config, sampler: Sampler) -> str:
    stochastic = config.eval.sampler == "rollout"
    return _steps(sampler, config.rollout.dynamics if stochastic else "ode")


def judges_told(config: Config, reward: Panel) -> str:
    """The rewards by their settings' names, with the weight of each score."""
    names = [use.name or use.function or "world" for _, use in config.reward.uses]
    weights = weights_of(reward.names, config.credit.weights)
    scores = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
    return f"{' and '.join(names)} ({scores})"


def _named(policy: PolicyConfig) -> str:
    kind = policy_class(policy.model)
    own = getattr(kind, "hub_id", None) or kind.default_weights
    return f"{policy.model}, {policy.weights or own}"


def _trained(config: PolicyConfig, policy: Policy) -> str:
    trains, all_ = (parameter_count(policy.module, trainable_only=only) for only in (True, False))
    if config.lora_rank:
        return f"LoRA of rank {config.lora_rank} trains, {_short(trains)} weights"
    return f"{_short(trains)} of {_short(all_)} weights train"


def _short(count: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return str(count)


def _sessions(config: Config, source: SessionSource) -> str:
    if source.sessions is None:
        return f"endless sessions of the shapes world, {counted(source.turns, 'turn')} each"
    return f"{counted(len(source.sessions), 'session')} of {config.data.path}"


def _evaluated(config: Config, source: SessionSource) -> str:
    if config.eval.off:
        return "no evaluation"
    kind = "training" if source.heldout_is_training else "held-out"
    when = f", every {config.eval.every}" if config.eval.every else ""
    return f"{counted(len(source.heldout), f'{kind} session')} before{when} and after"


def _steps(sampler: Sampler, dynamics: str) -> str:
    if not sampler.window:
        return f"{counted(sampler.steps, 'step')} of an ODE"
    return f"{counted(sampler.steps, 'step')} of {dynamics} ({sampler.window} with noise)"


def _iterations(all_: int, done: int, seconds: float) -> str:
    if done >= all_:
        return f"all {all_} iterations are done" if all_ > 1 else "its 1 iteration is done"
    if not done:
        return counted(all_, "iteration")
    each = seconds / done
    left = f" (about {duration(each * (all_ - done))} at {each:.3g} s each)" if each else ""
    are = "is" if all_ - done == 1 else "are"
    return f"{all_ - done} of {all_} iterations {are} left{left}"
