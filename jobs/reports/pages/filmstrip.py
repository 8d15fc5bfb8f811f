"""The reconstructions of fixed samples at several steps of a training."""

import json
from dataclasses import dataclass, field

from jobs.reports.pages.example import Example
from jobs.reports.pages.pictures import as_array, as_url, shrunk
from jobs.reports.pages.sounds import as_waveform, spectrogram_url

MOST_FRAMES = 10
SIDE = 128  # pixels


@dataclass
class Filmstrip:
    """keys and originals of the samples, and a frame of their reconstructions for each step. All are data URLs."""

    keys: list[str] = field(default_factory=list)
    originals: list[str] = field(default_factory=list)
    frames: dict[int, list[str]] = field(default_factory=dict)

    def add(self, examples: list[Example], step: int) -> None:
        """Adds a frame. If there are too many, every second one goes, but not the first and the last."""
        self.keys = [one.key for one in examples]
        self.originals = [_small(one, 0) for one in examples]
        self.frames[step] = [_small(one, 1) for one in examples]
        steps = sorted(self.frames)
        if len(steps) > MOST_FRAMES:
            for gone in steps[1:-1:2]:
                del self.frames[gone]

    def to_json(self) -> bytes:
        return json.dumps({"keys": self.keys, "originals": self.originals, "frames": self.frames}).encode()

    @classmethod
    def from_json(cls, data: bytes, until: int) -> "Filmstrip":
        """until: the step that training resumes from; later frames are of a run that was killed."""
        stored = json.loads(data)
        frames = {int(step): urls for step, urls in stored["frames"].items() if int(step) <= until}
        return cls(stored["keys"], stored["originals"], frames)


def _small(one: Example, side: int) -> str:
    if one.mime.startswith("image/"):
        return as_url(shrunk(as_array(one.views[side]), SIDE), lossless=False)
    return spectrogram_url(*as_waveform(one.files[side]), size=(240, 90))
