"""The base of every record that is written to JSON and read back."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

__all__ = ["Record", "Rounded"]

# Four digits are what a person reads; more would let a record differ where nothing that matters does.
Rounded = Annotated[float, AfterValidator(lambda value: float(f"{value:.4g}"))]


class Record(BaseModel):
    """A frozen record; unknown fields are refused, so that a misspelt one is not lost in silence."""

    model_config = ConfigDict(frozen=True, extra="forbid")
