"""Flags for Megatron: on a small parser with Megatron's own names, and on the real one where it can be imported.

The wheels of megatron-core up to 0.16 hold no parser. `MEGATRON_WHEEL=folder` names an unzipped later one.
"""

from __future__ import annotations

import argparse
import sys
import types
import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    try:
        from megatron.training.arguments import parse_args as real_parse_args
    except ImportError:
        real_parse_args = None

import dmoe.integrations.megatron
from dmoe.integrations.megatron import (
    add_moe_args,
    current_options,
    moe_config,
    options_from_args,
    training_loop,
)
from dmoe.integrations.megatron.translate import OPTIONS

SPEC = ["dmoe.integrations.megatron", "dmoe_gpt_spec"]


def stand_in(parser):
    """Megatron's own flags as far as they matter here, with its destinations and defaults."""
    parser.add_argument("--num-experts", type=int, default=None)
    parser.add_argument("--moe-router-topk", type=int, default=2)
    parser.add_argument("--moe-router-pre-softmax", action="store_true")
    parser.add_argument("--moe-aux-loss-coeff", type=float, nargs="+", default=0.0)
    parser.add_argument("--moe-z-loss-coeff", type=float, default=None)
    parser.add_argument("--moe-input-jitter-eps", type=float, default=None)
    parser.add_argument("--moe-expert-capacity-factor", type=float, default=None)
    parser.add_argument("--moe-token-dispatcher-type", default="allgather")
    parser.add_argument("--expert-model-parallel-size", type=int, default=1)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--context-parallel-size", type=int, default=1)
    parser.add_argument("--use-checkpoint-args", action="store_true")
    parser.add_argument("--spec", nargs="*", default=None)
    parser.add_argument("--mtp-num-layers", type=int, default=None)
    parser.add_argument("--heterogeneous-layers-config-path", type=str, default=None)
    parser.add_argument("--moe-use-upcycling", action="store_true")
    parser.add_argument("--optimizer", default="adam")
    return parser


def _parse_stand_in(provider, words):
    parser = stand_in(argparse.ArgumentParser(allow_abbrev=False))
    return (provider(parser) if provider else parser).parse_args(words)


def _parse_real(provider, words):
    before, sys.argv = sys.argv, ["pretrain_gpt.py", *words]
    try:
        return real_parse_args(extra_args_provider=provider)
    finally:
        sys.argv = before


PARSERS = {"stand-in": _parse_stand_in} | ({"megatron": _parse_real} if real_parse_args else {})


@pytest.mark.skipif(real_parse_args is None, reason="this megatron-core has no megatron.training, and so no parser")
def test_the_real_parser_is_tried_as_well():
    assert list(PARSERS) == ["stand-in", "megatron"]


@pytest.fixture(params=PARSERS.values(), ids=PARSERS)
def parse(request):
    """``parse(words)``: what a run with the provider reads; ``provider=None`` is Megatron alone."""

    def run(*words, provider=add_moe_args):
        return vars(request.param(provider, list(words)))

    return run


@pytest.fixture
def refused(parse, capsys):
    """The sentence after which the program ends with status 2."""

    def run(*words, **how):
        with pytest.raises(SystemExit) as end:
            parse(*words, **how)
        assert end.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run


def _shared(args, own):
    """What Megatron itself reads; the scripts' own flags are not its business."""
    return {name: value for name, value in args.items() if name in own}


def test_without_flags_megatron_reads_what_it_reads_alone(parse):
    own = parse(provider=None)
    args = parse()
    assert _shared(args, own) == own
    assert args["moe_impl"] == "dmoe"
    assert args["spec"] is None, "a dense model keeps its layers"


