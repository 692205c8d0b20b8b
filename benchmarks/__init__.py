"""Measurements of cost: ``python -m benchmarks step|meta|floor|all --out DIR``."""
