"""Where rows come from: language models, text, and activations at a hook point."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "activations": ["Activations", "collect"],
        "models": ["checkpoints", "default_device", "load_hf", "load_lm", "located"],
        "streams": ["stream"],
        "text": ["labelled_tasks", "load_text"],
    },
)
