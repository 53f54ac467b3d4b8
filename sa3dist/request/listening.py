"""The settings of what is heard and shown of a run; nothing here changes what is trained."""

from __future__ import annotations

from pydantic import Field

from sa3dist.request.fields import EndpointFields


class ListeningFields(EndpointFields):
    """Previews, beside the endpoint's fields."""

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
    preview_steps: int = Field(50, ge=1, description="sampler steps of a preview")
    preview_cfg: float = Field(7.0, allow_inf_nan=False, description="guidance scale of a preview; 1 = without")
    preview_seed: int = Field(
        0, ge=0, description="seed of the previews' noise, together with the number of the prompt"
    )
