"""Linear-Gaussian contextual bandits: tensors in, tensors out, no knowledge of transformers."""

from dht.bandit.posterior import Arms, LinearPosterior
from dht.bandit.thompson import codebook, mean_scores, nearest_in_codebook, sample_scores, top_k
from dht.bandit.ucb import choose, ucb_index

__all__ = [
    "Arms",
    "LinearPosterior",
    "choose",
    "codebook",
    "mean_scores",
    "nearest_in_codebook",
    "sample_scores",
    "top_k",
    "ucb_index",
]
