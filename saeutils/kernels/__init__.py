"""Why it is fast, and why files are whole: searches and sparse passes, memory, optimiser steps; files, keys, long runs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "files": ["cache_dir", "data_dir", "key", "sha256_of", "whole"],
        "jobs": ["caps"],
    },
)
