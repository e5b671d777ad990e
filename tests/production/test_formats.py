"A Learner as a file: others run it without fastai and answer as it does; what answers otherwise is not written."
import json
import subprocess
import sys
from functools import partial

import numpy as np
import onnx
import onnxruntime as ort
import pandas as pd
import pytest
import torch
from fastai.basics import Learner, Transform, nn
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner
from fastai.vision.all import (CategoryBlock, DataBlock, ImageBlock, MaskBlock, MultiCategoryBlock, PILImage, PILMask, RandomSplitter, RegressionBlock, Resize, TensorImage,
                               get_image_files, parent_label, resnet18, unet_learner)
from torch.nn import functional as F

from fastrecipes.data.pixels import fit_image, read_image
from fastrecipes.errors import BadValue
from fastrecipes.production import entries, formats, quantizing  # noqa: F401  the last for its method
from fastrecipes.production.entries import answer_of
from fastrecipes.production.formats import Exported, to_onnx, to_torch_export, to_torchscript
from fastrecipes.production.graphs import OPSETS, as_onnx, opset_of, ops_of
from fastrecipes.recipes.ship import ship
from fastrecipes.training import precision  # noqa: F401  its to_fp16 replaces fastai's

from .conftest import small_net

FORMATS = (to_onnx, to_torch_export, to_torchscript)
MEAN, STD = [.5, .4, .3], [.25, .3, .2]


def quiet(learn):
    learn.remove_cb(learn.progress)
    return learn


def blocks(files, *block, size=16, get_y=parent_label):
    return DataBlock((ImageBlock, *block), get_y=get_y, splitter=RandomSplitter(seed=0), item_tfms=Resize(size),
                     batch_tfms=Normalize.from_stats(MEAN, STD, cuda=False)).dataloaders(files, bs=8, num_workers=0, device=torch.device('cpu'))


def mask(f): return PILMask.create((np.asarray(PILImage.create(f))[..., 0]//100).astype(np.uint8))


def table(n=60):
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(colour=rng.choice(list('rgb'), n), shape=rng.choice(['round', 'flat'], n), weight=rng.normal(300, 50, n), height=rng.normal(0, 1e-2, n)))
    return df.assign(dear=np.where(df.weight + 5e3*df.height > 300, 'yes', 'no'))


@pytest.fixture
def learners(mixed_photos):
    "`learners(kind)`: a Learner of each kind of data, its network as it was drawn."
    files = [f for f in get_image_files(mixed_photos)]
    def make(kind):
        torch.manual_seed(0)
        if kind == 'images': learn = Learner(blocks(files, CategoryBlock), small_net())
        if kind == 'labels': learn = Learner(blocks(files, MultiCategoryBlock, get_y=lambda f: [parent_label(f), 'image']), small_net(4))
        if kind == 'numbers': learn = Learner(blocks(files, RegressionBlock(n_out=2), get_y=lambda f: torch.tensor([1., 1000.])), small_net(2))
        if kind == 'masks': learn = unet_learner(blocks(files[:20], MaskBlock(codes=['a', 'b', 'c']), size=32, get_y=mask), resnet18, pretrained=False)
        if kind == 'table':
            dls = TabularDataLoaders.from_df(table(), procs=[Categorify, FillMissing, Normalize], cat_names=['colour', 'shape'], cont_names=['weight', 'height'], y_names='dear',
                                             bs=16, valid_idx=range(20), num_workers=0, device=torch.device('cpu'))
            learn = tabular_learner(dls, layers=[8])
        for m in learn.model.modules():         # batch statistics unlike those of a new layer
            if isinstance(m, nn.modules.batchnorm._BatchNorm): m.running_mean.normal_(0, .1), m.running_var.uniform_(.5, 2)
        return quiet(learn)
    return make


def answers(file: Exported, *xb: np.ndarray) -> np.ndarray:
    "What a process without fastai or fastrecipes gets of a file."
    np.savez(f'{file.path}.npz', *xb)
    code = {'ONNX': 'import onnxruntime as r; s = r.InferenceSession(p); y = s.run(None, {i.name: x for i, x in zip(s.get_inputs(), xs)})[0]',
            'torch.export': 'import torch; y = torch.export.load(p).module()(*map(torch.from_numpy, xs)).detach().numpy()',
            'TorchScript': 'import torch; y = torch.jit.load(p)(*map(torch.from_numpy, xs)).detach().numpy()'}[file.format]
    code = f'import sys, numpy as np; p = sys.argv[1]; xs = list(np.load(p + ".npz").values()); {code}; np.save(p + ".npy", y); print([m for m in sys.modules if m.startswith("fast")])'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(file.path)], capture_output=True, text=True, cwd='/', env={'OMP_NUM_THREADS': '1', 'PATH': ''})
    assert done.stdout.strip() == '[]', done.stderr[-500:]
    return np.load(f'{file.path}.npy')


