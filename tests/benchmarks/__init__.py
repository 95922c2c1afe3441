"""Benchmarks, run by hand from the checkout: ``python -m tests.benchmarks.step``, ``... .startup``."""
