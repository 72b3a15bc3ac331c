"""Model types: what is read of each, what its own class computes of a plan, and which no plan extends."""

import copy
import json
import re
import sys

import pytest
import torch
import transformers
from conftest import llama_config
from helpers.model_families import SMALL
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import rope_dist
from rope_dist import stock_rotary
from rope_dist.layer_types import ROTATES_WINDOWS_ONLY, extended_layers
from rope_dist.model_config import load_config, read_rope
from rope_dist.strategies import STILL, STRATEGIES

VERSION = tuple(int(n) for n in transformers.__version__.split(".")[:2])


class TestPairsThatDoNotRotate:
    """Gemma 4 rotates the first quarter of the pairs of a head of 512, by the frequencies of the whole head."""

    def config(self):
        config = getattr(transformers, "Gemma4TextConfig", lambda: None)()
        if not getattr(config, "is_heterogeneous", False):
            pytest.skip(f"transformers {transformers.__version__} has no head_dim per layer type")
        return config

    def test_they_stay_still(self, tmp_path):
        config = self.config()
        trained = 1e6 ** (-torch.arange(0, 512, 2, dtype=torch.float64) / 512)
        trained[64:] = 0
        made = rope_dist.plan(config, factor=2, strategy="pi")
        assert (made.head_dim, made.rotary_dim) == (512, 512)
        torch.testing.assert_close(made.inv_freq.double(), trained / 2, rtol=3e-7, atol=0.0)
        assert made.factors[63:65] == (2.0, STILL)
        assert made.notes == (
            "only full_attention layers are extended: sliding_attention layers keep their own frequencies",
            "192 of the 256 pairs of a head do not rotate, and stay so",
        )
        assert made.interpolated_dims == 128
        made.save(tmp_path / "plan.json")
        assert rope_dist.RopePlan.load(tmp_path / "plan.json") == made
        kept = rope_dist.plan(config, factor=2, strategy="extrapolation")
        own = stock_rotary.frequencies(config, "full_attention")[0]
        assert torch.equal(kept.inv_freq, own)

    @pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "longrope"])
    def test_stock_reads_them_from_a_file_that_every_parser_reads(self, strategy, tmp_path):
        config = self.config()
        config.num_hidden_layers, config.layer_types = 2, ["sliding_attention", "full_attention"]
        config.per_layer_config = {1: {"head_dim": 512}}
        config.max_position_embeddings = 2048
        sliding = stock_rotary.frequencies(config, "sliding_attention")[0]
        made = rope_dist.plan(config, factor=4, strategy=strategy)
        config.__dict__.update(made.config_overrides(config))
        config.save_pretrained(tmp_path)

        def refuse(name):
            raise AssertionError(f"{name} is no JSON")

        json.loads((tmp_path / "config.json").read_text(), parse_constant=refuse)
        loaded = load_config(tmp_path)
        rotary = stock_rotary.rotary_class(loaded)(loaded)
        assert torch.equal(rotary.full_attention_inv_freq, made.inv_freq)
        assert not rotary.full_attention_inv_freq[64:].any()
        assert rotary.full_attention_attention_scaling == made.attention_scaling
        assert torch.equal(rotary.sliding_attention_inv_freq, sliding)
        # In a forward pass too, which may compute them anew; angles of 0 are exact.
        cos, sin = rotary(torch.zeros(1), torch.tensor([[0, 8000]]), "full_attention")
        assert torch.equal(rotary.full_attention_inv_freq, made.inv_freq)
        assert (cos[0, 1, 64:256] == made.attention_scaling).all()
        assert (sin[0, 1, 64:256] == 0).all()
        assert read_rope(loaded).rope.inv_freq.equal(made.inv_freq)

    def test_a_strategy_sees_those_that_rotate(self):
        """NTK interpolates the slowest pair that rotates in full; YaRN's ramp is over their periods."""
        config = self.config()
        made = rope_dist.plan(config, factor=2, strategy="ntk")
        assert made.factors[0] == 1
        assert made.factors[63] == pytest.approx(2)
        # Periods within 131072 tokens: 20861 to 696.
        made = rope_dist.plan(
            config, factor=2, strategy="yarn", beta_fast=20000, beta_slow=700, truncate=False
        )
        periods = 131072 * 1e6 ** (-torch.arange(64, dtype=torch.float64) / 256) / (2 * torch.pi)
        pair = torch.arange(64, dtype=torch.float64)
        low, high = (torch.log(periods[0] / p) / torch.log(periods[0] / periods[1]) for p in (20000.0, 700.0))
        share = ((pair - low) / (high - low)).clamp(0, 1)
        expected = 1 / (share / 2 + 1 - share)
        torch.testing.assert_close(torch.tensor(made.factors[:64]).double(), expected, rtol=1e-6, atol=0.0)

    def test_the_disturbance_is_of_those_that_rotate(self):
        made = rope_dist.plan(self.config(), factor=2, strategy="pi")
        assert made.disturbance_per_pair[64:] == (0.0,) * 192
        assert made.disturbance == pytest.approx(sum(made.disturbance_per_pair) / 64)
        row = made.summary().splitlines()[-1].split()
        assert row[:3] == ["64-255", "1", "inf"]


