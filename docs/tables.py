"""Writes the figures of docs/results/*.json into the tables of README.md and docs/*.md.

    python docs/tables.py            rewrite every marked block
    python docs/tables.py --check    exit 1 when a block does not show what its file holds

A block stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a key of TABLES below. A block whose
result file is not there yet is left alone.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Result = Mapping[str, Any]


def gemm(result: Result) -> list[str]:
    """Every method on every shape."""
    columns = {
        "cublas_ms": "cuBLAS bf16",
        "pytorch_spmm_ms": "PyTorch SpMM",
        "cusparselt_ms": "cuSPARSELt (GEMM only)",
        "fp8_rowwise_ms": "fp8 rowwise (GEMM only)",
        "sparsify_ms": "sparsify",
        "gemm_ms": "sparse GEMM",
        "total_ms": "**total**",
        "total_no_lora_ms": "total, no LoRA",
    }
    lines = _head(["M, N, K", *columns.values(), "speed-up"])
    for row in result["rows"]:
        cells = [_ms(row.get(key)) for key in columns]
        lines.append(_line([f"{row['m']}, {row['n']}, {row['k']}", *cells, f"**{row['speedup']:.2f}×**"]))
    return [*lines, "", _source(result, "ms; geometric mean {geomean_speedup:.2f}×")]


def chains(result: Result) -> list[str]:
    """A producer and the linear layer behind it."""
    columns = {
        "inductor_ms": "Inductor, ms",
        "sparsify_ms": "sparsify",
        "gemm_ms": "sparse GEMM",
        "total_ms": "**total**",
    }
    columns = {
        key: heading for key, heading in columns.items() if all(key in row for row in result["chains"])
    }
    lines = _head(["chain", "M, N, K", *columns.values(), "speed-up"])
    for row in result["chains"]:
        shape = f"{row['m']}, {row['n']}, {row['k']}"
        times = [_ms(row[key]) for key in columns]
        lines.append(_line([row["chain"], shape, *times, f"**{row['speedup']:.2f}×**"]))
    return [*lines, "", _source(result, "geometric mean {geomean_chain_speedup:.2f}×")]


def rates(result: Result) -> list[str]:
    """Where the kernels stand: dense-equivalent TFLOP/s and bytes a second."""
    lines = _head(
        ["M, N, K", "cuBLAS, TFLOP/s", "sparse GEMM, TFLOP/s", "with LoRA", "sparsify, TB/s", "with LoRA"]
    )
    for row in result["rows"]:
        m, n, k = row["m"], row["n"], row["k"]
        flops, moved = 2 * m * n * k, _sparsify_bytes(m, k)
        cells = [f"{flops / row[key] / 1e9:.0f}" for key in ("cublas_ms", "gemm_no_lora_ms", "gemm_ms")]
        cells += [f"{moved / row[key] / 1e9:.2f}" for key in ("sparsify_no_lora_ms", "sparsify_ms")]
        lines.append(_line([f"{m}, {n}, {k}", *cells]))
    return [*lines, "", _source(result, "dense-equivalent FLOP: 2·M·N·K")]


PARTS = {
    "gemm_ms": "GEMM",
    "sparsify_ms": "sparsify",
    "attention_ms": "attention",
    "elementwise_ms": "elementwise",
}


def steps(result: Result) -> list[str]:
    """One denoising step under every backend, split by what its kernels do."""
    columns = {"step_ms": "step", **PARTS, "host_ms": "host"}
    lines = _head(["model", "backend", "LoRA rank", "sparse FLOPs", *columns.values(), "vs Inductor"])
    for row in result["rows"]:
        cells = [row["model"], row["backend"], str(row["lora_rank"]), f"{row['sparse_flops_share']:.0%}"]
        cells += [f"{row[key]:.1f}" for key in columns]
        lines.append(_line([*cells, f"**{row['speedup_vs_inductor']:.2f}×**"]))
    return [*lines, "", _source(result, f"ms, {_points(result)}")]


def steps_by_model(result: Result) -> list[str]:
    """The step of each backend, a column a model, with its speed-up over Inductor."""
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    lines = _head(["backend", *models])
    for backend in dict.fromkeys(row["backend"] for row in result["rows"]):
        found = {row["model"]: row for row in result["rows"] if row["backend"] == backend}
        cells = [
            f"{found[m]['step_ms']:.1f} (**{found[m]['speedup_vs_inductor']:.2f}×**)" if m in found else "–"
            for m in models
        ]
        lines.append(_line([f"`{backend}`", *cells]))
    return [*lines, "", _source(result, f"ms, {_points(result)}")]


def memory(result: Result) -> list[str]:
    """Kernel launches and peak memory of a step beside Inductor's."""
    lines = _head(["model", "backend", "LoRA rank", "launches", "peak, GiB", "over dense"])
    for row, dense in _beside(result, "inductor"):
        cells = [row["model"], row["backend"], str(row["lora_rank"]), str(row["launches"])]
        over = row["peak_gib"] / dense["peak_gib"] - 1
        lines.append(_line([*cells, f"{row['peak_gib']:.2f}", "" if row is dense else f"**{over:+.1%}**"]))
    return [*lines, "", _source(result, _points(result))]


