"""What an extension does to a model: texts, models, perplexity."""

from .corpora import CORPORA, load_text
from .models import PACKAGED_MODELS, load_model
from .perplexity import STOCK, Bucket, Reading, read_with_strategies, token_nll

__all__ = [
    "CORPORA",
    "PACKAGED_MODELS",
    "STOCK",
    "Bucket",
    "Reading",
    "load_model",
    "load_text",
    "read_with_strategies",
    "token_nll",
]
