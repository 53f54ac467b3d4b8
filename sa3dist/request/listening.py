"""The settings of previews, validation and the page; none changes what is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from sa3dist.data.remote.local_paths import expand_home
from sa3dist.request.fields import EndpointFields

LARGEST_SHARE = 0.5


def _share_names_or_source(value: Any) -> Any:
    """A share, a list of names, the address of another data set, or 0 for off. Raises ValueError."""
    if isinstance(value, str) and value.lower() in ("off", "no", "false"):
        return 0.0
    if isinstance(value, list):
        if not all(isinstance(name, str) and name.strip("/") for name in value):
            raise ValueError("expected names of clips, files or folders of the data set in the list")
        return value or 0.0
    try:
        share = float(value)
    except (TypeError, ValueError):
        if isinstance(value, str) and value:
            return expand_home(value)
        share = -1.0
    if not 0 <= share <= LARGEST_SHARE:
        raise ValueError(
            f"{str(value)[:80]!r} is not valid, expected a share of the clips up to {LARGEST_SHARE}, such as 0.1, a "
            f"list of names, such as [drums_07, takes/], or the place of another data set"
        )
    return share


class ListeningFields(EndpointFields):
    """Previews and validation, beside the endpoint's fields."""

    preview_every: int = Field(
        0,
        ge=0,
        description="steps between previews, which are also made of the base and at the end; 0 = none",
    )
    preview_prompts: list[str] | None = Field(
        None, description="prompts of the previews; unset = three captions of the data set and an empty prompt"
    )
    preview_seconds: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="length of a preview; unset = 20, or the crop's if it is shorter",
    )
    preview_steps: int = Field(50, ge=1, le=20_000, description="sampler steps of a preview")
    preview_cfg: float = Field(
        7.0, ge=-1000, le=1000, allow_inf_nan=False, description="guidance scale of a preview; 1 = without"
    )
    preview_seed: int = Field(
        0, ge=0, description="seed of the previews' noise, together with the number of the prompt"
    )

    validation: Annotated[list[str] | float | str, BeforeValidator(_share_names_or_source)] = Field(
        0.0,
        description="clips held out, never trained on: a share such as 0.1, a list of clips, files or folders, or "
        "another data set's path or URL; 0 = none",
    )
    validation_every: int = Field(
        250,
        ge=0,
        description="steps between losses on the clips held out, found for the base and at the end too; 0 = none",
    )
    keep_best: bool = Field(False, description="publish the adapter of the lowest validation loss, too")
    early_stop: int = Field(0, ge=0, description="evaluations without a lower validation loss that end a run; 0 = none")
    health: bool = Field(
        True, description="how far the adapters have moved the weights, and a verdict, at every save, in health.jsonl"
    )
    copy_check: bool = Field(
        True,
        description="the training clip nearest to every preview, and whether it is nearer than held-out clips get, in "
        "copies.jsonl",
    )

    # The page.
    report: bool = Field(True, description="write output_dir/report.html at every save, by another process")
    report_audio: Literal["inside", "beside"] = Field(
        "inside", description="previews inside report.html, as far as 20 MB hold them, or played from output_dir"
    )

    @property
    def validation_source(self) -> str | None:
        """The address of the validation set, if it is a separate data set."""
        return self.validation if isinstance(self.validation, str) else None

    @model_validator(mode="after")
    def _check_validation(self) -> ListeningFields:
        for key in ("keep_best", "early_stop"):
            if getattr(self, key) and not (self.validation and self.validation_every):
                raise ValueError(f"{key}: needs validation, such as validation: 0.1, and validation_every above 0")
        return self