def by_hand(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    "Normalised, through the network in evaluation mode: logits."
    net.eval()
    with torch.no_grad(): return net((x-torch.tensor(MEAN).view(3, 1, 1))/torch.tensor(STD).view(3, 1, 1))


@pytest.mark.parametrize('write', FORMATS)
def test_image_files_become_probabilities_in_a_process_without_fastai(learn, tmp_path, write):
    pixels = np.stack([np.asarray(fit_image(read_image(f), (16, 16))) for f in learn.dls.valid.items[:5]])
    expected = by_hand(learn.model, torch.from_numpy(pixels).permute(0, 3, 1, 2)/255).softmax(1)
    file = write(learn, tmp_path/'m.file')
    assert np.abs(answers(file, pixels) - expected.numpy()).max() < 1e-5 and file.inputs[0].endswith('(n, 16, 16, 3)') and 'uint8' in file.inputs[0]
    assert (file.agreement.n, file.agreement.same) == (21, 21) and file.agreement.max_diff < 1e-5 and file.size_bytes == file.path.stat().st_size


@pytest.mark.parametrize('write', FORMATS)
@pytest.mark.parametrize('kind, activation', [('images', partial(F.softmax, dim=1)), ('labels', torch.sigmoid), ('numbers', lambda x: x), ('masks', partial(F.softmax, dim=1))])
def test_images_of_any_data_block_become_what_the_loss_makes_of_outputs(learners, tmp_path, write, kind, activation):
    learn = learners(kind)
    file = write(learn, tmp_path/'m.file')
    assert file.inputs == (f'images: float32 (n, 3, {32 if kind == "masks" else 16}, {32 if kind == "masks" else 16})',)
    assert file.output.startswith('predictions' if kind == 'numbers' else 'probabilities') and file.agreement.n == len(learn.dls.valid_ds)
    assert file.agreement.same == (None if kind == 'numbers' else file.agreement.n)
    x = torch.rand(3, *learn.dls.one_batch()[0].shape[1:], generator=torch.Generator().manual_seed(1))
    expected = np.asarray(activation(by_hand(learn.model, x)))
    run = {'ONNX': lambda: ort.InferenceSession(file).run(None, {'images': x.numpy()})[0], 'torch.export': lambda: torch.export.load(file.path).module()(x).detach().numpy(),
           'TorchScript': lambda: torch.jit.load(file.path)(x).detach().numpy()}[file.format]
    assert np.abs(run() - expected).max() < 1e-5*max(1, np.abs(expected).max())


@pytest.mark.parametrize('write', FORMATS)
def test_a_table_takes_codes_and_numbers_in_their_own_units(learners, tmp_path, write):
    learn, df = learners('table'), table()
    file = write(learn, tmp_path/'m.file')
    train, rows = df.iloc[20:], df.iloc[:7]
    codes = np.stack([[1 + sorted(set(df[c])).index(v) for v in rows[c]] for c in ('colour', 'shape')], 1).astype(np.int64)       # 0 is for what training did not have
    numbers = rows[['weight', 'height']].to_numpy(np.float32)
    scaled = (rows[['weight', 'height']] - train[['weight', 'height']].mean())/train[['weight', 'height']].std(ddof=0)
    with torch.no_grad(): expected = learn.model.eval()(torch.from_numpy(codes), torch.tensor(scaled.to_numpy(), dtype=torch.float32)).softmax(1)
    assert np.abs(answers(file, codes, numbers) - expected.numpy()).max() < 1e-4
    if file.format == 'ONNX':
        props = {p.key: json.loads(p.value) for p in onnx.load(file).metadata_props}
        assert props['labels'] == ['no', 'yes'] and props['input']['categories'] == dict(colour=['#na#', 'b', 'g', 'r'], shape=['#na#', 'flat', 'round'])
        assert props['input']['continuous'] == ['weight', 'height']


class Brighter(Transform):
    "A validation transform after the normalisation, which no file has."
    order = 100
    def encodes(self, x: TensorImage): return x + .3


@pytest.mark.parametrize('write', FORMATS)
@pytest.mark.parametrize('kind', ['images', 'files'])
def test_what_answers_otherwise_is_not_written_and_the_learner_stays(learners, learn, tmp_path, write, kind):
    learn = learners('images') if kind == 'images' else learn
    learn.dls.valid.after_batch.add(Brighter())
    before, cbs, rng = dict(vars(learn)), list(learn.cbs), torch.get_rng_state()
    with pytest.raises(BadValue, match=f'^{write.__name__}: the file does not answer as the Learner does.*0.0001 is allowed') as e: write(learn, tmp_path/'m.file')
    assert list(tmp_path.iterdir()) == [] and '\n' not in str(e.value)
    assert vars(learn) == before and list(learn.cbs) == cbs and torch.equal(rng, torch.get_rng_state())


class OffOnce(nn.Module):
    "A network that is off for the one sample whose pixels come to this sum."
    def __init__(self, net, at): super().__init__(); self.net, self.at = net, at
    def forward(self, x): return self.net(x) + .01*torch.tensor([1., 0., 0.])*((x.sum((1, 2, 3))-self.at).abs() < 1e-2)[:, None]


def test_a_difference_in_the_very_last_sample_is_found(learners, tmp_path, monkeypatch):
    learn = learners('images')
    *_, (x, _) = learn.dls.valid
    def entry_of(learn, who):
        entry = entries.entry_of(learn, who)
        entry.module.model = OffOnce(entry.module.model, float(x[-1].sum()))
        return entry
    monkeypatch.setattr(formats, 'entry_of', entry_of)
    with pytest.raises(BadValue, match='to_onnx: the file does not answer as the Learner does.*within 0.002'): to_onnx(learn, tmp_path/'m.onnx')


def test_any_opset_that_torch_writes_and_others_are_refused(learn, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    expected = by_hand(learn.model, torch.from_numpy(pixels).permute(0, 3, 1, 2)/255).softmax(1).numpy()
    for opset in (OPSETS[0], OPSETS[-1]):
        file = to_onnx(learn, tmp_path/f'{opset}.onnx', opset=opset)
        assert opset_of(onnx.load(file)) == file.opset == opset and np.abs(ort.InferenceSession(file).run(None, {'pixels': pixels})[0] - expected).max() < 1e-5
    for opset in (20., True):
        with pytest.raises(BadValue, match=f'^to_onnx: opset must be a whole number or None, got {opset}'): to_onnx(learn, tmp_path/'no.onnx', opset=opset)
    for opset in (17, 26):
        with pytest.raises(BadValue, match=f'^to_onnx: opset must be 18 to 25, which torch writes and onnxruntime runs, got {opset}'): to_onnx(learn, tmp_path/'no.onnx', opset=opset)
    assert not (tmp_path/'no.onnx').exists()


@pytest.mark.parametrize('opset', OPSETS)
def test_every_opset_of_the_range_is_written_and_run(opset):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.LayerNorm(4)
        def forward(self, x): return self.b(F.gelu(F.interpolate(self.a(x), scale_factor=2)).mean((2, 3))).softmax(1)
    x = torch.randn(2, 3, 8, 8)
    net = Net().eval()
    proto = as_onnx(net, (x,), opset=opset)
    assert opset_of(proto) == opset
    options = ort.SessionOptions()
    options.log_severity_level = 3
    got = ort.InferenceSession(proto.SerializeToString(), options).run(None, {'x0': torch.cat([x, x]).numpy()})[0]
    assert np.abs(got - net(torch.cat([x, x])).detach().numpy()).max() < 1e-5


def test_operators_are_counted_in_inner_graphs_too():
    helper, f = onnx.helper, onnx.TensorProto.FLOAT
    out = helper.make_tensor_value_info('y', f, [1])
    inner = helper.make_graph([helper.make_node('Add', ['x', 'x'], ['y'])], 'g', [], [out])
    node = helper.make_node('If', ['c'], ['y'], then_branch=inner, else_branch=inner)
    graph = helper.make_graph([node], 'g', [helper.make_tensor_value_info('c', onnx.TensorProto.BOOL, [])], [out])
    assert ops_of(helper.make_model(graph)) == dict(Add=2, If=1)


def test_it_prints_what_it_is_and_the_whole_graph(learn, tmp_path):
    for write, conv, softmax in ((to_onnx, 'Conv', 'Softmax'), (to_torch_export, 'aten.conv2d', 'aten.softmax.int'), (to_torchscript, 'aten::_convolution', 'aten::softmax')):
        file = write(learn, tmp_path/'m.file')
        assert file.ops[conv] == file.ops[softmax] == 1 and f'1 {conv}' in str(file) and conv.split('.')[-1].lower() in file.text().lower() and len(file.text()) < 20_000
        assert 'the same answer on 21 of 21' in str(file) and len(str(file).splitlines()) == 5
    assert onnx.load(to_onnx(learn, tmp_path/'m.onnx')).graph.node[0].op_type in to_onnx(learn, tmp_path/'m.onnx').text()


def test_in_16_bits_it_is_compared_and_written_in_32(make_learn, tmp_path):
    learn = make_learn().to_fp16()
    file = learn.to_onnx(tmp_path/'m.onnx')
    assert file.agreement.max_diff < 1e-5 and learn.autocast_cb in learn.cbs


@pytest.mark.parametrize('write', [to_torch_export, to_torchscript])
def test_of_a_view_only_what_is_seen_is_stored(make_learn, tmp_path, write):
    plain = write(make_learn(epochs=0), tmp_path/'plain').size_bytes
    learn = make_learn(epochs=0)
    layer = learn.model[-1]
    layer.weight = nn.Parameter(torch.cat([layer.weight.detach(), torch.zeros(100_000, 32)])[:3])
    assert layer.weight.untyped_storage().nbytes() > 12e6 and write(learn, tmp_path/'view').size_bytes < plain + 10_000


class Branches(nn.Module):
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x) if x.sum() > 0 else -self.net(x)


class AsWritten(nn.Module):
    "A trace of this knows the number of samples that it was made with."
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x)*(1. if len(x) == 2 else 2.)


