"""Measures the nodes of an allocation and judges them against a run, before hours are burnt."""
