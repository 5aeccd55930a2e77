"""examples/emoji_flux: data preparation, captions, training, the pipeline and the shipped weights."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import zipfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from lynx_compile.profile import load_profile
from lynx_compile.profile.apply import check_fits

EXAMPLE = Path(__file__).parents[1] / "examples" / "emoji_flux"
TINY = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}


@pytest.fixture(scope="module", autouse=True)
def _example_on_path():
    sys.path.insert(0, str(EXAMPLE))
    yield
    sys.path.remove(str(EXAMPLE))


@pytest.fixture(scope="module")
def shipped():
    from pipeline import EmojiFluxPipeline

    pipe = EmojiFluxPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _seeds(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- captions


def test_names_lead_with_what_people_say():
    from captions import names_of

    assert names_of("red heart", "HEAVY BLACK HEART", ["heart"]) == [
        "red heart",
        "heavy black heart",
        "heart",
    ]
    assert names_of("flag Japan", "REGIONAL INDICATOR SYMBOL LETTERS JP", ["jp", "flag-jp"]) == [
        "flag japan",
        "flag of japan",
        "japan flag",
    ]
    assert names_of("thumbs up", "THUMBS UP SIGN", ["+1", "thumbsup"]) == [
        "thumbs up",
        "thumbs up sign",
        "thumbsup",
    ]
    assert names_of(None, "SQUARED CJK UNIFIED IDEOGRAPH-7533", ["u7533"]) == []


def test_captions_are_distinct_and_name_the_style():
    from captions import ADJECTIVES, captions_of

    captions = captions_of(["octopus", "fox"], "fluent 3d", seed=0)
    assert len(captions) == len(set(captions))
    assert "octopus, fluent 3d" in captions
    assert "an octopus, fluent 3d" in captions
    assert [c for c in captions if "fluent 3d" not in c] == ["an octopus", "octopus", "a fox", "fox"]
    words = {word for seed in range(8) for c in captions_of(["fox"], "noto", seed) for word in c.split()}
    assert words >= set(ADJECTIVES)


def test_captions_with_a_colour_and_cut_short():
    from captions import captions_of

    captions = captions_of(["red heart", "heart"], "noto", seed=0, color="red")
    assert "a red heart, noto" in captions
    assert not any("red red" in c for c in captions)
    assert [captions_of(["red heart"], "noto", seed)[-1] for seed in (0, 1)] == ["heart, noto", "red, noto"]


def test_a_picture_has_the_colour_that_most_of_it_has():
    from captions import color_word

    picture = np.full((64, 64, 3), 255, np.uint8)
    assert color_word(picture) is None
    for color, word in {
        (230, 30, 20): "red",
        (230, 20, 60): "red",  # the other end of the circle
        (250, 140, 0): "orange",
        (255, 220, 60): "yellow",
        (40, 160, 60): "green",
        (40, 90, 220): "blue",
        (130, 60, 200): "purple",
        (250, 90, 180): "pink",
        (128, 128, 128): None,
    }.items():
        picture[16:48, 16:48] = color
        assert color_word(picture) == word, color
    picture[16:48, 16:32], picture[16:48, 32:48] = (230, 30, 20), (40, 90, 220)
    assert color_word(picture) is None  # half and half


# --- preparation


def _png(color: tuple[int, int, int, int], size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", size, color).save(buffer, "png")
    return buffer.getvalue()


def _archive(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def _emoji(code: str, name: str, short: str, twitter: bool = True) -> dict:
    return {
        "unified": code.upper(),
        "image": f"{code}.png",
        "name": name,
        "short_names": [short],
        "category": "Objects",
        "has_img_google": True,
        "has_img_twitter": twitter,
    }


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A prepared archive of three emoji from packages made here: 3 Noto, 2 Twemoji, 1 Fluent."""
    import prepare

    folder = tmp_path_factory.mktemp("packages")
    emoji = [
        _emoji("2764-fe0f", "HEAVY BLACK HEART", "heart"),
        _emoji("1f55a", "CLOCK FACE ELEVEN OCLOCK", "clock11"),
        _emoji("1f55b", "CLOCK FACE TWELVE OCLOCK", "clock12", twitter=False),
    ]
    names = {
        "\N{HEAVY BLACK HEART}\ufe0f": {"name": "red heart"},
        "\U0001f55a": {"name": "eleven o’clock"},
        "\U0001f55b": {"name": "twelve o’clock"},
    }
    sources = {
        "google": {"emoji.json": json.dumps(emoji).encode()}
        | {f"img/google/64/{e['image']}": _png((255, 0, 0, 128)) for e in emoji},
        "twitter": {f"img/twitter/64/{e['image']}": _png((0, 0, 255, 255)) for e in emoji[:2]},
        "fluent": {"assets/2764.webp": _png((0, 255, 0, 255), (256, 128))},
        "names": {"data-by-emoji.json": json.dumps(names).encode()},
    }
    out = folder / "emoji.zip"
    with ExitStack() as stack:
        archives = {}
        for key, files in sources.items():
            _archive(folder / f"{key}.tgz", files)
            archives[key] = stack.enter_context(tarfile.open(folder / f"{key}.tgz"))
        assert prepare.pack(archives, out) == 6
    return out


