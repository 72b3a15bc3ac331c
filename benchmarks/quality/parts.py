"""What the study reads: models, texts, strategies, and in which order."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from benchmarks.quality.small_llama import MODEL as TRAINED_MODEL
from rope_dist.defaults import STRATEGY_NAMES
from rope_dist.evaluation import Variant, make_variants
from rope_dist.evaluation.perplexity import WIDTH

FIRST, SECOND = ("persuasion", "state-of-the-union"), ("moby-dick", "python")
TEXTS = FIRST + SECOND
"""Nothing was tuned on these."""


@dataclass(frozen=True)
class StudyModel:
    """A model of the study, and how it reads.

    Attributes:
        name: in its record.
        source: packaged model or directory.
        trained: length that it was trained to, tokens.
        dtype: of its weights.
        suffix: of the file name of its record.
        passages: of a text; each begins ``4 * trained`` tokens after the one before.
        width: positions of one mean loss, whose differences are paired.
        texts: corpora.
    """

    name: str
    source: str
    trained: int
    dtype: str
    suffix: str = ""
    passages: int = 1
    width: int = WIDTH
    texts: tuple[str, ...] = TEXTS

    @property
    def kind(self) -> str:
        """Of its record, ``quality_KIND.json``."""
        return f"perplexity{self.suffix}"


# bfloat16 is what models are run in, and half the time of float32 where a processor multiplies it.
SMOLLM2 = StudyModel("smollm2-135m", "smollm2-135m", 8192, "bfloat16")
SMOLLM2_FLOAT32 = replace(SMOLLM2, dtype="float32", suffix="_float32")
"""For processors without bfloat16 products, which take fifty times as long."""
MODEL, TRAINED, DTYPE = SMOLLM2.name, SMOLLM2.trained, SMOLLM2.dtype
"""Of the studies that read with this model alone."""
SMALL_TOKENS = 32768
"""Of each text that the small model reads at 4x."""


def study_model(name: str) -> StudyModel:
    """The packaged model, or a small one, which reads many passages of a text.

    Args:
        name: of the packaged model, or a directory: of a model, or of a training by ``small_llama.py``.

    Raises:
        ValueError: neither, or the directory's config has no trained length.
    """
    if name == SMOLLM2.name:
        return SMOLLM2
    folder = Path(name)
    if (folder / TRAINED_MODEL).is_dir():
        folder /= TRAINED_MODEL
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        trained = int(config["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{name} is neither {SMOLLM2.name} nor the directory of a model with a config.json that has "
            "max_position_embeddings"
        ) from None
    passages = max(SMALL_TOKENS // (4 * trained), 1)
    return StudyModel("small_llama", str(folder), trained, "float32", "_small", passages, width=64)


OF_AUTO = ", auto's temperature"
"""What follows the name of a strategy whose ``attention_factor`` is the one of ``auto``."""
BASELINE = "auto"
_CLOSEST = (
    "stock",
    BASELINE,
    "auto-yarn",
    "mrrope-pro",
    "mrrope-uni",
    f"mrrope-pro{OF_AUTO}",
    f"yarn{OF_AUTO}",
    "yarn",
    "ntk",
)
# Stock's frequencies, NTK's at the target length, and what needs factors of its own.
_NOT_READ = ("extrapolation", "dynamic-ntk", "longrope")


def _known(label: str) -> bool:
    return label == "stock" or label.removesuffix(OF_AUTO).partition(":")[0] in STRATEGY_NAMES


def windowed(trained: int) -> tuple[str, ...]:
    """Labels with trained frequencies within a window of an eighth or a quarter of ``trained`` tokens.

    Beyond a quarter by ``pi`` they are Leaky ReRoPE's, ``grouped`` Self-Extend's.
    """
    eighth, quarter = trained // 8, trained // 4
    plans = f"auto+window={eighth}", f"auto+window={quarter}", f"auto+window={quarter}+scaling=far"
    grouped = f"grouped+window={quarter}", f"jet-long+dynamic+window={quarter}"
    return *plans, f"pi+window={quarter}", *grouped


CLOSEST = tuple(filter(_known, _CLOSEST))
_REST = (*(name for name in STRATEGY_NAMES if name not in CLOSEST + _NOT_READ), "resonance:of=auto")
STRATEGIES = (*CLOSEST, *filter(_known, _REST))


@dataclass(frozen=True)
class Part:
    """Strategies planned for ``scale`` times the trained length read every text to there.

    Attributes:
        name: on the command line.
        scale: times the trained length.
        strategies: labels.
        tokens: read of each text, where it is another number.
        windows: labels of :func:`windowed` too.
    """

    name: str
    scale: float
    strategies: tuple[str, ...] = STRATEGIES
    tokens: int | None = None
    windows: bool = False

    def labels(self, trained: int) -> tuple[str, ...]:
        """What reads with a model that was trained to so many tokens."""
        return self.strategies + windowed(trained) * self.windows


PARTS = (
    Part("2x", 2),
    Part("1.5x", 1.5),
    Part("4x", 4, CLOSEST),
    Part("4x-rest", 4, tuple(label for label in STRATEGIES if label not in CLOSEST)),
    Part("window-2x", 2, (BASELINE,), windows=True),
    Part("window-4x", 4, (BASELINE,), windows=True),
)
"""What a study that is stopped should have comes first."""
QUICK = (Part("quick", 2, ("stock", "yarn"), tokens=600),)


def planner(model: PreTrainedModel) -> Callable[[str, int], Variant]:
    """A function that makes the variant of a label and target length, each once."""

    @functools.cache
    def variant(label: str, target: int) -> Variant:
        name = label
        if label.endswith(OF_AUTO):
            plan = variant(BASELINE, target).plan
            name = f"{label.removesuffix(OF_AUTO)}:attention_factor={plan.attention_scaling!r}"
        (made,) = make_variants(model, [name], target)
        return Variant(label, made.plan, made.window)

    return variant
