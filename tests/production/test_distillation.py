"A teacher: what it adds to the loss, what it costs, and what it must not touch."
from copy import deepcopy

import pytest
import torch
from fastai.basics import Callback, Learner, nn
from fastai.vision.all import Normalize
from torch.nn import functional as F

from fastrecipes.data.statistics import PixelMap, normalization_of
from fastrecipes.production.distillation import Renormalize, soft_divergence
from fastrecipes.production.export import export_learner


class Counting(nn.Linear):
    "Counts its calls, and those with gradients on."
    calls = graded = 0
    def forward(self, x):
        type(self).calls += 1
        type(self).graded += torch.is_grad_enabled()
        assert not self.training
        return super().forward(x)


def test_the_divergence_against_a_loop_and_against_torch():
    g = torch.Generator().manual_seed(0)
    s, t, T = torch.randn(5, 3, generator=g), torch.randn(5, 3, generator=g), 4.
    by_hand = 0.
    for i in range(5):
        p, q = (t[i]/T).softmax(0), (s[i]/T).softmax(0)
        by_hand += T*T*sum(float(p[k]*(p[k]/q[k]).log()) for k in range(3))/5
    assert float(soft_divergence(s, t, T)) == pytest.approx(by_hand, rel=1e-5)
    assert float(soft_divergence(s, t, T)) == pytest.approx(float(T*T*F.kl_div((s/T).log_softmax(1), (t/T).softmax(1), reduction='batchmean')), rel=1e-5)
    assert float(soft_divergence(s, s + 7)) == pytest.approx(0, abs=1e-6)


def test_pixels_count_as_samples_along_another_axis():
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 3, 4, 5, generator=g), torch.randn(2, 3, 4, 5, generator=g)
    flat = [x.movedim(1, -1).reshape(-1, 3) for x in (s, t)]
    assert float(soft_divergence(s, t, 2., axis=1)) == pytest.approx(float(soft_divergence(*flat, 2.)), rel=1e-5)


def test_F7_valid_loss_is_the_datas_own(toy):
    learn = toy().distill(toy(seed=1), alpha=.9)
    learn.fit(2)
    x, y = learn.dls.valid_ds.dataset.tensors
    assert learn.recorder.values[-1][1] == pytest.approx(F.cross_entropy(learn.model(x), y).item(), rel=1e-5)


def test_F8_the_teacher_has_no_gradients_and_works_in_training_only(toy):
    teacher = Counting(4, 3)
    learn = toy().distill(teacher)
    Counting.calls = Counting.graded = 0
    learn.fit(2)
    learn.validate()
    assert (Counting.calls, Counting.graded) == (2*4, 0)         # 4 batches an epoch, none of validation
    assert all(p.grad is None and not p.requires_grad for p in learn.distill_cb.teacher.parameters())


