"""A trained model at work: going on with texts."""
