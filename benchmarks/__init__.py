"""Measurements that are repeated by one command each; dated results are in results/."""
