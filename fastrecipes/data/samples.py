"Real data that need no download."
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from fastrecipes.errors import BadValue
from fastrecipes.randomness import stream

__all__ = ['digits']


def digits(path, imbalance: float = 1., seed: int = 42) -> Path:
    """Write scikit-learn's 1,797 scanned digits (8×8 px, 10 classes) to `path/<digit>/*.png`; return `path`.

    `imbalance`: how many times more images the commonest class keeps than the rarest, falling geometrically from 0 to 9 (1–100).
    Files that are there already are kept. Source: doi:10.24432/C50P49, through `sklearn.datasets.load_digits`."""
    if not 1 <= imbalance <= 100: raise BadValue(f'imbalance: 1 to 100, got {imbalance}')
    path, data = Path(path), load_digits()
    for digit in range(10):
        own = stream(seed, 'digits', digit).permutation(np.flatnonzero(data.target == digit))
        (path/str(digit)).mkdir(parents=True, exist_ok=True)
        for i in sorted(own[:max(3, round(len(own)*imbalance**(-digit/9)))]):
            file = path/str(digit)/f'{i:04}.png'
            if not file.exists(): Image.fromarray((data.images[i]*255/16).round().astype(np.uint8)).save(file)
    return path