def test_the_forks_names_write_to_megatrons_destinations(parse):
    pairs = {
        "--moe-num-experts": ("--num-experts", "8"),
        "--moe-top-k": ("--moe-router-topk", "4"),
        "--moe-loss-weight": ("--moe-aux-loss-coeff", "0.1"),
        "--moe-zloss-weight": ("--moe-z-loss-coeff", "0.001"),
        "--moe-jitter-eps": ("--moe-input-jitter-eps", "0.01"),
        "--moe-capacity-factor": ("--moe-expert-capacity-factor", "1.5"),
    }
    fork = parse(*(word for flag, (_, value) in pairs.items() for word in (flag, value)))
    native = parse(*(word for flag, value in pairs.values() for word in (flag, value)))
    assert native["num_experts"] == 8
    assert native["moe_router_topk"] == 4
    native["moe_aux_loss_coeff"] = native["moe_aux_loss_coeff"][0]  # Megatron itself takes it out of its list later
    assert fork == native


def test_each_name_of_the_fork_alone(parse):
    own = parse("--num-experts", "8")
    for flag, dest, value in (
        ("--moe-top-k", "moe_router_topk", 3),
        ("--moe-loss-weight", "moe_aux_loss_coeff", 0.25),
        ("--moe-zloss-weight", "moe_z_loss_coeff", 0.5),
        ("--moe-jitter-eps", "moe_input_jitter_eps", 0.125),
        ("--moe-capacity-factor", "moe_expert_capacity_factor", 2.0),
    ):
        args = parse("--num-experts", "8", flag, str(value))
        assert {name for name in args if args[name] != own[name]} == {dest}
        assert args[dest] == value


def test_a_capacity_of_zero_is_dropless(parse, refused):
    assert parse("--num-experts", "8", "--moe-capacity-factor", "0")["moe_expert_capacity_factor"] is None
    assert "at least 0 (0: dropless), got -1" in refused("--num-experts", "8", "--moe-capacity-factor", "-1")
    assert "invalid number value: 'much'" in refused("--num-experts", "8", "--moe-capacity-factor", "much")


def test_one_expert_per_token_is_weighed_by_its_softmax_over_all(parse):
    assert parse("--moe-num-experts", "8", "--moe-top-k", "1")["moe_router_pre_softmax"]
    assert not parse("--moe-num-experts", "8", "--moe-top-k", "2")["moe_router_pre_softmax"]


@pytest.mark.parametrize("experts", [["--moe-num-experts", "8"], ["--num-experts", "8"], ["--use-checkpoint-args"]])
def test_experts_are_dmoes_unless_megatrons_are_asked_for(parse, experts):
    """A checkpoint's arguments may bring experts along after parsing."""
    args = parse(*experts)
    assert (args["moe_impl"], args["spec"]) == ("dmoe", SPEC)
    assert args["moe_token_dispatcher_type"] == "alltoall"
    for words in (["--moe-impl", "megatron"], ["--moe-use-megatron-switch"]):
        args = parse(*experts, *words)
        assert (args["moe_impl"], args["spec"]) == ("megatron", None)
        assert args["moe_token_dispatcher_type"] == "allgather"


def test_a_spec_of_ones_own(parse, refused):
    experts_alone = ["dmoe.integrations.megatron", "dmoe_experts_spec"]
    assert parse("--num-experts", "8", "--spec", *experts_alone)["spec"] == experts_alone
    assert parse("--spec", "mine", "spec")["spec"] == ["mine", "spec"], "a dense model may have any"
    args = parse("--num-experts", "8", "--spec", "mine", "spec", "--moe-impl", "megatron")
    assert args["spec"] == ["mine", "spec"]
    for words in (["--spec", "mine", "spec", "--moe-impl", "dmoe"], ["--moe-impl", "dmoe", "--spec", "mine", "spec"]):
        assert "--spec mine spec and --moe-impl dmoe (its default) both choose" in refused("--num-experts", "8", *words)
    assert "names dmoe's layer" in refused("--num-experts", "8", "--spec", *SPEC, "--moe-impl", "megatron")
    assert "--moe-use-megatron-switch" in refused("--moe-use-megatron-switch", "--moe-impl", "dmoe")


