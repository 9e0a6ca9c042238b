"""The machine as the lab sees it: GPUs and their links, CPUs, NUMA nodes, limits; and where a server is put on it."""
