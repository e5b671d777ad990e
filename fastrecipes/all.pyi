"What editors know of `from fastrecipes.all import *`: written by docs/stub.py from the registry, and not by hand."
# ruff: noqa
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastrecipes.production.quantized import Quantization
from fastrecipes.training.transfer import Backbone
from typing import Callable
from typing import Literal
from typing import Sequence
import torch.nn as nn

from fastai.vision.all import *
from fastai.learner import Learner as _Learner
from fastrecipes.data.albumentation import *
from fastrecipes.data.augment import *
from fastrecipes.data.augmix import *
from fastrecipes.data.balance import *
from fastrecipes.data.cache import *
from fastrecipes.data.contact_sheet import *
from fastrecipes.data.erasing import *
from fastrecipes.data.folders import *
from fastrecipes.data.keyed import *
from fastrecipes.data.loaders import *
from fastrecipes.data.mixing import *
from fastrecipes.data.pixels import *
from fastrecipes.data.pseudo import *
from fastrecipes.data.samples import *
from fastrecipes.data.statistics import *
from fastrecipes.errors import *
from fastrecipes.layers.activations import *
from fastrecipes.layers.attention import *
from fastrecipes.layers.coordconv import *
from fastrecipes.layers.dropping import *
from fastrecipes.layers.init import *
from fastrecipes.layers.normalization import *
from fastrecipes.layers.regularization import *
from fastrecipes.layers.resnet9 import *
from fastrecipes.losses.classification import *
from fastrecipes.losses.kinds import *
from fastrecipes.losses.regression import *
from fastrecipes.losses.segmentation import *
from fastrecipes.metrics.kinds import *
from fastrecipes.objective import *
from fastrecipes.production.bagging import *
from fastrecipes.production.boosting import *
from fastrecipes.production.bundle import *
from fastrecipes.production.calibration import *
from fastrecipes.production.client import *
from fastrecipes.production.distillation import *
from fastrecipes.production.ensembles import *
from fastrecipes.production.evaluation import *
from fastrecipes.production.export import *
from fastrecipes.production.formats import *
from fastrecipes.production.gate import *
from fastrecipes.production.graphs import *
from fastrecipes.production.iterative import *
from fastrecipes.production.matching import *
from fastrecipes.production.members import *
from fastrecipes.production.predictor import *
from fastrecipes.production.pretrained import *
from fastrecipes.production.pruning import *
from fastrecipes.production.quantization import *
from fastrecipes.production.quantized import *
from fastrecipes.production.quantizing import *
from fastrecipes.production.sensitivity import *
from fastrecipes.production.slimming import *
from fastrecipes.production.snapshots import *
from fastrecipes.production.stacking import *
from fastrecipes.production.tta import *
from fastrecipes.production.voting import *
from fastrecipes.randomness import *
from fastrecipes.recipes.ablate import *
from fastrecipes.recipes.classify import *
from fastrecipes.recipes.compress import *
from fastrecipes.recipes.ensemble import *
from fastrecipes.recipes.fast import *
from fastrecipes.recipes.learning_curve import *
from fastrecipes.recipes.pipeline import *
from fastrecipes.recipes.recommend import *
from fastrecipes.recipes.self_training import *
from fastrecipes.recipes.serve import *
from fastrecipes.recipes.ship import *
from fastrecipes.recipes.small_images import *
from fastrecipes.recipes.validate import *
from fastrecipes.report.page import *
from fastrecipes.report.run_folder import *
from fastrecipes.technique import *
from fastrecipes.training.accumulation import *
from fastrecipes.training.activations import *
from fastrecipes.training.aside import *
from fastrecipes.training.averaging import *
from fastrecipes.training.batch_size import *
from fastrecipes.training.clock import *
from fastrecipes.training.compiling import *
from fastrecipes.training.distributed import *
from fastrecipes.training.finders import *
from fastrecipes.training.freezing import *
from fastrecipes.training.memory import *
from fastrecipes.training.objective import *
from fastrecipes.training.optimizers import *
from fastrecipes.training.parallel import *
from fastrecipes.training.precision import *
from fastrecipes.training.precompute import *
from fastrecipes.training.preflight import *
from fastrecipes.training.profiling import *
from fastrecipes.training.reproducibility import *
from fastrecipes.training.resizing import *
from fastrecipes.training.resume import *
from fastrecipes.training.sanity import *
from fastrecipes.training.schedules import *
from fastrecipes.training.sharpness import *
from fastrecipes.training.state import *
from fastrecipes.training.stopping import *
from fastrecipes.training.transfer import *

