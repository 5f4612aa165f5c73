"""The race: dense, random and CGGR training of one small language model at an equal budget.

``settings`` says what is raced, ``text`` and ``tokens`` prepare the data, ``decoder`` and
``pretrained`` the model's shape and weights. ``torch_lanes`` and ``jax_lanes`` hold the models and
optimizers of the two ``backend``s, ``engine`` shares the machine between the lanes and keeps their
clocks, ``display`` shows the race while it runs, ``summary``, ``figure`` and ``report`` say how it
ended. Only the lanes, ``jax_decoder`` and ``machine`` know a framework: a race imports its own.
"""
