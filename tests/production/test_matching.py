"Hidden maps of a teacher: the formulas by hand, who trains the regressors, which layers are paired, what is left behind."
from functools import partial

import pytest
import torch
from fastai.basics import Callback, DataLoaders, Learner, OptimWrapper, load_learner, nn
from fastai.callback.schedule import LRFinder
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fastrecipes.data.keyed import KeyedDL, keyed
from fastrecipes.data.loaders import Indexed
from fastrecipes.production.distillation import soft_divergence
from fastrecipes.production.export import export_learner
from fastrecipes.production.matching import RATE, Match, attention_distance, attention_map, hint_distance, layer_pairs, maps_of
from fastrecipes.training.resume import resumable


def net(*widths, c=3, seed=0):
    "A convolution to each of `widths`, each with half the pixels of the one before."
    torch.manual_seed(seed)
    steps = [nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.ReLU()) for i, o in zip((1, *widths), widths)]
    return nn.Sequential(*steps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], c))


def learner(model=None, n=64, bs=16, size=16, **kwargs):
    g = torch.Generator().manual_seed(0)
    ds = Indexed(TensorDataset(torch.rand(n, 1, size, size, generator=g), torch.randint(3, (n,), generator=g)), vocab=range(3))
    dls = DataLoaders(KeyedDL(ds, bs, seed=0, shuffle=True, drop_last=True, num_workers=0), KeyedDL(ds, bs, num_workers=0), device=torch.device('cpu'))
    learn = Learner(dls, model or net(4, 6), nn.CrossEntropyLoss(), **kwargs)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    keyed(learn, 0)
    return learn


@pytest.fixture
def maps():
    g = torch.Generator().manual_seed(0)
    return torch.randn(5, 3, 4, 6, generator=g), torch.randn(5, 7, 4, 6, generator=g)


def test_attention_by_hand(maps):
    far = 0.
    for s, t in zip(*maps):
        q = [torch.stack([(x[:, i, j]**2).sum() for i in range(4) for j in range(6)]) for x in (s, t)]
        far += float(((q[0]/q[0].norm() - q[1]/q[1].norm())**2).sum())/5
    assert float(attention_distance(*maps)) == pytest.approx(far, rel=1e-5)
    assert attention_map(maps[0]).norm(dim=1).tolist() == pytest.approx([1.]*5) and not attention_map(torch.zeros(1, 2, 3, 3)).any()


def test_attention_is_0_for_the_same_places_whatever_scale_and_channels_and_2_at_most(maps):
    s, _ = maps
    assert float(attention_distance(s, torch.cat([s, -2*s], 1))) == pytest.approx(0, abs=1e-10)
    left, right = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
    left[..., 0], right[..., 1] = 3., 5.
    assert float(attention_distance(left, right)) == pytest.approx(2.)


def test_hints_by_hand(maps):
    s, t = maps
    w, b = torch.randn(7, 3), torch.randn(7)
    far = sum(float(((w @ s[n, :, i, j] + b - t[n, :, i, j])**2).sum()) for n in range(5) for i in range(4) for j in range(6))/t.numel()
    assert float(hint_distance(s, t, w, b)) == pytest.approx(far, rel=1e-5)
    assert float(hint_distance(s, s, torch.eye(3), torch.zeros(3))) == pytest.approx(0, abs=1e-12)


def test_larger_maps_are_averaged_down(maps):
    s, t = maps
    half = t.view(5, 7, 2, 2, 3, 2).mean((3, 5))
    assert float(attention_distance(s, half)) == pytest.approx(float(attention_distance(s.view(5, 3, 2, 2, 3, 2).mean((3, 5)), half)), rel=1e-5)
    w = torch.randn(7, 3)
    assert float(hint_distance(s, half, w, torch.zeros(7))) == pytest.approx(float(F.mse_loss(torch.einsum('ts,nsij->ntij', w, s.view(5, 3, 2, 2, 3, 2).mean((3, 5))), half)), rel=1e-5)


class Watch(Callback):
    "The loss that is differentiated in each training batch, and what it is of."
    order = 5.9
    def before_fit(self): self.seen = []
    def after_loss(self):
        if self.learn.training: self.seen.append((float(self.learn.loss_grad.detach()), self.learn.xb[0].clone(), self.learn.yb[0].clone(), float(self.learn.loss)))