def test_the_teachers_learner_is_as_it_was(toy):
    teacher = toy(model=nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    teacher.model.train()
    before = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    toy().distill(teacher).fit(2)
    assert all(torch.equal(v, before[k]) for k, v in teacher.model.state_dict().items())
    assert teacher.model.training and all(p.requires_grad for p in teacher.model.parameters())


def test_a_student_learns_from_the_answers_alone(toy):
    "With alpha=1 the labels count for nothing: shuffled ones lead to the teacher all the same."
    teacher = toy()
    teacher.fit(20, .1)
    learn = toy(seed=1, n=64).distill(teacher, alpha=1., T=1.)
    learn.dls.train_ds.dataset.tensors = (teacher.dls.train_ds.dataset.tensors[0], learn.dls.train_ds.dataset.tensors[1])
    learn.fit(40, .1)
    x = teacher.dls.train_ds.dataset.tensors[0]
    assert (learn.model(x).argmax(1) == teacher.model(x).argmax(1)).float().mean() > .95


@pytest.mark.parametrize('whiten', [False, True])
def test_each_network_sees_pixels_normalised_as_it_was_trained(digit_folder, whiten):
    from fastai.basics import Learner
    from fastrecipes.data.folders import image_folder
    def learner(mean, std):
        dls = image_folder(digit_folder, size=8, bs=32, device=torch.device('cpu'))
        dls.add_tfms([Normalize.from_stats([mean]*3, [std]*3, cuda=False)], 'after_batch')
        learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 10)))
        learn.remove_cb(learn.progress)
        learn.logger = lambda row: None
        return learn
    teacher, student = learner(.5, .5), learner(.2, .3)
    if whiten: student.normalize('zca')
    student.distill(teacher)
    kept = {}
    class Keep(Callback):
        order = 4.7
        def after_pred(self):
            if self.learn.training and not kept: kept.update(x=self.learn.xb[0], answer=self.learn.distill_cb.answer)
    student.fit(1, cbs=Keep())
    pixels = normalization_of(student).inverse()(kept['x']) if whiten else kept['x']*.3 + .2
    assert -.01 < float(pixels.min()) < .01 and .9 < float(pixels.max()) < 1.01
    assert torch.allclose(kept['answer'], teacher.model((pixels-.5)/.5), atol=1e-4)


def test_renormalising_is_undoing_and_doing():
    one, two = (PixelMap.standard([m]*3, [s]*3) for m, s in ((.2, .3), (.5, .25)))
    x = torch.rand(2, 3, 4, 4)
    assert torch.allclose(Renormalize(one, two)((x-.2)/.3), (x-.5)/.25, atol=1e-5)
    g = torch.Generator().manual_seed(0)
    full = PixelMap(torch.rand(3, 4, 4, generator=g), torch.eye(48) + .1*torch.randn(48, 48, generator=g))
    white = ((x-full.shift).flatten(1) @ full.factor).view_as(x)
    assert torch.allclose(Renormalize(full, two)(white), (x-.5)/.25, atol=1e-4) and torch.allclose(Renormalize(two, full)((x-.5)/.25), white, atol=1e-4)


def test_a_teacher_by_its_path(toy, tmp_path):
    teacher = toy(seed=1)
    export_learner(teacher, tmp_path/'learner.pkl')
    learn = toy().distill(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(learn.distill_cb.teacher.parameters(), teacher.model.parameters()))
    with pytest.raises(FileNotFoundError, match='distill: no exported Learner .*nowhere'): toy().distill('nowhere')


def test_the_teacher_is_not_exported_with_the_student(toy, tmp_path):
    from fastai.learner import load_learner
    path = export_learner(toy().distill(toy(model=nn.Sequential(nn.Linear(4, 50_000), nn.Linear(50_000, 3)))), tmp_path/'learner.pkl')
    assert path.stat().st_size < 100_000 and load_learner(path).techniques['distill'].arguments['teacher'] == '<Learner>'


@pytest.mark.parametrize('kwargs, message', [(dict(T=0), 'T must be > 0, got 0'), (dict(alpha=1.1), r'alpha must be in \[0, 1\], got 1.1')])
def test_values_outside_their_ranges_are_refused(toy, kwargs, message):
    with pytest.raises(ValueError, match=f'distill: {message}'): toy().distill(nn.Linear(4, 3), **kwargs)


def test_what_cannot_teach_is_refused(toy):
    with pytest.raises(ValueError, match='distill: the teacher answers .16, 5. where the student answers .16, 3.'): toy().distill(nn.Linear(4, 5)).fit(1)
    with pytest.raises(ValueError, match=r"distill: the teacher knows the classes 0, 1, the student"): toy().distill(toy(c=2))
    with pytest.raises(ValueError, match='distill: teacher must be a Learner'): toy().distill(3)
    with pytest.raises(ValueError, match='distill: the loss must be a cross entropy'): toy(loss_func=nn.MSELoss(), labels=torch.randn(64, 3)).distill(nn.Linear(4, 3))
    with pytest.raises(TypeError, match='distill: needs teacher'): toy().use(distill=True)


