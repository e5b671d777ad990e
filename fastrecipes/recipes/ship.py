"From a trained classifier to the folder that is served."
from pathlib import Path

from fastai.basics import Learner

from fastrecipes.errors import BadValue
from fastrecipes.production.bundle import Bundle, write_bundle

__all__ = ['ship']


def ship(learn, out: str = 'bundle', *, overwrite: bool = False) -> Bundle:
    """Ship a trained classifier: a bundle that runs without torch, written once it answers as the Learner does on every validation image.

    A bundle holds model.onnx (pixels in, probabilities out), bundle.json (labels, input, metrics, checksums, provenance) and
    requirements.txt. Raises `ValueError`, and leaves nothing behind, where one answer differs: another best label, or a probability
    off by more than 1e-4; where `out` is there already; and where the images do not come from `image_folder`.

    Args:
        learn: a fitted Learner, or the run folder that it was left in
        out: the folder to write
        overwrite: replace the bundle in that folder
    """
    if isinstance(learn, (str, Path)):
        from fastrecipes.report.run_folder import load_run
        learn = load_run(learn)
    if not isinstance(learn, Learner): raise BadValue(f'learn: a fitted Learner or a run folder, got {type(learn).__name__}')

    return write_bundle(learn, out, overwrite=overwrite)