@pytest.mark.parametrize(
    ("world", "sizes", "experts", "expected"),
    [(8, [], 16, 8), (8, [], 4, 4), (6, [], 8, 2), (8, ["--tensor-model-parallel-size", "2"], 16, 4), (1, [], 8, 1)],
)
def test_expert_parallelism_of_the_fork(parse, monkeypatch, world, sizes, experts, expected):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    args = parse("--moe-num-experts", str(experts), "--moe-expert-model-parallelism", *sizes)
    assert args["expert_model_parallel_size"] == expected


def test_expert_parallelism_said_twice(parse, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    words = ["--moe-num-experts", "8", "--moe-expert-model-parallelism", "--expert-model-parallel-size"]
    assert parse(*words, "8")["expert_model_parallel_size"] == 8
    message = refused(*words, "4")
    assert "makes --expert-model-parallel-size 8 of 8 data-parallel ranks" in message
    assert "4 was given" in message
    assert "expected --moe-num-experts beside it" in refused("--moe-expert-model-parallelism")


GIVEN = {
    "activation": ("gelu_tanh",),
    "backend": ("grouped",),
    "bias": ("output",),
    "drop_order": ("choice_major",),
    "max_rows_received": ("4096",),
    "min_capacity": ("4",),
    "overlap_degree": ("2",),
    "recompute_pre_activation": (),
    "wire_backward": (),
    "wire_dtype": ("fp8",),
}


def _flag(option):
    return "--moe-dmoe-" + option.replace("_", "-")


def test_options_that_megatron_has_no_name_for(parse):
    assert set(GIVEN) == set(OPTIONS)
    base = parse("--num-experts", "8")
    assert options_from_args(argparse.Namespace(**base)) == {}
    found = {}
    for option, values in GIVEN.items():
        args = parse("--num-experts", "8", _flag(option), *values)
        found |= (given := options_from_args(argparse.Namespace(**args)))
        assert list(given) == [option]
    assert found == {
        name: {"max_rows_received": 4096, "min_capacity": 4, "overlap_degree": 2}.get(name, (*values, True)[0])
        for name, values in GIVEN.items()
    }
    config = moe_config(_transformer_config(moe_expert_capacity_factor=1.0), found)
    assert all(getattr(config, name) == value for name, value in found.items())


def test_options_are_refused_where_they_would_do_nothing(refused):
    flag, values = _flag("overlap_degree"), GIVEN["overlap_degree"]
    assert f"{flag}: expected --moe-num-experts beside it" in refused(flag, *values)
    message = refused("--num-experts", "8", "--moe-impl", "megatron", flag, *values)
    assert message.endswith(f"{flag}: expected --moe-impl dmoe, got megatron")


def _transformer_config(**fields):
    from megatron.core.transformer.transformer_config import TransformerConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TransformerConfig(
            num_layers=1,
            hidden_size=8,
            num_attention_heads=1,
            num_moe_experts=8,
            moe_ffn_hidden_size=8,
            add_bias_linear=False,
            moe_token_dispatcher_type="alltoall",
            **fields,
        )


def test_aliases_name_what_a_transformer_config_has():
    """The stand-in's destinations are fields of the real one, so that Megatron copies them."""
    args = _parse_stand_in(
        add_moe_args,
        ["--moe-num-experts", "8", "--moe-top-k", "1", "--moe-zloss-weight", "0.5", "--moe-jitter-eps", "0.25"],
    )
    config = _transformer_config(
        **{name: value for name, value in vars(args).items() if name.startswith("moe_router") or "_eps" in name},
        moe_z_loss_coeff=args.moe_z_loss_coeff,
    )
    found = moe_config(config)
    assert (found.top_k, found.softmax_order, found.input_jitter) == (1, "before_topk", 0.25)
    assert found.router_z_loss_coefficient == 0.5


def test_a_flag_that_megatron_has_itself_stays_its_own(parse):
    def later(parser):
        parser.add_argument("--moe-top-k", type=str, dest="something_else", default="unset")
        return add_moe_args(parser)

    args = parse("--moe-num-experts", "8", "--moe-top-k", "many", provider=later)
    assert (args["something_else"], args["moe_router_topk"], args["spec"]) == ("many", 2, SPEC)


def test_another_provider_may_follow(parse):
    def silent(parser):
        parser.add_argument("--mine", type=int, default=1)

    def speaking(parser):
        silent(parser)
        return parser

    for then in (silent, speaking):
        args = parse(
            "--moe-num-experts", "8", "--mine", "5", provider=lambda parser, then=then: add_moe_args(parser, then)
        )
        assert (args["mine"], args["num_experts"], args["spec"]) == (5, 8, SPEC)


UNCARRIED = {
    ("--mtp-num-layers", "1"): "with experts of its own, or not at all; build the model from dmoe_block_spec(config)",
    ("--heterogeneous-layers-config-path", "x.json"): "a layer does not see what the others are like; leave out --spec",
    ("--moe-use-upcycling",): "do that with --moe-impl megatron and --ckpt-format torch_dist",
    ("--optimizer", "muon"): "which would be left to Adam; choose adam or sgd",
}


@pytest.mark.parametrize("words", UNCARRIED, ids=lambda words: words[0])
def test_what_goes_with_no_spec_of_dmoes_is_refused(parse, refused, words):
    told = refused("--num-experts", "8", *words)
    assert f"dmoe.integrations.megatron: {words[0]} ({words[0][2:].replace('-', '_')}=" in told
    assert UNCARRIED[words] in told
    assert parse("--num-experts", "8", *words, "--moe-impl", "megatron")["spec"] is None
    assert parse(*words)["spec"] is None, "a dense model may have it"
    assert parse("--spec", *SPEC, "--optimizer", "muon")["spec"] == SPEC, "so may one whose layers are looked up here"


@pytest.mark.parametrize("name", ["dmoe_gpt_spec", "dmoe_block_spec", "dmoe_experts_spec"])
@pytest.mark.parametrize("words", UNCARRIED, ids=lambda words: words[0])
def test_it_is_refused_without_dmoes_flags_where_megatron_looks_the_spec_up(monkeypatch, words, name):
    """0.16 fails on some of it with an UnboundLocalError, before any layer is built."""
    module = dmoe.integrations.megatron
    parser = stand_in(argparse.ArgumentParser())
    args = parser.parse_args(["--num-experts", "8", "--spec", module.__name__, name, *words])
    monkeypatch.setitem(sys.modules, "megatron.training", types.SimpleNamespace(get_args=lambda: args))
    monkeypatch.delitem(vars(module), name, raising=False)
    with pytest.raises(ValueError, match=words[0]):
        __import__(module.__name__, {}, {}, [name])
    args.spec = ["mine", "spec"]  # the script has its own way to a model
    training_loop.refuse_uncarried_args(args)


def test_unknown_words_can_still_be_left_over():
    parser = add_moe_args(stand_in(argparse.ArgumentParser()))
    args, rest = parser.parse_known_args(["--moe-num-experts", "8", "--other"])
    assert (args.spec, rest) == (SPEC, ["--other"])


def test_options_of_the_running_loop(monkeypatch):
    monkeypatch.delitem(sys.modules, "megatron.training", raising=False)
    assert current_options() == {}

    def nothing_parsed():
        raise AssertionError("args is not initialized.")

    monkeypatch.setitem(sys.modules, "megatron.training", types.SimpleNamespace(get_args=nothing_parsed))
    assert current_options() == {}
    args = _parse_stand_in(add_moe_args, ["--num-experts", "8", "--moe-dmoe-wire-dtype", "int8"])
    monkeypatch.setitem(sys.modules, "megatron.training", types.SimpleNamespace(get_args=lambda: args))
    assert current_options() == {"wire_dtype": "int8"}
