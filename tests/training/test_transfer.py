"Networks by name, weights from packages, statistics of pixels."
import numpy as np
import pytest
import timm
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


# weights from a file

def published(arch, seed=5):
    "A network with its head, as others save it."
    import timm
    torch.manual_seed(seed)
    return timm.create_model(arch, num_classes=7)


def answers(net, model, x):
    with torch.no_grad(): return torch.allclose(net.body.eval()(x), model.eval().forward_features(x), atol=1e-6)


@pytest.mark.parametrize('how', ['plain', 'module.', 'state_dict', 'model', 'deep', 'safetensors', 'pt'])
def test_weights_from_a_file_however_they_were_saved(how, tmp_path, capsys):
    from safetensors.torch import save_file
    model = published('resnet10t')
    state, file = model.state_dict(), tmp_path/('w.pth' if how != 'pt' else 'w.pt')
    if how == 'safetensors': save_file(state, file := tmp_path/'w.safetensors')
    else:
        if how in ('module.', 'deep'): state = {f'{"module." if how == "module." else "module.net.0.model."}{k}': v for k, v in state.items()}
        torch.save(dict(epoch=3, args=dict(lr=.1), **{'model' if how == 'model' else 'state_dict': state}) if how in ('state_dict', 'model', 'deep') else state, file)
    net = backbone('resnet10t', weights=file)
    assert answers(net, model, torch.rand(2, 3, 64, 64)) and net.statistics is not None
    n = sum('num_batches' not in k and not k.startswith('fc.') for k in state) if how in ('plain', 'safetensors') else None
    out = capsys.readouterr().out
    assert f'tensors of the body from {file}; left out, for they fit nowhere: fc.' in out and (n is None or f'weights: {n} of {n} tensors' in out)


def test_weights_of_torchvisions_networks_with_a_head_of_another_size(tmp_path):
    import torchvision
    torch.manual_seed(5)
    model = torchvision.models.squeezenet1_1(num_classes=7)
    torch.save(model.state_dict(), tmp_path/'w.pth')
    net = backbone('squeezenet1_1', weights=tmp_path/'w.pth')
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad(): assert torch.equal(net.body.eval()(x), model.eval().features(x))


def test_a_learner_on_weights_from_a_file_is_frozen(dls, tmp_path):
    torch.save(published('resnet10t').state_dict(), tmp_path/'w.pth')
    learn = classifier(dls, backbone('resnet10t', weights=tmp_path/'w.pth'))
    assert not any(p.requires_grad for p in learn.model[0].parameters() if p.ndim > 1)


def test_weights_of_another_network_are_refused_with_counts_and_a_reason(tmp_path):
    torch.save(published('resnet18').state_dict(), tmp_path/'w.pth')
    with pytest.raises(ValueError, match=r'weights: \d+ of 70 tensors of this network fit those in .*: .* is \(.*\) here and \(.*\) there; name the network'):
        backbone('resnet10t', weights=tmp_path/'w.pth')
    torch.save(dict(a=torch.zeros(1)), tmp_path/'w.pth')
    with pytest.raises(ValueError, match=r'weights: 0 of 70 tensors .*: there is no conv1.0.weight, but a; name'): backbone('resnet10t', weights=tmp_path/'w.pth')


def test_a_few_tensors_that_lack_are_named(tmp_path):
    state = published('resnet10t').state_dict()
    del state['bn1.bias']
    torch.save(state, tmp_path/'w.pth')
    from fastrecipes.training.transfer import load_weights
    import timm
    said = load_weights(timm.create_model('resnet10t', num_classes=0), tmp_path/'w.pth')
    assert 'weights: 69 of 70 tensors' in said and 'as they were before: bn1.bias;' in said


class Harm:
    def __reduce__(self): return print, ('HARM',)


def test_a_file_that_would_run_code_is_refused_and_does_not(tmp_path, capsys):
    torch.save(dict(model=Harm()), tmp_path/'w.pth')
    with pytest.raises(ValueError, match='weights: .*w.pth holds no plain state dict'): backbone('resnet10t', weights=tmp_path/'w.pth')
    assert 'HARM' not in capsys.readouterr().out


@pytest.mark.parametrize('name', ['w.pth', 'w.safetensors'])
def test_files_that_are_none_are_refused(name, tmp_path):
    with pytest.raises(FileNotFoundError, match='weights: no file'): backbone('resnet10t', weights=tmp_path/name)
    (tmp_path/name).write_bytes(b'no weights')
    with pytest.raises(ValueError, match='holds no plain state dict'): backbone('resnet10t', weights=tmp_path/name)


def test_weights_of_a_deeper_network_of_the_kin_are_refused(tmp_path):
    deep = timm.create_model('resnet34').state_dict()
    torch.save(deep, tmp_path/'w.pth')
    more = set(deep) - set(timm.create_model('resnet18').state_dict())
    n = sum(not k.endswith('num_batches_tracked') for k in more)
    with pytest.raises(ValueError, match=f'weights: {n} tensors in .*w.pth have no place in this network .layer1.2.bn1.bias.*of a deeper one; name the network'):
        backbone('resnet18', weights=tmp_path/'w.pth')


def test_tensors_beside_those_of_the_network_do_no_harm(tmp_path):
    state = published('resnet10t').state_dict()
    torch.save(state | {f'projector.{i}.weight': torch.zeros(2, 2) for i in range(90)}, tmp_path/'w.pth')
    net = backbone('resnet10t', weights=tmp_path/'w.pth')
    assert torch.equal(net.body.model.layer1[0].conv1.weight, state['layer1.0.conv1.weight'])
