"""Made-up corpora and the small language models that learn them: two languages, and invented people's biographies."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "bilingual": ["documents", "first_tokens", "split_pairs", "train_lm"],
        "biographies": ["answers", "last_states", "memorise", "population", "questions", "relations"],
    },
)
