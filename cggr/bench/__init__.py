"""Benchmarks of the kernels and losses on a CUDA device, against the peers that are installed.

``settings`` says what can be measured, ``main`` measures it. Each benchmark is a module of its name
with a ``BENCHMARK``: cases, contestants and what is worked out of their times. ``timing`` lets the
contestants take turns, ``report`` makes tables and JSON. Only ``settings`` and ``report`` can be
imported without PyTorch.
"""
