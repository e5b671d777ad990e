"A bundle is written if it answers as its Learner does, or not at all."
import hashlib
import json
import re
from importlib.metadata import version

import numpy as np
import pytest
import torch
from fastai.basics import Transform, nn
from fastai.vision.all import TensorImage
from PIL import Image

from fastrecipes.errors import BadValue, NotThere
from fastrecipes.production.bundle import Bundle
from fastrecipes.production.export import export_learner
from fastrecipes.recipes.ship import ship
from fastrecipes.report.run_folder import RunFolder
from fastrecipes.training import precision  # noqa: F401  its to_fp16 replaces fastai's


def test_the_bundle_answers_as_the_learner_on_every_image_file(shipped):
    learn, bundle = shipped
    with learn.no_bar(): p = learn.get_preds()[0].numpy()
    got = bundle.predictor().probabilities(learn.dls.valid.items)
    kinds = {(f.suffix, Image.open(f).mode) for f in learn.dls.valid.items}
    assert len(kinds) >= 6                              # PNG and JPEG; RGB, grey, 16 bits, palette, alpha, CMYK
    assert (got.argmax(1) == p.argmax(1)).all() and np.abs(got-p).max() <= 1e-4
    assert (bundle.parity.n, bundle.parity.agree) == (len(p), len(p)) == (21, 21) and bundle.parity.max_diff == np.abs(got-p).max()


@pytest.mark.parametrize('resize', ['squish', 'pad'])
def test_the_other_ways_to_resize_agree_too(make_learn, tmp_path, resize): assert ship(make_learn(resize=resize), tmp_path/'b').parity.holds


def test_the_card_says_what_is_in_the_folder(shipped):
    learn, bundle = shipped
    card = json.loads((bundle.path/'bundle.json').read_text())
    assert sorted(p.name for p in bundle.path.iterdir()) == ['Dockerfile', 'bundle.json', 'model.onnx', 'requirements.txt', 'serve.pyz']
    assert card['schema'] == 1 and card['labels'] == ['blue', 'green', 'red']
    assert {k: v for k, v in card['input'].items() if k != 'pixels'} == dict(size=[16, 16], resize='crop', mode='RGB', dtype='uint8', layout='NHWC')
    assert card['files'] == {f: hashlib.sha256((bundle.path/f).read_bytes()).hexdigest() for f in ('Dockerfile', 'model.onnx', 'requirements.txt', 'serve.pyz')}
    assert card['size_bytes'] == bundle.size_bytes == (bundle.path/'model.onnx').stat().st_size
    assert card['parity'] == dict(n=21, agree=21, max_diff=bundle.parity.max_diff, versus='the Learner')
    assert card['latency_ms'] == bundle.latency_ms > 0 and card['eager_latency_ms'] == bundle.eager_latency_ms > 0
    assert card['provenance']['versions']['torch'] == version('torch') and card['provenance']['data'] == learn.dls.holdings.fingerprint
    assert re.fullmatch(r'\d{4}-\d\d-\d\dT[\d:]{8}[+-]\d\d:\d\d', card['provenance']['date'])


def test_the_card_tells_how_right_it_is(shipped):
    learn, bundle = shipped
    card = bundle.predictor().card['metrics']
    truth = [f.parent.name for f in learn.dls.valid.items]
    right = [next(iter(a)) == t for a, t in zip(bundle.predictor()(list(learn.dls.valid.items)), truth)]
    assert card == dict(side='valid', n=21, accuracy=sum(right)/21, balanced_accuracy=pytest.approx(
        np.mean([np.mean([r for r, t in zip(right, truth) if t == c]) for c in set(truth)])))


def test_requirements_are_what_serving_was_verified_with(shipped):
    assert (shipped[1].path/'requirements.txt').read_text().splitlines()[:3] == [f'{p}>={version(p)}' for p in ('onnxruntime', 'numpy', 'Pillow')]


def test_a_bundle_reads_as_a_sentence(shipped):
    assert re.fullmatch(r'bundle \S+: 3\.\d kB, [\d.]+ ms an image on one thread \(eager torch [\d.]+ ms\); '
                        r"the Learner's label on 21 of 21 validation images, probabilities within [\de.-]+", str(shipped[1]))


class Brighter(Transform):
    "A validation transform that the bundle does not know."
    order = 50
    def encodes(self, x: TensorImage): return x + .3


def nothing_left(tmp_path): return list(tmp_path.iterdir()) == []


def test_a_bundle_that_answers_differently_is_not_written(learn, tmp_path):
    learn.dls.valid.after_batch.add(Brighter())
    with pytest.raises(BadValue, match='does not answer as the Learner does') as e: ship(learn, tmp_path/'b')
    assert nothing_left(tmp_path) and '\n' not in str(e.value)


def test_a_model_that_gives_no_numbers_is_not_shipped(learn, tmp_path):
    nn.init.constant_(learn.model[-1].bias, float('nan'))
    with pytest.raises(BadValue, match='within nan'): ship(learn, tmp_path/'b')
    assert nothing_left(tmp_path)


