"The same numbers again, and memory given back."
import gc
import os
import random
import sys
from numbers import Integral

import numpy as np
import torch

from fastrecipes.errors import BadValue

__all__ = ['seed_everything', 'clean_mem']


def seed_everything(seed: int = 42) -> int:
    """Seed Python, NumPy, torch (every device) and, through torch, all that is keyed here; make cuDNN deterministic; return `seed`.

    0 ≤ seed < 2**32. `PYTHONHASHSEED` is set too, but reaches only processes started afterwards: this one's hashes are drawn.
    Call it before the DataLoaders are made: fastai's own draw their seed then."""
    if not isinstance(seed, Integral) or not 0 <= seed < 2**32: raise BadValue(f'seed: a whole number from 0 to 2**32-1, got {seed!r}')
    seed = int(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    os.environ['PYTHONHASHSEED'] = str(seed)
    return seed


def clean_mem():
    "Free what nobody refers to any more: Python's cycles (a Learner is one), the last traceback's frames, and the GPU's cached blocks."
    for name in ('last_traceback', 'last_exc', 'last_value', 'last_type'):
        if hasattr(sys, name): delattr(sys, name)
    gc.collect()
    if torch.cuda.is_available(): torch.cuda.empty_cache()
