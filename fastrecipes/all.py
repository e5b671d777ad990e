"fastai.vision.all and every public name here: `from fastrecipes.all import *`."
from fastai.vision.all import *

from fastrecipes.data.balance import *
from fastrecipes.data.erasing import *
from fastrecipes.data.folders import *
from fastrecipes.data.keyed import *
from fastrecipes.data.loaders import *
from fastrecipes.data.mixing import *
from fastrecipes.data.pixels import *
from fastrecipes.data.samples import *
from fastrecipes.errors import *
from fastrecipes.layers.regularization import *
from fastrecipes.losses.classification import *
from fastrecipes.objective import *
from fastrecipes.production.bundle import *
from fastrecipes.production.distillation import *
from fastrecipes.production.export import *
from fastrecipes.production.gate import *
from fastrecipes.production.predictor import *
from fastrecipes.production.pruning import *
from fastrecipes.production.quantization import *
from fastrecipes.production.slimming import *
from fastrecipes.randomness import *
from fastrecipes.recipes.classify import *
from fastrecipes.recipes.compress import *
from fastrecipes.recipes.pipeline import *
from fastrecipes.recipes.ship import *
from fastrecipes.report.page import *
from fastrecipes.report.run_folder import *
from fastrecipes.technique import *
from fastrecipes.training.accumulation import *
from fastrecipes.training.distributed import *
from fastrecipes.training.finders import *
from fastrecipes.training.parallel import *
from fastrecipes.training.precision import *
from fastrecipes.training.preflight import *
from fastrecipes.training.reproducibility import *
from fastrecipes.training.resume import *
from fastrecipes.training.state import *
from fastrecipes.training.stopping import *
from fastrecipes.training.transfer import *

discover()
