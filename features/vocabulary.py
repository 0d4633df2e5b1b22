"""The kinds of words that steps are made of."""

from behave import register_type

PEOPLE = "Alice|Bob|Carol|Dave|the batch key|the operator"


def _pattern(expression: str):
    def convert(text: str) -> str:
        return text

    convert.pattern = expression
    return convert


def parse_fields(text: str) -> dict[str, int | str]:
    """`priority batch and max_tokens 4` as the fields of a task."""
    pairs = (each.split(" ", 1) for each in text.split(" and "))
    return {name: int(value) if value.isdecimal() else value for name, value in pairs}


register_type(
    Who=_pattern(PEOPLE),
    Anyone=_pattern(f"{PEOPLE}|nobody|a stranger"),
    Name=_pattern(r'[^"]+'),
    Model=_pattern(r"[\w-]+(?:\.\w+)*"),
    State=_pattern("queued|running|succeeded|failed|canceled"),
    Code=_pattern("[A-Z_]+"),
    Fields=_pattern(r"(?:\w+ \S+)(?: and \w+ \S+)*"),
)
