"""Centred kernel alignment of two sets of features of the same tokens, without bias.

Papers: Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019,
arXiv 1905.00414; Song et al., "Feature Selection via Dependence Maximization", JMLR 2012, eq. 5.
"""

import torch

from megamoe.moe.losses import TINY

FEWEST_TOKENS = 8
"""With fewer, an estimate says nothing; with 3, it does not exist."""


def cka(x_NP: torch.Tensor, y_NP: torch.Tensor, kernel: str, sigma: float) -> torch.Tensor:
    """HSIC(K, M) / sqrt(HSIC(K, K) HSIC(M, M)): 1 for equal features, about 0 for unrelated ones.

    Args:
        kernel: "linear", or "rbf" of width `sigma` times the median distance, which has no gradient.
    """
    k_NN, m_NN = (_hollow_kernel(features_NP, kernel, sigma) for features_NP in (x_NP, y_NP))
    scale = _hsic(k_NN, k_NN).clamp_min(0) * _hsic(m_NN, m_NN).clamp_min(0)
    return _hsic(k_NN, m_NN) / (scale + TINY**2).sqrt()


def _hollow_kernel(x_NP: torch.Tensor, kernel: str, sigma: float) -> torch.Tensor:
    """The kernel matrix with a diagonal of 0."""
    if kernel == "linear":
        k_NN = x_NP @ x_NP.t()
    else:
        lengths_N = x_NP.square().sum(1)
        squares_NN = (lengths_N[:, None] + lengths_N - 2 * x_NP @ x_NP.t()).clamp_min(0)
        off_diagonal = ~torch.eye(len(x_NP), dtype=torch.bool, device=x_NP.device)
        width = sigma * squares_NN.detach()[off_diagonal].median().sqrt()
        k_NN = (-squares_NN / (2 * width.square() + TINY)).exp()
    return k_NN - k_NN.diagonal().diag()


def _hsic(k_NN: torch.Tensor, m_NN: torch.Tensor) -> torch.Tensor:
    """The unbiased estimate, of kernel matrices whose diagonal is 0."""
    n = len(k_NN)
    k_N, m_N = k_NN.sum(1), m_NN.sum(1)
    corrected = (k_NN * m_NN).sum() + k_N.sum() * m_N.sum() / ((n - 1) * (n - 2))
    return (corrected - 2 / (n - 2) * torch.dot(k_N, m_N)) / (n * (n - 3))
