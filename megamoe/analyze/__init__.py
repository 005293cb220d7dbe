"""What a trained model has become: which of its neurons and experts specialise in which functions."""
