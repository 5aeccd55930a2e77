"""The fixed sample sheet: 32 prompts, one seed each, in one grid.

python examples/emoji_flux/sheet.py --out examples/emoji_flux/sheet.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from pipeline import MODEL_DIR, SIDE, EmojiFluxPipeline

# Names as trained, other people's wording for the same things, and whole phrases; every style.
PROMPTS = (
    "a red fox, noto",
    "pizza, twemoji",
    "a sleeping cat, fluent 3d",
    "red heart, noto",
    "rocket, fluent 3d",
    "an octopus, twemoji",
    "a snowman, noto",
    "birthday cake, fluent 3d",
    "a yellow banana, twemoji",
    "frog, fluent 3d",
    "a laughing face, noto",
    "sunflower, fluent 3d",
    "a house with a garden, noto",
    "guitar, twemoji",
    "a cup of coffee, fluent 3d",
    "penguin, noto",
    "fire truck, twemoji",
    "a green tree, fluent 3d",
    "full moon, noto",
    "ghost, fluent 3d",
    "an angry face, twemoji",
    "strawberry, noto",
    "a dolphin jumping, fluent 3d",
    "a light bulb, twemoji",
    "flag of Japan, noto",
    "a gold trophy, fluent 3d",
    "mushroom, twemoji",
    "a slice of watermelon, noto",
    "alarm clock, fluent 3d",
    "a rainbow, twemoji",
    "robot, noto",
    "a wrapped present, fluent 3d",
)
SEED = 3


def noise(count: int, seed: int = SEED) -> torch.Tensor:
    """(count, 256, 48) start noise; picture i has the same noise whatever the count or the device."""
    per_picture = [torch.Generator().manual_seed(seed * 1000 + i) for i in range(count)]
    return torch.stack([torch.randn((SIDE // 4) ** 2, 48, generator=g) for g in per_picture])


def grid(pictures: list[Image.Image], labels: list[str], columns: int = 8, scale: int = 2) -> Image.Image:
    """Pictures in rows with their prompts below."""
    side, text, gap = SIDE * scale, 30, 10
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + text + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x = gap + i % columns * (side + gap)
        y = gap + i // columns * (side + text + gap)
        sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (x, y))
        draw.multiline_text(
            (x, y + side + 2), label.replace(", ", ",\n"), fill="#444444", font=font, spacing=1
        )
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    pipe = EmojiFluxPipeline.from_pretrained(args.model, dtype=dtype)
    pipe.to(args.device)
    pictures = pipe(
        list(PROMPTS),
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        latents=noise(len(PROMPTS), args.seed),
    ).images
    sheet = grid(pictures, list(PROMPTS)).quantize(256)  # a palette takes a quarter of the bytes
    sheet.save(args.out, optimize=True)
    print(args.out)


if __name__ == "__main__":
    main()
