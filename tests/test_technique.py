"The registry: one definition, and what follows from it."
import gc
import itertools
import weakref

import pytest
from fastai.basics import Callback, Learner

from fastrecipes.recipes.classify import image_classifier
from fastrecipes.technique import SHARED, STAGES, TECHNIQUES, TechniqueCallback, discover, plan, put, technique

SET = dict(mixup=.3, balance='upsampling', early_stop=dict(patience=2), label_smoothing=True)


@pytest.fixture
def registered():
    "Register techniques in a test, and forget them after it."
    before = dict(TECHNIQUES)
    yield
    for name in TECHNIQUES.keys() - before.keys():
        del TECHNIQUES[name]
        delattr(Learner, name)


def test_the_order_of_keywords_never_matters():
    orders = {tuple(t.name for t, _ in plan(dict(p))) for p in itertools.permutations(SET.items())}
    assert orders == {('balance', 'label_smoothing', 'early_stop', 'mixup')}


def test_values_mean_off_defaults_first_argument_or_all():
    discover()
    mixup = TECHNIQUES['mixup']
    assert [mixup.arguments(v) for v in (None, False, True, .2, dict(alpha=.3))] == [None, None, {}, {'alpha': .2}, {'alpha': .3}]


@pytest.mark.parametrize('keywords, message', [
    (dict(mixpu=.4), "no technique named 'mixpu'; did you mean 'mixup'"),
    (dict(mixup=dict(alpa=.4)), "mixup: no argument 'alpa'; did you mean 'alpha'")])
def test_an_unknown_keyword_is_a_type_error_that_names_the_nearest(keywords, message):
    with pytest.raises(TypeError, match=message): plan(keywords)


def test_a_required_argument_cannot_be_switched_on_by_true(registered):
    @technique('train', section='Test', source='here')
    def needs_a_teacher(self, teacher): "Needs one."
    with pytest.raises(TypeError, match='needs_a_teacher: needs teacher'): plan(dict(needs_a_teacher=True))


@pytest.mark.parametrize('name, why', [('fit', 'Learner.fit'), ('lr', 'Learner.lr'), ('epochs', 'a parameter of the recipes'), ('order', 'Callback.order'),
                                       ('mix_up', 'the attribute that MixUp sets'), ('mixup', 'registered twice')])
def test_a_name_that_is_taken_fails_at_import(name, why):
    discover()
    def f(self): "Taken."
    f.__name__ = name
    with pytest.raises(ValueError, match=why): technique('train', section='Test', source='here')(f)


@pytest.mark.parametrize('wrong, said', [(dict(stage='modle'), 'stage must be one of'), (dict(touches='gradient'), 'touches must be a tuple of'),
                                         (dict(touches=('gradients',)), "got \\('gradients',\\)")])
def test_a_record_holds_only_words_that_are_known(registered, wrong, said):
    with pytest.raises(ValueError, match=said): technique(**dict(dict(stage='train', section='Test', source='here'), **wrong))


def test_a_cell_of_a_notebook_may_be_run_again_and_a_module_not(registered, toy):
    "The later definition is the one that is called, from wherever it was reached."
    def define(module, value):
        def test_again(self):
            "Defined."
            self.said = value
        test_again.__module__ = module
        technique('train', section='Test', source='here')(test_again)
    define('__main__', 1)
    define('__main__', 2)
    assert toy().test_again().said == 2 == toy().use('test_again').said
    with pytest.raises(ValueError, match="'test_again' is registered twice"): define('elsewhere', 3)


def test_a_declared_order_within_a_stage_wins_over_the_names(registered):
    for name, after in (('test_a', ('test_b',)), ('test_b', ())):
        def f(self): "Ordered."
        f.__name__ = name
        technique('train', section='Test', source='here', after=after)(f)
    assert [t.name for t, _ in plan(dict(test_a=True, test_b=True))] == ['test_b', 'test_a']


def test_a_refused_pair_raises_its_sentence_both_ways_and_before_anything_is_applied(registered, toy):
    @technique('data', section='Test', source='here')
    def test_left(self): raise AssertionError('applied')
    @technique('train', section='Test', source='here', refuses={'test_left': 'both pull'})
    def test_right(self): return self
    with pytest.raises(ValueError, match="'test_(left|right)' and 'test_(left|right)' do not go together: both pull"): plan(dict(test_left=True, test_right=True))
    with pytest.raises(ValueError, match='both pull'): toy().test_right().test_left()


