"From a trained classifier to the folder that is served."
from pathlib import Path

from fastai.basics import Learner

from fastrecipes.arguments import checked
from fastrecipes.errors import BadName, BadValue
from fastrecipes.production.bundle import Bundle, write_bundle
from fastrecipes.production.ensembles import Ensemble
from fastrecipes.production.export import graph_of
from fastrecipes.production.gate import Compressed, costs_too_much
from fastrecipes.production.pretrained import ship_published
from fastrecipes.production.quantized import Quantized
from fastrecipes.report.run_folder import STAGES, load_run

__all__ = ['ship']


@checked
def ship(learn, out: str = 'bundle', *, weights: str | None = None, overwrite: bool = False) -> Bundle:
    """Ship a trained classifier: a bundle that runs without torch, written once it answers as the Learner does on every validation image.

    A bundle holds model.onnx (pixels in, probabilities out), bundle.json (labels, input, metrics, checksums, provenance) and
    requirements.txt. What is quantized must answer exactly as the graph that was accepted. Raises `ValueError`, and leaves nothing
    behind, where one answer differs: another best label, or a probability off by more than 1e-4; where a compressed graph is further from
    the original than its `tolerance`; where `out` is there already; and where the images do not come from `image_folder`.

    Args:
        learn: a fitted Learner, an `Ensemble` of networks, what `compress` gave, the run folder that one of them was left in, or the name of a network, such
            as densenet121, which is shipped as it was published, with its weights and labels
        out: the folder to write
        weights: of a network by name, a file of all its weights in place of the published ones
        overwrite: replace the bundle in that folder
    """
    if isinstance(learn, (str, Path)):
        folder = Path(learn)
        if folder.suffix == '.pkl':
            raise BadValue(f'learn: {learn} is an exported Learner, without data to verify a bundle on; give the run folder, or load_learner it and give it data (learn.dls = …)')
        if isinstance(learn, str) and not folder.exists() and '/' not in learn and '\\' not in learn: return _published(learn, out, weights, overwrite)
        learn = load_run(folder)
        if (folder/STAGES).is_file(): learn = Compressed.load(learn, folder)
    if weights: raise BadValue('weights: they are for a network by name, such as densenet121; what was trained has its own')
    if isinstance(learn, Ensemble): learn = learn.as_learner()
    if isinstance(learn, Learner):      # of one in 8 bits the graph is what is shipped: the last bit of a pixel in float may round to another step than in torch
        return write_bundle(learn, out, overwrite=overwrite, accepted=graph_of(learn) if isinstance(learn.model, Quantized) else None)
    if not isinstance(learn, Compressed): raise BadValue(f'learn: an Ensemble, a fitted Learner, what compress gave or a run folder, got {type(learn).__name__}')

    if costs_too_much(learn.accepted.change, learn.tolerance):
        raise BadValue(f'ship: the accepted graph is {learn.accepted.change} from the original on validation images, at most −{learn.tolerance:g} is allowed')
    return write_bundle(learn.learn, out, overwrite=overwrite, accepted=learn.onnx if learn.quantized else None, compression=[s.record() for s in learn.stages])


def _published(name: str, out, weights, overwrite: bool) -> Bundle:
    try: return ship_published(name, out, weights=weights, overwrite=overwrite)
    except BadName as e: raise BadName(f'{e}. There is no run folder of that name either') from None
