"What goes into the network of a Learner and what comes out, once it is a graph: normalisation before it and probabilities after it, within."
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from fastai.basics import Learner, Pipeline, TensorImage, Transform, nn, noop
from fastai.callback.rnn import RNNCallback
from fastai.data.transforms import Normalize
from fastai.losses import BaseLoss
from fastai.tabular.core import TabDataLoader

from fastrecipes.data.loaders import first_sample, shapes
from fastrecipes.data.statistics import PixelMap, normalization_of
from fastrecipes.errors import BadValue
from fastrecipes.losses.classification import classes_of
from fastrecipes.losses.kinds import targets_of
from fastrecipes.production.export import activation_of, contract_if_any, labels, plain_network, served, two_pictures
from fastrecipes.randomness import forked

__all__ = ['Entry', 'entry_of', 'answer_of']


@dataclass(frozen=True)
class Entry:
    """A Learner's network as it leaves: `module`, on the CPU, from `inputs` to one `output`, 'probabilities' or 'predictions'.

    `example`: two samples. `kind`: 'pixels' of image files, 'images', 'table' or 'tensors'. `card`: the metadata that the file gets, text by name.
    `activation`: what makes the Learner's own outputs comparable; `decide`: its answers of these, None where there is nothing to decide."""
    module: nn.Module
    inputs: tuple[str, ...]
    output: str
    kind: str
    example: tuple[torch.Tensor, ...]
    card: dict[str, str]
    activation: Callable
    decide: Callable | None
    given: Callable = tuple             # the inputs of the network in a batch → those of `module`


def answer_of(loss_func, who: str) -> tuple[str, Callable, Callable | None]:
    "The name of what a network trained by `loss_func` gives, what makes it of the outputs, and what decides by it (None for numbers)."
    targets = targets_of(loss_func)
    if targets and targets.kind == 'numbers': return 'predictions', noop, None
    plain = isinstance(loss_func, BaseLoss) and type(loss_func).activation is BaseLoss.activation     # says nothing of probabilities
    if plain and targets is None: return 'predictions', noop, None
    over = targets and targets.kind == 'labels' and not classes_of(loss_func)
    if over and not callable(getattr(loss_func, 'activation', None)): return 'probabilities', torch.sigmoid, partial(_above, .5)
    if over: return 'probabilities', activation_of(loss_func, who), partial(_above, getattr(loss_func, 'thresh', .5))
    return 'probabilities', activation_of(loss_func, who), partial(torch.argmax, dim=targets.axis if targets else 1)


def _above(thresh, p): return p > thresh


def entry_of(learn: Learner, who: str) -> Entry:
    """How the data of `learn` enter its network: pixels of files (data of `image_folder`), images in [0, 1], columns of a table, or tensors as they are.

    Raises `ValueError`, in the name of `who`, for inputs that are no tensors, a loss that does not say what outputs are, and 8 bits on other data than files."""
    output, activation, decide = answer_of(learn.loss_func, who)
    common = dict(output=output, activation=activation, decide=decide)
    given = one_sample(learn, who)
    xb = twice(given)
    image = len(given) == 1 and isinstance(given[0], TensorImage) and given[0].is_floating_point()
    if contract := contract_if_any(learn):
        module = None if hasattr(learn.model, 'pixels_graph') else served(learn)
        return Entry(module, ('pixels',), kind='pixels', example=(two_pictures(contract),), card=dict(labels=json.dumps(labels(learn)), input=json.dumps(contract)), **common)
    if hasattr(learn.model, 'pixels_graph'): raise BadValue(f'{who}: of networks in 8 bits those on data of image_folder are written; the graph of this one is learn.model.graph')
    net, first = plain_network(learn, who), any(isinstance(cb, RNNCallback) for cb in learn.cbs)
    if isinstance(learn.dls.valid, TabDataLoader):
        module = Table(net, activation, *(columns := _spread(learn))[1:])
        card = dict(kind='table', categories={n: [str(v) for v in learn.dls.classes[n]] for n in learn.dls.cat_names}, continuous=list(learn.dls.cont_names),
                    numbers='in their own units, none missing')
        return Entry(module, ('categories', 'numbers'), kind='table', example=xb, card=_card(learn, output, card), given=partial(_in_units, *columns[1:]), **common)
    if image:
        card = dict(kind='images', shape=list(xb[0].shape[1:]), layout='NCHW', dtype='float32', pixels='as the transforms of the Learner make them, before they are normalised')
        return Entry(Images(net, activation, normalization_of(learn)), ('images',), kind='images', example=xb, card=_card(learn, output, card), **common)
    names = tuple(f'x{i}' for i in range(len(xb)))
    card = dict(kind='tensors', shapes=[list(x.shape[1:]) for x in xb], dtypes=[str(x.dtype).removeprefix('torch.') for x in xb])
    return Entry(Tensors(net, activation, first), names, kind='tensors', example=xb, card=_card(learn, output, card), **common)


