"Clause 4 with real processes: `kill -9` at any moment, Ctrl-C, and files that lie there half written."
import random
import shlex
import signal

import pytest

from fastrecipes.data.samples import digits

from .kill import Zygote, kept, same

SIX = '--augment.flip false --label_smoothing .1 --balance upsampling --mixup .4 --cutout 8 --early_stop.patience 2'.split()
RUN = '--arch resnet10t --pretrained false --size 32 --bs 32 --epochs 2 --valid .3 --test .2 --lr .003'.split()


@pytest.fixture(scope='module')
def zygote():
    with Zygote() as z: yield z


@pytest.fixture(scope='module')
def command(tmp_path_factory):
    data = digits(tmp_path_factory.mktemp('few')/'digits', imbalance=100)
    return lambda out: ['image-classifier', data, *RUN, *SIX, '--out', out]


@pytest.fixture(scope='module')
def whole(zygote, command, tmp_path_factory):
    "The run that is never killed, and how long it takes."
    folder = tmp_path_factory.mktemp('whole')
    code, seconds = zygote.run(command(folder/'run'), folder/'log')
    assert code == 0, (folder/'log').read_text()
    return kept(folder/'run'), seconds


@pytest.mark.parametrize('seed', range(4))
def test_killed_at_a_random_moment_the_same_command_ends_bit_for_bit_the_same(seed, zygote, command, whole, tmp_path):
    moment = random.Random(seed).uniform(.3, .95)*whole[1]
    code, _ = zygote.run(command(tmp_path/'run'), tmp_path/'log', after=moment)
    if code == -9: code, _ = zygote.run(command(tmp_path/'run'), tmp_path/'log')
    assert code == 0, (tmp_path/'log').read_text()
    assert same(whole[0], kept(tmp_path/'run'))


def test_ctrl_c_ends_with_the_command_that_goes_on(zygote, command, whole, tmp_path):
    for run in (tmp_path/'run', tmp_path/'again', tmp_path/'third'):        # on a busy machine it may be done before the signal comes
        code, _ = zygote.run(command(run), tmp_path/'log', after=run/'checkpoint'/'1.pt', signal_=signal.SIGINT)
        if code != 0: break
    said = (tmp_path/'log').read_text().splitlines()[-1]
    assert code == 130 and said.startswith('fastrecipes: interrupted; to go on: fastrecipes image-classifier')
    code, _ = zygote.run(shlex.split(said.split(': ')[-1])[1:], tmp_path/'log')
    assert code == 0 and 'going on from its last checkpoint' in (tmp_path/'log').read_text()
    assert same(whole[0], kept(run))


def test_what_a_kill_left_half_written_is_not_read(zygote, command, whole, tmp_path):
    zygote.run(command(tmp_path/'run'), tmp_path/'log', after=tmp_path/'run'/'checkpoint'/'1.pt')
    (tmp_path/'run'/'checkpoint'/'.1.pt.12345.tmp').write_bytes(b'half')
    code, _ = zygote.run(command(tmp_path/'run'), tmp_path/'log')
    assert code == 0 and same(whole[0], kept(tmp_path/'run'))
