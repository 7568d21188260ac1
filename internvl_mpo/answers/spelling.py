"""Words in one spelling: American for British, singular for plural."""

import re

# British words whose American spelling follows no ending
_BRITISH_AND_AMERICAN = (
    "grey gray, aluminium aluminum, tyre tire, pyjama pajama, plough plow, cheque check, programme program, kerb curb, "
    "jewellery jewelry, aeroplane airplane, doughnut donut, moustache mustache, sceptical skeptical, mould mold, "
    "storey story, catalogue catalog, dialogue dialog, analogue analog, defence defense, licence license, metre meter, "
    "centre center, theatre theater, litre liter, fibre fiber, kilometre kilometer, centimetre centimeter, "
    "millimetre millimeter, sabre saber, sombre somber, traveller traveler, travelling traveling, cancelled canceled, "
    "labelled labeled, modelling modeling, yoghurt yogurt"
)
_BRITISH = dict(pair.split() for pair in _BRITISH_AND_AMERICAN.split(", "))
_OUR = re.compile(r"^(col|fav|flav|harb|hon|hum|lab|neighb|od|parl|rum|sav|vap|vig|behavi|arm|endeav|sple?nd)our")


_ISE = re.compile(r"(?<=[a-z]{3})is(?=(?:e[drs]?|ing|ations?)$)")  # in both texts, so no other word becomes the same
_NO_PLURAL = frozenset(("news", "lens", "gas", "series", "species", "texas", "wales", "mars", "james", "christmas"))


def american(word: str) -> str:
    """Return a word in American spelling: colour is color, theatre is theater."""
    singular = word.removesuffix("s")
    if singular in _BRITISH:
        return _BRITISH[singular] + word[len(singular) :]
    return _ISE.sub("iz", _OUR.sub(r"\1or", word))


def singular(text: str) -> str:
    """Return words without the plural's ending: "two red buses" is "two red bus"."""
    return " ".join(_without_plural(word) for word in text.split())


def _without_plural(word: str) -> str:
    if (
        len(word) < 3
        or word in _NO_PLURAL
        or not word.endswith("s")
        or word.endswith(("ss", "us", "is", "ics", "'s", "’s"))
    ):
        return word
    if word.endswith(("ses", "xes", "zes", "ches", "shes")):
        return word[:-2]
    return word[:-3] + "y" if word.endswith("ies") and len(word) > 4 else word[:-1]