def test_what_torch_cannot_write_is_one_sentence(make_learn, tmp_path):
    learn = make_learn(epochs=0, model=Branches(small_net()))
    for write in (to_onnx, to_torch_export):
        with pytest.raises(BadValue, match=f'^{write.__name__}: torch cannot') as e: write(learn, tmp_path/'m')
        assert '\n' not in str(e.value)
    learn = make_learn(epochs=0, model=AsWritten(small_net()))
    with pytest.raises(BadValue, match='^to_torchscript: '): to_torchscript(learn, tmp_path/'m')
    assert list(tmp_path.iterdir()) == []


class Recurrent(nn.Linear):
    "A weight that is computed anew in each pass, as fastai's WeightDropout leaves it in an AWD_LSTM: no leaf, which torch does not copy."
    def forward(self, x):
        self.dropped = self.weight*1.
        return F.linear(x, self.dropped, self.bias)


@pytest.mark.parametrize('write', FORMATS)
def test_a_network_that_cannot_be_copied_is_one_sentence(toy, tmp_path, write):
    learn = toy(model=Recurrent(4, 3))
    learn.fit(1)
    learn.model.train()(torch.zeros(1, 4))
    with pytest.raises(BadValue, match=f'^{write.__name__}: Recurrent holds tensors that torch cannot copy.*export'): write(learn, tmp_path/'m')
    learn.export(tmp_path/'l.pkl')
    assert [f.name for f in tmp_path.iterdir()] == ['l.pkl']


