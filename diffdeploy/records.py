"""The base class of every record that is written to JSON and read back."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

__all__ = ["Record", "Rounded"]

# Four digits are enough for a reader; with more, records would differ where nothing relevant differs.
Rounded = Annotated[float, AfterValidator(lambda value: float(f"{value:.4g}"))]


class Record(BaseModel):
    """A frozen record that rejects unknown fields, so that a misspelt field is not silently lost."""

    model_config = ConfigDict(frozen=True, extra="forbid")
