"""Layers that were pruned one by one (Llama-Nemotron): what a block's config means, what is refused, models through real ranks."""

import copy
import json

import pytest
from shardproof import fixtures
from shardproof.bridges.errors import ConfigError, PlanError
from shardproof.bridges.families import find_family
from shardproof.bridges.plan import ParallelPlan
from shardproof.conformance.cases import Case
from shardproof.conformance.checks import CHECKS
from shardproof.conformance.lab import Lab
from shardproof.toy_models import toy_config
from test_engine_experts import LOCAL, WHOLE, Toy

SUPER, ULTRA = "nvidia/Llama-3_3-Nemotron-Super-49B-v1", "nvidia/Llama-3_1-Nemotron-Ultra-253B-v1"


def toy(geometry="pruned"):
    return toy_config(fixtures.published(SUPER), geometry)


def architecture(config):
    return find_family(config).architecture(config)


@pytest.mark.parametrize("variant, count", [(SUPER, 49_867_145_216), (ULTRA, 253_401_268_224)])
def test_a_published_model_has_its_parameters(variant, count):
    """Widths rounded up to 256, blocks and whole layers that are absent: the sum is the advertised one."""
    assert architecture(fixtures.published(variant)).parameters() == count


def test_what_each_layer_has():
    """Settings by layer, and names of what is there: no norm without its block."""
    found = architecture(toy())
    v = found.settings
    assert v["attention_kind_by_layer"] == [None, None, "none", "linear", "none"]
    assert v["mlp_kind_by_layer"] == [None, None, "none", None, "linear"]
    assert v["num_query_groups_by_layer"][:2] == [2, 4] and v["num_query_groups"] == 4
    assert v["ffn_hidden_size_by_layer"] == [256, 768, 1280, 1280, 1280]
    layers = {
        n: {s.name.split(".", 3)[3] for s in found.hf_sources() if s.name.startswith(f"model.layers.{n}.")} for n in range(5)
    }
    assert layers[2] == set()
    assert {n for n in layers[3] if "mlp" not in n} == {
        "input_layernorm.weight",
        "self_attn.linear_attn.weight",
        "post_attention_layernorm.weight",
    }
    assert layers[4] == {"post_attention_layernorm.weight", "mlp.linear_mlp.weight"}


def test_the_way_back_says_the_same():
    """What is written for a model without a source's config is read as the same settings."""
    found = architecture(toy())
    assert find_family(toy()).rules.read(found.family.rules.write(found.settings, {})) == {
        key: value for key, value in found.settings.items() if key not in found.family.fixed
    }


@pytest.mark.parametrize(
    "part, fields, named",
    [
        ("attention", {"n_heads_in_group": 3}, r"block_configs\[0\].attention.n_heads_in_group"),
        ("attention", {"n_heads_in_group": None}, "n_heads_in_group"),
        ("attention", {"window_length": 5}, "window_length"),
        ("attention", {"num_sink_tokens": 4}, "num_sink_tokens"),
        ("attention", {"sparsify": ["q"]}, "sparsify"),
        ("attention", {"no_op": True, "replace_with_linear": True}, "replace_with_linear"),
        ("attention", {"no_op": 1}, "no_op"),
        ("attention", {"heads": 3}, "heads"),
        ("ffn", {"ffn_mult": -1.0}, "ffn_mult"),
        ("ffn", {"ffn_mult": "5"}, "ffn_mult"),
        ("ffn", {"intermediate_size": 512}, "intermediate_size"),
    ],
)
def test_blocks_that_mean_nothing_are_refused(part, fields, named):
    """One clear error names layer and field."""
    config = copy.deepcopy(toy("default"))
    config["block_configs"][0][part] |= fields
    with pytest.raises(ConfigError, match=named):
        architecture(config)


@pytest.mark.parametrize("blocks", [None, 3, [{}] * 5, [{"attention": {}}] * 5, []])
def test_lists_that_are_none_are_refused(blocks):
    """Anything but an object with attention and ffn for each layer."""
    with pytest.raises(ConfigError, match="block_configs"):
        architecture(toy("default") | {"block_configs": blocks})


def test_a_plan_is_asked_of_every_layer():
    """The narrowest groups decide, wherever their layer is."""
    found = architecture(toy())
    with pytest.raises(PlanError, match="3"):
        found.check(ParallelPlan.parse("tp3"))


def test_a_width_that_no_file_can_say_is_refused():
    """config.json has multiples of 256 alone."""
    found = architecture(toy())
    with pytest.raises(ConfigError, match="256"):
        found.family.rules.write({**found.settings, "ffn_hidden_size_by_layer": [100] * 5}, {})


PRUNED = Toy("pruned", SUPER, json.dumps({"block_configs": toy()["block_configs"]}))


@pytest.fixture(scope="module")
def lab():
    with_local = Lab(LOCAL, "test_engine_pruned:LOCAL")
    yield with_local
    with_local.close()


@pytest.mark.parametrize("plan", ["tp2", "pp2,split2-3", "pp3,split2-1-2"])
def test_pruned_layers_of_the_local_spec(lab, plan):
    """The suite's own laws hold in megatron-core's local layer spec too, where norms stand alone; and where a stage has a layer that is gone and
    no other, hence no parameter."""
    for check in WHOLE:
        CHECKS[check].run(lab, Case("llama_nemotron", PRUNED, plan, "fp32", CHECKS[check].direction, check))
