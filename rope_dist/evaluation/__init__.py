"""Evaluation of extended models: perplexity, LongPPL, passkeys, synthetic tasks and lm-evaluation-harness."""

from ..optional import require_hf

require_hf("rope_dist.evaluation")


from .corpora import CORPORA, Passage, install_corpus, load_text, passages
from .long_context_tables import longppl_tables, synthetic_tables
from .longppl import Evaluator, key_tokens, make_evaluator, measure_longppl
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
from .synthetic import measure_synthetic
from .synthetic_prompts import (
    SYNTHETIC_TASKS,
    SyntheticCase,
    SyntheticPrompt,
    make_synthetic_cases,
    synthetic_prompts,
)
from .tables import passkey_tables, perplexity_tables, tasks_table
from .tasks import TASK_SETS, measure_tasks, resolve_tasks
from .variants import STOCK, Variant, make_variants

__all__ = [
    "CORPORA",
    "PACKAGED_MODELS",
    "STOCK",
    "SYNTHETIC_TASKS",
    "TASK_SETS",
    "Bucket",
    "Evaluator",
    "Passage",
    "PerplexityResult",
    "Record",
    "SyntheticCase",
    "SyntheticPrompt",
    "Variant",
    "describe",
    "install_corpus",
    "key_tokens",
    "load_model",
    "load_text",
    "longppl_tables",
    "make_cases",
    "make_evaluator",
    "make_synthetic_cases",
    "make_variants",
    "measure_longppl",
    "measure_passkey",
    "measure_perplexity",
    "measure_synthetic",
    "measure_tasks",
    "paired_difference",
    "passages",
    "passkey_tables",
    "percent",
    "perplexity_by_strategy",
    "perplexity_tables",
    "resolve_tasks",
    "sliding_window_nll",
    "synthetic_prompts",
    "synthetic_tables",
    "tasks_table",
    "token_nll",
    "wilson_interval",
]
