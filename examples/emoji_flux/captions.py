"""What an emoji may be called in a prompt: names × phrasings × style words."""

from __future__ import annotations

import re
from collections.abc import Iterable

STYLES = ("noto", "twemoji", "fluent 3d")

# {name} and {style}; the first is the wording of the model card, the others keep free-form prompts working.
STYLED = (
    "{name}, {style}",
    "{article} {name}, {style}",
    "{name} emoji, {style} style",
    "{style} emoji of {article} {name}",
    "{article} {adjective} {name}, {style}",
)
UNSTYLED = "{article} {name}"
ADJECTIVES = ("cute", "little", "simple", "nice", "single", "funny", "beautiful", "colorful")

# Words that say "this is an emoji" rather than what it shows; a person leaves them out of a prompt.
_FILLER = re.compile(r"\b(face|symbol|sign|button|heavy|black|white) ?\b")
_SPEAKABLE = re.compile(r"[a-z][a-z '&-]{2,}")


def names_of(cldr: str | None, unicode_name: str, short_names: Iterable[str]) -> list[str]:
    """Distinct lower-case names of one emoji, the one people use most (CLDR's) first.

    cldr: the name of Unicode's emoji test file, or None. unicode_name: the character's name in capitals.
    short_names: chat shortcodes. Shortcodes that are no words ("flag-jp", "u7533", "+1") are left out.
    """
    names = [cldr.lower()] if cldr else []
    country = re.fullmatch(r"flag (.+)", names[0]) if names else None
    if country:
        names += [f"flag of {country[1]}", f"{country[1]} flag"]
    elif "ideograph" not in unicode_name.lower():
        names.append(unicode_name.lower())
    for short in short_names:
        words = re.sub(r"\d+$", "", short.lower()).replace("_", " ")
        if not words.startswith("flag-") and _SPEAKABLE.fullmatch(words):
            names.append(words.replace("-", " "))
    if cldr and cldr.lower().endswith(" face") and not re.search(r"\b(smil|grin)", cldr.lower()):
        names.append(_FILLER.sub("", cldr.lower()).strip())
    return [name for name in dict.fromkeys(names) if name]


def article(name: str) -> str:
    """ "an" before a vowel, else "a"."""
    return "an" if name[0] in "aeiou" else "a"


def captions_of(names: Iterable[str], style: str, seed: int) -> list[str]:
    """Every caption under which one picture is trained, in a fixed order.

    The seed picks the neutral adjective, so that each is learnt as a word that changes nothing.
    """
    captions = []
    for i, name in enumerate(names):
        words = {"name": name, "style": style, "article": article(name)}
        words["adjective"] = ADJECTIVES[(seed + i) % len(ADJECTIVES)]
        captions += [template.format(**words) for template in STYLED]
        captions.append(UNSTYLED.format(**words))
    return list(dict.fromkeys(captions))