def compilation(result: Result) -> list[str]:
    """Graphs and seconds of compilation with empty caches beside Inductor's."""
    lines = _head(["model", "backend", "graphs", "compile, s", "of Inductor's"])
    for row, dense in _beside(result, "inductor"):
        if row["compile_s"] is not None and dense["compile_s"] and row["graphs"]:
            cells = [str(row["graphs"]), f"{row['compile_s']:.1f}"]
            cells.append(f"**{row['compile_s'] / dense['compile_s']:.2f}×**")
            lines.append(_line([row["model"], row["backend"], *cells]))
    return [*lines, "", _source(result, _points(result))]


def shapes(result: Result) -> list[str]:
    """Resolutions and batches on graphs that were compiled once, in the order they came."""
    columns = ["step, ms", "host, ms", "vs Inductor", "graphs so far", "peak, GiB"]
    lines = _head(["model", "pixels", "batch", "backend", "sparse FLOPs", *columns])
    for row in result["rows"]:
        cells = [row["model"], str(row["resolution"]), str(row["batch"]), row["backend"]]
        cells += [f"{row['sparse_flops_share']:.0%}", f"{row['step_ms']:.1f}", f"{row['host_ms']:.1f}"]
        cells += [f"**{row['speedup_vs_inductor']:.2f}×**", str(row["graphs"]), f"{row['peak_gib']:.2f}"]
        lines.append(_line(cells))
    return [*lines, "", _source(result, "")]


def layers(result: Result) -> list[str]:
    """Every kind of linear layer alone; those that read one X together."""
    lines = _head(["model", "layers", "blocks", "M, N, K", "dense", "**sparse**", "no LoRA", "speed-up"])
    for row in result["rows"]:
        first, *others = row["layers"]
        folder = first.rpartition(".")[0] + "."
        names = ", ".join([first, *(name.removeprefix(folder) for name in others)])
        cells = [row["model"], names, str(row["count"]), f"{row['m']}, {row['n']}, {row['k']}"]
        cells += [_ms(row[key]) for key in ("dense_ms", "total_ms", "total_no_lora_ms")]
        lines.append(
            _line([*cells, f"**{row['speedup']:.2f}×**" if row["decision"] == "sparse" else "dense"])
        )
    means = ", ".join(f"{model} {speedup:.2f}×" for model, speedup in result["averages"].items())
    return [*lines, "", _source(result, f"ms; time of all sparse layers of a model: {means}")]


def floor(result: Result) -> list[str]:
    """What the parts of a step take, and what is the least they could.

    GEMM: Inductor's, the sparse share of its FLOPs at twice the rate. sparsify: its bytes at copy speed.
    attention, elementwise: what they take under Inductor.
    """
    device = json.loads((ROOT / "lynx_compile" / "data" / "h200.json").read_text())
    lines = _head(["model", "part", "Inductor, ms", "rt_lynx-everything, ms", "floor, ms", "above it, ms"])
    for row, dense in _beside(result, "inductor"):
        if row["backend"] != "rt_lynx-everything":
            continue
        least = {
            "gemm_ms": dense["gemm_ms"] * (1 - row["sparse_flops_share"] / 2),
            "sparsify_ms": row["sparsify_gb"] / device["copy_tb_s"],
            "attention_ms": dense["attention_ms"],
            "elementwise_ms": dense["elementwise_ms"],
        }
        for key, name in PARTS.items():
            times = (dense[key], row[key], least[key], row[key] - least[key])
            lines.append(_line([row["model"], name, *(f"{time:.1f}" for time in times)]))
    return [*lines, "", _source(result, _points(result))]