def test_prepared_archive(archive):
    with zipfile.ZipFile(archive) as folder:
        rows = [json.loads(line) for line in folder.read("metadata.jsonl").decode().splitlines()]
        pictures = {row["file_name"]: Image.open(io.BytesIO(folder.read(row["file_name"]))) for row in rows}
    assert [(row["style"], row["names"][0]) for row in rows] == [
        ("noto", "red heart"),
        ("twemoji", "red heart"),
        ("fluent 3d", "red heart"),
        ("noto", "eleven o’clock"),
        ("twemoji", "eleven o’clock"),
        ("noto", "twelve o’clock"),
    ]
    # "clock" is the shortcode of both clocks and would teach their average
    assert rows[3]["names"] == ["eleven o’clock", "clock face eleven oclock"]
    noto, fluent = pictures["noto/2764.webp"], pictures["fluent-3d/2764.webp"]
    assert {p.size for p in pictures.values()} == {(64, 64)}
    assert {p.mode for p in pictures.values()} == {"RGB"}
    assert noto.getpixel((32, 32)) == (255, 127, 127)  # half-transparent red over white
    assert fluent.getpixel((32, 32)) == (0, 255, 0)
    assert fluent.getpixel((32, 4)) == (255, 255, 255)  # a wide picture is padded to a square


# --- training


def test_augmented_pictures_stay_whole():
    from corpus import SMALLEST, augment

    pictures = torch.ones(64, 3, 64, 64)
    pictures[:, :, :, :32] = -1.0  # black left half, white right half
    pictures[:, 0, 24:40, 4:12] = 1.0  # red spot
    mirrored = torch.arange(64) % 2 == 0
    made = augment(pictures, mirrored, torch.Generator().manual_seed(0))
    assert made.shape == pictures.shape
    assert made.min() >= -1
    assert made.max() <= 1
    black = (made[:, 1] < 0).float().sum((1, 2)) / 2048
    assert black.min() > SMALLEST**2 - 0.05  # smaller, and nothing has left the frame
    assert black.max() <= 1
    assert len(black.unique()) > 10
    # columns of the black pixels' centre: left where not turned
    columns = (made[:, 1] < 0).float().mean(1)
    centre = (columns * torch.arange(64)).sum(1) / columns.sum(1)
    assert (centre[~mirrored] < 24).all()
    turned = centre[mirrored] > 32
    assert 4 < turned.sum() < 28
    same = (made == pictures).flatten(1).all(1)
    assert 4 < same.sum() < 40


def test_training_resumes_and_writes_a_pipeline(archive, tmp_path, monkeypatch):
    import train
    from corpus import Corpus
    from pipeline import EmojiFluxPipeline

    monkeypatch.setattr(train, "ARCHITECTURE", {**train.ARCHITECTURE, **TINY})
    monkeypatch.setattr("corpus.HELD_OUT", 6)
    monkeypatch.setattr(train, "LOG_STEPS", 2)
    corpus = Corpus(archive, torch.device("cpu"))
    assert len(corpus.train_rows) == 5
    assert len(corpus.held_out_rows) == 1
    assert corpus.count.sum() + 1 == len(corpus.text)  # and the empty caption
    assert corpus.batch(torch.tensor([1])).tokens[0, 0, -1].item() == 1.0  # blue, last channel

    config = train.Config(batch=2, warmup_steps=1, ema=0.5)
    first = train.Run(config, corpus, tmp_path)
    assert first.model.proj_out.weight.abs().sum() == 0  # a fresh model predicts nothing
    first.train(max_steps=2)
    assert first.step == 2
    assert first.model.proj_out.weight.abs().sum() > 0

    second = train.Run(config, corpus, tmp_path)
    assert second.step == 2
    assert second.seconds == first.seconds
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    averages = [[state["exp_avg"] for state in run.optimizer.state.values()] for run in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*averages, strict=True))
    assert any(average.abs().sum() > 0 for average in averages[1])
    second.train(max_steps=4)
    figures = json.loads((tmp_path / "training.json").read_text())
    assert (figures["steps"], figures["pictures_seen"]) == (4, 8)
    assert [entry["step"] for entry in figures["log"]] == [2, 4]
    assert [entry["step"] for entry in figures["checkpoints"]] == [2, 4]
    assert all(entry["held_out_loss"] > 0 and entry["trained_loss"] > 0 for entry in figures["checkpoints"])

    pipe = EmojiFluxPipeline.from_pretrained(tmp_path / "model")
    for saved, ema in zip(pipe.transformer.parameters(), second.ema.parameters(), strict=True):
        assert torch.equal(saved, ema.bfloat16().float())


