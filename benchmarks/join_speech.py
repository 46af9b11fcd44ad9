"""Joins utterances in random order, with pauses, to sounds of up to 30 seconds: calibration data without transcripts.

Whisper pads every utterance to 30 seconds, so that long ones cost nothing, and the same utterances in other company are
other inputs. The dense model writes the transcripts (see `load_speech`).

Sounds of other rates are resampled to that of Whisper.

python benchmarks/join_speech.py speech-a --out speech-joined
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

LONGEST = 29.0
"""Seconds; Whisper hears 30."""

PAUSES = (0.05, 0.3)
"""Seconds, after each utterance."""

RATE = 16_000
"""Samples a second."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+", help="folders of .flac or .wav files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=170)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    join(options.sources, options.out, options.count, options.seed)


def join(sources: Sequence[Path], out: Path, count: int, seed: int = 0) -> None:
    """Write `count` joined sounds of the utterances in `sources` to the new folder `out`."""
    files = [path for source in sources for path in sorted(source.rglob("*")) if path.suffix in (".flac", ".wav")]
    heard = [read(file) for file in files]
    draw = random.Random(seed)
    out.mkdir(parents=True)
    for number in range(count):
        wanted = draw.choice([5, 10, 15, 20, 25, LONGEST])
        samples = joined(draw.sample(heard, len(heard)), wanted, draw)
        soundfile.write(out / f"joined-{number:03}.wav", samples, RATE)


def read(file: Path) -> np.ndarray:
    samples, rate = soundfile.read(file, dtype="float32")
    return samples if rate == RATE else resample_poly(samples, RATE, rate).astype(np.float32)


def joined(heard: list[np.ndarray], wanted: float, draw: random.Random) -> np.ndarray:
    """Join the first utterances until there are `wanted` seconds; those that would exceed `LONGEST` are passed over."""
    parts, seconds = [], 0.0
    for samples in heard:
        pause = draw.uniform(*PAUSES)
        own = len(samples) / RATE + pause
        if seconds < wanted and seconds + own <= LONGEST:
            parts += [samples, np.zeros(round(pause * RATE), np.float32)]
            seconds += own
    return np.concatenate(parts)


if __name__ == "__main__":
    main()
