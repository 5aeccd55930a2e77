"""A whole FLUX pipeline in miniature on the real kernels, and everything users do to one."""

import gc
import importlib
import logging
import resource

import pytest
import torch

import lynx_compile
from lynx_compile.bench.backends import attach_random_branches

diffusers = pytest.importorskip("diffusers")
zoo = importlib.import_module("tests.zoo")
grid_ids = zoo.registry.grid_ids

DEVICE = "cuda"
CONFIG = {
    "num_attention_heads": 4, "attention_head_dim": 64, "axes_dims_rope": (16, 24, 24),
    "joint_attention_dim": 64, "pooled_projection_dim": 64,
}  # fmt: skip
TARGETS = ["attn.to_q", "attn.to_v", "ff.net.2", "proj_out"]
SPARSE = {"strict": True, "min_tokens": 0, "only": ["*transformer_blocks.*"]}
EAGER = {**SPARSE, "rest": "eager"}
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _fresh():
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch._dynamo.reset()
    lynx_compile.clear_report()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.no_grad():
        yield
    torch._dynamo.reset()


def transformer(dtype=torch.bfloat16):
    return torch.nn.Module.to(zoo.build("FluxTransformer2DModel", dtype, **CONFIG)[0], DEVICE)


def inputs_of(dtype=torch.bfloat16):
    inputs = zoo.build("FluxTransformer2DModel", dtype, **CONFIG)[1]
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def with_branches(model):
    attach_random_branches(model, 16, inputs_of(model.dtype))


