"""The race: dense, random and CGGR training of one small language model at an equal budget.

``settings`` says what is raced, ``text`` and ``tokens`` prepare the data, ``torch_lanes`` holds the
models and optimizers, ``engine`` shares the machine between the lanes and keeps their clocks,
``display`` shows the race while it runs, ``summary``, ``figure`` and ``report`` say how it ended.
Only ``torch_lanes`` and ``machine`` know a framework, and import it when they are asked to.
"""
