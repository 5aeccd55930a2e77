"""Read and write a profile folder: a PEFT LoRA adapter, the extra vectors, and `lynx.json` over both.

    adapter_model.safetensors   A and B of every layer, under PEFT's names
    adapter_config.json         PEFT's LoraConfig
    lynx_vectors.safetensors    shift and score of every layer that has them
    lynx.json                   decisions, errors, fingerprint, hashes of the other files, digest of itself

`lynx.json` names no path that is opened: the four file names are fixed.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..files import write_whole
from .errors import ProfileError
from .format import DAMAGED, Described, Profile, from_json, to_json

JSON = "lynx.json"
ADAPTER = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
VECTORS = "lynx_vectors.safetensors"
HASHED = (ADAPTER, CONFIG, VECTORS)
PREFIX = "base_model.model."  # of PEFT's parameter names
MAX_JSON = 64 << 20


def save_profile(profile: Profile, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the profile; A and B in `dtype`, vectors in fp32. A half-written folder does not load."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    adapter: dict[str, Tensor] = {}
    vectors: dict[str, Tensor] = {}
    for name, layer in profile.layers.items():
        branch = layer.branch
        if branch.down is not None and branch.up is not None:
            # PEFT wants an A for each layer, safetensors no memory twice: layers that share one get copies
            adapter[f"{PREFIX}{name}.lora_A.weight"] = branch.down.to("cpu", dtype).clone()
            adapter[f"{PREFIX}{name}.lora_B.weight"] = branch.up.to("cpu", dtype).contiguous()
        for kind, vector in (("shift", branch.shift), ("score", branch.score)):
            if vector is not None:
                vectors[f"{name}.{kind}"] = vector.to("cpu", torch.float32).clone()
    contents = {
        ADAPTER: save_tensors(adapter, {"format": "pt"}),
        CONFIG: _dump(_peft_config(profile)),
        VECTORS: save_tensors(vectors, {"format": "pt"}),
    }
    (folder / JSON).unlink(missing_ok=True)
    for name, content in contents.items():
        write_whole(folder / name, content)
    write_whole(folder / JSON, _sealed(to_json(profile), contents))


def load_profile(folder: str | Path) -> Profile:
    """Read and check a profile folder. Raises ProfileError for anything but exactly what was saved."""
    folder = Path(folder)
    data = _read_json(folder)
    contents = {name: _read(folder / name) for name in HASHED}
    profile, described = from_json({k: v for k, v in data.items() if k not in ("files", "digest")}, JSON)
    files = data.get("files")
    if not isinstance(files, dict) or set(files) != set(HASHED):
        raise ProfileError(JSON, "files", f"must name exactly {', '.join(HASHED)}", DAMAGED)
    if data.get("digest") != _digest(data):
        raise ProfileError(JSON, "digest", "does not match the content", DAMAGED)
    for name, content in contents.items():
        if files[name] != hashlib.sha256(content).hexdigest():
            raise ProfileError(
                folder / name,
                "SHA-256",
                f"does not match {JSON}",
                "fetch it again, or accept an adapter you trained further: `rt-lynx profile seal FOLDER`",
            )
    _parse_json(contents[CONFIG], CONFIG)
    _attach_tensors(
        profile, described, _tensors(contents[ADAPTER], ADAPTER), _tensors(contents[VECTORS], VECTORS)
    )
    return profile


def seal(folder: str | Path) -> Profile:
    """Accept the folder's tensors and decisions as they are now: hash them anew and load the result.

    For adapters trained further with PEFT. Raises ProfileError when the tensors do not fit `lynx.json`.
    """
    folder = Path(folder)
    data = _read_json(folder)
    contents = {name: _read(folder / name) for name in HASHED}
    profile, described = from_json({k: v for k, v in data.items() if k not in ("files", "digest")}, JSON)
    _attach_tensors(
        profile, described, _tensors(contents[ADAPTER], ADAPTER), _tensors(contents[VECTORS], VECTORS)
    )
    write_whole(folder / JSON, _sealed(to_json(profile), contents))
    return load_profile(folder)


def _peft_config(profile: Profile) -> dict[str, Any]:
    ranks = {name: layer.branch.rank for name, layer in profile.layers.items() if layer.branch.rank}
    common = max(ranks.values(), default=1)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": profile.provenance.get("model"),
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != common},
        "alpha_pattern": {name: rank for name, rank in ranks.items() if rank != common},
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }


def _attach_tensors(
    profile: Profile, described: dict[str, Described], adapter: dict[str, Tensor], vectors: dict[str, Tensor]
) -> None:
    for name, want in described.items():
        n, k = want.layer.shape
        down = up = shift = score = None
        if want.rank:
            down = _take(adapter, ADAPTER, f"{PREFIX}{name}.lora_A.weight", (want.rank, k))
            up = _take(adapter, ADAPTER, f"{PREFIX}{name}.lora_B.weight", (n, want.rank))
        if want.shift:
            shift = _take(vectors, VECTORS, f"{name}.shift", (k,))
        if want.score:
            score = _take(vectors, VECTORS, f"{name}.score", (k,))
        layer = profile.layers[name]
        layer.branch = replace(
            layer.branch, down=down, up=up, shift=shift, score=score, compensation=profile.compensation
        )
    for file, left in ((ADAPTER, adapter), (VECTORS, vectors)):
        if left:
            raise ProfileError(file, next(iter(left)), f"belongs to no layer of {JSON}", DAMAGED)


def _take(tensors: dict[str, Tensor], file: str, key: str, shape: tuple[int, ...]) -> Tensor:
    if key not in tensors:
        raise ProfileError(file, key, "is missing", DAMAGED)
    tensor = tensors.pop(key)
    if tuple(tensor.shape) != shape:
        raise ProfileError(
            file,
            key,
            f"has shape {tuple(tensor.shape)}, not {shape}",
            f"its rank or layer differs: {DAMAGED}",
        )
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
        raise ProfileError(file, key, f"({tensor.dtype}) holds values that are no finite numbers", DAMAGED)
    return tensor


def _sealed(data: dict[str, Any], contents: dict[str, bytes]) -> bytes:
    data["files"] = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    data["digest"] = _digest(data)
    return _dump(data)


def _digest(data: dict[str, Any]) -> str:
    content = {name: value for name, value in data.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _dump(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode()


def _read_json(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ProfileError(folder, "", "is no folder", "pass the folder that holds lynx.json")
    data = _parse_json(_read(folder / JSON), JSON)
    if not isinstance(data, dict):
        raise ProfileError(JSON, "top level", f"is a {type(data).__name__}, not an object", DAMAGED)
    return data


def _parse_json(content: bytes, file: str) -> Any:
    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is no JSON number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            raise ValueError("a name stands twice in one object")
        return names

    try:
        return json.loads(content.decode("utf-8"), parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ProfileError(file, "", f"is not valid JSON ({error})", DAMAGED) from error


def _read(path: Path) -> bytes:
    try:
        if path.name.endswith(".json") and path.stat().st_size > MAX_JSON:
            raise ProfileError(path, "size", f"is over {MAX_JSON >> 20} MiB", DAMAGED)
        return path.read_bytes()
    except OSError as error:
        raise ProfileError(
            path, "", f"cannot be read ({error.strerror})", "the profile is incomplete; fetch it again"
        ) from error


def _tensors(content: bytes, file: str) -> dict[str, Tensor]:
    try:
        return load_tensors(content)
    except (
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        struct.error,
        MemoryError,
    ) as error:
        raise ProfileError(file, "", f"is no valid safetensors file ({error})", DAMAGED) from error
