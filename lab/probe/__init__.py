"""The in-server probe, as a folder for PYTHONPATH: `labprobe` (the program), its entry point for SGLang's plugin
loader (`labprobe-1.dist-info`), and `startup` for releases without plugins. Nothing here imports the lab."""
