"Channels removed: shapes, shares, and what cannot be cut."
import pytest
import timm
import torch
from fastai.basics import DataLoaders, Learner, nn
from fastai.callback.tracker import SaveModelCallback

from fastrecipes.production.slimming import slimmed, widths


def net(c=3): return nn.Sequential(nn.Conv2d(c, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
                                   nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def test_half_the_channels_go_and_the_answer_keeps_its_width():
    model = net()
    thin = slimmed(model, .5, torch.rand(2, 3, 8, 8))
    assert widths(thin) == [16, 32, 10] and widths(model) == [32, 64, 10]
    assert thin[3].weight.shape == (32, 16, 3, 3) and thin[1].num_features == 16 and thin(torch.rand(2, 3, 8, 8)).shape == (2, 10)


def test_the_weakest_channels_go():
    model = net()
    with torch.no_grad():
        for m in (model[0], model[3]): m.weight[::2] *= 1e-3            # every other channel does next to nothing
        model[1].weight[::2] = 1e-3
        model[3].weight[:, ::2] *= 1e-3
        model[7].weight[:, ::2] *= 1e-3
    x = torch.rand(4, 3, 8, 8)
    thin = slimmed(model, .5, x)
    with torch.no_grad():
        assert torch.equal(thin[0].weight, model[0].weight[1::2])
        assert torch.allclose(thin.eval()(x), model.eval()(x), atol=.02)


@pytest.mark.parametrize('arch', ['resnet10t', 'mobilenetv3_small_050', 'convnext_atto'])
def test_networks_of_timm_get_smaller(arch):
    model = timm.create_model(arch, num_classes=10)
    thin = slimmed(model, .5, torch.rand(2, 3, 64, 64))
    size = [sum(p.numel() for p in m.parameters()) for m in (model, thin)]
    assert size[1] < .65*size[0]


def test_F5_images_of_one_channel(toy):
    assert widths(slimmed(net(1), .5, torch.rand(2, 1, 8, 8))) == [16, 32, 10]


def test_F4_the_best_checkpoint_of_the_fit_that_follows_loads(tmp_path):
    x, y = torch.rand(64, 3, 8, 8), torch.arange(64) % 10
    ds = torch.utils.data.TensorDataset(x, y)
    dls = DataLoaders.from_dsets(ds, ds, bs=16, device='cpu')
    learn = Learner(dls, slimmed(net(), .5, x[:2]), nn.CrossEntropyLoss(), path=tmp_path)
    class WorseLater(SaveModelCallback):
        "The first epoch is the best."
        def after_epoch(self):
            self.learn.recorder.values[-1][1] = float(self.learn.epoch)
            super().after_epoch()
    with learn.no_bar(), learn.no_logging(): learn.fit(3, cbs=WorseLater())
    assert widths(learn.model) == [16, 32, 10]


def test_the_model_given_is_not_touched():
    model = net().eval().requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    thin = slimmed(model, .25, torch.rand(2, 3, 8, 8))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in thin.parameters()) and not thin.training


def test_what_cannot_be_cut_is_refused():
    class Fixed(nn.Module):
        "A width that is written into a reshape."
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 32, 1), nn.Linear(32*64, 10)
        def forward(self, x): return self.fc(self.conv(x).reshape(len(x), 32*64))
    with pytest.raises(ValueError, match='prune: torch-pruning cannot cut this network'): slimmed(Fixed(), .5, torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match='no layer is wide enough to lose 50%'): slimmed(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(512, 10)), .5, torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match='between 0 and 1, got 1'): slimmed(net(), 1, torch.rand(2, 3, 8, 8))
