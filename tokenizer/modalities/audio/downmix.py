"""Weights of the channels of surround sound in a mono signal, by ITU-R BS.775."""

import numpy as np

RULES = ("bs775", "mean")
HALF_POWER = 0.5**0.5
# BS.775-3, annex 4, table 2, mono from 3/2: C + 0.7071 (L + R) + 0.5 (LS + RS). It leaves the subwoofer out. A single
# surround channel (BC) is 0.7071 (LS + RS) there. The standard has no further channels; they count like the nearest one
WEIGHTS = {
    **{"FC": 1.0, "FL": HALF_POWER, "FR": HALF_POWER, "FLC": HALF_POWER, "FRC": HALF_POWER, "BC": HALF_POWER},
    **{"BL": 0.5, "BR": 0.5, "SL": 0.5, "SR": 0.5, "LFE": 0.0, "LFE2": 0.0},
}


def mono_weights(names: tuple[str, ...]) -> np.ndarray | None:
    """Weight of each channel: float32 [C] with sum 1, so that mono is no louder than full scale.

    names: FFmpeg's, such as FL. None if a channel has no name with a weight: then all count alike.
    """
    weights = np.array([WEIGHTS.get(name, np.nan) for name in names])
    if not weights.sum() > 0:
        return None
    return (weights / weights.sum()).astype(np.float32)