class Images(nn.Module):
    "Images `(n, c, h, w)` as numbers → normalised → the model → what its outputs mean."
    def __init__(self, model: nn.Module, activation, normalize: PixelMap | None):
        super().__init__()
        self.model, self.activation, self.normalize = model, activation, normalize

    def forward(self, images): return self.activation(self.model(images if self.normalize is None else self.normalize(images)))


class Table(nn.Module):
    "Codes of categories `(n, k)` and numbers in their own units `(n, m)`, less `mean`, over `std` → the model → what its outputs mean."
    def __init__(self, model: nn.Module, activation, mean: torch.Tensor, std: torch.Tensor):
        super().__init__()
        self.model, self.activation = model, activation
        self.register_buffer('mean', mean.float())
        self.register_buffer('std', std.float())

    def forward(self, categories, numbers): return self.activation(self.model(categories, (numbers-self.mean)/self.std))


class Tensors(nn.Module):
    "Tensors as they are → the model → what its outputs mean; `first`: of several outputs the first, as an RNNCallback does."
    def __init__(self, model: nn.Module, activation, first: bool = False):
        super().__init__()
        self.model, self.activation, self.first = model, activation, first

    def forward(self, *xb):
        out = self.model(*xb)
        return self.activation(out[0] if self.first else out)


def one_sample(learn: Learner, who: str) -> tuple[torch.Tensor, ...]:
    "Inputs of the network, at least one sample, as fastai types them. Raises `ValueError` where there are none, or they are no tensors."
    try:
        with forked('export'): xb = seen[0] if (seen := first_sample(learn.dls)) is not None else tuple(learn.dls.one_batch()[:getattr(learn.dls, 'n_inp', 1)])
    except (ValueError, IndexError) as e: raise BadValue(f'{who}: there is no training sample to show the network; set learn.dls to DataLoaders that have some') from e
    if not all(isinstance(x, torch.Tensor) for x in xb): raise BadValue(f'{who}: the inputs must be tensors, got {", ".join(type(x).__name__ for x in xb)}')
    return xb


def twice(xb) -> tuple[torch.Tensor, ...]:
    "The first sample of inputs two times, on the CPU, in memory of their own: torch.export.save keeps all that an example points into."
    return tuple(torch.cat([x.detach().as_subclass(torch.Tensor).cpu()[:1]]*2) for x in xb)


def two_samples(learn: Learner) -> tuple[torch.Tensor, ...]:
    "Inputs for the network of `learn`, two samples, on the CPU. Raises `ValueError` as `one_sample` does."
    return twice(one_sample(learn, 'quantize'))


def _spread(learn: Learner) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    "The continuous columns with the mean and standard deviation that the table's Normalize took; 0 and 1 where it takes none."
    names, own = list(learn.dls.cont_names), next((p for p in learn.dls.procs if isinstance(p, Normalize)), None)
    mean, std = (torch.tensor([float(of.get(n, other)) for n in names], dtype=torch.float64) for of, other in ((own.means if own else {}, 0.), (own.stds if own else {}, 1.)))
    return names, mean, std


def _in_units(mean, std, xb): return xb[0], (xb[1].double()*std+mean).float()


def _card(learn: Learner, output: str, card: dict) -> dict[str, str]:
    "Metadata: how inputs are to come, and the classes where there are."
    vocab = getattr(learn.dls, 'vocab', None) if output == 'probabilities' else None
    if vocab is not None and len(vocab) and isinstance(vocab[-1], (list, tuple)): vocab = vocab[-1]        # of a text first its words, then the classes
    return {'input': json.dumps(card), **({'labels': json.dumps([str(v) for v in vocab])} if vocab is not None else {})}


def mismatch(who: str, entry: Entry, xb) -> BadValue:
    "What is said where a batch of the validation set has other shapes than the network was written for."
    return BadValue(f'{who}: written for inputs of {shapes(entry.example)}, and validation has {shapes(xb)}; sizes other than the number of samples must be the same in all batches')


def met_by(dl, seen: Callable):
    "A loader like `dl` that calls `seen(x)` with the images that its normalisation is to meet."
    class Met(Transform):
        "Look at images before they are normalised."
        order = Normalize.order-.01
        def encodes(self, x: TensorImage):
            seen(x)
            return x
    new = dl.new()
    new.after_batch = Pipeline([*dl.after_batch.fs, Met()])
    return new
