"""Runs measured live, beside what `megamoe plan` says of them before they start."""
