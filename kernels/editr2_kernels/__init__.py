"""Fused operators for reinforcement learning of flow-matching image editors.

Every sampler step is an affine Gaussian transition read from a table; noise is counter-based; a sample is rounded to
its storage dtype before it is scored. Importing this touches no GPU, compiler or network.
"""

from .backends import BackendStatus, backends
from .group_advantage import CREDIT_PRESETS, CreditOptions, GroupAdvantage, group_advantage, group_advantage_ref
from .philox import INITIAL_STEP, philox_normal, philox_normal_ref
from .sde_log_prob import SdeLogProb, sde_log_prob, sde_log_prob_ref
from .sde_step import SdeStep, sde_step, sde_step_ref
from .table import COLUMNS, DYNAMICS, flow_sigmas, transition_table

__all__ = [
    "COLUMNS",
    "CREDIT_PRESETS",
    "DYNAMICS",
    "INITIAL_STEP",
    "BackendStatus",
    "CreditOptions",
    "GroupAdvantage",
    "SdeLogProb",
    "SdeStep",
    "backends",
    "flow_sigmas",
    "group_advantage",
    "group_advantage_ref",
    "philox_normal",
    "philox_normal_ref",
    "sde_log_prob",
    "sde_log_prob_ref",
    "sde_step",
    "sde_step_ref",
    "transition_table",
]