class Learner(_Learner):
    def activation(self, kind: Literal['tanh', 'relu', 'shifted_relu', 'leaky_relu', 'prelu', 'elu', 'selu', 'serlu', 'gelu', 'swish', 'elish', 'mish', 'tanh_gate', 'shifted_tanh_gate', 'clamp_gate']='mish') -> Learner:
        'Exchange the activations between the layers of a network for those of one kind; weights stay as they are.'
        ...

    def albumentations(self, compose: Callable | Sequence | str) -> Learner:
        'Vary the training images by a pipeline of the library albumentations: some hundred transforms, as users of it have written them.'
        ...

    def augment(self, flip: bool=True, rotate: float=10.0, zoom: float=1.1, warp: float=0.2, lighting: float=0.2, p: float=0.75, crop: int=0) -> Learner:
        "Vary the training images: mirrored, turned, enlarged, tilted, lit differently; the same kinds and defaults as fastai's `aug_transforms`."
        ...

    def augmix(self, severity: float=3.0, width: int=3, depth: int=-1, alpha: float=1.0, jsd: bool=True, weight: float=12.0) -> Learner:
        'Train on images and on mixtures of distorted copies of them, and ask for the same answer to all: for pictures worse than those trained on.'
        ...

    def autoaugment(self, policy: Literal['imagenet', 'cifar10', 'svhn']='imagenet', interpolation: Literal['nearest', 'bilinear', 'bicubic']='nearest') -> Learner:
        'Do one of 25 pairs of ops to each training image, as a search on the data of the paper found them: AutoAugment.'
        ...

    def autocontrast(self, p: float=0.5) -> Learner:
        'Stretch each channel of training images from black to white: `ImageOps.autocontrast(im)` of Pillow.'
        ...

    def balance(self, mode: Literal['upsampling', 'downsampling', 'weighted']='upsampling', weights: list[float] | None=None) -> Learner:
        'Draw the classes of the training set equally often; validation stays as it is.'
        ...

    def brightness(self, amount: float=0.5, p: float=0.5) -> Learner:
        'Vary the brightness of training images: `ImageEnhance.Brightness(im).enhance(factor)` of Pillow.'
        ...

    def cache(self, folder: str | None=None, sizes: list[int] | None=None) -> Learner:
        'Decode every image once, into a file of pixels that later epochs, processes and runs take whole batches from.'
        ...

    def class_weights(self, weights: list[float] | None | Literal['inverse', 'effective']='inverse', beta: float=...) -> Learner:
        'Let each sample count in the training loss by the weight of its class.'
        ...

    def color(self, amount: float=0.5, p: float=0.5) -> Learner:
        'Vary the colourfulness of training images: `ImageEnhance.Color(im).enhance(factor)` of Pillow.'
        ...

    def compile(self, mode: Literal['default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs']='default', backend: str='inductor') -> Learner:
        'Compile the network with `torch.compile` at its first batch: the same numbers but for rounding, in less time a batch.'
        ...

    def contrast(self, amount: float=0.5, p: float=0.5) -> Learner:
        'Vary the contrast of training images: `ImageEnhance.Contrast(im).enhance(factor)` of Pillow.'
        ...

    def coordconv(self, layers: Literal['first', 'all']='first') -> Learner:
        'Tell convolutions where in the picture they are, by two input channels more: row and column, each from 1/size to 1.'
        ...

    def cutmix(self, alpha: float=1.0) -> Learner:
        'Train on images with a rectangle of another image pasted in, and on targets in proportion to what is visible.'
        ...

    def cutout(self, size: int=16) -> Learner:
        'Hide a square of each training image.'
        ...

    def distill(self, teacher: Learner | nn.Module | str, T: float=4.0, alpha: float=0.9, features: float | None=None, attention: float | None=None, layers: dict[str, str] | None=None) -> Learner:
        'Train a network on what a teacher says of each image, beside its label.'
        ...

    def dropconnect(self, p: float=0.5, layers: Literal['all', 'first']='all', permanent: bool=False) -> Learner:
        'Leave out weights at random while training: dropout of connections instead of units.'
        ...

    def dropout(self, p: float=0.5) -> Learner:
        'Leave out units at random while training, so that none relies on another.'
        ...

    def early_stop(self, monitor: str='valid_loss', patience: int=3, min_delta: float=0.0, restore: bool=True) -> Learner:
        'Stop when `monitor` has got no better for `patience` epochs, and go back to the weights of the best epoch.'
        ...

    def ema(self, decay: float=0.999, warmup: bool=True) -> Learner:
        'Average the weights over the last steps, later ones weighing more, and keep the average: steadier than the weights that are trained.'
        ...

    def equalize(self, p: float=0.5) -> Learner:
        'Spread the values of each channel of training images evenly: `ImageOps.equalize(im)` of Pillow.'
        ...

    def freeze_bn(self) -> Learner:
        'Freeze the batch norm of frozen layers too, so that a body that does not train gives the same in training as in inference.'
        ...

    def grad_accum(self, n: int=2) -> Learner:
        'Take a step every `n` batches, with the gradient of one big batch made of them: a large batch in the memory of a small one.'
        ...

    def grad_clip(self, max_norm: float=1.0, mode: Literal['norm', 'value', 'adaptive']='norm', max_value: float=0.5, max_ratio: float=0.01) -> Learner:
        'Shorten a gradient that is too long: one bad batch does not throw the weights far off.'
        ...

    def initialize(self, kind: Literal['constant', 'uniform', 'normal', 'xavier_uniform', 'xavier_normal', 'kaiming_uniform', 'kaiming_normal', 'delta_orthogonal']='kaiming_normal', layers: Literal['all', 'last']='all', args: dict | None=None) -> Learner:
        'Begin with new weights: those of all convolutions and linear layers, or of the last one, which gives the answers.'
        ...

    def label_smoothing(self, eps: float=0.1) -> Learner:
        'Ask for 1−eps+eps/c on the right class and eps/c on each of the others, instead of 1 and 0.'
        ...

    def logit_adjustment(self, tau: float=1.0, shares: list[float] | None=None) -> Learner:
        'Train on logits moved by tau·log(share of the class), so that the logits themselves come out right for classes equally often.'
        ...

    def loss(self, kind: Literal['mae', 'mse', 'rmse', 'mape', 'mspe', 'rmspe', 'ce', 'nll', 'label_smoothing', 'focal', 'bce', 'hinge', 'soft_f1', 'dice', 'iou'], gamma: float | None=None, alpha: float | None=None, eps: float | None=None, margin: float | None=None, smooth: float | None=None) -> Learner:
        "Train on another loss, by its name; validation, `predict` and metrics keep the Learner's own, so that runs can be compared."
        ...

    def mixup(self, alpha: float=0.4) -> Learner:
        'Train on convex blends of two samples and of their targets.'
        ...

    def norm(self, kind: Literal['batch', 'layer', 'instance', 'group']='group', groups: int=32, insert: bool=False) -> Learner:
        "Exchange a network's norms for those of one kind, or put norms where it has none."
        ...

    def normalize(self, kind: Literal['center', 'standardize', 'decorrelate', 'pca', 'zca', 'minmax', 'minmax_signed']='standardize', over: Literal['auto', 'channels', 'pixels']='auto', eps: float=1e-05) -> Learner:
        'Bring pixels to a common scale by the numbers of the training set alone, in training, validation and serving.'
        ...

    def optimizer(self, name: str, eps: float | None=None, betas: list[float] | None=None, momentum: float | None=None, args: dict | None=None) -> Learner:
        "Take the steps of another optimizer: any of timm's by its name, such as 'adamw', 'lamb', 'lion', 'adopt', 'muon', 'kron'."
        ...

    def posterize(self, bits: int=4, p: float=0.5) -> Learner:
        'Keep fewer levels of training images: `ImageOps.posterize(im, bits)` of Pillow.'
        ...

    def precompute(self, dir: str, views: int=1, dtype: Literal['float32', 'float16']='float32') -> Learner:
        'Work out once what the frozen body makes of each image, keep it on disk, and train the head alone on that: an epoch takes a moment.'
        ...

    def profile(self) -> Learner:
        'Measure where the time of each fit goes: data, forward, loss, backward, step, and every callback; nothing else changes.'
        ...

    def progressive_resize(self, initial: float=0.5, delay: float=0.5, finetune: float=0.2, multiple: int=4) -> Learner:
        'Train on smaller images first, and let them grow to their full size over the fit: it takes less time, at little or no loss of accuracy.'
        ...

    def prune(self, amount: float | None=None, threshold: float | None=None, layers: list[str] | None=None) -> Learner:
        'Set the smallest weights to 0, now, and keep them there in every later fit.'
        ...

    def randaugment(self, n: int=2, magnitude: int=9, interpolation: Literal['nearest', 'bilinear', 'bicubic']='nearest') -> Learner:
        'Do `n` randomly drawn ops to each training image, all of one magnitude: RandAugment.'
        ...

    def rotate(self, degrees: float=15.0, p: float=0.5, interpolation: Literal['nearest', 'bilinear', 'bicubic']='bilinear', fill: int=0) -> Learner:
        'Turn training images about their centre: `im.rotate(angle, interpolation, fillcolor=fill)` of Pillow.'
        ...

    def sam(self, rho: float=0.05, adaptive: bool=False) -> Learner:
        'Take each step by the gradient from where the loss is worst within `rho` of the weights: it leads to flat minima, which generalise better.'
        ...

    def self_attention(self, layer: str | None=None) -> Learner:
        'Put a self-attention layer behind `layer`: each place of its map adds what it finds, anywhere in the picture, that resembles it.'
        ...

    def sharpness(self, amount: float=0.5, p: float=0.5) -> Learner:
        'Blur or sharpen training images: `ImageEnhance.Sharpness(im).enhance(factor)` of Pillow.'
        ...

    def shear(self, amount: float=0.2, p: float=0.5, interpolation: Literal['nearest', 'bilinear', 'bicubic']='bilinear', fill: int=0) -> Learner:
        'Slant training images: `im.transform(im.size, Image.AFFINE, (1, sx, -sx*h/2, sy, 1, -sy*w/2), interpolation, fillcolor=fill)` of Pillow.'
        ...

    def slim(self, ratio: float | None=None, max_ms: float | None=None, round_to: int=8, per_layer: dict[str, float] | None=None) -> Learner:
        'Remove whole channels, the least important of each layer, now and for good: a network that is smaller and faster anywhere.'
        ...

    def solarize(self, threshold: int=128, p: float=0.5) -> Learner:
        'Invert the bright parts of training images: `ImageOps.solarize(im, threshold)` of Pillow.'
        ...

    def stochastic_depth(self, p: float=0.1) -> Learner:
        'Leave out whole residual blocks at random while training: a network that is shallower for each sample, and whole in validation.'
        ...

    def swa(self, start: float=0.75, lr: float | None=None, every: int | None=None) -> Learner:
        'Average the weights that the last epochs end with: a point in the middle of a wide minimum, which generalises better than its rim.'
        ...

    def to_bf16(self) -> Learner:
        'Compute the forward pass in bfloat16: the range of float32 with 8 bits of mantissa, so no loss scale is needed.'
        ...

    def to_channelslast(self, use_amp: bool=False, amp_mode: Literal['fp16', 'bf16']='fp16') -> Learner:
        'Lay out images and convolution weights with the channels of a pixel side by side, which is how the fast kernels read them.'
        ...

    def to_distributed(self, sync_bn: bool=True, timeout: float=600.0) -> Learner:
        'Train in several processes, one a GPU or, on a CPU, as many as you start: `torchrun --nproc-per-node 2 -m fastrecipes image-classifier …`.'
        ...

    def to_fp16(self, init_scale: float=2.0 ** 16, growth_factor: float=2.0, backoff_factor: float=0.5, growth_interval: int=2000) -> Learner:
        'Compute the forward pass in float16, with a scaled loss: about half the memory, and faster on a GPU with tensor cores.'
        ...

    def to_fp32(self) -> Learner:
        'Compute in float32 throughout: undoes `to_fp16` and `to_bf16`.'
        ...

    def to_parallel(self, device_ids: list[int] | None=None) -> Learner:
        'Split each batch over several GPUs of this machine, and gather what they answer.'
        ...

    def translate(self, share: float=0.1, p: float=0.5, interpolation: Literal['nearest', 'bilinear', 'bicubic']='bilinear', fill: int=0) -> Learner:
        'Shift training images: `im.transform(im.size, Image.AFFINE, (1, 0, -dx, 0, 1, -dy), interpolation, fillcolor=fill)` of Pillow.'
        ...

    def weight_decay(self, wd: float=0.0005) -> Learner:
        'Shrink the weights by a share of themselves at each step: w ← w − lr·wd·w, aside from the gradient.'
        ...

    def weight_penalty(self, l2: float=0.0005, l1: float=0.0) -> Learner:
        'Penalise large weights: ridge (`l2`), LASSO (`l1`), or elastic net (both).'
        ...

    def calibrate(self, ds_idx: int=1):
        "Divide the network's outputs by the temperature that fits the validation images best (`ds_idx` 1), and tell what that did (arXiv:1706.04599)."
        ...

    def export(self, fname='export.pkl', pickle_module=..., pickle_protocol=2):
        "Save what inference needs, whole or not at all, to `fname` in the Learner's folder; the Learner itself is not touched."
        ...

    def find_batch_size(self, pairs: int=16, times: int=8):
        'Suggest a batch size from the gradient noise scale (arXiv:1812.06162), and on a GPU find the largest that fits.'
        ...

    def fit(self, n_epoch, lr=None, wd=None, cbs=None, reset_opt=False, start_epoch=0):
        'Train for the epochs from `start_epoch` to `n_epoch`, at a rate of `lr`.'
        ...

    def fit_constant(self, n_epoch, lr=None, wd=None, cbs=None, reset_opt=False, start_epoch=0):
        'Fit for `n_epoch` epochs at a rate of `lr`, from the first batch to the last.'
        ...

    def fit_cos(self, n_epoch, lr=None, div_final=100000.0, wd=None, cbs=None, reset_opt=False, start_epoch=0):
        'Fit for `n_epoch` epochs while `lr` falls to `lr/div_final` (≥ 1) by half a cosine, from the first batch on (arXiv:1608.03983, without restarts).'
        ...

    def fit_decay(self, n_epoch, lr=None, form='exponential', div_final=100.0, power=0.9, wd=None, cbs=None, reset_opt=False, start_epoch=0):
        'Fit for `n_epoch` epochs while `lr` falls to `lr/div_final`, batch by batch, by one of these forms (t: how much of the fit is over, 0–1).'
        ...

    def fit_flat_cos(self, n_epoch, lr=None, div_final=100000.0, pct_start=0.75, wd=None, cbs=None, reset_opt=False, start_epoch=0):
        'Fit for `n_epoch` epochs at a flat `lr`, annealed by a cosine to `lr/div_final` from `pct_start` of the way (0–1; mostly .5 to .75) on.'
        ...

    def fit_for(self, minutes, lr=None, schedule='one_cycle', wd=None, cbs=None, reset_opt=False, **kwargs):
        'Fit for `minutes` > 0 of training, with the rate where `schedule` has it at that share of the time: it ends annealed, on a fast machine and on a busy one.'
        ...

    def fit_gradual_unfreeze(self, epochs: int, lr: float | None=None, *, step_epochs: int=1, steps: int | None=None, div: float=2.6, schedule: str='flat_cos'):
        'Train the head alone, then with the group of layers below it, and so on down: gradual unfreezing with layer-wise rates (arXiv:1801.06146).'
        ...

    def fit_sgdr(self, n_cycles, cycle_len, lr_max=None, cycle_mult=2, cbs=None, reset_opt=False, wd=None, start_epoch=0, opt: Literal['sgd', 'adamw'] | None=None):
        'Fit for `n_cycles` warm restarts: within each `lr_max` falls to 0 by half a cosine (arXiv:1608.03983).'
        ...

    def fit_snapshots(self, n_cycles, cycle_len, lr_max=None, last=None, kind='average', wd=None, cbs=None, reset_opt=False):
        'Fit for `n_cycles` warm restarts of `cycle_len` epochs each, as `fit_sgdr` does, and make an ensemble of the weights that they end with: arXiv:1704.00109.'
        ...

    def fit_step(self, n_epoch, lr=None, gamma=0.1, milestones=None, every=None, wd=None, cbs=None, reset_opt=False, start_epoch=0):
        'Fit for `n_epoch` epochs, with `lr` multiplied by `gamma` (0–1) at each of the `milestones`, or `every` so many epochs.'
        ...

    def iterative_prune(self, epochs: int=10, lr: float | None=None, *, step: float=0.15, until: float=0.9, floor: float=0.995, first: int=0, patience: int=5, monitor: str='accuracy'):
        "Prune `step` of the original weights, fine-tune until the metric is back at `floor` of the original's, and so on up to `until` (arXiv:1506.02626)."
        ...

    def load(self, file, device=None, **kwargs):
        "Load weights (and the optimizer). Of those of another network fastai 2.8.12 prints torch's page of sizes: here a sentence names the first layer that differs."
        ...

    def lr_find(self, start_lr=1e-07, end_lr=10, num_it=100, stop_div=True, show_plot=True, suggest_funcs=...):
        'Raise the rate from `start_lr` to `end_lr` over `num_it` ≥ 6 batches, undo it, and suggest rates by `suggest_funcs`.'
        ...

    def overfit_batch(self, n: int=8, steps: int=100, lr: float | slice | None=None):
        'Train on the same `n` ≥ 2 samples for `steps` ≥ 2 steps, say whether the network learnt them by heart, and undo it: the first thing to try.'
        ...

    def plot_schedule(self, schedule: str, *args, **kwargs):
        "Plot what `fit_<schedule>` would do with these arguments, batch by batch, before anything is trained: `learn.plot_schedule('flat_cos', 5, lr=3e-3)`."
        ...

    def preflight(self, n_epoch: int=1, folder=None):
        'Raise one `ValueError` for everything that would go wrong in a fit of `n_epoch` epochs (see `problems`), before its first batch.'
        ...

    def quantize(self, kind: Literal['static', 'dynamic', 'qat']='static', *, tolerance: float | None=None, calibration: int | None=None, epochs: int | None=None, lr: float | None=None, schedule: str | None=None, force: bool | None=None, seed: int=42):
        'A Learner whose network computes in 8 bits, in onnxruntime on the CPU; this one stays as it is. One line says what was gained and lost.'
        ...

    def sensitivity(self, ratios: tuple=(0.25, 0.5, 0.75), n: int=512, round_to: int=1):
        'Cut each group of layers alone by each of `ratios` (in (0, 1), ascending), without training, and measure loss and accuracy in validation (arXiv:1608.08710).'
        ...

    def to_onnx(self, path: str, *, opset: int | None=None):
        'Write the Learner as an ONNX file: its inputs before normalisation, in any number, to probabilities; numbers where it has no classes.'
        ...

    def to_torch_export(self, path: str):
        'Write the Learner as a program of torch.export, to be read by `torch.export.load(path).module()`, without its classes: what torch compiles and lowers.'
        ...

    def to_torchscript(self, path: str):
        'Write the Learner as TorchScript, traced, to be read by `torch.jit.load(path)` in Python, C++ or on a phone.'
        ...

    def tta(self, ds_idx=1, dl=None, n=4, item_tfms=None, batch_tfms=None, beta=0.25, use_max=False, views: Literal['flip'] | None=None):
        'Probabilities `(m, c)` averaged over views of each sample of `dl`, or of `dls[ds_idx]`, in order, and their targets.'
        ...

    def use(self, *names: str, **techniques) -> Learner:
        'Apply techniques by keyword, in their own order whatever the order of the keywords.'
        ...

