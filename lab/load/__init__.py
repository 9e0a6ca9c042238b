"""Client programs that run with the stack's interpreter, beside SGLang's own bench_serving.

They import SGLang and the standard library, never the lab, so that they run wherever the stack does."""
