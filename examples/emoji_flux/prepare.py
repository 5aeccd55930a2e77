"""Pack the training pictures: three emoji sets at 64×64 on white, with their names, in one archive.

    python examples/emoji_flux/prepare.py

Writes `data/emoji.zip` in the ImageFolder layout: `metadata.jsonl` (file_name, style, category, names) beside
lossless WebP files. Sources are npm packages, fetched with `npm pack`:

    emoji-datasource-google   Noto Emoji, Apache-2.0
    emoji-datasource-twitter  Twemoji, CC-BY-4.0 (© Twitter, Inc and other contributors)
    @lobehub/fluent-emoji-3d  Fluent Emoji 3D, MIT (© Microsoft)
    unicode-emoji-json        CLDR names, MIT

Pictures are matched by code point without U+FE0F; skin-tone variants are left out.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from captions import STYLES, names_of
from PIL import Image
from rich.progress import track

HERE = Path(__file__).resolve().parent
SIDE = 64
PACKAGES = {
    "google": "emoji-datasource-google@16.0.0",
    "twitter": "emoji-datasource-twitter@16.0.0",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
    "names": "unicode-emoji-json@0.9.0",
}


def fetch(folder: Path) -> dict[str, Path]:
    """The package archives; those already in the folder are not fetched again."""
    paths = {}
    for key, package in PACKAGES.items():
        name, version = package.removeprefix("@").rsplit("@", 1)
        path = folder / f"{name.replace('/', '-')}-{version}.tgz"
        if not path.exists():
            npm = shutil.which("npm")
            if npm is None:
                sys.exit(f"npm is not installed; install it, or put {path.name} into {folder}")
            subprocess.run(
                [npm, "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL
            )
        paths[key] = path
    return paths


def code_points(text: str) -> str:
    """ "0023-FE0F-20E3" → "0023-20e3": the key under which the packages agree."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def on_white(data: bytes) -> Image.Image:
    """The picture as SIDE×SIDE RGB: alpha over white, padded to a square, reduced with Lanczos."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def read(archive: tarfile.TarFile, member: str) -> bytes:
    file = archive.extractfile(member)
    if file is None:
        raise FileNotFoundError(f"{archive.name} holds no file {member}")
    return file.read()


def cldr_names(archive: tarfile.TarFile) -> dict[str, str]:
    """Code points → CLDR name."""
    table = json.loads(read(archive, "package/data-by-emoji.json"))
    return {
        code_points("-".join(f"{ord(c):04x}" for c in emoji)): entry["name"] for emoji, entry in table.items()
    }


def pictures(archives: dict[str, tarfile.TarFile]) -> Iterator[tuple[dict[str, Any], Image.Image]]:
    """(metadata row, picture) for every emoji and style, skin-tone variants left out."""
    cldr = cldr_names(archives["names"])
    fluent = {
        code_points(Path(member).stem): member
        for member in archives["fluent"].getnames()
        if member.endswith(".webp")
    }
    emojis = json.loads(read(archives["google"], "package/emoji.json"))
    names_by_key = {}
    for emoji in emojis:
        key = code_points(emoji["unified"])
        names_by_key[key] = names_of(cldr.get(key), emoji["name"], emoji["short_names"])
    uses = Counter(name for names in names_by_key.values() for name in names)
    for emoji in emojis:
        key = code_points(emoji["unified"])
        first, *others = names_by_key[key]
        # "clock" is a shortcode of all clock faces: a name that others share would teach their average
        names = [first, *(name for name in others if uses[name] == 1)]
        members = {
            "noto": (
                "google",
                f"package/img/google/64/{emoji['image']}" if emoji["has_img_google"] else None,
            ),
            "twemoji": (
                "twitter",
                f"package/img/twitter/64/{emoji['image']}" if emoji["has_img_twitter"] else None,
            ),
            "fluent 3d": ("fluent", fluent.get(key)),
        }
        for style in STYLES:
            source, member = members[style]
            if member is not None:
                file_name = f"{style.replace(' ', '-')}/{key}.webp"
                row = {"file_name": file_name, "style": style, "category": emoji["category"], "names": names}
                yield row, on_white(read(archives[source], member))


def pack(archives: dict[str, tarfile.TarFile], out: Path) -> int:
    """Write the archive and return how many pictures it holds."""
    rows = []
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as folder:
        for row, picture in track(pictures(archives), "packing", total=None):
            buffer = io.BytesIO()
            picture.save(buffer, "webp", lossless=True, method=4)
            folder.writestr(row["file_name"], buffer.getvalue())
            rows.append(json.dumps(row))
        folder.writestr("metadata.jsonl", "\n".join(rows), zipfile.ZIP_DEFLATED)
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--packages", type=Path, help="folder with the package archives; default: fetch them anew"
    )
    parser.add_argument("--out", type=Path, default=HERE / "data" / "emoji.zip")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        paths = fetch(args.packages or Path(scratch))
        count = pack({key: stack.enter_context(tarfile.open(path)) for key, path in paths.items()}, args.out)
    print(f"{args.out}: {count} pictures, {args.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
