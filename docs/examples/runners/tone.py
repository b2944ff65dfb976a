"""A runner that turns text into sound: `MODEL_RUNNER=tone:Tone`. Each letter is a tone."""

import io
import wave

import numpy as np
from pydantic import Field

from generation_runner import Context, File, Output, Parameters, Runner

RATE = 22_050  # samples per second
LOWEST = 220.0  # hertz; the tone of the letter `a`
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class ToneParameters(Parameters):
    """What is played, and how fast."""

    text: str = Field(min_length=1, max_length=200)
    seconds_per_letter: float = Field(default=0.1, gt=0, le=1)


class Tone(Runner[ToneParameters]):
    """Plays the letters of a text on a scale; every other character is a pause."""

    parameters = ToneParameters
    name = "tone"
    version = "1.0"

    def run(self, parameters: ToneParameters, context: Context) -> Output:
        """Write a WAV file: mono, 16 bits."""
        times = np.arange(int(RATE * parameters.seconds_per_letter)) / RATE
        parts = []
        for number, letter in enumerate(parameters.text.lower()):
            height = LETTERS.find(letter)
            if height < 0:
                parts.append(np.zeros_like(times))
            else:
                parts.append(np.sin(2 * np.pi * LOWEST * 2 ** (height / 12) * times))
            context.step(number + 1, len(parameters.text))
        if not any(part.any() for part in parts):
            context.warn("the text has no letter: the file is silent")
        return File(_wav(np.concatenate(parts)), "audio/wav", "wav")


def _wav(samples: "np.ndarray") -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(RATE)
        writer.writeframes((samples * 20_000).astype("<i2").tobytes())
    return file.getvalue()
