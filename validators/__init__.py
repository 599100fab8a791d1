"""Proof that an artifact is what its source says: structure, tensors, tokens and logits on the real runtime."""