@pytest.mark.parametrize('write', FORMATS)
def test_where_no_file_can_be_is_said_before_any_work(make_learn, tmp_path, write, monkeypatch):
    learn, name = make_learn(), write.__name__
    monkeypatch.setattr('fastrecipes.production.formats.entry_of', lambda *a: pytest.fail('it began'))
    (tmp_path/'file').write_text('')
    with pytest.raises(BadValue, match=f'^{name}: .* is a folder; name a file in it'): write(learn, tmp_path)
    with pytest.raises(BadValue, match=f'^{name}: .* cannot be written, for .*file is a file'): write(learn, tmp_path/'file'/'net')
    with pytest.raises(BadValue, match=f'^{name}: path must be text, got 5'): write(learn, 5)
    with pytest.raises(TypeError, match=f"^{name}: no argument 'pth'"): write(learn, pth='a')
    other, own = ('net.pt', 'net.onnx') if name == 'to_onnx' else ('net.onnx', 'net.pt2' if name == 'to_torch_export' else 'net.pt')
    with pytest.raises(BadValue, match=f'^{name}: {other} has the ending of what .* writes; name it {own}$'): write(learn, tmp_path/other)


def test_outputs_of_another_number_than_classes_are_one_sentence(make_learn, tmp_path):
    learn = make_learn(model=small_net(5))
    said = r'the network gives 5 outputs for 3 classes \(blue, green, red\); its last layer must have 3'
    for write in FORMATS:
        with pytest.raises(BadValue, match=f'^{write.__name__}: {said}'): write(learn, tmp_path/'net')
    with pytest.raises(BadValue, match=f'^ship: {said}'): ship(learn, tmp_path/'bundle')
    assert not list(tmp_path.iterdir())


