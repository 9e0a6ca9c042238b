"""What the GPUs did while something was measured: a sampler in a process of its own, and the reader of its file."""