def classifier(dls: DataLoaders, net: Backbone, metrics=(), head=...) -> Learner:
    'A Learner for `dls` on `net` with a new head; frozen where `net` has trained weights.'
    ...

def fast_classifier(path, arch: str='auto', *, minutes: float=5.0, size: int=32, bs: int=..., lr: float | str=..., valid: float | list[str] | str | Callable=0.1, test: float=0.1, groups: str | Callable | None=None, near_duplicates: Literal['warn', 'together']='warn', resize: Literal['crop', 'squish', 'pad']='crop', seed: int=42, workers: int | None=None, out: str | None=None, overwrite: bool=False, **switched) -> Learner:
    'Train a small network on small images, from scratch and for `minutes`, and return the fitted Learner: the fastest way to a first result.'
    ...

def image_classifier(path, arch: str='resnet18', *, epochs: int=5, minutes: float | None=None, lr: float | str='find', size: int=224, bs: int=64, valid: float | list[str] | str | Callable=0.2, test: float=0.1, groups: str | Callable | None=None, near_duplicates: Literal['warn', 'together']='warn', resize: Literal['crop', 'squish', 'pad']='crop', pretrained: bool=True, weights: str | None=None, freeze: bool=False, schedule: Literal['constant', 'step', 'decay', 'cos', 'flat_cos', 'sgdr', 'one_cycle']='flat_cos', techniques: list[str] | str | None=None, seed: int=42, workers: int | None=None, out: str | None=None, overwrite: bool=False, **switched) -> Learner:
    'Train a network on a folder of images, `path/<class>/*`, and return the fitted Learner.'
    ...

