"Clause 6: two processes train what one does with the same global batch; metrics are exact, the first process writes, and one that dies takes none along."
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastrecipes.data.samples import digits

from . import two
from .conftest import TECHNIQUES, learner, use
from .kill import Zygote, kept, same

HERE = Path(__file__).parent
CASES = two.cases()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    "What each of two processes ended with, all cases in one start."
    folder = tmp_path_factory.mktemp('two')
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(HERE.parents[1]), PYTHONWARNINGS='ignore')
    run = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', HERE/'two.py', folder], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-3000:]
    return [torch.load(folder/f'{rank}.pt', weights_only=False) for rank in (0, 1)]


def far(a, b) -> float: return max(float((x-y).abs().max()) for x, y in zip(a, b))


def per_batch(names): return any(n in ('mixup', 'cutmix') for n in names)         # their draws belong to a process's batch, not to a sample


@pytest.mark.parametrize('names', CASES, ids=lambda n: '+'.join(n) or 'none')
def test_two_processes_equal_one_with_the_same_global_batch(names, ranks):
    one, (a, b) = two.trained(names, learner, use, 1), [r[names] for r in ranks]
    assert all(torch.equal(x, y) for x, y in zip(a['weights'], b['weights'])) and a['values'] == b['values']       # the ranks agree, bit for bit
    assert all(sorted(x+y) == sorted(w) and x+y == w for x, y, w in zip(a['samples'], b['samples'], one['samples'])) and len(one['samples']) == len(a['samples'])
    assert torch.equal(a['targets'], one['targets']) and a['preds'].shape == one['preds'].shape and a['model'] == one['model']
    if per_batch(names): return
    low = any('precision' in TECHNIQUES[n].touches for n in names)              # 16 bits round sums of half a batch differently
    assert far(a['weights'], one['weights']) <= (2e-3 if low else 1e-6)
    assert far([a['preds']], [one['preds']]) <= (2e-2 if low else 1e-5)
    for mine, theirs in zip(a['values'], one['values']): assert mine == pytest.approx(theirs, abs=2e-2 if low else 2e-6)


@pytest.mark.parametrize('names', [n for n in CASES if per_batch(n)], ids='+'.join)
def test_what_is_drawn_for_a_batch_differs_between_ranks_and_keeps_its_distribution(names, ranks):
    one, (a, b) = two.trained(names, learner, use, 1), [r[names] for r in ranks]
    assert len(a['shares']) == len(one['shares']) and not any(torch.equal(x, y) for x, y in zip(a['shares'], b['shares']))
    both, alone = torch.cat(a['shares'] + b['shares']), torch.cat(one['shares'])
    assert float(both.mean()) == pytest.approx(float(alone.mean()), abs=.1) and far(a['weights'], one['weights']) < .1


@pytest.mark.parametrize('names', CASES, ids=lambda n: '+'.join(n) or 'none')
def test_validation_is_exact_though_it_does_not_divide(names, ranks):
    for r in ranks:
        got = r[names]
        accuracy = float((got['preds'].argmax(1) == got['targets']).float().mean())
        assert len(got['preds']) == two.VALID and got['values'][-1][2] == pytest.approx(accuracy, abs=1e-6) and got['validated'] == pytest.approx(got['values'][-1][1:], abs=1e-6)


def test_distill_trains_the_same_regressors_in_both_processes_and_in_one(ranks):
    one, (a, b) = two.matched(learner, 1), [r['matched'] for r in ranks]
    for kind in ('regressors', 'weights'): assert all(map(torch.equal, a[kind], b[kind])) and far(a[kind], one[kind]) <= 1e-5


def test_a_balanced_epoch_is_shared_out_without_overlap(ranks):
    a, b = (r[('balance',)]['samples'] for r in ranks)
    draws = [i for batch in (*a, *b) for i in batch]
    per_epoch = len(draws)//2
    first = [i for batch in (*a[:len(a)//2], *b[:len(b)//2]) for i in batch]
    assert len(set(first)) == len(first) == per_epoch       # a draw is sample + repetition·samples: none comes up twice


RUN = '--arch resnet10t --pretrained false --size 32 --bs 16 --epochs 2 --valid .3 --test .2 --lr .003 --to_distributed.timeout 60 --balance upsampling'.split()


@pytest.fixture(scope='module')
def pair():
    "Two command lines that find each other as torchrun's do, but without it: nobody ends the one when the other dies."
    with Zygote() as first, Zygote() as second: yield first, second


def start(pair, argv, folder) -> list[int]:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    return [z.start(argv, folder/f'log{r}', RANK=str(r), LOCAL_RANK=str(r), **env) for r, z in enumerate(pair)]


def test_one_processs_death_ends_the_other_with_a_sentence_and_the_run_goes_on(pair, tmp_path):
    data = digits(tmp_path/'digits', imbalance=20)
    command = lambda out: ['image-classifier', data, *RUN, '--out', tmp_path/out]
    start(pair, command('whole'), tmp_path)
    assert [z.wait() for z in pair] == [0, 0], (tmp_path/'log0').read_text() + (tmp_path/'log1').read_text()
    assert (tmp_path/'log1').read_text() == ''                                   # the first process alone prints, and writes
    assert (tmp_path/'log0').read_text().count('epoch 0') == 1

    pids = start(pair, command('killed'), tmp_path)
    while not (tmp_path/'killed'/'checkpoint'/'1.pt').exists(): time.sleep(.01)
    os.kill(pids[1], signal.SIGKILL)
    died = time.monotonic()
    assert [pair[1].wait(), pair[0].wait()] == [-9, 2] and time.monotonic()-died < 60
    said = (tmp_path/'log0').read_text().splitlines()[-1]
    assert 'to_distributed: another of the 2 processes is gone' in said and 'to go on: torchrun --nproc-per-node 2 -m fastrecipes image-classifier' in said

    start(pair, command('killed'), tmp_path)
    assert [z.wait() for z in pair] == [0, 0] and 'going on from its last checkpoint' in (tmp_path/'log0').read_text()
    assert same(kept(tmp_path/'whole'), kept(tmp_path/'killed'))


def test_processes_without_the_technique_are_refused(pair, tmp_path):
    data = digits(tmp_path/'digits', imbalance=100)
    start(pair, ['image-classifier', data, '--pretrained', 'false', '--out', tmp_path/'run'], tmp_path)
    assert [z.wait() for z in pair] == [2, 2] and 'torchrun started 2; train with image-classifier --to_distributed' in (tmp_path/'log0').read_text()
