"""The only room that knows DeepSpeed and torch.distributed."""
