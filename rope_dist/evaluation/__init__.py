"""Evaluation of extended models: perplexity, passkey retrieval and the tasks of lm-evaluation-harness."""

from ..optional import require_hf

require_hf("rope_dist.evaluation")


from .corpora import CORPORA, Passage, install_corpus, load_text, passages
from .models import PACKAGED_MODELS, describe, load_model
from .paired import paired_difference, percent, wilson_interval
from .passkey import make_cases, measure_passkey
from .perplexity import (
    Bucket,
    PerplexityResult,
    measure_perplexity,
    perplexity_by_strategy,
    sliding_window_nll,
    token_nll,
)
from .records import Record
from .tables import passkey_tables, perplexity_tables, tasks_table
from .tasks import TASK_SETS, measure_tasks, resolve_tasks
from .variants import STOCK, Variant, make_variants

__all__ = [
    "CORPORA",
    "PACKAGED_MODELS",
    "STOCK",
    "TASK_SETS",
    "Bucket",
    "Passage",
    "PerplexityResult",
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
    "paired_difference",
    "passages",
    "passkey_tables",
    "percent",
    "perplexity_by_strategy",
    "perplexity_tables",
    "resolve_tasks",
    "sliding_window_nll",
    "tasks_table",
    "token_nll",
    "wilson_interval",
]
