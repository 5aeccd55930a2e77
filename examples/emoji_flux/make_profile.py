"""The profile in profile/: branches that deflate, from the model's own runs, and a choice measured elsewhere.

    python examples/emoji_flux/make_profile.py            # 13 minutes on 2 busy CPU cores

Which layers stay dense is `rt-lynx eval`'s choice at 85% (docs/results/quality_emoji.json, 512 prompts on a
GPU); of the steps it is the last, not the first. `rt-lynx calibrate emoji --speed …` chooses anew, which
takes a GPU's patience.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from lynx_compile.calibration import Pipeline, calibrate
from lynx_compile.calibration.choose import usual_last_steps
from lynx_compile.evaluation.emoji import load_emoji_pipeline, prompts
from lynx_compile.profile import Branch, Profile, save_profile

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "docs" / "results" / "quality_emoji.json"
CHOICE = "shift + deflation r128 + SL end to end, 85%"
TEXT_TOKENS = 32


def choose(profile: Profile, dense: list[str], text_rows_dense: list[str]) -> None:
    """Layers named in `dense` lose their branch, those in `text_rows_dense` keep their text rows dense."""
    for name, layer in profile.layers.items():
        layer.sparse = name not in dense
        layer.reason = "chosen by end-to-end sensitivity"
        if not layer.sparse:
            layer.branch = Branch()
        elif name in text_rows_dense:
            layer.branch = replace(layer.branch, dense_tokens=TEXT_TOKENS)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=HERE / "profile")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()

    details = json.loads(RESULTS.read_text(encoding="utf-8"))["details"][CHOICE]
    pipe = load_emoji_pipeline(dtype=torch.float32).to(given.device)
    workload = Pipeline(pipe, prompts(given.prompts), steps=given.steps, batch_size=8)
    made = {"model": "emoji", "prompts": given.prompts, "rank": given.rank, "choice": CHOICE}
    profile = calibrate(workload, rank=given.rank, steps=given.steps, provenance=made)
    profile.dense_last_steps = usual_last_steps(given.steps)
    choose(profile, details["dense_layers"], details["text_rows_dense"])
    save_profile(profile, given.out)
    print(f"wrote {given.out}: {len(profile.sparse_layers())} of {len(profile.layers)} layers sparse")


if __name__ == "__main__":
    main()
