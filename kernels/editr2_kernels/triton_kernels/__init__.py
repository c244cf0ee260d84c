"""The Triton kernels of all operators and their launchers. Imported on first use, so that Triton is
too."""

from .common import INTERPRETED, OPTIONS
from .group import group_advantage
from .grpo import grpo_loss
from .nft import nft_loss, nft_loss_backward
from .replay import replay_backward, sde_log_prob
from .step import philox_normal, sde_step
from .tokens import token_log_prob, token_log_prob_backward

__all__ = [
    "INTERPRETED",
    "OPTIONS",
    "group_advantage",
    "grpo_loss",
    "nft_loss",
    "nft_loss_backward",
    "philox_normal",
    "replay_backward",
    "sde_log_prob",
    "sde_step",
    "token_log_prob",
    "token_log_prob_backward",
]
