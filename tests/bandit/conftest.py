"""The textbook that the bandits are checked against, and one thread, so that the small matrices stay fast."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch


class Textbook:
    """LinUCB's ridge regressions, one arm and one row at a time, float64 NumPy.

    The inverse is advanced with Sherman & Morrison, as Li et al. 2010 do; with forgetting it is inverted afresh.
    """

    def __init__(self, num_arms: int, num_features: int, num_targets: int, ridge: np.ndarray, forgetting: float = 1.0):
        self.ridge = ridge
        self.forgetting = forgetting
        self.inverse = [np.eye(num_features) / ridge[a] for a in range(num_arms)]
        self.gram = [np.zeros((num_features, num_features)) for _ in range(num_arms)]
        self.moment = [np.zeros((num_features, num_targets)) for _ in range(num_arms)]
        self.pulls = np.zeros(num_arms)

    def update(self, context: np.ndarray, weight: np.ndarray, target: np.ndarray) -> None:
        eye = np.eye(context.shape[1])
        for phi, weights, rewards in zip(context, weight, target, strict=True):
            for a, (w, r) in enumerate(zip(weights, rewards, strict=True)):
                seen = w * np.outer(phi, phi)
                self.gram[a] = self.forgetting * self.gram[a] + seen
                self.moment[a] = self.forgetting * self.moment[a] + (w * np.outer(phi, r) if w else 0.0)
                self.pulls[a] = self.forgetting * self.pulls[a] + w
                if self.forgetting == 1.0:
                    step = self.inverse[a] @ phi
                    self.inverse[a] = self.inverse[a] - w * np.outer(step, step) / (1.0 + w * phi @ step)
                else:
                    self.inverse[a] = np.linalg.inv(self.ridge[a] * eye + self.gram[a])

    def mean(self) -> np.ndarray:
        return np.stack([inverse @ moment for inverse, moment in zip(self.inverse, self.moment, strict=True)])

    def width(self, context: np.ndarray) -> np.ndarray:
        return np.sqrt([[phi @ inverse @ phi for inverse in self.inverse] for phi in context])


@pytest.fixture
def textbook() -> type[Textbook]:
    return Textbook


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
