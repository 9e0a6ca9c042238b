"""Stands in for the six names that SGLang 0.4.6.post5 takes from vLLM where torch has no CUDA.

Only the modules below this package are here, so what SGLang tries to import besides
(`vllm.model_executor.layers.quantization`, ...) fails as it does where there is no vLLM, and SGLang goes on without it.
containers/cpu046/README.md explains each.
"""
