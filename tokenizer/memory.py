"""Running out of memory: on a device, and in the allocators of torch and NumPy."""

import gc

import torch

# in messages of RuntimeErrors: of torch's CPU allocator, C++, CUDA's libraries and the CUDA driver
SIGNS = ("allocate memory", "not enough memory", "bad_alloc", "out of memory", "_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the computation failed for lack of memory, so that a smaller batch may succeed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def release_memory() -> None:
    """Frees what a failed computation left: objects in reference cycles, and torch's cache on the GPU."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
