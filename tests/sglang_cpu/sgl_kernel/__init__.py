"""Stands in for SGLang's kernels in tests on a CPU: the unmodified SGLang is imported and runs on torch alone.

The one kernel that its CPU path calls without asking is written out in torch; every other one raises when it is called, so
a test cannot pass on a kernel that is not there. Where torch has no accelerator it has no pinned memory either, and
SGLang asks for that in some places without looking: the request is dropped.
"""

import functools

import torch

__version__ = "0.0.0"


def assign_req_to_token_pool_cpu(pool_indices, req_to_token, starts, ends, cache_locations, pool_length):
    """Row pool_indices[i], columns starts[i] to ends[i], take the next of the cache locations."""
    used = 0
    for row, start, end in zip(pool_indices.tolist(), starts.tolist(), ends.tolist(), strict=True):
        req_to_token[row, start:end] = cache_locations[used : used + end - start].to(req_to_token.dtype)
        used += end - start


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def kernel(*args, **options):
        raise NotImplementedError(f"sgl_kernel.{name} is not in the tests' stand-in")

    return kernel


def _without_pinning(function):
    @functools.wraps(function)
    def wrapper(*args, pin_memory=False, **options):
        return function(*args, **options)

    return wrapper


if not torch.accelerator.is_available():
    for _name in ("empty", "zeros", "ones", "full", "tensor", "arange"):
        setattr(torch, _name, _without_pinning(getattr(torch, _name)))
    torch.Tensor.pin_memory = lambda self, *args, **options: self
