"""Watching the loss: spikes beside its running average, and steps that had to be left out."""

import math

_SETTLED_STEPS = 50  # the first steps fall too fast for an average
_WEIGHT = 0.02  # of a new loss in the running averages: they follow some fifty steps
_LEAST_DEVIATION = 0.005  # share of the loss; what varies less never spikes by rounding


class LossWatch:
    """Running mean and variance of the finite losses, and how many steps in a row were skipped.

    `spike_deviations`: a loss so many standard deviations above the mean is a spike (0: none is); it does not enter
    the averages. `max_skipped`: so many skipped steps in a row are too many. `state` and `restore` carry all of it over
    a resume.
    """

    def __init__(self, spike_deviations: float, max_skipped: int):
        self._deviations, self._max_skipped = spike_deviations, max_skipped
        self._steps, self._mean, self._variance, self.skipped_in_a_row = 0, 0.0, 0.0, 0

    def is_spike(self, loss: float) -> bool:
        """Take the loss of one more step that was not skipped."""
        excess = loss - self._mean
        deviation = max(math.sqrt(self._variance), _LEAST_DEVIATION * abs(self._mean))
        if self._deviations and self._steps >= _SETTLED_STEPS and excess > self._deviations * deviation:
            return True
        self._steps += 1
        weight = max(_WEIGHT, 1 / self._steps)
        self._mean += weight * excess
        self._variance = (1 - weight) * (self._variance + weight * excess**2)
        return False

    def count(self, was_skipped: bool) -> bool:
        """Count a step; whether too many in a row were skipped."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if was_skipped else 0
        return self.skipped_in_a_row >= self._max_skipped

    def state(self) -> dict:
        """JSON values that `restore` takes."""
        return {
            "steps": self._steps,
            "mean": self._mean,
            "variance": self._variance,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def restore(self, state: dict) -> None:
        """Go on where `state` was taken."""
        self._steps, self._mean, self._variance = state["steps"], state["mean"], state["variance"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
