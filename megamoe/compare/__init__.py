"""Comparing routing policies: the same data, model, optimizer and budget for all, several seeds each."""
