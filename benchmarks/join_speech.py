"""Joins utterances in random order, with pauses, to sounds of up to 30 seconds: calibration data without transcripts.

Whisper pads every utterance to 30 seconds, so that long ones cost nothing, and the same utterances in other company are
other inputs. The dense model writes the transcripts (see `load_speech`).

python benchmarks/join_speech.py speech-a --out speech-joined
"""

import argparse
import random
from pathlib import Path

import numpy as np
import soundfile

LONGEST = 29.0
"""Seconds; Whisper hears 30."""

PAUSES = (0.05, 0.3)
"""Seconds, after each utterance."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of .flac or .wav files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=170)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    files = sorted(path for path in options.source.rglob("*") if path.suffix in (".flac", ".wav"))
    heard = [soundfile.read(file, dtype="float32") for file in files]
    draw = random.Random(options.seed)
    options.out.mkdir(parents=True)
    for number in range(options.count):
        wanted = draw.choice([5, 10, 15, 20, 25, LONGEST])
        samples, rate = joined(draw.sample(heard, len(heard)), wanted, draw)
        soundfile.write(options.out / f"joined-{number:03}.wav", samples, rate)


def joined(heard: list[tuple[np.ndarray, int]], wanted: float, draw: random.Random) -> tuple[np.ndarray, int]:
    """Join the first utterances until there are `wanted` seconds; those that would exceed `LONGEST` are passed over."""
    parts, seconds, rate = [], 0.0, heard[0][1]
    for samples, _ in heard:
        pause = draw.uniform(*PAUSES)
        own = len(samples) / rate + pause
        if seconds < wanted and seconds + own <= LONGEST:
            parts += [samples, np.zeros(round(pause * rate), np.float32)]
            seconds += own
    return np.concatenate(parts), rate


if __name__ == "__main__":
    main()
