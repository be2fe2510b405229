"""Checks that a user's own model computes the same on meshes as on one device.

comparison -> program (loss and gradients), proportions (wrong gradients), diagnosis
(wrong losses) -> alterations (batches that wrong programs compute on).
"""

from usp_jax.checking.comparison import Comparison, MeshComparison, check

__all__ = ["Comparison", "MeshComparison", "check"]
