"""Feather for JAX: train a neural network sparse, from scratch, in one run."""

from feather_jax.asl import asl_init, asl_loss, asl_sparsify, asl_thresholds
from feather_jax.budget import budget_thresholds
from feather_jax.compact import load, load_metadata, save
from feather_jax.erdos_renyi import erdos_renyi_kernel
from feather_jax.feather import Feather
from feather_jax.leaves import named_leaves
from feather_jax.macs import Macs, count_macs
from feather_jax.magnitude import block_magnitude
from feather_jax.masks import path_mask, prunable_weights
from feather_jax.n_m import n_m_thresholds
from feather_jax.operator import sparsify, threshold_operator
from feather_jax.schedule import cubic_schedule, default_theta
from feather_jax.selection import global_threshold, layer_thresholds
from feather_jax.summary import Summary, summarize
from feather_jax.transform import keep_zeros, scale_pruned_gradients

__version__ = "0.1.0"

__all__ = [
    "Feather",
    "Macs",
    "Summary",
    "asl_init",
    "asl_loss",
    "asl_sparsify",
    "asl_thresholds",
    "block_magnitude",
    "budget_thresholds",
    "count_macs",
    "cubic_schedule",
    "default_theta",
    "erdos_renyi_kernel",
    "global_threshold",
    "keep_zeros",
    "layer_thresholds",
    "load",
    "load_metadata",
    "n_m_thresholds",
    "named_leaves",
    "path_mask",
    "prunable_weights",
    "save",
    "scale_pruned_gradients",
    "sparsify",
    "summarize",
    "threshold_operator",
]