def kernels(result: Result) -> list[str]:
    """The heaviest kernels of a step, dense and with everything sparse."""
    lines = _head(["model", "backend", "launches in all", "kernel", "kind", "launches", "ms"])
    for row in result["rows"]:
        if row["backend"] in ("inductor", "rt_lynx-everything"):
            for kernel in row["kernels"][:6]:
                cells = [row["model"], row["backend"], str(row["launches"]), f"`{kernel['kernel'][:60]}`"]
                cells += [kernel["kind"], str(kernel["launches"]), f"{kernel['ms']:.2f}"]
                lines.append(_line(cells))
    return [*lines, "", _source(result, _points(result))]


def start(result: Result) -> list[str]:
    """Compilation before the first step of a process, without and with caches on disk."""
    columns = {"cold_s": "first process, s", "warm_s": "second process, s", "tracing_s": "of it tracing"}
    columns = {key: heading for key, heading in columns.items() if all(key in row for row in result["rows"])}
    lines = _head(["model", "backend", *columns.values(), "faster"])
    for row in result["rows"]:
        cells = [*(f"{row[key]:.2f}" for key in columns), f"**{row['faster']:.1f}×**"]
        lines.append(_line([row["model"], row["backend"], *cells]))
    return [*lines, "", _source(result, "")]


def coverage(result: Result) -> list[str]:
    """What the patterns match and what the default decisions make sparse, by linear FLOPs."""
    lines = _head(["model", "linear TFLOP a step", "linears", "matched", "matched FLOPs", "sparse FLOPs"])
    for row in result["rows"]:
        cells = [f"{row['linear_flops'] / 1e12:.1f}", str(row["linears"]), str(row["matched"])]
        cells += [f"{row['matched_share']:.1%}", f"{row['sparse_share']:.1%}"]
        lines.append(_line([row["model"], *cells]))
    return [*lines, "", _source(result, "")]


def quality(result: Result) -> list[str]:
    """Every method against the dense model at the same seeds."""
    lines = _head(
        ["method", "sparse", "branch", "PSNR, dB", "SSIM", "error (95%)", "KID (95%)", "made in, s"]
    )
    for row in result["rows"]:
        added = result.get("details", {}).get(row["method"], {}).get("branch_flops_share")
        if row["latent_rel_err"]:
            cells = [f"{row['sparse_flops_share']:.1%}" if row["sparse_flops_share"] else "–"]
            cells += ["–" if added is None else f"{added:.0%}", f"{row['psnr_db']:.1f}", f"{row['ssim']:.3f}"]
            cells += [_interval(row, "latent_rel_err", 3)]
        else:
            cells = ["–"] * 5
        cells += [_interval(row, "kid", 3), f"{row['calibration_s']:.1f}" if row["calibration_s"] else "–"]
        lines.append(_line([row["method"], *cells]))
    return [*lines, "", _source(result, "{prompts} held-out prompts, {steps} steps")]


def levers(result: Result) -> list[str]:
    """Every lever by itself."""
    lines = _head(["lever", "sparse", "PSNR, dB", "error (95%)"])
    for row in result["rows"]:
        if row["latent_rel_err"]:
            share = f"{row['sparse_flops_share']:.1%}" if row["sparse_flops_share"] else "–"
            cells = [share, f"{row['psnr_db']:.1f}", _interval(row, "latent_rel_err", 3)]
            lines.append(_line([row["method"].removeprefix("lever: "), *cells]))
    return [*lines, "", _source(result, "{prompts} held-out prompts, {steps} steps")]


def levers_besides(result: Result) -> list[str]:
    """What study scripts measured with the same forwards, on other prompts than the command's."""
    lines = _head(["lever", "sparse", "branch", "PSNR, dB", "error (95%)"])
    study = result["studies"]["besides"]
    for row in study["rows"]:
        added = row["branch_flops_share"]
        share = row["sparse_flops_share"]
        cells = [f"{share:.1%}" if share else "–", "–" if added is None else f"{added:.0%}"]
        cells += [f"{row['psnr_db']:.1f}", _interval(row, "latent_rel_err", 3)]
        lines.append(_line([row["method"], *cells]))
    note = "128 held-out prompts, 20 steps; branch: its FLOPs over all linear FLOPs"
    return [*lines, "", _source({**study, "device": result["device"]}, note)]


def levers_chosen(result: Result) -> list[str]:
    """What else was tried on the set that the chooser found, each with its KID."""
    return _chosen_set(result, result["studies"]["chosen_set"]["rows"])