def pipeline(dtype=torch.bfloat16):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=4, sample_size=64,
        shift_factor=0.1, scaling_factor=0.4,
    )  # fmt: skip
    pipe = diffusers.FluxPipeline(
        transformer=transformer(dtype), vae=vae.to(DEVICE, dtype).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeddings(count, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    wide, pooled = (
        torch.randn(count, 24, 64, generator=generator),
        torch.randn(count, 64, generator=generator),
    )
    return wide.to(DEVICE, dtype), pooled.to(DEVICE, dtype)


def picture(pipe, *, size=64, prompts=1, guided=False, steps=2, output="latent"):
    dtype = pipe.transformer.dtype
    wide, pooled = embeddings(prompts, dtype, 1)
    call = {"prompt_embeds": wide, "pooled_prompt_embeds": pooled}
    if guided:
        wide, pooled = embeddings(prompts, dtype, 2)
        call |= {
            "negative_prompt_embeds": wide,
            "negative_pooled_prompt_embeds": pooled,
            "true_cfg_scale": 3.0,
        }
    image = pipe(
        **call, height=size, width=size, num_inference_steps=steps, output_type=output,
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    return image.float() if output == "latent" else image


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


def off(pipe):
    for module in pipe.transformer.modules():
        module._compiled_call_impl = None


def compare(pipe, again=lambda: None, **call):
    """Kernels against the emulation of the same layers, and both against dense. again: after each compile."""
    pictures = []
    for options in (None, {"emulate": True}, {"emulate": False}):
        off(pipe)
        torch._dynamo.reset()
        lynx_compile.clear_report()
        if options is not None:
            lynx_compile.compile_blocks(pipe.transformer, **EAGER, **options)
        again()
        pictures.append(picture(pipe, **call))
    dense, emulated, kernels = pictures
    moved, error = apart(emulated, dense), apart(kernels, emulated)
    assert moved > 1e-3, "nothing ran sparse"
    assert error < max(0.3 * moved, 2e-2), (
        f"kernels are {error:.4f} from the emulation, which moved {moved:.4f}"
    )
    assert sum(row.decision == "sparse" for row in lynx_compile.report().rows) >= 8
    assert not lynx_compile.report().notes
    return kernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lora", [False, True])
def test_a_picture(dtype, lora):
    pipe = pipeline(dtype)
    if lora:
        with_branches(pipe.transformer)
    assert compare(pipe).isfinite().all()


def test_guidance_and_batches():
    pipe = pipeline()
    guided = compare(pipe, prompts=2, guided=True)
    assert guided.shape[0] == 2
    assert apart(guided, picture(pipe, prompts=2)) > 1e-2


def styles(folder):
    """Two adapters of users on disk."""
    peft = pytest.importorskip("peft")
    from peft.utils import get_peft_model_state_dict

    for seed, (name, rank) in enumerate([("fox", 16), ("owl", 8)]):
        model = transformer()
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False)
        model.add_adapter(config, adapter_name=name)
        layers = get_peft_model_state_dict(model, adapter_name=name)
        diffusers.FluxPipeline.save_lora_weights(folder / name, transformer_lora_layers=layers)


def test_users_adapters_load_scale_and_unload(tmp_path):
    styles(tmp_path)
    pipe = pipeline()
    plain = compare(pipe)
    pipe.load_lora_weights(tmp_path / "fox", adapter_name="fox")
    full = compare(pipe)
    pipe.set_adapters(["fox"], [0.5])
    half = compare(pipe)
    pipe.load_lora_weights(tmp_path / "owl", adapter_name="owl")
    pipe.set_adapters(["fox", "owl"], [0.5, 0.5])
    both = compare(pipe)
    pipe.unload_lora_weights()
    assert apart(picture(pipe), plain) < 1e-3
    for a, b in [(full, plain), (half, full), (half, plain), (both, half)]:
        assert apart(a, b) > 1e-2


def test_adapters_hot_swap_without_compiling(tmp_path):
    styles(tmp_path)
    pipe = pipeline()
    pipe.enable_lora_hotswap(target_rank=16)
    pipe.load_lora_weights(tmp_path / "fox", adapter_name="style")
    lynx_compile.compile_blocks(pipe.transformer, **EAGER)
    fox = picture(pipe)
    graphs = len(lynx_compile.report().graphs)
    pipe.load_lora_weights(tmp_path / "owl", adapter_name="style", hotswap=True)
    owl = picture(pipe)
    assert len(lynx_compile.report().graphs) == graphs
    assert apart(owl, fox) > 1e-2
    assert apart(compare(pipe), owl) < 1e-3


def test_model_offloading():
    pytest.importorskip("accelerate")
    pipe = pipeline()
    expected = compare(pipe)
    pipe.enable_model_cpu_offload(device=DEVICE)
    assert apart(picture(pipe), expected) < 1e-3
    assert next(pipe.transformer.parameters()).device.type == "cpu" or DEVICE == "cpu"


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading(kind):
    pipe = pipeline()
    with_branches(pipe.transformer)
    expected = compare(pipe)
    off(pipe)
    torch._dynamo.reset()
    pipe.transformer.enable_group_offload(
        onload_device=torch.device(DEVICE),
        offload_device=torch.device("cpu"),
        offload_type=kind,
        use_stream=DEVICE == "cuda",
        **({"num_blocks_per_group": 1} if kind == "block_level" else {}),
    )
    lynx_compile.compile_blocks(pipe.transformer, **EAGER)
    with torch._dynamo.config.patch(recompile_limit=1000):  # hooks on leaves: as diffusers advises
        found = picture(pipe)
    # hooks on leaves break the graphs, so that nothing is fused and bf16 rounds elsewhere
    assert apart(found, expected) < (1e-3 if kind == "block_level" else 1e-2)
    weight = pipe.transformer.transformer_blocks[0].ff.net[2].weight
    assert weight.device.type == "cpu", "the weights were not offloaded"


def test_tiled_decoding_is_untouched():
    pipe = pipeline()
    pipe.vae.enable_tiling()
    lynx_compile.compile_blocks(pipe.transformer, **EAGER)
    decoded = []
    decode = pipe.vae.decode

    def spied(latents, **options):
        decoded.append((latents, decode(latents, **options)[0]))
        return (decoded[-1][1],)

    pipe.vae.decode = spied
    image = picture(pipe, size=192, output="pt")
    latents, pixels = decoded[0]
    assert image.shape[-2:] == (192, 192)
    fresh = diffusers.AutoencoderKL.from_config(pipe.vae.config).to(DEVICE, pipe.vae.dtype).eval()
    fresh.load_state_dict(pipe.vae.state_dict())
    fresh.enable_tiling()
    torch.testing.assert_close(pixels, fresh.decode(latents)[0], rtol=0, atol=0)
    assert all(module._compiled_call_impl is None for module in pipe.vae.modules())


def one_step(model, height, width, batch):
    def noise(*shape):
        return torch.randn(*shape, device=DEVICE, dtype=model.dtype)

    return model(
        hidden_states=noise(batch, height * width, 16), encoder_hidden_states=noise(batch, 24, 64),
        pooled_projections=noise(batch, 64), timestep=noise(batch), guidance=noise(batch),
        img_ids=grid_ids(height, width).to(DEVICE), txt_ids=torch.zeros(24, 3, device=DEVICE),
    )  # fmt: skip


@pytest.fixture
def undisturbed():
    """Inductor as users have it: no filling of fresh memory."""
    torch.use_deterministic_algorithms(False)


def test_whole_model_by_blocks_and_cuda_graphs_agree(undisturbed):
    pipe = pipeline(torch.float16)  # rounds finer than bf16, so that other fusions change less
    with_branches(pipe.transformer)
    dense = picture(pipe, steps=3)
    lynx_compile.compile_blocks(pipe.transformer, fullgraph=True, **SPARSE)
    by_blocks = picture(pipe, steps=3)
    off(pipe)
    pipe.transformer.compile(backend="rt_lynx", fullgraph=True, options=SPARSE)
    whole = picture(pipe, steps=3)
    off(pipe)
    pipe.transformer.compile(backend="rt_lynx", fullgraph=True, options={**SPARSE, "mode": "reduce-overhead"})
    captured = [picture(pipe, steps=6), picture(pipe, steps=3)]
    moved = apart(by_blocks, dense)
    assert moved > 1e-3
    assert apart(whole, by_blocks) < 0.5 * moved
    assert apart(captured[1], whole) < 1e-3
    assert not lynx_compile.report().notes


def test_cuda_graphs_by_blocks(undisturbed):
    pipe = pipeline()
    model, inputs, pictures = pipe.transformer, inputs_of(), []
    for options in ({}, {"mode": "reduce-overhead"}):
        off(pipe)
        lynx_compile.compile_blocks(model, fullgraph=True, **SPARSE, **options)
        for _ in range(4):
            found = model(**inputs)[0].clone()
        pictures.append(found.float())
    assert apart(pictures[1], pictures[0]) < 1e-3
    assert apart(picture(pipe, guided=True), picture(pipe, guided=True)) < 1e-6


@torch._dynamo.config.patch(recompile_limit=32)  # so that a failure says how many graphs there were
def test_a_thousand_steps_of_many_shapes_need_no_more_memory(undisturbed):
    model = transformer()
    with_branches(model)
    lynx_compile.compile_blocks(
        model, fullgraph=True, dynamic=True, **EAGER
    )  # Inductor adds guards of its own
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (height, width, batch) for height in range(4, 20, 2) for width in (4, 8, 20) for batch in (1, 2, 3)
    ]
    graphs = used = held = None
    for step in range(1000):
        height, width, batch = shapes[int(torch.randint(len(shapes), (1,), generator=generator))]
        one_step(model, height, width, batch)
        if step == 300:
            gc.collect()
            graphs = len(lynx_compile.report().graphs)
            used = torch.cuda.memory_allocated()
            held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gc.collect()
    # two kinds of block, one sample or several, the text a view (first blocks) or contiguous (the others)
    assert graphs <= 2 * 2 * 2
    assert len(lynx_compile.report().graphs) == graphs
    assert torch.cuda.memory_allocated() <= used
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 32 * 1024, "KiB of the host's memory"