def test_learning_rate_warms_up_and_ends_at_zero(archive, tmp_path, monkeypatch):
    import train
    from corpus import Corpus

    monkeypatch.setattr(train, "ARCHITECTURE", {**train.ARCHITECTURE, **TINY})
    config = train.Config(minutes=1, lr=1.0, warmup_steps=10)
    run = train.Run(config, Corpus(archive, torch.device("cpu")), tmp_path)
    assert run.learning_rate() == pytest.approx(0.1)
    run.step, run.seconds = 100, 30.0
    assert run.learning_rate() == pytest.approx(0.5)
    run.seconds = 61.0
    assert run.learning_rate() == pytest.approx(0.0)


# --- the pipeline and the shipped weights


def test_patches_round_trip():
    from pipeline import patchify, unpatchify

    pictures = torch.randn(2, 3, 64, 64)
    tokens = patchify(pictures)
    assert tokens.shape == (2, 256, 48)
    assert torch.equal(unpatchify(tokens), pictures)
    # token 17 is the patch in the second row and column; channels lead, then rows, then columns
    assert torch.equal(tokens[0, 17], pictures[0, :, 4:8, 4:8].flatten())


def test_shipped_weights_fit_the_promise():
    shards = sorted((EXAMPLE / "model" / "transformer").glob("*.safetensors"))
    assert 0 < sum(shard.stat().st_size for shard in shards) <= 24e6
    widths = set()
    for shard in shards:
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_slice(name)
                assert tensor.get_dtype() == "BF16"
                if "blocks." in name and len(tensor.get_shape()) == 2:
                    widths |= set(tensor.get_shape())
    assert widths
    assert all(width % 64 == 0 for width in widths)


def test_prompt_decides_the_picture(shipped):
    pictures = shipped(
        ["red heart, noto", "blue heart, noto"],
        num_inference_steps=5,
        generator=_seeds(0, 0),
        output_type="pt",
    ).images
    red, blue = pictures[:, :, 24:36, 24:40].mean((2, 3))
    assert red[0] > red[2] + 0.3
    assert blue[2] > blue[0] + 0.3
    assert pictures[:, :, :4, :4].mean() > 0.9  # on white


def test_same_seed_same_picture_alone_and_in_a_batch(shipped):
    alone = shipped("frog, noto", num_inference_steps=2, generator=_seeds(5), output_type="latent").images
    again = shipped("frog, noto", num_inference_steps=2, generator=_seeds(5), output_type="latent").images
    batch = shipped(
        ["pizza, noto", "frog, noto"], num_inference_steps=2, generator=_seeds(4, 5), output_type="latent"
    ).images
    assert torch.equal(alone, again)
    torch.testing.assert_close(batch[1:], alone, rtol=1e-3, atol=1e-3)


def test_latents_guidance_and_callback(shipped):
    noise = torch.randn(1, 256, 48, generator=_seeds(1)[0])
    seen: list[tuple[int, torch.Size]] = []

    def zero_after_the_last(pipe, step, timestep, state):
        seen.append((step, state["latents"].shape))
        return {"latents": torch.zeros_like(state["latents"])} if step == 1 else {}

    options = {"num_inference_steps": 2, "latents": noise, "output_type": "latent", "return_dict": False}
    (unguided,) = shipped("dog, noto", guidance_scale=1.0, **options)
    (guided,) = shipped("dog, noto", guidance_scale=4.0, **options)
    (zeros,) = shipped("dog, noto", callback_on_step_end=zero_after_the_last, **options)
    assert not torch.allclose(unguided, guided)
    assert zeros.abs().sum() == 0
    assert seen == [(0, noise.shape), (1, noise.shape)]
    # the negative prompt only matters with guidance
    (other,) = shipped("dog, noto", negative_prompt="cat, noto", guidance_scale=1.0, **options)
    assert torch.equal(other, unguided)


def test_several_pictures_a_prompt(shipped):
    made = shipped(["a", "b"], num_images_per_prompt=2, num_inference_steps=1, generator=_seeds(1, 2, 1, 2))
    assert [picture.size for picture in made.images] == [(64, 64)] * 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt": []}, "non-empty"),
        ({"prompt": ["a"], "negative_prompt": ["b", "c"]}, "2 negative prompts for 1 prompts"),
        ({"prompt": ["a", "b"], "generator": _seeds(1)}, "1 generators for 2 pictures"),
        ({"prompt": "a", "latents": torch.zeros(1, 4, 48)}, "needs (1, 256, 48)"),
    ],
)
def test_arguments_that_do_not_fit(shipped, arguments, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
        shipped(**arguments)


def test_missing_model_folder_is_named(tmp_path):
    from pipeline import EmojiFluxPipeline

    with pytest.raises(FileNotFoundError, match=r"model_index\.json.*save_pretrained"):
        EmojiFluxPipeline.from_pretrained(tmp_path)


def test_the_profile_beside_the_model_is_its_own(shipped):
    profile = load_profile(EXAMPLE / "profile")
    check_fits(shipped.transformer, profile)
    assert 0 < len(profile.sparse_layers()) < len(profile.layers)