def test_the_decorator_returns_the_function_and_the_method_chains(toy):
    from fastrecipes.data.mixing import mixup
    assert mixup is TECHNIQUES['mixup'].f and mixup.__name__ == 'mixup'         # fastcore's @patch would leave None here
    learn = toy()
    assert learn.mixup(.2).early_stop() is learn
    assert learn.techniques['mixup'].arguments == {'alpha': .2}


def test_put_makes_the_last_call_win_and_the_method_survives(toy):
    learn = toy().mixup(.2).mixup(.3)
    assert [cb.alpha for cb in learn.cbs if type(cb).__name__ == 'Mix'] == [{'mixup': .3}]
    assert callable(learn.mixup)                                                # fastai's add_cb overwrites learn.<class name>


def test_put_raises_where_the_first_cannot_be_undone(toy):
    class Surgery(TechniqueCallback): undoable = False
    learn = put(toy(), Surgery())
    with pytest.raises(ValueError, match='cannot be undone'): put(learn, Surgery())


def test_a_technique_that_raises_is_not_recorded(toy):
    learn = toy()
    with pytest.raises(ValueError, match='alpha must be > 0'): learn.mixup(-1)
    assert 'mixup' not in learn.techniques


def test_every_record_is_complete():
    for t in discover().values():
        assert t.stage in STAGES and t.section and t.source and t.summary.endswith('.')
        required = [n for n, p in t.parameters.items() if p.default is p.empty]
        assert not required or callable(t.example) or set(required) <= set(t.example or {}), f'{t.name} needs an example'


def test_no_technique_is_named_like_a_callback():
    def subclasses(cls): return {s for c in cls.__subclasses__() for s in {c} | subclasses(c)}
    discover()
    names = {cls.__new__(cls).name for cls in subclasses(Callback) if not cls.__module__.startswith(('test', 'fastai.callback.tensorboard'))}
    assert not names & TECHNIQUES.keys()


def test_what_fastai_leaves_on_a_learner_hides_no_technique(tmp_path):
    "`vision_learner` keeps its arguments as attributes, `normalize` among them."
    from fastai.vision.all import resnet18, unet_learner, vision_learner

    from fastrecipes.all import digits, image_folder
    dls = image_folder(digits(tmp_path/'digits', imbalance=20), size=32)
    for make in (vision_learner, unet_learner):
        learn = make(dls, resnet18, pretrained=False, n_out=10)
        assert {n for n in vars(learn) if n in TECHNIQUES} <= set(SHARED) and vars(learn)['normalize'] is True
        learn.normalize('minmax').randaugment()
        assert list(learn.techniques) == ['normalize', 'randaugment'] and vars(learn)['normalize'] is True
    del learn.normalize
    assert 'normalize' not in vars(learn) and callable(learn.normalize)


def test_names_alone_are_defaults(toy):
    learn = toy().use('ema', 'label_smoothing', mixup=.2)
    assert {n: a.arguments for n, a in learn.techniques.items()} == dict(ema={}, label_smoothing={}, mixup=dict(alpha=.2))
    for bad in (dict(ema=True), 3):
        with pytest.raises(TypeError, match='use: the names of techniques, such as use'): toy().use(bad)
    with pytest.raises(TypeError, match="no technique named 'emma'; did you mean 'ema'"): toy().use('emma')


def test_off_does_not_pretend_to_take_back_what_is_on(toy):
    learn = toy().use(dropout=.5)
    with pytest.raises(ValueError, match='dropout: it is on, and dropout=False does not take it back; build the Learner again'): learn.use(dropout=False)
    assert dict(toy().techniques) == {}


def test_a_refusal_tells_what_was_applied_before_it(toy):
    with pytest.raises(ValueError, match='norm: the network has no norm to exchange.*On this Learner already: initialize'): toy().use(initialize=True, norm='group')


def test_a_learner_that_was_asked_for_predictions_is_collected(photos):
    "Its loss, a tensor of fastai's own kind with a view, once held the Learner for good."
    learn = image_classifier(photos, 'test_resnet', pretrained=False, size=16, bs=4, epochs=1, lr=.01, workers=0)
    learn.get_preds()
    assert callable(learn.loss) and float(learn.loss) > 0
    gone = weakref.ref(learn)
    del learn
    gc.collect()
    assert gone() is None