class TestDynamic:
    """Scalings that change with the length are replaced, with what they compute within the trained length."""

    def test_a_fixed_alpha_is_part_of_the_trained_model(self, tmp_path):
        """HunYuan writes "dynamic" for a base of theta * alpha ** (d / (d - 2)), at any length."""
        parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0}
        config = transformers.HunYuanDenseV1Config(**SMALL, head_dim=16, rope_parameters=parameters)
        trained = (1e4 * 1000.0 ** (16 / 14)) ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
        made = rope_dist.plan(config, factor=2, strategy="pi")
        torch.testing.assert_close(made.inv_freq.double(), trained / 2, rtol=1e-6, atol=0.0)
        model = transformers.HunYuanDenseV1ForCausalLM(config)
        new = copy.deepcopy(config)
        new.__dict__.update(made.config_overrides(config))
        new.save_pretrained(tmp_path)
        again = type(model)(load_config(tmp_path))
        assert torch.equal(again.model.rotary_emb.inv_freq, made.inv_freq)

    def test_the_advice_of_a_refusal_is_not_refused(self):
        """No message sends to a plan that enable(plan=) refuses with the same words."""
        config = llama_config()
        config.rope_parameters = {"rope_type": "magic", "rope_theta": 1e4}
        with pytest.raises(ValueError, match="rope_type 'magic' of LlamaConfig is not known") as raised:
            rope_dist.plan(config, factor=2)
        assert "plain numbers" not in str(raised.value)


class TestOtherConfigs:
    def test_custom_code_is_planned_by_the_formulas_of_transformers(self):
        """Its config has no model class in transformers: nothing is imported for it."""

        class MineConfig(transformers.LlamaConfig):
            model_type = "mine"

        config = MineConfig(**SMALL, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5})
        assert stock_rotary.rotary_class(config) is None
        made = rope_dist.plan(config, factor=2, strategy="pi")
        assert (made.rotary_dim, made.head_dim) == (6, 12)
        expected = 1e4 ** (-torch.arange(0, 6, 2, dtype=torch.float64) / 6) / 2
        torch.testing.assert_close(made.inv_freq.double(), expected, rtol=3e-7, atol=0.0)

    def test_what_users_keep_on_a_config(self):
        config = llama_config()
        expected = rope_dist.plan(config, factor=2)
        config.quantization_config = transformers.BitsAndBytesConfig(load_in_8bit=True)
        config.dtype = torch.bfloat16
        config.of_a_trainer = object()
        assert rope_dist.plan(config, factor=2) == expected

    @pytest.mark.parametrize(
        ("kind", "changes", "reason"),
        [
            ("Falcon", {"alibi": True}, "its alibi is True, not False"),
            ("Zamba2", {"use_mem_rope": False}, "its use_mem_rope is False, not True"),
        ],
    )
    def test_without_a_rotary_embedding(self, kind, changes, reason):
        config = getattr(transformers, f"{kind}Config")
        with pytest.raises(ValueError, match=f"{kind}Config has no rotary embedding: {reason}"):
            rope_dist.plan(config(**changes), factor=2)
        (key, value), *_ = changes.items()
        assert rope_dist.plan(config(**{key: not value}), factor=2).scale == 2

    def test_layers_with_bases_of_their_own(self):
        if not hasattr(transformers, "GraniteSWAConfig"):
            pytest.skip(f"transformers {transformers.__version__} has no granite_swa")
        layers = {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        }

        def config(*bases):
            return transformers.GraniteSWAConfig(layer_rope_theta=list(bases), **layers)

        with pytest.raises(ValueError, match=r"bases of their own \(layer_rope_theta: 5000, 10000\)"):
            rope_dist.plan(config(5000.0, 10000.0, 0), factor=2)
        with pytest.raises(ValueError, match="nothing to extend: the full attention"):
            rope_dist.plan(config(10000.0, 0, 0), factor=2)
        assert rope_dist.plan(config(10000.0, 10000.0, 0), factor=2).scale == 2


