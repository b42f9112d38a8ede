"""Rotary position embeddings: parameters and frequencies, by the arithmetic of transformers' `modeling_rope_utils`, so
that a runtime's own formula can be checked against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Linear:
    """All angles divided by `factor` (position interpolation)."""

    factor: float


@dataclass(frozen=True)
class Llama3:
    """Llama-3.1's rule: long wavelengths divided by `factor`, short ones kept, a ramp in between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al. 2023).  `attention_factor` is the net magnitude of cos and sin."""

    factor: float
    original_context_length: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


Scaling = Linear | Llama3 | Yarn | None


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one layer: base `theta`, `dim` rotated dimensions per head, optional scaling."""

    theta: float
    dim: int
    scaling: Scaling = None

    @property
    def attention_factor(self) -> float:
        """Factor on cos and sin; 1 unless the scaling is YaRN."""
        return self.scaling.attention_factor if isinstance(self.scaling, Yarn) else 1.0

    def plain_inverse_frequencies(self) -> NDArray[np.float64]:
        """Unscaled angles per position, [dim / 2]."""
        import numpy as np

        return np.asarray(self.theta ** (-np.arange(0, self.dim, 2) / self.dim), np.float64)

    def inverse_frequencies(self) -> NDArray[np.float64]:
        """Angles per position after scaling, [dim / 2]."""
        plain = self.plain_inverse_frequencies()
        match self.scaling:
            case None:
                return plain
            case Linear(factor):
                return plain / factor
            case Llama3():
                return _llama3(plain, self.scaling)
            case Yarn():
                return _yarn(plain, self.theta, self.dim, self.scaling)


def _llama3(plain: NDArray[np.float64], s: Llama3) -> NDArray[np.float64]:
    import numpy as np

    wavelength = 2 * math.pi / plain
    smooth = (s.original_context_length / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    ramped = (1 - smooth) * plain / s.factor + smooth * plain
    scaled = np.where(wavelength > s.original_context_length / s.low_freq_factor, plain / s.factor, ramped)
    return np.where(wavelength < s.original_context_length / s.high_freq_factor, plain, scaled)


def _yarn(plain: NDArray[np.float64], theta: float, dim: int, s: Yarn) -> NDArray[np.float64]:
    import numpy as np

    def dimension(rotations: float) -> float:
        return dim * math.log(s.original_context_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)
    return np.asarray(plain / s.factor * ramp + plain * (1 - ramp), np.float64)