@pytest.mark.parametrize('student, teacher', [(None, True), (True, None), (None, None), (True, True)])
def test_a_teacher_sees_pixels_as_it_was_trained_whoever_normalises(digit_folder, student, teacher):
    from fastrecipes.data.folders import image_folder
    from fastrecipes.data.loaders import samples
    stats = (.3, .4, .5), (.2, .3, .4)
    def learner(normalised, seed):
        torch.manual_seed(seed)
        dls = image_folder(digit_folder, size=8, bs=16, seed=1, workers=0)
        if normalised: dls.add_tfms([Normalize.from_stats(*(s if seed else stats[0] for s in stats))], 'after_batch')
        return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, len(dls.vocab))))
    ours, theirs = learner(student, 0), learner(teacher, 1)
    x, seen = (samples(o.dls.valid, 8)[0].as_subclass(torch.Tensor) for o in (ours, theirs))        # the same images, each as its Learner normalises them
    with torch.no_grad(): expected = theirs.model(seen)
    ours.distill(theirs)
    with torch.no_grad(): assert torch.allclose(ours.distill_cb.teacher(x), expected, atol=1e-4)


def test_pixels_that_are_normalised_afterwards_are_refused(digit_folder):
    from fastrecipes.data.folders import image_folder
    dls = image_folder(digit_folder, size=8, bs=16, seed=1, workers=0)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, len(dls.vocab))))
    learn.remove_cb(learn.progress)
    learn.distill(deepcopy(learn.model)).normalize('standardize')
    with pytest.raises(ValueError, match='distill: pixels are normalised otherwise than when it was called; call normalize first'): learn.fit(1)


def test_a_network_whose_features_are_matched_is_not_cut(make_learn):
    learn = make_learn(epochs=0)
    learn.distill(deepcopy(learn.model), features=1.)
    with pytest.raises(ValueError, match='slim: distill matches features of the layers as they are .*slim first, then distill'): learn.slim(.5, round_to=1)


def test_how_often_the_teacher_is_right_is_said(toy):
    teacher = toy(n=64)
    teacher.fit(20, .1)
    learn = toy(n=64).distill(teacher)
    x, y = learn.dls.valid_ds.dataset.tensors
    right = float((teacher.model(x).argmax(1) == y).float().mean())
    assert len(x) == 64 and .4 < right < 1 and f'; the teacher is right on {right:.1%} of 64 validation samples' in learn.techniques['distill'].effect


def test_a_teacher_that_knows_nothing_is_told_of(toy, capsys):
    net = nn.Linear(4, 3)
    for p in net.parameters(): nn.init.zeros_(p)            # names class 0 for all
    learn = toy(n=256, labels=sorted(i % 3 for i in range(256)))        # the first 86 of them all of class 0
    y = learn.dls.valid_ds.dataset.tensors[1][::4]
    learn.distill(net)
    said = capsys.readouterr().out
    assert f'one class for all on {float(y.bincount().max()/len(y)):.1%}: it has little to teach' in said and said.startswith('distill: ')


def test_a_teacher_of_another_size_is_told_of(photos, monkeypatch, capsys):
    from fastrecipes.data.folders import image_folder
    nets = [Learner(image_folder(photos, size=side, bs=4, workers=0), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)), nn.CrossEntropyLoss()) for side in (8, 16)]
    nets[0].model[-1].weight.data.zero_()
    monkeypatch.setattr('fastrecipes.production.distillation.FEW', 1)
    nets[1].distill(nets[0])
    assert capsys.readouterr().out.strip().endswith('it has little to teach. Its images were 8×8 px, these are 16×16')


def test_a_teacher_of_another_kind_of_input_is_refused_at_once(toy):
    with pytest.raises(ValueError, match="^distill: the teacher cannot take the student's batches: .*mat1 and mat2"): toy().distill(nn.Linear(7, 3))
