"""Fused operators for reinforcement learning of flow-matching image editors.

Every sampler step is an affine Gaussian transition read from a table; noise is counter-based; a
sample is rounded to its storage dtype before it is scored. Importing this touches no GPU, compiler
or network.
"""

from .awm_loss import awm_log_prob, awm_loss
from .backends import BackendStatus, backends
from .compat import COMPAT, Compat
from .credit import CREDIT_PRESETS, CreditOptions
from .dynamics import DYNAMICS, LOG_PROBS, SOLVERS, Coefficients, Dynamics, ScheduleStep
from .group_advantage import GroupAdvantage, group_advantage, group_advantage_ref
from .grpo_loss import KL_SCALES, GrpoLoss, GrpoMetrics, grpo_loss, grpo_loss_ref
from .guidance import RENORMS, guided_velocity
from .nft_loss import NftLoss, NftMetrics, nft_loss, nft_loss_ref, nft_optimality
from .philox import INITIAL_STEP, philox_normal, philox_normal_ref
from .sde_log_prob import SdeLogProb, sde_log_prob, sde_log_prob_ref
from .sde_step import SdeStep, sde_step, sde_step_ref
from .table import COLUMNS, flow_sigmas, transition_table
from .token_log_prob import TokenLogProb, token_log_prob, token_log_prob_ref

__all__ = [
    "COLUMNS",
    "COMPAT",
    "CREDIT_PRESETS",
    "DYNAMICS",
    "INITIAL_STEP",
    "KL_SCALES",
    "LOG_PROBS",
    "RENORMS",
    "SOLVERS",
    "BackendStatus",
    "Coefficients",
    "Compat",
    "CreditOptions",
    "Dynamics",
    "GroupAdvantage",
    "GrpoLoss",
    "GrpoMetrics",
    "NftLoss",
    "NftMetrics",
    "ScheduleStep",
    "SdeLogProb",
    "SdeStep",
    "TokenLogProb",
    "awm_log_prob",
    "awm_loss",
    "backends",
    "flow_sigmas",
    "group_advantage",
    "group_advantage_ref",
    "grpo_loss",
    "grpo_loss_ref",
    "guided_velocity",
    "nft_loss",
    "nft_loss_ref",
    "nft_optimality",
    "philox_normal",
    "philox_normal_ref",
    "sde_log_prob",
    "sde_log_prob_ref",
    "sde_step",
    "sde_step_ref",
    "token_log_prob",
    "token_log_prob_ref",
    "transition_table",
]
