"""Settings, presets, and the arithmetic of size and cost."""

import dataclasses

import pytest
from tiny import PRESETS, tiny

from mixlab.errors import UserError
from mixlab.model.config import config_problems
from mixlab.model.presets import GPT2_SIZES, LLAMA_SIZES, OLMO2_SIZES, gpt2, llama, olmo2
from mixlab.model.size import flops_per_token, parameter_count


@pytest.mark.parametrize(
    "config, count",
    [
        (olmo2("1B"), 1_484_916_736),  # the OLMo 2 models, padded to 100,352 rows
        (olmo2("7B"), 7_298_617_344),
        (olmo2("13B"), 13_716_198_400),
        (olmo2("32B"), 32_234_279_936),
        (gpt2("124M", vocab_multiple=1), 124_439_808),  # the GPT-2 checkpoints
        (gpt2("355M", vocab_multiple=1), 354_823_168),
        (gpt2("774M", vocab_multiple=1), 774_030_080),
        (gpt2("1558M", vocab_multiple=1), 1_557_611_200),
        (llama("7B"), 6_738_415_616),  # Llama 2 7B and 13B, Llama 3 8B
        (llama("13B"), 13_015_864_320),
        (llama("8B", vocab_size=128_256), 8_030_261_248),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_published_parameter_counts(config, count):
    assert parameter_count(config) == count


def test_every_named_size_is_sound():
    for preset, sizes in ((gpt2, GPT2_SIZES), (llama, LLAMA_SIZES), (olmo2, OLMO2_SIZES)):
        for name in sizes:
            assert config_problems(preset(name)) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_flops_of_a_small_model_by_hand(preset):
    config = tiny(preset)
    # d_model 32; query and output 32 x 32; key and value 32 x 32 (GPT-2) or 32 x 16; MLP of width 40
    matrices = {"gpt2": 4 * 1024 + 2 * 1280, "llama": 3 * 1024 + 3 * 1280, "olmo2": 3 * 1024 + 3 * 1280}[preset]
    forward = 2 * (2 * matrices + 32 * 61)
    # 16 tokens: two products of 32 multiply-adds with each of 8 keys on average, in two layers
    forward += 2 * 2 * 2 * 32 * 8
    assert flops_per_token(config, 16) == 3 * forward


def test_overrides_and_derived_widths():
    config = olmo2("190M", vocab_size=8192, context_length=512)
    assert (config.vocab_size, config.context_length, config.layers, config.head_dim) == (8192, 512, 12, 64)
    config = llama(layers=6, d_model=384, heads=6)
    assert (config.kv_heads, config.head_dim, config.ffn_width) == (6, 64, 1024)
    assert gpt2(layers=6, d_model=384, heads=6).ffn_width == 1536
    assert llama(layers=1, d_model=384, heads=6, vocab_size=129).padded_vocab_size == 256


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: olmo2("2B"), r"model\.size = '2B': olmo2 has the sizes 30M, .*32B"),
        (lambda: gpt2("124M", head=3), r"model\.head does not exist; did you mean model\.heads\?"),
        (lambda: gpt2(layers=2, heads=2), r"model\.d_model is not set: gpt2 needs a size"),
        (lambda: llama(layers=2, d_model=32, heads=5), r"model\.heads = 5 must divide model\.d_model = 32"),
        (
            lambda: llama(layers=2, d_model="32", heads=4),
            r"model\.d_model = '32' must be an int of at least 1",
        ),
        (lambda: llama(layers=2, d_model=32, heads=0), r"model\.heads = 0 must be an int of at least 1"),
    ],
)
def test_mistakes_name_the_key(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(kv_heads=3), "model.kv_heads = 3 must divide model.heads = 4"),
        (dict(head_dim=7), "model.head_dim = 7 must be even for rotary positions"),
        (dict(norm="batch"), "model.norm = 'batch' must be one of 'rms', 'layer'"),
        (dict(remat=True), "model.remat = True must be one of 'none', 'dots', 'full'"),
        (dict(layers=True), "model.layers = True must be of type int"),
        (dict(layers=2.0), "model.layers = 2.0 must be of type int"),
        (dict(tied_head=1), "model.tied_head = 1 must be of type bool"),
        (dict(init_cutoff="3"), "model.init_cutoff = '3' must be of type float | None"),
        (dict(init_cutoff=0), "model.init_cutoff = 0 must be positive, or None"),
        (dict(norm_eps=0.0), "model.norm_eps = 0.0 must be positive"),
    ],
)
def test_each_problem_is_found(change, message):
    config = dataclasses.replace(tiny("llama"), **change)
    assert config_problems(config) == [message]


def test_all_problems_are_told_at_once():
    config = dataclasses.replace(tiny("llama"), kv_heads=3, d_model=0, rope_base=-1.0)
    assert [problem.split(" = ")[0] for problem in config_problems(config)] == [
        "model.d_model",
        "model.rope_base",
        "model.kv_heads",
    ]
