"""Pictures of real handwritten digits: the UCI set that scikit-learn ships, 1,797 images of 8x8 pixels."""

import random
from pathlib import Path

DIGIT_PIXELS = 32  # one digit fills one tile of the mini start model
TEST_SHARE = 0.25  # of the digit images; they appear in no training picture


class Painter:
    """Puts digits of one split side by side and saves the picture."""

    def __init__(self, output: Path, seed: int):
        from sklearn.datasets import load_digits

        self.output = output
        self.rng = random.Random(f"pictures {seed}")
        bunch = load_digits()
        self.images, self.labels = bunch.images, bunch.target
        order = list(range(len(self.labels)))
        random.Random("digits of the test split").shuffle(order)  # the same split for every seed
        cut = round(TEST_SHARE * len(order))
        self.split = {"test": order[:cut], "train": order[cut:]}

    def __call__(self, name: str, num_digits: int, split: str) -> tuple[str, list[int]]:
        import numpy as np
        from PIL import Image

        chosen = [self.rng.choice(self.split[split]) for _ in range(num_digits)]
        ink = np.concatenate([self.images[i] for i in chosen], axis=1) / 16  # (8, 8 n), 0 is paper and 1 is ink
        picture = Image.fromarray((255 * (1 - 0.9 * ink)).round().astype("uint8"), mode="L")
        picture = picture.resize((DIGIT_PIXELS * num_digits, DIGIT_PIXELS), Image.Resampling.BICUBIC)
        picture.save(self.output / "images" / f"{name}.png")
        return f"images/{name}.png", [int(self.labels[i]) for i in chosen]
