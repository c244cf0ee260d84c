"""What other trainers compute, as arguments of the operators here: presets for comparing with them
and replacing them.

    preset = COMPAT["flow_grpo"]
    table = preset.transition_table(sigmas, dynamics="flow-sde", noise_level=0.7)
    step = sde_step(x, v, table, step_index, seed, score=preset.score)
    loss = grpo_loss(..., v_ref=v_ref, kl_weight=0.04, **preset.grpo_for("flow-sde"))
    advantage = group_advantage(scores, group, preset.credit).advantage

A preset holds what a project's code fixes. What its recipes choose (noise level, clip range,
weights of losses) stays an argument. Each scores the sample before it is cast to its storage dtype,
so `score` is "unrounded": with a dtype below fp32 the log-prob of a replay then differs from the
rollout's, which `score="stored"`, the default of `sde_step`, exists to avoid.

Sources: the projects' published code, read between November 2025 and August 2026.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from .credit import CREDIT_PRESETS, CreditOptions
from .dynamics import DYNAMICS, LogProb
from .table import transition_table


@dataclass(frozen=True)
class Compat:
    """One project's conventions.

    log_prob: by dynamics, `log_prob` of the transition table; its keys are the dynamics that the
        project has.
    score: `score` of `sde_step`.
    grpo: keywords of `grpo_loss` that the project's policy loss fixes, but for kl_scale; empty
        where it has none.
    kl_scale: by dynamics, `kl_scale` of `grpo_loss`; "step" where there is no entry.
    nft: keywords of `nft_loss`; empty where it has none.
    credit: options of `group_advantage`.
    renorm: `renorm` of `sde_step` by model family; families without an entry use none.
    note: what an argument here cannot express, or expresses under another name.
    """

    log_prob: Mapping[str, LogProb]
    credit: CreditOptions
    score: Literal["stored", "unrounded"] = "unrounded"
    grpo: Mapping[str, Any] = field(default_factory=dict)
    kl_scale: Mapping[str, str] = field(default_factory=dict)
    nft: Mapping[str, Any] = field(default_factory=dict)
    renorm: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def log_prob_of(self, dynamics: str) -> LogProb | None:
        """`log_prob` of the table; None for the ODE, which has none. Raises ValueError for dynamics
        that the project does not have."""
        deterministic = dynamics in DYNAMICS and not DYNAMICS[dynamics].stochastic
        if dynamics not in self.log_prob and not deterministic:
            raise ValueError(
                f"dynamics {dynamics!r} is not in this compat preset, which has "
                f"{', '.join(self.log_prob)}"
            )
        return self.log_prob.get(dynamics)

    def transition_table(
        self,
        sigmas: Sequence[float] | Tensor,
        *,
        dynamics: str = "flow-sde",
        log_prob: LogProb | None = None,
        **options: Any,
    ) -> Tensor:
        """`transition_table` with the log-prob as the project has it, where none is given.

        options: its other keywords. Raises ValueError, also for dynamics that the project does not
        have.
        """
        published = self.log_prob_of(dynamics)
        if log_prob is None:
            log_prob = published
        return transition_table(sigmas, dynamics=dynamics, log_prob=log_prob, **options)

    def grpo_for(self, dynamics: str) -> dict[str, Any]:
        """The keywords of `grpo_loss`. Raises ValueError for dynamics that the project does not
        have."""
        self.log_prob_of(dynamics)
        return {**self.grpo, "kl_scale": self.kl_scale.get(dynamics, "step")}


def _credit(name: str) -> CreditOptions:
    """Peers clamp the advantage in the loss, where `grpo_loss` and `nft_optimality` do it too."""
    return replace(CREDIT_PRESETS[name], clip=None)


_FLOW_GRPO = Compat(
    log_prob={"flow-sde": "full", "cps": "unscaled"},
    credit=_credit("flow-grpo"),
    grpo={"advantage_clip": 5.0},
    kl_scale={"flow-sde": "diffusion"},
    renorm={"qwen_image": "token"},
    note="std over the group; over the batch: replace(credit, std='global'). Statistics in "
    "float64 there.",
)

COMPAT: dict[str, Compat] = {
    "flow_grpo": _FLOW_GRPO,
    "flow_grpo_wan": replace(
        _FLOW_GRPO,
        log_prob={"wan-sde": "full"},
        kl_scale={},
        renorm={},
    ),
    "flow_grpo_bagel": replace(
        _FLOW_GRPO,
        log_prob={"flow-sde": "scaled"},
        renorm={},
        note="renorm is a setting there: 'global', 'channel' or 'text_channel', within a "
        "guidance_interval.",
    ),
    "dance_grpo": Compat(
        log_prob={"dance-sde": "full"},
        credit=_credit("dance-grpo"),
        grpo={"advantage_clip": 5.0},
        note="The last step is not trained on and the image is its x0: a deterministic row here.",
    ),
    "mixgrpo": Compat(
        log_prob={"flow-sde": "full", "dance-sde": "scaled", "dpm++sde": "full"},
        credit=_credit("mixgrpo"),
        grpo={"advantage_clip": 5.0},
        note="Its KL, half the mean square of log p - log p_old, is `metrics.approx_kl` of "
        "`grpo_loss`. Its Dance-SDE loses the constants of log p, which cancel in the ratio.",
    ),
    "diffusion_nft": Compat(
        log_prob={"ddim-sde": "full"},
        credit=_credit("flow-grpo"),
        nft={"advantage_max": 5.0, "ref_weight": 1e-4, "min_weight": 1e-5},
        note="std over the group; over the batch: replace(credit, std='global'). The loss runs "
        "in float64 there.",
    ),
    "flow_factory": Compat(
        log_prob={"flow-sde": "full", "dance-sde": "full", "cps": "unscaled"},
        credit=_credit("flow-factory"),
        grpo={"advantage_clip": 5.0},
        kl_scale={"flow-sde": "mean", "dance-sde": "mean", "cps": "mean"},
        renorm={"qwen_image": "token"},
        note="A KL in v instead of x: kl_scale='velocity'. Several rewards by GDPO: "
        "CREDIT_PRESETS['gdpo'].",
    ),
    "verl_omni": Compat(
        log_prob={"flow-sde": "full", "dance-sde": "full", "cps": "unscaled"},
        credit=_credit("verl-omni"),
        grpo={"advantage_clip": 5.0},
        kl_scale={"flow-sde": "diffusion", "dance-sde": "diffusion"},
        renorm={"qwen_image": "token"},
        note="include_logprob_normalizer=False is log_prob='scaled'; Dr. GRPO is "
        "replace(credit, std='none'). Its GRPO-Guard uses batch means of S: equal to guard=True "
        "where a batch is at one step.",
    ),
}
