"fastrecipes: every trick of a deep-learning cheatsheet as a fastai callback, composed into complete pipelines."
__version__ = '0.1.0'
