"""Experts in fewer bytes: barycenter and residuals (ResMoE), pruning, low rank, merging, dropping."""
