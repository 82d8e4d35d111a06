"""Plain data, checked: fields say their types and ranges, and what is wrong is one sentence."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import Field

from train.errors import UserError


class Checked(pydantic.BaseModel):
    """A record whose fields are checked when it is made: no other fields, no other types.

    A whole number will do for a float; floats are finite unless their field says otherwise. Where a
    field has a `description`, it completes "it must be ..." in the sentence on a wrong value.
    """

    model_config = pydantic.ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


Count = Annotated[int, Field(ge=1, description="a whole number above 0")]
Counts = Annotated[
    tuple[Count, ...],
    Field(strict=False, min_length=1, description="a sequence of whole numbers above 0"),
]
Positive = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

AnyChecked = TypeVar("AnyChecked", bound=Checked)


def parse(
    kind: type[AnyChecked], values: Mapping[str, Any], where: str, what: str = "the configuration"
) -> AnyChecked:
    """`values` as a record.

    Args:
      kind: the record's class.
      values: its fields, plain data.
      where: how a user gives them: "config" for `config.seed`.
      what: whose fields they are.

    Raises:
      UserError: a field is unknown, missing, of another type or out of its range.
    """
    try:
        return kind.model_validate(dict(values))
    except pydantic.ValidationError as error:
        # An unknown field first: it may be a missing one, misspelt.
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    name = str(first["loc"][0])
    given, known = f"{where}.{name}", kind.model_fields
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"the nearest is {close[0]!r}" if close else f"its fields are {_listed(known)}"
        raise UserError(f"{given} is not a field of {what}; {hint}.")
    if first["type"] == "missing":
        raise UserError(f"{where} lacks the field {name!r}; give {given}.")
    must, of_type = known[name].description, ""
    if must is None:
        must = first["msg"].removeprefix("Input should be ")
        if first["type"].endswith("_type"):
            of_type = f", of type {type(values[name]).__name__}"
    raise UserError(f"{given} is {values[name]!r}{of_type}, and it must be {must}.")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
