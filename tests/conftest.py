"What many tests stand on: small real data, made once."
import os
import shutil

os.environ.setdefault('OMP_NUM_THREADS', '1' if 'PYTEST_XDIST_WORKER' in os.environ else '2')
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ['XDG_CACHE_HOME'] = os.path.join(os.environ.get('PYTEST_CACHE_HOME', '/tmp'), f'fastrecipes-tests-{os.getpid()}')

import numpy as np                                              # noqa: E402
import pytest                                                   # noqa: E402
import torch                                                    # noqa: E402
from fastai.basics import Learner, nn                           # noqa: E402
from fastai.data.core import DataLoaders                        # noqa: E402
from fastai.metrics import accuracy                             # noqa: E402
from PIL import Image                                           # noqa: E402

from fastrecipes.data.keyed import KeyedDL                      # noqa: E402
from fastrecipes.data.loaders import Indexed                    # noqa: E402
from fastrecipes.data.samples import digits                     # noqa: E402


@pytest.fixture(scope='session')
def digit_folder(tmp_path_factory):
    "The embedded digits as a folder of PNGs, ten to one imbalanced; read only."
    return digits(tmp_path_factory.mktemp('digits'), imbalance=10)


@pytest.fixture
def photos(tmp_path):
    "Two classes of ten 16×12 px noise images: `photos/<cat|dog>/<i>.png`."
    rng = np.random.default_rng(0)
    for label in ('cat', 'dog'):
        (tmp_path/'photos'/label).mkdir(parents=True)
        for i in range(10): Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(tmp_path/'photos'/label/f'{i}.png')
    return tmp_path/'photos'


@pytest.fixture
def toy():
    "`toy(n=64, c=3, loss_func=…)`: a linear Learner on seeded noise in memory, without progress bars."
    def make(n=64, c=3, d=4, bs=16, loss_func=None, labels=None, seed=0, model=None, **kwargs):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(n, d, generator=g)
        y = torch.randint(c, (n,), generator=g) if labels is None else torch.as_tensor(labels)
        ds = Indexed(torch.utils.data.TensorDataset(x, y), vocab=range(c))
        dls = DataLoaders(KeyedDL(ds, bs, seed=seed, shuffle=True, drop_last=True, num_workers=0), KeyedDL(ds, bs, seed=seed, num_workers=0), device=torch.device('cpu'))
        torch.manual_seed(seed)
        learn = Learner(dls, model or nn.Linear(d, c), loss_func or nn.CrossEntropyLoss(), metrics=accuracy, **kwargs)
        learn.remove_cb(learn.progress)
        learn.logger = lambda row: None
        return learn
    return make


@pytest.fixture(scope='module')
def browser():
    "A headless Chromium: the system's, else one that playwright has installed."
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed (extra dev)')
    found = next((p for n in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(n))), None)
    quiet = ['--no-sandbox', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--no-first-run', '--disable-gpu']
    with sync_api.sync_playwright() as p:
        if found is None and not os.path.exists(p.chromium.executable_path): pytest.skip('no chromium on this machine')
        b = p.chromium.launch(executable_path=found, args=quiet)
        yield b
        b.close()
