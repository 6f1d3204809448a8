"""Spikes of the loss beside its running average."""

import math

_SETTLED_STEPS = 50  # the first steps fall too fast for an average
_WEIGHT = 0.02  # of a new loss in the running averages: they follow some fifty steps
_LEAST_DEVIATION = 0.005  # share of the loss; what varies less never spikes by rounding


class LossWatch:
    """Running mean and variance of the losses.

    `spike_deviations`: a loss so many standard deviations above the mean is a spike (0: none is); it does not enter
    the averages. `state` and `restore` carry them over a resume.
    """

    def __init__(self, spike_deviations: float):
        self._deviations = spike_deviations
        self._steps, self._mean, self._variance = 0, 0.0, 0.0

    def observe(self, loss: float) -> bool:
        """Take the finite loss of one more step: it is a spike (True), or enters the averages (False)."""
        if self._is_spike(loss):
            return True
        self._steps += 1
        excess, weight = loss - self._mean, max(_WEIGHT, 1 / self._steps)
        self._mean += weight * excess
        self._variance = (1 - weight) * (self._variance + weight * excess**2)
        return False

    def _is_spike(self, loss: float) -> bool:
        if not self._deviations or self._steps < _SETTLED_STEPS:
            return False
        deviation = max(math.sqrt(self._variance), _LEAST_DEVIATION * abs(self._mean))
        return loss - self._mean > self._deviations * deviation

    def state(self) -> dict:
        """JSON values that `restore` takes."""
        return {"steps": self._steps, "mean": self._mean, "variance": self._variance}

    def restore(self, state: dict) -> None:
        """Go on where `state` was taken."""
        self._steps, self._mean, self._variance = state["steps"], state["mean"], state["variance"]
