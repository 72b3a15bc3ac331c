"""What an extension does to a model: texts, models, perplexity, passkey retrieval, tasks."""

from .corpora import CORPORA, install_corpus, load_text
from .models import PACKAGED_MODELS, describe, load_model
from .passkey import make_cases, measure_passkey, passkey_tables
from .perplexity import Bucket, Reading, read_with_strategies, sliding_window_nll, token_nll
from .records import Record
from .sweep import Passage, measure_perplexity, passages, perplexity_tables
from .tasks import TASK_SETS, measure_tasks, resolve_tasks, tasks_table
from .variants import STOCK, Variant, make_variants

__all__ = [
    "CORPORA",
    "PACKAGED_MODELS",
    "STOCK",
    "TASK_SETS",
    "Bucket",
    "Passage",
    "Reading",
    "Record",
    "Variant",
    "describe",
    "install_corpus",
    "load_model",
    "load_text",
    "make_cases",
    "make_variants",
    "measure_passkey",
    "measure_perplexity",
    "measure_tasks",
    "passages",
    "passkey_tables",
    "perplexity_tables",
    "read_with_strategies",
    "resolve_tasks",
    "sliding_window_nll",
    "tasks_table",
    "token_nll",
]
