"""What an emoji may be called in a prompt: names × phrasings × style words, with a colour, cut short."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

STYLES = ("noto", "twemoji", "fluent 3d")

# {name} and {style}; the first is the wording of the model card, the others keep free-form prompts working.
STYLED = (
    "{name}, {style}",
    "{article} {name}, {style}",
    "{name} emoji, {style} style",
    "{style} emoji of {article} {name}",
    "{article} {adjective} {name}, {style}",
)
COLORED = "{article} {color} {name}, {style}"
SHORTENED = "{short}, {style}"
UNSTYLED = ("{article} {name}", "{name}")  # any of the styles answers these
ADJECTIVES = ("cute", "little", "simple", "nice", "single", "funny", "beautiful", "colorful")

# Words that say "this is an emoji" rather than what it shows; a person leaves them out of a prompt.
_FILLER = re.compile(r"\b(face|symbol|sign|button|heavy|black|white) ?\b")
_HUES = (15, 42, 68, 165, 255, 290, 340)  # degrees at which one colour's word gives way to the next
_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "red")
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


def color_word(pixels: np.ndarray) -> str | None:
    """The colour most of a picture has, as a person would say it; None for grey, white and mixed ones.

    pixels: (H, W, 3) uint8 on white.
    """
    rgb = pixels.reshape(-1, 3).astype(np.float32) / 255
    high, low = rgb.max(1), rgb.min(1)
    vivid = (high - low > 0.3) & (high > 0.25)
    if vivid.mean() < 0.1:
        return None
    r, g, b = rgb[vivid].T
    # the hexagon's hue in degrees
    hue = np.degrees(np.arctan2(3**0.5 * (g - b), 2 * r - g - b)) % 360
    votes = np.bincount(np.searchsorted(_HUES, hue, side="right"), minlength=len(_COLORS))
    votes[0] += votes[-1]  # both ends of the circle are red
    most = int(votes[:-1].argmax())
    return _COLORS[most] if votes[most] > 0.6 * vivid.sum() else None


def captions_of(names: Iterable[str], style: str, seed: int, color: str | None = None) -> list[str]:
    """Every caption under which one picture is trained, in a fixed order.

    The seed picks the neutral adjective, so that each is learnt as a word that changes nothing, and the word
    that a name of several words loses in its shortened caption, which then fits other pictures too.
    """
    captions = []
    for i, name in enumerate(names):
        parts = name.split()
        words = {"name": name, "style": style, "article": article(name)}
        words["adjective"] = ADJECTIVES[(seed + i) % len(ADJECTIVES)]
        captions += [template.format(**words) for template in STYLED]
        captions += [template.format(**words) for template in UNSTYLED]
        if color and color not in parts:
            captions.append(COLORED.format(**{**words, "color": color, "article": article(color)}))
        if len(parts) > 1:
            lost = (seed + i) % len(parts)
            captions.append(SHORTENED.format(short=" ".join(parts[:lost] + parts[lost + 1 :]), style=style))
    return list(dict.fromkeys(captions))