@pytest.mark.parametrize('weights', [dict(attention=3.), dict(features=2.), dict(features=2., attention=3.)], ids=str)
def test_the_loss_of_the_first_batch_by_hand(weights):
    student, teacher = net(4, 6), net(4, 9, seed=1)
    learn = learner(student).distill(teacher, T=2., alpha=.7, **weights)
    if 'features' in weights: w, b = (r.clone() for r in learn.match_cb.regressors[2:])
    start = [p.detach().clone() for p in student.parameters()]
    learn.fit(1, 0., cbs=(seen := Watch()), wd=0.)
    assert all(torch.equal(p, q) for p, q in zip(student.parameters(), start))
    loss, x, y, told = seen.seen[0]
    with torch.no_grad():
        logits, answer = student(x), teacher(x)
        own, theirs = [student[:1](x), student[:2](x)], [teacher[:1](x), teacher[:2](x)]
        by_hand = .3*F.cross_entropy(logits, y) + .7*soft_divergence(logits, answer, 2.)
        by_hand += weights.get('attention', 0)*sum(map(attention_distance, own, theirs))/2
        if 'features' in weights:
            by_hand += 2.*(F.mse_loss(own[0], theirs[0]) + F.mse_loss(torch.einsum('ts,nsij->ntij', w, own[1]) + b[:, None, None], theirs[1]))/2    # equal widths begin as the identity
    assert loss == pytest.approx(float(by_hand), rel=1e-5) and told == loss


def test_it_is_0_when_the_student_is_the_teacher():
    model = net(4, 6)
    learn = learner(model).distill(model, alpha=1., features=1., attention=1.)
    learn.fit(1, 0., cbs=(seen := Watch()), wd=0.)
    assert max(loss for loss, *_ in seen.seen) == pytest.approx(0, abs=1e-6)


def test_regressors_are_trained_as_if_they_were_part_of_the_network():
    "The same student, its regressors beside it in one torch optimizer, in a loop by hand."
    rate = dict(lr=RATE, betas=(.9, .999), eps=1e-8)
    student, teacher = net(4, 6), net(5, 9, seed=1).requires_grad_(False)
    learn = learner(student, opt_func=partial(OptimWrapper, opt=partial(torch.optim.Adam, **rate)), lr=RATE, wd=0.).distill(teacher, alpha=0., features=2.)
    by_hand, regressors = net(4, 6), [r.clone().requires_grad_() for r in learn.match_cb.regressors]
    opt = torch.optim.Adam([*by_hand.parameters(), *regressors], **rate)
    learn.fit(2, RATE, cbs=(seen := Watch()))
    assert len(seen.seen) == 8 and [tuple(r.shape) for r in regressors] == [(5, 4), (5,), (9, 6), (9,)]
    for loss, x, y, _ in seen.seen:
        far = sum(hint_distance(by_hand[:i+1](x), teacher[:i+1](x), *regressors[2*i:2*i+2]) for i in range(2))/2
        total = F.cross_entropy(by_hand(x), y) + 2.*far
        assert loss == pytest.approx(float(total), rel=1e-4)
        opt.zero_grad()
        total.backward()
        opt.step()
    for a, b in zip([*student.parameters(), *learn.match_cb.regressors], [*by_hand.parameters(), *regressors]): assert torch.allclose(a, b, atol=1e-5)


def test_a_student_comes_to_see_what_the_teacher_sees():
    torch.manual_seed(3)
    teacher, x = net(6, 8, seed=5), torch.rand(64, 1, 16, 16)
    def apart(model): return float(attention_distance(model[:2](x), teacher[:2](x)))
    plain, looks = learner(net(6, 8)), learner(net(6, 8)).distill(teacher, alpha=0., attention=10.)
    for learn in (plain, looks): learn.fit(15, 1e-2)
    assert apart(looks.model) < .5*apart(plain.model)


