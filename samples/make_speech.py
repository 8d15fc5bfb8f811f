"""Choose clips of freely licensed telephone prompts for the speech shards: unchanged g722, transcript, attribution.

    python samples/make_speech.py build/speech

Needs apt-get with package lists (run `apt-get update` once), dpkg-deb, and what make_tiles.py imports. Writes
OUT_DIR/train, OUT_DIR/heldout and OUT_DIR/ood; samples/speech/README.md names the speakers and the licence.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from make_tiles import unpack_deb

SEED = 20240
VERSION = "1.6.1-1"
LICENCE = "CC-BY-SA-3.0"
BYTES_PER_SECOND = 8000  # g722 at 64 kbit/s: two samples of 16 kHz per byte
SECONDS = (0.3, 15.0)
SHARED_WORDS = 5  # a training clip shares no run of this many words with a held-out one

# Tones, beeps and monkeys. Clips under silence/ are also left out.
NOT_SPEECH = {
    *("ascending-2tone", "descending-2tone", "beep", "beeperr", "confbridge-join", "confbridge-leave", "tt-monkeys"),
    "vm-intro",  # ends in a tone
}


class Voice(NamedTuple):
    """One speaker of the Asterisk core sounds."""

    code: str
    language: str
    folder: str
    speaker: str


class Clip(NamedTuple):
    """One recording; name is its path under the speaker's folder, without the extension."""

    voice: Voice
    name: str
    text: str
    data: bytes


class Split(NamedTuple):
    """The maximum length of a split in seconds."""

    name: str
    voice: Voice
    seconds: float


ENGLISH = Voice("en", "en-US", "en_US_f_Allison", "Allison Smith")
FRENCH = Voice("fr", "fr-CA", "fr_CA_f_June", "June Wallack")

# Held-out clips are drawn first. Training clips are those that share no phrase with them.
SPLITS = (Split("heldout", ENGLISH, 55), Split("train", ENGLISH, 285), Split("ood", FRENCH, 55))
# for experiments, as large as the packages allow; not for the repository
ALL = (Split("heldout", ENGLISH, 180), Split("train", ENGLISH, float("inf")), Split("ood", FRENCH, 180))


def package(voice: Voice) -> str:
    return f"asterisk-core-sounds-{voice.code}-g722={VERSION}"


def fetch(voice: Voice, folder: Path) -> None:
    """Unpack a voice's sounds, and its transcripts from another package."""
    for name in (package(voice), f"asterisk-core-sounds-{voice.code}={VERSION}"):
        target = folder / name
        target.mkdir(parents=True)
        unpack_deb(name, target)


def read_transcripts(voice: Voice, folder: Path) -> dict[str, str]:
    """Name to words; a remark in brackets, such as `at [@]`, is not spoken."""
    name = f"asterisk-core-sounds-{voice.code}"
    file = folder / f"{name}={VERSION}" / f"usr/share/doc/{name}/core-sounds-{voice.code}.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    pairs = [line.split(":", 1) for line in lines if ":" in line and not line.startswith(";")]
    return {name.strip(): " ".join(re.sub(r"\[.*?\]|\(.*?\)", "", text).split()) for name, text in pairs}


def read_clips(voice: Voice, folder: Path) -> list[Clip]:
    """All clips of speech with a transcript and a suitable length; only one of several with the same words."""
    sounds = folder / package(voice) / "usr/share/asterisk/sounds" / voice.folder
    chosen: dict[tuple[str, ...], Clip] = {}
    for name, text in sorted(read_transcripts(voice, folder).items()):
        file = sounds / f"{name}.g722"
        if name in NOT_SPEECH or name.startswith("silence/") or not words(text) or not file.exists():
            continue
        if SECONDS[0] <= file.stat().st_size / BYTES_PER_SECOND <= SECONDS[1]:
            chosen.setdefault(words(text), Clip(voice, name, text, file.read_bytes()))
    return list(chosen.values())


def words(text: str) -> tuple[str, ...]:
    """Lower-case words without punctuation."""
    return tuple(re.findall(r"\w+", text.lower()))


def phrases(clip: Clip) -> set[tuple[str, ...]]:
    """Every run of SHARED_WORDS words."""
    spoken = words(clip.text)
    return {spoken[i : i + SHARED_WORDS] for i in range(len(spoken) - SHARED_WORDS + 1)}


def draw(clips: list[Clip], split: Split) -> list[Clip]:
    """Random clips up to the split's seconds."""
    left = split.seconds * BYTES_PER_SECOND
    drawn = []
    for clip in random.Random(f"{SEED}:{split.name}").sample(clips, len(clips)):
        if len(clip.data) <= left:
            drawn.append(clip)
            left -= len(clip.data)
    return drawn


def without(clips: list[Clip], drawn: list[Clip]) -> list[Clip]:
    """The clips that were not drawn and share no phrase with one that was."""
    names = {clip.name for clip in drawn}
    taken = set().union(*map(phrases, drawn))
    return [clip for clip in clips if clip.name not in names and not phrases(clip) & taken]


def write_clip(folder: Path, clip: Clip) -> None:
    """Write a clip's .g722, .txt and .json. The .json carries the attribution into the shards."""
    stem = folder / f"{clip.voice.code}_{clip.name.replace('/', '-')}"
    source = f"{package(clip.voice)}:usr/share/asterisk/sounds/{clip.voice.folder}/{clip.name}.g722"
    about = {
        "language": clip.voice.language,
        "speaker": clip.voice.speaker,
        "source_file": source,
        "licence": LICENCE,
    }
    stem.with_suffix(".g722").write_bytes(clip.data)
    stem.with_suffix(".txt").write_text(clip.text + "\n", encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps(about, ensure_ascii=False) + "\n", encoding="utf-8")


def write_splits(splits: tuple[Split, ...], out_dir: Path, sources: Path) -> None:
    """Draw and write every split, and print its size."""
    clips = {voice: read_clips(voice, sources) for voice in (ENGLISH, FRENCH)}
    for split in splits:
        drawn = draw(clips[split.voice], split)
        clips[split.voice] = without(clips[split.voice], drawn)
        (out_dir / split.name).mkdir(parents=True)
        for clip in drawn:
            write_clip(out_dir / split.name, clip)
        num_bytes = sum(len(clip.data) for clip in drawn)
        print(f"{split.name:8} {len(drawn):4d} clips  {num_bytes / BYTES_PER_SECOND / 60:.2f} min  {num_bytes} bytes")


def main() -> None:
    """Fetch the packages into a temporary folder and write the clips."""
    parser = argparse.ArgumentParser(description="Choose freely licensed speech clips for the sample shards.")
    parser.add_argument("out_dir", type=Path, help="folder that gets train/, heldout/ and ood/")
    parser.add_argument("--all", action="store_true", help="use all clips, for experiments")
    arguments = parser.parse_args()
    out_dir: Path = arguments.out_dir
    splits = ALL if arguments.all else SPLITS
    for split in splits:
        if (out_dir / split.name).exists():
            sys.exit(f"{out_dir / split.name} already exists; remove it first")
    with tempfile.TemporaryDirectory() as folder:
        for voice in (ENGLISH, FRENCH):
            fetch(voice, Path(folder))
        write_splits(splits, out_dir, Path(folder))


if __name__ == "__main__":
    main()
