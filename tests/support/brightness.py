"""A scorer in a file of its own, as a user writes one: brightness, each call noted in the file $SCORED, slowly."""

import os
import time

import numpy as np


class Scorer:
    name = "brightness"
    version = "1"

    def __call__(self, images, prompts):
        values = [float(np.asarray(image).mean()) / 255 for image in images]
        for value, prompt in zip(values, prompts, strict=True):
            time.sleep(float(os.environ.get("SCORING_TIME", "0")))
            with open(os.environ["SCORED"], "a") as file:  # noqa: PTH123
                file.write(f"{os.getpid()} {value!r} {prompt}\n")
        return values


def load(device):
    return Scorer()