def test_without_validation_samples_nothing_is_written(learn, toy, tmp_path):
    learn.dls = learn.dls.new_empty()
    with pytest.raises(BadValue, match='^to_onnx: there is no .* sample'): to_onnx(learn, tmp_path/'m')
    learn = toy(loss_func=lambda p, y: p.sum())
    with pytest.raises(BadValue, match='^to_onnx: .*does not say how outputs become probabilities'): to_onnx(learn, tmp_path/'m')


def test_tensors_as_they_are(toy, tmp_path):
    learn = toy(d=4)
    file = learn.to_onnx(tmp_path/'m.onnx')
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    w, b = (p.detach().numpy() for p in learn.model.parameters())
    e = np.exp(x @ w.T + b)
    assert file.inputs == ('x0: float32 (n, 4)',) and np.allclose(ort.InferenceSession(file).run(None, {'x0': x})[0], e/e.sum(1, keepdims=True), atol=1e-6)


def test_in_8_bits_the_graph_is_what_is_written(learn, tmp_path):
    q = learn.quantize(tolerance=100)
    file = q.to_onnx(tmp_path/'q.onnx')
    assert file.ops['DequantizeLinear'] > 0 and file.agreement.allowed == .05 and file.agreement.n == 21
    with pytest.raises(BadValue, match='in an opset of its own'): q.to_onnx(tmp_path/'no', opset=20)
    with pytest.raises(BadValue, match='^to_torchscript: a network in 8 bits is an ONNX graph'): q.to_torchscript(tmp_path/'no')


@pytest.mark.parametrize('loss, name, x, y', [(nn.MSELoss(), 'predictions', 3., 3.), (F.l1_loss, 'predictions', 3., 3.), (nn.BCEWithLogitsLoss(), 'probabilities', 0., .5)])
def test_losses_say_what_outputs_are(loss, name, x, y):
    said, activation, decide = answer_of(loss, 'to_onnx')
    assert said == name and float(activation(torch.tensor([x]))) == y and (decide is None) == (name == 'predictions')