def quality_ends(result: Result) -> list[str]:
    """The rows of the same study that tell what dense steps at either end do."""
    study = result["studies"]["chosen_set"]
    return _chosen_set(result, [row for row in study["rows"] if row["method"] in study["in_short"]])


def _chosen_set(result: Result, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    lines = _head(["changed", "sparse", "branch", "PSNR, dB", "error (95%)", "KID (95%)"])
    study = result["studies"]["chosen_set"]
    for row in rows:
        shares = f"{row['sparse_flops_share']:.1%}", f"{row['branch_flops_share']:.0%}"
        cells = [*shares, f"{row['psnr_db']:.1f}"]
        cells += [_interval(row, key, 3) for key in ("latent_rel_err", "kid")]
        lines.append(_line([row["method"], *cells]))
    return [*lines, "", _source({**study, "device": result["device"]}, study["what"])]


def distillation(result: Result) -> list[str]:
    """What joint distillation does to the loss it trains on."""
    lines = _head(["start and rate", "s", "held-out loss before", "after"])
    for run in result["studies"]["joint_distillation"]["runs"]:
        first, last = run["history"][0][2], min(loss for _, _, loss in run["history"])
        lines.append(_line([run["method"], f"{run['seconds']:.0f}", f"{first:.3f}", f"{last:.3f}"]))
    return [*lines, "", _source(result, "relative squared error of the guided velocity, held-out prompts")]


def quality_race(result: Result) -> list[str]:
    """How long training takes to the closed form's error."""
    lines = _head(
        [
            "rank",
            "prompts × steps",
            "closed form, s",
            "its error",
            "training to within 5%, s",
            "1%",
            "0%",
            "at its end",
        ]
    )
    for rank, race in result["studies"]["recipe_against_closed_form"].items():
        step, seconds, error = race["history"][-1]
        for closed in race["closed_form"]:
            met = [closed["training_to_within"][slack] for slack in ("5%", "1%", "0%")]
            times = ["never" if at is None else f"{at['seconds']:.1f} (step {at['step']})" for at in met]
            size = f"{closed['prompts']} × {closed['steps']}"
            cells = [size, f"{closed['seconds']:.2f}", f"{closed['error']:.4f}", *times]
            lines.append(_line([rank, *cells, f"{error:.4f} ({step} steps, {seconds:.1f} s)"]))
        if further := race.get("refined"):
            more = f"{further['training_steps']} steps of training on top of {further['error_before']:.4f}"
            made = f"{further['seconds']:.2f}", f"{further['error']:.4f}"
            lines.append(_line([rank, more, *made, *["–"] * 3, further.get("note", "–")]))
    notes = [
        race["note"] for race in result["studies"]["recipe_against_closed_form"].values() if "note" in race
    ]
    what = "mean over layers of the relative output error, validation prompts"
    return [*lines, "", _source(result, "; ".join([what, *notes]))]


def quality_classes(result: Result) -> list[str]:
    """Each class and each block of layers alone sparse."""
    study = result["studies"]["sensitivity"]
    lines = _head(["alone sparse", "velocity's error", "final sample's error"])
    for by in ("class", "block"):
        for unit, effect in sorted(study[by].items(), key=lambda entry: -entry[1]["sample"]):
            lines.append(_line([unit, f"{effect['velocity']:.3f}", f"{effect['sample']:.3f}"]))
    ranks = study["spearman"]
    note = f"rank correlation over {len(study['layers'])} layers of the effect on the final sample with "
    note += f"the layer's own error {ranks['output']:.2f}, with the velocity's {ranks['velocity']:.2f}"
    return [*lines, "", _source(result, note)]


def quality_rungs(result: Result) -> list[str]:
    """Each class alone sparse under every compensation."""
    study = result["studies"]["rungs"]
    classes = study["classes"]
    lines = _head(["alone sparse", *next(iter(classes.values()))])
    worst = {unit: max(effect["sample"] for effect in rungs.values()) for unit, rungs in classes.items()}
    for unit in sorted(classes, key=lambda unit: -worst[unit]):
        lines.append(_line([unit, *(f"{effect['sample']:.3f}" for effect in classes[unit].values())]))
    return [*lines, "", _source({**result, **study}, study.get("what", ""))]


def quality_steps(result: Result) -> list[str]:
    """The likely set with the first steps dense, and with only them sparse."""
    study = result["studies"]["sensitivity"]
    lines = _head(["n", "error, first n steps dense", "error, only the first n sparse"])
    for n, (dense, sparse) in study["dense_first_steps"].items():
        lines.append(_line([n, f"{dense:.3f}", f"{sparse:.3f}" if int(n) else "–"]))
    together = study["interactions"]
    note = "the layers of one set: root of the sum of squares {sum_of_own:.3f}, sum of vectors "
    note += "{sum_of_vectors:.3f}, measured together {measured_together:.3f}"
    return [*lines, "", _source(result, note.format(**together))]


def _interval(row: Mapping[str, Any], key: str, digits: int) -> str:
    if row[key] is None:
        return "–"
    if row[f"{key}_ci"] is None:
        return f"{row[key]:.{digits}f}"
    low, high = row[f"{key}_ci"]
    return f"{row[key]:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


# block name → (result file, what writes it)
TABLES: dict[str, tuple[str, Callable[[Result], list[str]]]] = {
    "gemm": ("gemm_h200.json", gemm),
    "quality": ("quality_emoji.json", quality),
    "levers": ("levers_emoji.json", levers),
    "levers-besides": ("levers_emoji.json", levers_besides),
    "levers-chosen": ("levers_emoji.json", levers_chosen),
    "quality-ends": ("levers_emoji.json", quality_ends),
    "distillation": ("levers_emoji.json", distillation),
    "quality-race": ("quality_emoji.json", quality_race),
    "quality-classes": ("quality_emoji.json", quality_classes),
    "quality-rungs": ("quality_emoji.json", quality_rungs),
    "quality-steps": ("quality_emoji.json", quality_steps),
    "gemm-chains": ("gemm_h200.json", chains),
    "gemm-rates": ("gemm_h200.json", rates),
    "coverage": ("coverage.json", coverage),
    "steps": ("step_h200.json", steps),
    "steps-by-model": ("step_h200.json", steps_by_model),
    "memory": ("step_h200.json", memory),
    "compilation": ("step_h200.json", compilation),
    "floor": ("step_h200.json", floor),
    "kernels": ("step_h200.json", kernels),
    "layers": ("layers_h200.json", layers),
    "shapes": ("shapes_h200.json", shapes),
    "start": ("start_h200.json", start),
}


def _head(names: Iterable[str]) -> list[str]:
    names = list(names)
    return [_line(names), _line("---:" if i else "---" for i in range(len(names)))]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _sparsify_bytes(m: int, k: int) -> float:
    """X read; values, metadata and scale written."""
    return 2 * m * k + m * k + m * k / 8 + 4 * m


def _beside(result: Result, backend: str) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Each row with the row of `backend` on the same model, resolution and batch."""

    def point(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return row["model"], row["resolution"], row["batch"]

    rivals = {point(row): row for row in result["rows"] if row["backend"] == backend}
    return [(row, rivals[point(row)]) for row in result["rows"] if point(row) in rivals]


def _points(result: Result) -> str:
    found = {f"{row['resolution']} × {row['resolution']}, batch {row['batch']}" for row in result["rows"]}
    return "; ".join(sorted(found))


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if value < 1 else f"{value:.3f}"


def _source(result: Result, note: str) -> str:
    load = f"{result['power_w']:.0f} W, {result['clock_mhz']:.0f} MHz" if result.get("power_w") else ""
    parts = [
        note.format(**result),
        result.get("device", ""),
        load,
        f"`{result['command']}`",
        f"at {result['commit']}",
        result.get("note", "").partition(";")[0],  # how it differs from what the command alone would give
    ]
    return f"*{'; '.join(part for part in parts if part)}.*"


def rewritten(text: str) -> str:
    """`text` with every block renewed. Raises KeyError for a block nobody writes."""

    def renew(block: re.Match[str]) -> str:
        file, write = TABLES[block["name"]]
        if not (RESULTS / file).exists():
            return block[0]
        result = json.loads((RESULTS / file).read_text())
        return block[1] + "\n" + "\n".join(write(result)) + "\n\n" + block[3]

    return BLOCK.sub(renew, text)


def main(arguments: list[str]) -> int:
    """Rewrite, or with --check compare; returns the exit code."""
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if not path.exists():
            continue
        text = path.read_text()
        new = rewritten(text)
        if new != text:
            stale.append(path.relative_to(ROOT))
            if "--check" not in arguments:
                path.write_text(new)
    for path in stale:
        print(f"{path}: {'out of date; run python docs/tables.py' if '--check' in arguments else 'renewed'}")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