def plain_fastai(dls, arch: str, epochs: int, pretrained: bool=True, seed: int=42, weights: str | None=None) -> Learner:
    "The same body on the same images as fastai's tutorials train it: its own head, `fine_tune` (`fit_one_cycle` from scratch), default rates."
    ...

def put(learn: Learner, cb: Callback) -> Learner:
    'Add `cb` in place of any callback of its class: calling a technique twice is calling it last.'
    ...

def quantized_learner(learn: Learner, graph: bytes, told: Quantization) -> Learner:
    'A Learner of the same kind on the same data that holds `graph`: it validates, predicts, shows results, is exported and loaded; `learn` keeps its own network.'
    ...

def twin(learn: Learner, model: nn.Module) -> Learner:
    "A Learner like `learn` on the same data that holds `model`: it validates, predicts and is exported; it has no optimizer and none of its callbacks but fastai's own, anew."
    ...

def vision_learner(dls, arch, normalize=True, n_out=None, pretrained=True, weights=None, loss_func=None, opt_func=..., lr=..., splitter=None, cbs=None, metrics=None, path=None, model_dir='models', wd=None, wd_bn_bias=False, train_bn=True, moms=(0.95, 0.85, 0.95), cut=None, init=..., custom_head=None, concat_pool=True, pool=True, lin_ftrs=None, ps=0.5, first_bn=True, bn_final=False, lin_first=False, y_range=None, **kwargs) -> Learner:
    'Build a vision learner from `dls` and `arch`'
    ...

def unet_learner(dls, arch, normalize=True, n_out=None, pretrained=True, weights=None, config=None, loss_func=None, opt_func=..., lr=..., splitter=None, cbs=None, metrics=None, path=None, model_dir='models', wd=None, wd_bn_bias=False, train_bn=True, moms=(0.95, 0.85, 0.95), **kwargs) -> Learner:
    'Build a unet learner from `dls` and `arch`'
    ...

def load_learner(fname, cpu=True, pickle_module=...) -> Learner:
    'Load a `Learner` object in `fname`, by default putting it on the `cpu`'
    ...