@pytest.mark.parametrize('other', [{}, dict(to_bf16=True), dict(sam=.05), dict(grad_accum=2), dict(mixup=.4), dict(compile=dict(backend='eager'))], ids=str)
def test_it_goes_with_what_else_touches_the_batch(other):
    from fastrecipes.technique import discover
    discover()
    learn = learner().use(distill=dict(teacher=net(5, 6, seed=1), features=1., attention=1.), **other)
    learn.fit(2, 1e-2)
    cb = learn.match_cb
    assert [float(s) for s in cb.steps] == [8.]*4 and not cb.maps and all(r.isfinite().all() for r in cb.regressors)     # one step a batch, sam's second pass none
    assert all(p.isfinite().all() for p in learn.model.parameters())


def test_lr_find_trains_no_regressor(tmp_path):
    learn = learner(path=tmp_path).distill(net(5, 6, seed=1), features=1.)
    before = [r.clone() for r in learn.match_cb.regressors]
    learn.lr_find(num_it=6, show_plot=False)
    assert all(map(torch.equal, before, learn.match_cb.regressors))
    learn.fit(2, cbs=LRFinder(num_it=6))                    # fastai's own puts back the network, and nothing else
    assert all(map(torch.equal, before, learn.match_cb.regressors))


class Killed(BaseException): pass


@pytest.mark.parametrize('at', [(0, 2), (1, 0), (1, 3)])
def test_killed_and_run_again_it_ends_as_if_never_killed(tmp_path, at):
    class Kill(Callback):
        order = 1100
        def after_batch(self):
            if self.learn.training and (self.learn.epoch, self.learn.iter) == at: raise Killed
    def run(folder, *cbs):
        learn = learner(cbs=list(cbs)).distill(net(5, 6, seed=1), features=1., attention=1.)
        with resumable(folder, every=1): learn.fit(2, 1e-2)
        return learn
    whole = run(tmp_path/'whole')
    with pytest.raises(Killed): run(tmp_path/'run', Kill())
    again = run(tmp_path/'run')
    tensors = lambda learn: [*learn.model.parameters(), *learn.match_cb.regressors, *sum(learn.match_cb.moments, []), *learn.match_cb.steps]
    assert all(map(torch.equal, tensors(whole), tensors(again))) and whole.recorder.values == again.recorder.values


def hooks(learn): return sum(len(m._forward_hooks) for net in (learn.model, learn.distill_cb.teacher) for m in net.modules())


@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'after_backward', 'after_batch'])
def test_a_fit_that_dies_leaves_no_trace(event):
    class Die(Callback):
        order = 90
        def __call__(self, name):
            if name == event and self.learn.training and self.learn.iter == 1: raise RuntimeError('dies')
            return super().__call__(name)
    learn = learner().distill(net(5, 6, seed=1), features=1., attention=1.)
    names = list(learn.model.state_dict())
    with pytest.raises(RuntimeError, match='dies'): learn.fit(1, cbs=Die())
    assert hooks(learn) == 0 and not learn.match_cb.maps and list(learn.model.state_dict()) == names
    learn.fit(1)
    assert len(learn.opt.all_params()) == len(list(learn.model.parameters())) and hooks(learn) == 0


def test_what_is_exported_knows_neither_teacher_nor_regressors(tmp_path):
    learn = learner().distill(net(500, 6, seed=1), features=1.)
    learn.fit(1)
    path = export_learner(learn, tmp_path/'learner.pkl')
    assert path.stat().st_size < 40_000 and list(load_learner(path).model.state_dict()) == list(learn.model.state_dict())


def test_validation_is_untouched():
    learn = learner().distill(net(5, 6, seed=1), features=1., attention=1.)
    x, y = learn.dls.valid_ds.dataset.tensors
    assert learn.validate()[0] == pytest.approx(F.cross_entropy(learn.model(x), y).item(), rel=1e-5)
    assert float(learn.match_cb.steps[0]) == 0


def test_the_last_call_wins():
    learn = learner().distill(net(5, 6, seed=1), features=1.).distill(net(5, 6, seed=1), attention=1.)
    assert [cb.hints for cb in learn.cbs if isinstance(cb, Match)] == [0.]
    assert not [cb for cb in learn.distill(net(5, 6)).cbs if isinstance(cb, Match)]


