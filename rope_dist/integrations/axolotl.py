"""axolotl's plugin: with ``rope_dist: {factor: 2}`` in its configuration the model is enabled after it is built.

axolotl finds it by the entry point; it does nothing without the key ``rope_dist``.
"""

from __future__ import annotations

from typing import Any, Literal

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict, field_validator

from ..defaults import DEFAULT_STRATEGY


class RopeDistOptions(BaseModel):
    """Arguments of :func:`rope_dist.enable`; ``plan`` is the path of a file."""

    model_config = ConfigDict(extra="forbid")

    target_length: int | None = None
    factor: float | None = None
    strategy: str | None = None
    settings: dict[str, Any] | None = None
    plan: str | None = None
    dynamic: bool | None = None
    stages: list[int] | None = None
    original_length: int | None = None
    tables: Literal["float32", "model"] | None = None


class RopeDistArgs(BaseModel):
    """What is added to axolotl's configuration."""

    rope_dist: RopeDistOptions | None = None

    @field_validator("rope_dist", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        """``true`` swaps the kernels alone."""
        return ({} if value else None) if isinstance(value, bool) else value


class RopeDistPlugin(BasePlugin):
    """Enables the model before adapters and wrappers are put around it."""

    def get_input_args(self) -> str:
        """The name of the class of the configuration."""
        return f"{__name__}.{RopeDistArgs.__name__}"

    def post_model_build(self, cfg: Any, model: Any) -> None:
        """Enable ``model`` as ``cfg`` asks.

        Raises:
            ValueError: it cannot be enabled so.
        """
        chosen = cfg.get("rope_dist")
        if chosen is None or chosen is False:
            return
        options = RopeDistArgs(rope_dist=chosen).rope_dist

        from ..dynamic import load_plan
        from ..hf import enable

        given = options.model_dump(exclude_none=True) if options else {}
        if "plan" in given:
            given["plan"] = load_plan(given["plan"])
        enable(model, **{"strategy": DEFAULT_STRATEGY, **given})