def test_a_failure_in_the_middle_leaves_neither_folder_nor_a_changed_learner(learn, tmp_path):
    class Branches(nn.Sequential):
        def forward(self, x): return super().forward(x) if x.sum() > 0 else -super().forward(x)
    learn.model = Branches(*learn.model).train()
    before, modes, opt, threads = list(learn.cbs), [m.training for m in learn.model.modules()], learn.opt, torch.get_num_threads()
    with pytest.raises(BadValue, match='cannot write this network as ONNX'): ship(learn, tmp_path/'b')
    assert nothing_left(tmp_path) and learn.opt is opt and list(learn.cbs) == before and torch.get_num_threads() == threads
    assert [m.training for m in learn.model.modules()] == modes and len(learn.dls.valid.items) == 21


def test_shipping_leaves_the_learner_ready_to_train(make_learn, tmp_path):
    learn = make_learn().to_fp16()
    learn.model.train()
    torch.set_num_threads(2)
    before, threads, values, losses = list(learn.cbs), torch.get_num_threads(), list(learn.recorder.values), list(learn.recorder.losses)
    ship(learn, tmp_path/'b')
    assert list(learn.cbs) == before and all(cb.learn is learn for cb in before) and learn.autocast_cb in before
    assert len(values) == 2 and learn.recorder.values == values and learn.recorder.losses == losses and learn.epoch == 1    # get_preds empties them
    assert all(m.training for m in learn.model.modules()) and torch.get_num_threads() == threads


@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(), None])
def test_the_loss_of_torch_gives_probabilities_as_fastais_does(make_learn, tmp_path, loss):
    "fastai's `get_preds` leaves logits as they are where the loss is torch's own."
    p = ship(make_learn(loss_func=loss), tmp_path/'b').predictor().probabilities([Image.new('RGB', (16, 16), 'red')])
    assert p.sum() == pytest.approx(1) and (p > 0).all()


def test_a_folder_that_is_there_stays(shipped, tmp_path):
    learn, _ = shipped
    (tmp_path/'mine.txt').write_text('precious')
    for overwrite in (False, True):
        with pytest.raises(BadValue, match='files that are no bundle'): ship(learn, tmp_path, overwrite=overwrite)
    with pytest.raises(BadValue, match='mine.txt is a file'): ship(learn, tmp_path/'mine.txt', overwrite=True)
    with pytest.raises(BadValue, match='cannot be created'): ship(learn, tmp_path/'mine.txt'/'b')
    assert [p.read_text() for p in tmp_path.iterdir()] == ['precious']


def test_overwrite_replaces_a_bundle_and_a_failed_one_leaves_it(learn, tmp_path):
    first = ship(learn, tmp_path/'b')
    old = (tmp_path/'b'/'model.onnx').read_bytes()
    with pytest.raises(BadValue, match='exists already; .*--overwrite'): ship(learn, tmp_path/'b')

    nn.init.constant_(learn.model[-1].bias, float('nan'))
    with pytest.raises(BadValue, match='nan'): ship(learn, tmp_path/'b', overwrite=True)
    assert (tmp_path/'b'/'model.onnx').read_bytes() == old and first.predictor().labels == ['blue', 'green', 'red']

    nn.init.constant_(learn.model[-1].bias, 0.)
    second = ship(learn, tmp_path/'b', overwrite=True)
    assert isinstance(second, Bundle) and (tmp_path/'b'/'model.onnx').read_bytes() != old and [p.name for p in tmp_path.iterdir()] == ['b']
    second.predictor()


def test_data_that_are_no_image_folder_are_refused(toy, tmp_path):
    with pytest.raises(BadValue, match='data made by image_folder'): ship(toy(), tmp_path/'b')
    with pytest.raises(BadValue, match='a fitted Learner, what compress gave or a run folder, got Linear'): ship(nn.Linear(1, 1), tmp_path/'b')
    with pytest.raises(BadValue, match='l.pkl is an exported Learner, without data to verify a bundle on; give the run folder'): ship('l.pkl', tmp_path/'b')
    assert nothing_left(tmp_path)


def test_a_learner_without_validation_images_is_refused(learn, tmp_path):
    learn.dls = learn.dls.new_empty()
    with pytest.raises(BadValue, match='no validation image to verify'): ship(learn, tmp_path/'b')


def test_a_run_folder_is_shipped_as_its_learner(learn, mixed_photos, tmp_path):
    run = RunFolder.open('image-classifier', dict(path=mixed_photos, size=16, bs=8, valid=.5, test=0.), out=tmp_path/'run')
    export_learner(learn, run.path/'learner.pkl')
    bundle = ship(str(run.path), tmp_path/'b')
    assert bundle.parity.n == 21 and np.allclose(bundle.predictor().probabilities(learn.dls.valid.items),
                                                 ship(learn, tmp_path/'c').predictor().probabilities(learn.dls.valid.items), atol=1e-6)
    with pytest.raises(NotThere, match='does not exist'): ship(tmp_path/'nowhere')
