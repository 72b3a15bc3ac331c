"""Names, choices and defaults that the library and the command line share; nothing here needs torch.

The command line builds its parsers from them: ``--help`` and an error in the arguments do not wait for torch.
``tests/test_cli_arguments.py`` compares every name here with the object that it stands for.
"""

DEFAULT_STRATEGY = "auto"
"""What plan(), enable() and the command line extend with; the paper's own ``dprope`` is meant for training."""

NUMBER, INTEGER, BOOLEAN = "a number", "a whole number", "true or false"
NUMBERS, NAME, NAMES = "a list of numbers", "the name of a strategy", "a list of strategies"
THRESHOLD_NAMES = ("paper-2x", "paper-4x")
THRESHOLD = f"a number or one of {', '.join(THRESHOLD_NAMES)}"
INTERVALS = 360
DIVERGENCE_NAMES = ("pretrained-extended", "extended-pretrained")
DIVERGENCE = f"one of {', '.join(DIVERGENCE_NAMES)}"
MEASURE_DTYPES = ("float32", "float64")
DTYPE = f"one of {', '.join(MEASURE_DTYPES)}"
_MEASURE = {"intervals": INTEGER, "smoothing": NUMBER, "divergence": DIVERGENCE, "dtype": DTYPE}
MEASURE_SETTINGS = ("intervals", "divergence", "dtype")
"""Settings that plan() passes on to a strategy that has them: it minimises the disturbance that is reported."""
_RAMP = {"fast_periods": NUMBER, "slow_periods": NUMBER, "attention_factor": NUMBER}

STRATEGIES: dict[str, tuple[str, dict[str, str]]] = {
    "extrapolation": ("formulas.extrapolation", {}),
    "pi": ("formulas.pi", {}),
    "ntk": ("formulas.ntk", {}),
    "ntk-mixed": ("formulas.ntk_mixed", {"exponent": NUMBER}),
    "dynamic-ntk": ("formulas.dynamic_ntk", {"factor": NUMBER}),
    "yarn": (
        "formulas.yarn",
        {"beta_fast": NUMBER, "beta_slow": NUMBER, "attention_factor": NUMBER, "truncate": BOOLEAN},
    ),
    "llama3": (
        "formulas.llama3",
        {"factor": NUMBER, "low_freq_factor": NUMBER, "high_freq_factor": NUMBER},
    ),
    "longrope": ("formulas.longrope", {"factors": NUMBERS, "attention_factor": NUMBER}),
    "longrope2": ("formulas.longrope2", {"critical_periods": NUMBER, "attention_factor": NUMBER}),
    "mrrope-uni": ("mixed_radix.mrrope_uni", _RAMP),
    "mrrope-pro": ("mixed_radix.mrrope_pro", _RAMP),
    "resonance": ("combined.resonance", {"of": NAME}),
    "cope": ("combined.cope", {"of": NAME, "clipped_pairs": INTEGER}),
    "clip": ("combined.clip", {"of": NAME, "slow_periods": NUMBER}),
    "dprope": (
        "distributional.dprope",
        {"threshold": THRESHOLD, "interpolated_dims": INTEGER, "candidates": NAMES, **_MEASURE},
    ),
    "refined": ("refinement.refined", {"tolerance": NUMBER, "slack": NUMBER, **_MEASURE}),
    "auto": ("auto.auto", _RAMP),
    "auto-yarn": (
        "auto_yarn.auto_yarn",
        {"beta_fast": NUMBER, "beta_slow": NUMBER, "attention_factor": NUMBER, "truncate": BOOLEAN},
    ),
}
"""Every strategy: its function in rope_dist/strategies, and what each of its settings takes.

This is the one place that lists them; importing :mod:`rope_dist.strategies` compares each entry with its function.
"""

STRATEGY_SETTINGS = {name: settings for name, (_, settings) in STRATEGIES.items()}
STRATEGY_NAMES = tuple(STRATEGY_SETTINGS)
COMPARED_STRATEGIES = tuple(name for name in STRATEGY_NAMES if name != "longrope")
"""What ``rope-dist compare`` compares: longrope has no factors of its own, they come from a search on a model."""
DYNAMIC = "+dynamic"
"""What follows the name of a strategy whose plan is to grow with the text, where models are evaluated."""
WINDOW, SCALING = "+window=", "+scaling="
"""What follows it where distances below so many tokens are to stay the trained model's, and whose logits are scaled."""
GROUPED = ("grouped", "jet-long")
"""In place of a strategy's name: positions beyond the window in groups, whose size is by either of two rules."""
TABLES = ("float32", "model")
"""Dtypes of the values of cos and sin that an enabled model rotates by."""
EVALUATED_STRATEGIES = ("stock", "pi", "yarn", "dprope", "auto")
QUICK_STRATEGIES = ("stock", "yarn", "auto")
DEMO_STRATEGIES = ("stock", "auto", "dprope")
"""In the order in which the demonstration reads; the last is left out where time is short."""

PRESETS: dict[str, tuple[str, str]] = {
    "llama2-7b": ("meta-llama/Llama-2-7b-hf", "llama"),
    "llama2-13b": ("meta-llama/Llama-2-13b-hf", "llama"),
    "llama2-70b": ("meta-llama/Llama-2-70b-hf", "llama"),
    "llama3-8b": ("meta-llama/Meta-Llama-3-8B", "llama"),
    "llama3.1-8b": ("meta-llama/Llama-3.1-8B", "llama"),
    "mistral-7b": ("mistralai/Mistral-7B-v0.3", "mistral"),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B-Instruct", "qwen2"),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M", "llama"),
}
"""Preset -> its repository on the Hugging Face Hub and its ``model_type``."""

PACKAGED_MODEL_NAMES = ("smollm2-135m",)
CORPUS_NAMES = (
    "python",
    "emma",
    "mansfield-park",
    "northanger-abbey",
    "persuasion",
    "pride-and-prejudice",
    "sense-and-sensibility",
    "moby-dick",
    "state-of-the-union",
    "enwik8",
    "pg19",
    "wikitext",
)
ENGINE_NAMES = ("transformers-4", "vllm", "sglang", "mlx", "tensorrt-llm", "exllamav3")
FORM_NAMES = ("native", "longrope")
FLAG_ENGINES = ("vllm", "sglang", "llama-server", "transformers")
"""Engines of ``rope-dist export flags``."""
METHODS = ("whole", "sliding", "grown")
SCORINGS = ("generate", "decoys")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SYNTHETIC_TASK_NAMES = ("single-key", "multi-key", "multi-value", "variables", "frequent-words")
QUICK_SYNTHETIC_TASKS = ("multi-key", "variables")
COMPARED_PROMPTS = 20
"""Prompts of a cell, by default, from which on accuracies are compared."""
TASK_SET_NAMES = ("longbench-e", "ruler", "open-llm")