NO_ROTARY = r"^\w+ has no rotary embedding that a plan can extend \(no rope_parameters\)$"
WITHOUT_PARAMETERS = {"codegen", "gptj", "cohere_compass", "cohere_compass_text"}
"""Model types with a rotary embedding but nothing of it in their default config."""

ODD = "head_dim of Qwen3OmniMoeTextConfig must be a positive even number"
REFUSED = {
    "blt": r"BltConfig has several transformers .*\(patcher_config, encoder_config, decoder_config, global_config\)",
    "cosmos3_edge": "requires `rope_type='default'`",
    "ernie4_5_vl_moe": "requires the `default` rope type",
    "granitemoehybrid": "GraniteMoeHybridConfig has no rotary embedding: its position_embedding_type is None",
    "qwen3_omni_moe_thinker": ODD,  # of the defaults only
    "zamba2": "Zamba2Config has no rotary embedding: its use_mem_rope is False",
    "beam": "full attention of BeamConfig has no positions",
    "muse_glimmer": "full attention of MuseGlimmerTextConfig has no positions",
    "muse_spark": "full attention of MuseSparkTextConfig has no positions",
}
"""Model types whose default config no plan extends, and why; beside those of ``ROTATES_WINDOWS_ONLY``."""

OLDER = {
    "bamba": "stock transformers cannot run this plan in BambaConfig",
    "gemma4": "this version of transformers computes a longrope of gemma4_text by the head_dim",
    "gemma4_text": "this version of transformers computes a longrope of gemma4_text by the head_dim",
    "olmo3": "this version of transformers would scale the sliding layers of olmo3 too",
}
"""The same for transformers before 5.15."""


def test_every_family_computes_as_read_and_as_planned(monkeypatch):
    """By its own class: the frequencies before are those that are read, and after are the plan's to the last bit."""
    monkeypatch.setattr(
        rope_dist.planning, "disturbances", lambda inv_freq, *a, **k: torch.zeros(1, len(inv_freq))
    )
    right, wrong, refused = [], [], {}
    for model_type in sorted(
        {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    ):
        try:
            config = transformers.CONFIG_MAPPING[model_type]()
        except (StrictDataclassError, ValueError):  # it takes no config of defaults
            continue
        text = config.get_text_config(decoder=True)
        try:
            found = read_rope(config)
            made = rope_dist.plan(config, factor=2, strategy="yarn", beta_fast=8)
        except ValueError as error:
            refused[model_type] = text.model_type, str(error), rotary_classes(text)
            continue
        after = copy.deepcopy(text)
        after.__dict__.update(made.config_overrides(config))
        layers = extended_layers(text)
        name, scaling = (f"{layers}_{n}" if layers else n for n in ("inv_freq", "attention_scaling"))
        for cls in rotary_classes(text):
            own, extended = cls(text), cls(after)
            same = torch.allclose(getattr(own, name), found.rope.inv_freq, rtol=1e-6, atol=0.0)
            planned = torch.equal(getattr(extended, name), made.inv_freq)
            planned &= getattr(extended, scaling) == made.attention_scaling
            (right if same and planned else wrong).append(model_type)
    assert not wrong
    assert {
        "llama",
        "qwen3",
        "gemma3",
        "phi3",
        "deepseek_v3",
        "glm4",
        "gpt_oss",
        "ministral3",
        "qwen2_5_vl",
    } <= set(right)
    expected = {**REFUSED, **(OLDER if VERSION < (5, 15) else {})}
    for model_type, (text_type, reason, classes) in refused.items():
        if text_type in ROTATES_WINDOWS_ONLY:
            assert f"{text_type} rotates only the layers that see" in reason
        elif re.search(NO_ROTARY, reason):
            assert not classes or model_type in WITHOUT_PARAMETERS
        else:
            assert re.search(expected.pop(model_type, "^not expected$"), reason), (model_type, reason)
    assert not {t for t in expected if t in transformers.CONFIG_MAPPING} or VERSION < (5, 24)


def rotary_classes(config) -> list[type]:
    """The rotary embeddings in the file of a config's model."""
    try:
        model = transformers.MODEL_MAPPING[type(config)]
    except KeyError:
        return []
    file = (model[0] if isinstance(model, tuple) else model).__module__
    classes = (c for n, c in vars(sys.modules[file]).items() if n.endswith("RotaryEmbedding"))
    other = ("Vision", "Audio", "SaProt")
    return [c for c in classes if c.__module__ == file and not any(tower in c.__name__ for tower in other)]