def test_layers_are_paired_by_size_the_last_of_each():
    learn = learner(net(4, 6))
    ours = maps_of(learn.model, learn.dls)
    assert ours == {'0.0': (4, 8, 8), '0.1': (4, 8, 8), '0': (4, 8, 8), '1.0': (6, 4, 4), '1.1': (6, 4, 4), '1': (6, 4, 4)}
    assert layer_pairs(ours, maps_of(net(5, 7, 9), learn.dls)) == [('0', '0'), ('1', '1')]
    assert layer_pairs(ours, {'a': (3, 4, 4), 'b': (8, 4, 4), 'c': (8, 3, 3)}) == [('1', 'b')]
    assert learner(net(4, 6)).distill(net(5, 7, 9), attention=1.).techniques['distill'].effect.endswith('; maps matched: 0 → 0, 1 → 1')


def test_layers_of_a_network_of_timm_by_the_end_of_their_names():
    import timm
    torch.manual_seed(0)
    student, teacher = (timm.create_model(n, num_classes=3, in_chans=1) for n in ('resnet10t', 'resnet18'))
    learn = learner(nn.Sequential(student), size=32)
    pairs = layer_pairs(*(maps_of(m, learn.dls) for m in (learn.model, nn.Sequential(teacher))))
    assert pairs[-3:] == [('0.layer1', '0.layer1'), ('0.layer2', '0.layer2'), ('0.layer3', '0.layer3')]           # layer4 is one pixel
    assert learn.distill(teacher, features=1., layers={'layer2': 'layer2', 'layer3': 'layer3.1'}).match_cb.pairs == [('0.layer2', 'layer2'), ('0.layer3', 'layer3.1')]
    assert [tuple(r.shape) for r in learn.match_cb.regressors] == [(128, 128), (128,), (256, 256), (256,)]
    learn.fit(1, 1e-3)


def test_the_teacher_normalises_as_it_was_trained_and_its_layers_keep_their_names():
    from fastai.vision.all import Normalize
    def normalised(mean, model):
        learn = learner(model)
        learn.dls.add_tfms([Normalize.from_stats([mean], [.5], cuda=False)], 'after_batch')
        return learn
    learn = normalised(.2, net(4, 6)).distill(normalised(.5, net(5, 9, seed=1)), attention=1., layers={'1': '1'})
    learn.fit(1)
    assert learn.match_cb.pairs == [('1', '1')] and type(learn.distill_cb.teacher[0]).__name__ == 'Renormalize'


@pytest.mark.parametrize('kwargs, message', [
    (dict(features=0.), 'features must be > 0, or None for none, got 0.0'), (dict(attention=-1), 'attention must be > 0, or None for none, got -1'),
    (dict(layers={'0': '0'}), 'layers are paired for features or attention, and both are off'), (dict(attention=1., layers={}), 'layers must name at least one pair'),
    (dict(attention=1., layers={'1.2': '0'}), "layers: no layer '1.2' that gives maps in the student; did you mean '1.[01]'\\? it has 0.0, 0.1, 0, 1.0, 1.1, 1"),
    (dict(attention=1., layers={'0': '4'}), "layers: no layer '4' that gives maps in the teacher; it has 0.0"), (dict(features=True), 'features must be a number or None, got True')])
def test_what_cannot_be_matched_is_refused(kwargs, message):
    learn = learner()
    with pytest.raises(ValueError, match=f'distill: {message}'): learn.distill(net(5, 7), **kwargs)
    assert not hasattr(learn, 'distill_cb')


def test_an_ambiguous_name_is_refused_and_so_are_networks_without_a_common_size():
    maps = {'a.conv1': (3, 8, 8), 'b.conv1': (3, 4, 4)}
    with pytest.raises(ValueError, match="distill: layers: the student has several layers 'conv1': a.conv1, b.conv1; write one"): layer_pairs(maps, maps, {'conv1': 'a.conv1'})
    with pytest.raises(ValueError, match=r"no layer of the student \(8×8, 4×4\) gives maps as large as one of the teacher's \(7×7\); name pairs"): layer_pairs(maps, {'x': (3, 7, 7)})
    assert layer_pairs(maps, {'x': (3, 7, 7)}, {'b.conv1': 'x'}) == [('b.conv1', 'x')]


def test_a_layer_that_is_gone_is_missed_before_the_first_forward_pass():
    learn = learner().distill(net(5, 6), attention=1.)
    learn.model = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(256, 3)))
    with pytest.raises(ValueError, match='distill: the layer 1 is not there any more; call distill after what changes the network'): learn.fit(1)
