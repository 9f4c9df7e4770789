"""llmkit next to other programs on the same weights: transformers, PEFT, bitsandbytes and llama.cpp. Not in the wheel.

`llmkit bench --against NAME` calls this package from a source checkout; `python -m benchmarks.bench_gpu` is `make bench-gpu`.
"""
