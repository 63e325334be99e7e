"""Other projects that run the same checkpoint, each in its own environment: one module per peer, run by the peer's own Python.

Every module has two commands: ``convert <checkpoint> <out> <options as JSON>`` makes what the peer opens, ``time <order>`` opens it
behind the interface of the device tests' sessions and times it by the loop that times our own artifacts. They import
``pipeline.bench_child`` and ``device_tests`` beside the peer's libraries, nothing else of ours.
"""
