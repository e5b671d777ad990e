"Networks by name, weights from packages, statistics of pixels."
import numpy as np
import pytest
import torch
from fastai.vision.all import Normalize

from fastrecipes.data.folders import image_folder
from fastrecipes.data.pixels import read_image
from fastrecipes.training.transfer import backbone, check_arch, classifier, packaged_weights, train_statistics


@pytest.fixture(scope='module')
def dls(digit_folder): return image_folder(digit_folder, size=32, bs=32, workers=0)


@pytest.mark.parametrize('arch', ['resnet10t', 'mobilenetv3_small_050', 'squeezenet1_1', 'vit_tiny_patch16_224'])
def test_a_network_by_name_gives_one_logit_a_class(arch):
    net = backbone(arch, pretrained=False)
    from fastai.vision.learner import add_head
    model = add_head(net.body, net.n_features, 10, pool=net.pool).eval()
    size = 224 if arch.startswith('vit') else 64
    assert model(torch.rand(2, 3, size, size)).shape == (2, 10)
    n = sum(p.numel() for p in model.parameters())
    groups = net.split(model)
    assert sum(p.numel() for g in groups for p in g) == n and all(len(g) for g in groups)


def test_an_unknown_network_names_the_nearest():
    assert check_arch('densenet121') == 'timm' and check_arch('squeezenet1_1') == 'torchvision'
    with pytest.raises(TypeError, match="arch: neither timm nor torchvision has a network 'resent18'; did you mean .*resnet18"): check_arch('resent18')


def test_statistics_are_those_of_the_training_pixels(dls):
    from PIL import Image, ImageOps
    pixels = np.stack([np.asarray(ImageOps.fit(read_image(f), (32, 32), Image.Resampling.BILINEAR)) for f in dls.train.items])/255.
    mean, std = train_statistics(dls)
    assert mean == pytest.approx(pixels.mean((0, 1, 2)), abs=1e-6) and std == pytest.approx(pixels.std((0, 1, 2)), abs=1e-6)


def test_pixels_are_normalised_once_by_the_training_set(digit_folder):
    dls = image_folder(digit_folder, size=16, bs=32, workers=0)
    net = backbone('resnet10t', pretrained=False)
    classifier(dls, net)
    x = torch.cat([x for x, _ in dls.train.new(shuffle=False, drop_last=False)])
    assert x.mean().item() == pytest.approx(0, abs=1e-3) and x.std().item() == pytest.approx(1, abs=1e-3)
    classifier(dls, net)
    assert sum(isinstance(t, Normalize) for t in dls.train.after_batch.fs) == 1


def test_packaged_weights_know_a_palace_from_a_daisy():
    from sklearn.datasets import load_sample_images
    if packaged_weights('tf_efficientnet_lite0') is None: pytest.fail('the weights extra is part of the test set-up: make test installs it')
    import timm
    net = backbone('tf_efficientnet_lite0')
    model = timm.create_model('tf_efficientnet_lite0').eval()
    state = torch.load(packaged_weights('tf_efficientnet_lite0'), map_location='cpu', weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), state.values())))
    x = torch.stack([torch.nn.functional.interpolate(torch.tensor(im).permute(2, 0, 1)[None]/255., (224, 224), mode='bilinear')[0] for im in load_sample_images().images])
    x = (x - torch.tensor(net.statistics[0])[:, None, None])/torch.tensor(net.statistics[1])[:, None, None]
    with torch.no_grad():
        assert model(x).argmax(1).tolist()[1] == 985                                       # ImageNet's daisy
        features = model.global_pool(net.body.eval()(x))
        assert torch.allclose(model.classifier(features), model(x), atol=1e-4)             # the backbone holds the same weights


def test_a_frozen_body_trains_only_its_head(dls):
    learn = classifier(dls, backbone('tf_efficientnet_lite0'))
    assert [p.requires_grad for p in learn.opt.all_params(with_grad=False).itemgot(0)].count(True) > 0
    weights = [p for n, p in learn.model[0].named_parameters() if p.ndim > 1]
    assert not any(p.requires_grad for p in weights) and all(p.requires_grad for p in learn.model[1].parameters())
