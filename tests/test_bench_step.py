"""The step benchmark without a GPU: what it switches on, what it undoes, what it counts."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from lynx_compile import models
from lynx_compile.bench import backends, step, step_report
from lynx_compile.bench.split import heaviest, in_turn, kernels, kind_of, total_ms
from lynx_compile.layers import LynxLinear
from tests import zoo

EMULATED = {"emulate": True, "rest": "eager", "min_tokens": 0}


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sparsify", "sparsify_ms"),
        ("sparse_gemm", "gemm_ms"),
        ("sparse_gemm_mma", "gemm_ms"),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNT", "gemm_ms"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "gemm_ms"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal>", "gemm_ms"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128", "attention_ms"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention_ms"),
        ("triton_tem_fused_addmm_12", "gemm_ms"),
        ("triton_tem_fused_flex_attention_3", "attention_ms"),
        ("triton_red_fused_add_mul_native_layer_norm_4", "elementwise_ms"),
        ("triton_red_fused__fused_rms_norm__scaled_dot_product_cudnn_attention_view_2", "elementwise_ms"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>", "elementwise_ms"),
        ("Memcpy DtoD (Device -> Device)", "elementwise_ms"),
    ],
)
def test_kernels_are_told_apart_by_name(kernel, kind):
    assert kind_of(kernel) == kind


def test_split_sums_nanoseconds_by_kind():
    totals = total_ms([("sparse_gemm", 2_000_000), ("nvjet_x", 500_000), ("sparsify", 250_000)])
    assert totals == {"sparsify_ms": 0.25, "attention_ms": 0.0, "gemm_ms": 2.5, "elementwise_ms": 0.0}


def test_a_kernel_counts_from_the_end_of_those_before_it():
    ran = [("gemm", 60, 50), ("sparsify", 10, 90), ("norm", 70, 20), ("gemm", 200, 5)]
    assert in_turn(ran) == [("sparsify", 90), ("gemm", 10), ("norm", 0), ("gemm", 5)]


def test_heaviest_kernels_come_first():
    ran = [("nvjet_a", 2_000_000), ("sparsify", 2_500_000), ("nvjet_a", 1_000_000), ("triton_poi", 1)]
    assert heaviest(ran, 2) == [
        {"kernel": "nvjet_a", "kind": "gemm", "launches": 2, "ms": 3.0},
        {"kernel": "sparsify", "kind": "sparsify", "launches": 1, "ms": 2.5},
    ]


def test_split_reads_the_profiler():
    a = torch.randn(256, 256)
    with torch.no_grad():
        totals = total_ms(kernels(lambda: torch.nn.functional.gelu(a @ a)))
    assert sum(totals.values()) > 0
    assert totals["sparsify_ms"] == 0


def test_branches_go_where_tokens_go():
    model, inputs = zoo.build("FluxTransformer2DModel")
    attached = backends.attach_random_branches(model, 16, inputs)
    carrying = {name for name, m in model.named_modules() if isinstance(m, LynxLinear)}
    assert len(carrying) == attached
    assert "transformer_blocks.0.attn.to_q" in carrying
    assert "single_transformer_blocks.1.proj_out" in carrying
    assert not any("norm" in name or "embed" in name for name in carrying)
    layer = model.transformer_blocks[0].ff.net[2]
    assert layer.lynx_down.shape == (16, layer.in_features)
    assert layer.lynx_up.shape == (layer.out_features, 16)
    single, double = model.single_transformer_blocks[0], model.transformer_blocks[0]
    assert single.attn.to_q.lynx_down is single.attn.to_v.lynx_down is single.proj_mlp.lynx_down
    assert double.attn.to_q.lynx_down is not double.ff.net[0].proj.lynx_down


@pytest.mark.parametrize("everything", [False, True])
def test_sparse_work_counts_every_block(everything):
    model, inputs = zoo.build("FluxTransformer2DModel")
    backend = backends.Backend("test", lynx=True, lora=True, everything=everything, options=EMULATED)
    with torch.no_grad():
        dense = model(**inputs, return_dict=False)[0]
        step.clear_report()
        with backends.switched_on(model, backend, 16, inputs):
            sparse = model(**inputs, return_dict=False)[0]
            work = step.sparse_work(model, inputs)
        again = model(**inputs, return_dict=False)[0]
    flops = {}
    tokens = {"transformer_blocks": 24, "single_transformer_blocks": 32}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            m = tokens.get(name.split(".")[0], 24)
            if any(word in name for word in ("add_", "context")):
                m = 8
            if "norm" in name or "time_text_embed" in name:
                m = 1
            flops[name] = 2 * m * module.weight.numel()
    chosen = [
        name
        for name in flops
        if "blocks" in name
        and (everything or not any(w in name for w in ("norm", "add_", "context", "to_out", "to_add")))
    ]
    share = sum(flops[name] for name in chosen) / sum(flops.values())
    assert work["sparse_flops_share"] == pytest.approx(share, abs=2e-4)
    shared = ("to_k", "to_v", "add_k_proj", "add_v_proj", "single_transformer_blocks.0.proj_mlp",
              "single_transformer_blocks.1.proj_mlp")  # read the X of to_q, add_q_proj, to_q  # fmt: skip
    moved = 0
    for name in (name for name in chosen if not name.endswith(shared)):
        n, k = model.get_submodule(name).weight.shape
        m = flops[name] // (2 * n * k)
        moved += 4 * m * k + 2 * m * k + m * k / 8 + 4 * m  # fp32: X, values, metadata, scale
    assert work["sparsify_gb"] == pytest.approx(moved / 1e9, abs=1e-4)
    assert step.sparsify_bytes(4096, 3072, 2) == 4096 * 3072 * 3.125 + 4 * 4096
    assert (sparse - dense).abs().max() > 1e-3 * dense.abs().max()
    torch.testing.assert_close(again, dense, rtol=0, atol=0)
    assert not any(isinstance(m, LynxLinear) for m in model.modules())


def test_text_rows_of_joint_sequences_are_counted_dense(monkeypatch):
    model, inputs = zoo.build("FluxTransformer2DModel")
    shares, rows = [], []
    monkeypatch.setattr(step, "sparsify_bytes", lambda m, k, itemsize: rows.append(m) or 0)
    for text_dense in (False, True):
        backend = backends.Backend(
            "test", lynx=True, lora=True, everything=True, text_dense=text_dense, options=EMULATED
        )
        step.clear_report()
        with torch.no_grad(), backends.switched_on(model, backend, 16, inputs):
            model(**inputs)
            shares.append(step.sparse_work(model, inputs))
    text, tokens, joint, total = 8, 32, 0, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            m = 1 if "norm" in name or "time_text_embed" in name else 24
            m = text if any(word in name for word in ("add_", "context")) and m > 1 else m
            m = tokens if name.startswith("single_") and m > 1 else m
            joint += 2 * m * module.weight.numel() * (m == tokens)
            total += 2 * m * module.weight.numel()
    everything, without_text = (work["sparse_flops_share"] for work in shares)
    assert everything - without_text == pytest.approx(joint * text / tokens / total, abs=2e-4)
    half = len(rows) // 2
    assert [m - text * (m == tokens) for m in rows[:half]] == rows[half:]


def test_text_behind_the_image_stays_dense():
    model, inputs = zoo.build("ZImageTransformer2DModel")
    backends.attach_random_branches(model, 16, inputs, text_dense=True)
    assert model.layers[0].attention.to_q.lynx_dense_tokens == -inputs["cap_feats"][0].shape[0]
    assert model.context_refiner[0].attention.to_q.lynx_dense_tokens == 0


def test_models_without_joint_text_are_named():
    model, inputs = zoo.build("QwenImageTransformer2DModel")
    with pytest.raises(RuntimeError, match="QwenImageTransformer2DModel is known to read text and image"):
        backends.attach_random_branches(model, 16, inputs, text_dense=True)


def test_paper_skips_name_layers_of_the_models():
    from lynx_compile.models import resolve
    from lynx_compile.policy import first_match

    for name in ("flux", "z-image"):
        model = resolve(name).build("meta")
        skips = backends.PAPER_SKIPS[type(model).__name__]
        linears = [path for path, m in model.named_modules() if isinstance(m, nn.Linear)]
        for skip in skips:
            assert sum(first_match(path, [skip]) is not None for path in linears) >= 30


def test_backends_stay_compiled_side_by_side(monkeypatch):
    small = {"num_attention_heads": 1, "joint_attention_dim": 64}
    known = models.KNOWN["flux"]
    monkeypatch.setitem(models.KNOWN, "flux", replace(known, config={**known.config, **small}))
    rivals = [
        backends.Backend("broken", inductor=True),
        backends.Backend("eager"),
        backends.Backend("sparse", lynx=True, lora=True, options=EMULATED),
        backends.Backend("everything", lynx=True, everything=True, options=EMULATED),
    ]
    monkeypatch.setattr(step, "BACKENDS", {backend.name: backend for backend in rivals})
    pictures, graphs, told, kept, tuned = [], [], [], [], []

    def first_call_s(model, inputs):
        tuned.append(torch._inductor.config.coordinate_descent_tuning)
        torch._inductor.config.coordinate_descent_tuning = True  # as torchao does
        if not told[-1].endswith("broken"):
            step.step(model, inputs)
            return 2.0
        raise RuntimeError("out of memory")

    def step_times(call, seconds):
        pictures.append(call()[0])
        graphs.append(step.compiled_graphs())
        return [10.0 + len(pictures)]

    monkeypatch.setattr(step, "steady", lambda model, inputs, others: {"host_ms": 1.0})
    monkeypatch.setattr(step, "first_call_s", first_call_s)
    monkeypatch.setattr(step, "step_times", step_times)
    rows = step.run(
        ["flux"], resolutions=[64], backends=[rival.name for rival in rivals], rank=16, device="cpu",
        blocks=1, warm=["everything"], progress=told.append, keep=lambda rows: kept.append(len(rows)),
    )  # fmt: skip
    assert "flux: broken has no figures: out of memory" in told
    assert [row["backend"] for row in rows] == ["eager", "sparse", "everything"]
    assert kept == [0, 1, 2, 3, 3, 3, 3]
    assert [*tuned, torch._inductor.config.coordinate_descent_tuning] == [False] * 5
    assert [row["lora_rank"] for row in rows] == [0, 16, 0]
    assert [row["step_ms"] for row in rows] == [18.0, 19.0, 20.0]  # medians of three rounds in turn
    assert [row["graphs"] for row in rows] == [0, 2, 2]
    assert [row["compile_s"] for row in rows] == [1.99, 1.99, None]
    dense, sparse, everything = (row["sparse_flops_share"] for row in rows)
    assert dense == 0
    assert 0.1 < sparse < everything
    first, rounds = pictures[:3], [pictures[i : i + 3] for i in (4, 7, 10)]  # before them the chip is heated
    for again in rounds:
        for a, b in zip(first, again, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0)
    assert (first[1] - first[0]).abs().max() > 0
    assert (first[2] - first[1]).abs().max() > 0
    assert graphs[-1] == graphs[2], "a round compiled something again"


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="'warp'; one of eager, inductor"):
        step.run(["flux"], backends=["warp"], device="meta")


def test_table_and_plot(tmp_path, capsys):
    from rich.console import Console

    rows = [
        {"model": "flux", "resolution": 1024, "batch": 1, "backend": backend, "lora_rank": rank,
         "step_ms": ms, "gemm_ms": ms * 0.7, "sparsify_ms": 1.0, "attention_ms": 20.0, "elementwise_ms": 5.0,
         "host_ms": 9.0, "compile_s": 12.0, "peak_gib": 23.5, "power_w": 690.0, "sparse_flops_share": 0.9}
        for backend, rank, ms in [("inductor", 0, 100.0), ("rt_lynx", 64, 80.0)]
    ]  # fmt: skip
    step.with_speedups(rows)
    assert [row["speedup_vs_inductor"] for row in rows] == [1.0, 1.25]
    step_report.show(rows, Console(width=200))
    printed = capsys.readouterr().out
    assert "1.250×" in printed
    assert "rt_lynx" in printed
    step_report.plot(rows, tmp_path / "bars.png", "a chip")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    assert json.dumps(rows)
